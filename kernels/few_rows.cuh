// The quantizer inside few.cu: rows of 16-bit floats become the operand A in shared memory, in the
// order that the products read.
//
// A warp transforms eight Hadamard blocks of 128 at a time. Of an element's index in its block, bits
// 0 and 4 to 6 are transformed by one product on the tensor cores (`rotate.cuh`; 4 and 5 lie in the
// lane, 6 in the second word), bits 1 to 3 by additions in a lane: no shuffle. A lane then holds 16
// elements in a row of two blocks.
//
// Each block of a cluster quantizes its own share of K, of all rows. Sums of squares, of blocks of 128
// first, are added in the same order everywhere: all blocks of the grid find the same scale.
// Formulas and special rows are those of blocks.cu. A block of 128 whose sum of squares is far from
// 1, zero or not finite counts with a power of two of its own (`fields`, exponents as floats have
// them, 127 for 1); it is transformed at that power, too, so that 16 bits hold what counts.

constexpr int GROUP = 8;                  // blocks of 128 that a warp transforms together
constexpr int ORDER = 128;
constexpr int STEP_BLOCKS = 4 / BITS;     // in a step
constexpr int SPAN = 100;                 // the most that a block's power lies below its row's
constexpr float SMALL = 1.3234889800848443e-23f, GREAT = 1.2676506002282294e30f;  // 2^-76, 2^100
constexpr float NORM = 0.08838834764831845f;                                     // 128^-0.5
constexpr float LARGEST = 3.4028234663852886e38f;
constexpr u32 ALL = 0xFFFFFFFF;

__device__ __forceinline__ float power(int field) { return __uint_as_float((u32)field << 23); }

// What a block of the grid quantizes, and where it leaves it. blocks: of 128, of a row, that it has;
// first: the first of them in K; inside: how many lie inside K. inverse: ceil(2^32 / blocks), 0 for 1.
// operand, scale: what is shown of it, or null.
struct Share {
  const char *x;
  i64 stride;
  int rows, blocks, first, inside, width, levels;
  u32 inverse;
  float step;
  uint4 *held;
  float *squares;
  int *fields;
  u32 *parts;  // (CLUSTER, rows): the sum of a block's share, and its field
  float *row_scale, *row_inverse;
  int *row_field, *row_sum;
  char *operand;
  float *scale;

  __device__ int total() const { return rows * blocks; }
  __device__ int row_of(int b) const { return inverse ? __umulhi((u32)b, inverse) : b; }
};

// The words of block `lane / 4` of a group: by bit 6 of the index and then bits 1 to 3.
__device__ __forceinline__ void read_group(u32 (&w)[16], const Share &s, int group, int lane) {
  const int b = group * GROUP + lane / 4, row = s.row_of(b), q = b - row * s.blocks;
  const char *from = s.x + row * s.stride + (i64)(s.first + q) * (2 * ORDER) + lane % 4 * 32;
  const bool inside = b < s.total() && q < s.inside;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (inside) load_rows(v, from + i / 2 * ORDER + i % 2 * CHUNK);
    w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
  }
}

__device__ __forceinline__ float over_block(float value) {
  value += __shfl_xor_sync(ALL, value, 1);
  return value + __shfl_xor_sync(ALL, value, 2);
}

__device__ __forceinline__ float squares_of(const u32 (&w)[16], float down) {
  float s[4] = {};
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const float a = low(w[i]) * down, b = high(w[i]) * down;
    s[i % 4] = fmaf(b, b, fmaf(a, a, s[i % 4]));
  }
  return over_block((s[0] + s[1]) + (s[2] + s[3]));
}

// The sum of squares of each block of a group, and its field.
__device__ __forceinline__ void measure(const u32 (&w)[16], const Share &s, int group, int lane) {
  const int b = group * GROUP + lane / 4;
  float sum = squares_of(w, 1.0f);
  int field = 127;
  const bool rare = !(sum >= SMALL && sum <= GREAT);
  if (__any_sync(ALL, rare)) {
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) top = max(top, max(w[i] & 0x7FFF, w[i] >> 16 & 0x7FFF));
    top = max(top, __shfl_xor_sync(ALL, top, 1));
    top = max(top, __shfl_xor_sync(ALL, top, 2));
    // fp16 comes here with zeros and with what is not finite only.
    const int own = HALF ? (top ? 253 : 1) : min(max((int)(top >> 7), 1), 253);
    const float again = squares_of(w, power(254 - own));
    if (rare) field = own, sum = again;
  }
  if (lane % 4 == 0 && b < s.total()) s.squares[b] = sum, s.fields[b] = field;
}

// Of two sums of squares at different powers; a field below another by more than 126 doesn't count.
__device__ __forceinline__ float brought(float sum, int field, int to) {
  const float shrink = power(127 + max(field - to, -126));
  return sum * shrink * shrink;
}

// Rows' sums over this block's share, to all blocks of the cluster.
__device__ __forceinline__ void share_rows(const Share &s, int rank, int warp, int lane) {
#pragma unroll 1
  for (int row = warp; row < s.rows; row += WARPS) {
    const int at = row * s.blocks;
    int field = 1;
#pragma unroll 1
    for (int i = lane; i < s.blocks; i += 32) field = max(field, s.fields[at + i]);
    field = __reduce_max_sync(ALL, field);
    float sum = 0.0f;
#pragma unroll 1
    for (int i = lane; i < s.blocks; i += 32) sum += brought(s.squares[at + i], s.fields[at + i], field);
    for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(ALL, sum, i);
    if (lane < CLUSTER)
      put_at(remote(shared_address(s.parts + 2 * (rank * s.rows + row)), lane), __float_as_uint(sum), field);
  }
}

// A row's scale, and what its codes are multiplied with: 0 where the row counts as zeros.
__device__ __forceinline__ void scale_row(const Share &s, int row, bool show) {
  int field = 1;
  float sum = 0.0f;
  for (int i = 0; i < CLUSTER; i++) field = max(field, (int)s.parts[2 * (i * s.rows + row) + 1]);
  for (int i = 0; i < CLUSTER; i++) {
    const u32 *part = s.parts + 2 * (i * s.rows + row);
    sum += brought(__uint_as_float(part[0]), part[1], field);
  }
  float sigma = fminf(sqrtf(sum / (float)s.width) * power(field), LARGEST);
  float inner = sigma * power(254 - field);
  // Blocks with finite entries have finite sums, at their powers.
  if (!(sum <= LARGEST)) sigma = __uint_as_float(0x7FC00000), inner = 0.0f;
  s.row_scale[row] = sigma;
  s.row_field[row] = field;
  s.row_inverse[row] = inner > 0.0f ? NORM / (inner * s.step) : 0.0f;
  if (show && s.scale) s.scale[row] = sigma;
}

// y[j][z + 2 h]: of block 2 (lane % 4) + z of the group, element 16 (lane / 4) + 2 j + h, times 128^0.5.
__device__ __forceinline__ void transform(float (&y)[8][4], const u32 (&w)[16], const u32 (&signs)[4]) {
#pragma unroll
  for (int j = 0; j < 8; j++) rotate(y[j], signs, w[j], w[8 + j]);
#pragma unroll
  for (int half = 1; half < 8; half *= 2) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (j & half) continue;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float a = y[j][c], b = y[j + half][c];
        y[j][c] = a + b;
        y[j + half][c] = a - b;
      }
    }
  }
}

// Codes from 0 of four elements, as bytes of a word. Rounded down beside 1.5 * 2^23, see codes.cuh: the
// low halves are whole numbers of less than 2^15.
__device__ __forceinline__ u32 codes_of(float a, float b, float c, float d, float inverse, u32 add, u32 most) {
  const float magic = 12582912.0f;
  const u32 p = __float_as_uint(__fmaf_rd(a, inverse, magic)), q = __float_as_uint(__fmaf_rd(b, inverse, magic));
  const u32 r = __float_as_uint(__fmaf_rd(c, inverse, magic)), t = __float_as_uint(__fmaf_rd(d, inverse, magic));
  // max(min(code + levels / 2, levels - 1), 0)
  const u32 front = __viaddmin_s16x2_relu(__byte_perm(p, q, 0x5410), add, most);
  const u32 back = __viaddmin_s16x2_relu(__byte_perm(r, t, 0x5410), add, most);
  return __byte_perm(front, back, 0x6420);
}

// Element 4 m + i of a chunk in byte i of word m, from the order of `unpack`.
__device__ __forceinline__ uint4 in_order(const uint4 &v) {
  if (BITS == 2) return arranged(v);
  return make_uint4(__byte_perm(v.x, v.y, 0x5140), __byte_perm(v.x, v.y, 0x7362), __byte_perm(v.z, v.w, 0x5140),
                    __byte_perm(v.z, v.w, 0x7362));
}

// A lane's 16 elements of block q of a row: into shared memory, and shown. Returns their sum.
__device__ __forceinline__ int keep(const float (&y)[8][4], int z, float inverse, const Share &s, int row, int q,
                                    int lane) {
  const int part = lane / 4;
  const bool inside = q < s.inside;
  const i64 at = (i64)row * (s.width / (BITS == 1 ? 8 : 1));
  if (BITS == 1) {
    u32 bits = 0;
#pragma unroll
    for (int e = 15; e >= 0; e--)  // + 0: a negative zero is not negative
      bits = __funnelshift_l(__float_as_uint(y[e / 2][z + 2 * (e % 2)] + 0.0f), bits, 1);
    bits = inside ? ~bits & 0xFFFF : 0;
    ((unsigned short *)(s.held + place(row, q)))[part] = bits;
    if (s.operand && inside) ((unsigned short *)(s.operand + at))[8 * (s.first + q) + part] = bits;
    return inside ? 2 * __popc(bits) - 16 : 0;
  }
  const u32 add = s.levels / 2 * 0x10001, most = (s.levels - 1) * 0x10001;
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // Elements in the order of `arranged`: an element is 2 j + h.
    const int h = i % 2, j = BITS == 4 ? i / 2 * 4 : i / 2, hop = BITS == 4 ? 1 : 2;
    words[i] = codes_of(y[j][z + 2 * h], y[j + hop][z + 2 * h], y[j + 2 * hop][z + 2 * h], y[j + 3 * hop][z + 2 * h],
                        inverse, add, most);
    // 2 code - (levels - 1) in each byte: nothing is carried, for the sum lies between 0x71 and 0x8F.
    words[i] = words[i] * 2 + (0x80 - (s.levels - 1)) * 0x01010101u ^ 0x80808080u;
    if (!inside) words[i] = 0;
  }
  const uint4 chunk = make_uint4(words[0], words[1], words[2], words[3]);
  s.held[place(row, q * 8 + part)] = chunk;
  if (s.operand && inside) ((uint4 *)(s.operand + at))[8 * (s.first + q) + part] = in_order(chunk);
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) sum = __dp4a((int)words[i], 0x01010101, sum);
  return sum;
}

// The operand of a group, from its words at their powers.
__device__ __forceinline__ void code_group(u32 (&w)[16], const u32 (&signs)[4], const Share &s, int group, int lane) {
  const int b = group * GROUP + lane / 4, total = s.total();
  float inverse = 0.0f;
  bool changed = false;
  int field = 127;
  if (b < total && b - s.row_of(b) * s.blocks < s.inside) {
    const int row = s.row_of(b), of_row = s.row_field[row];
    field = max(s.fields[b], of_row - SPAN);
    inverse = s.row_inverse[row] * power(127 + field - of_row);
    changed = field != 127 || !(inverse > 0.0f);
  }
  if (__any_sync(ALL, changed)) {
    const float down = power(254 - field);
#pragma unroll
    for (int i = 0; i < 16; i++) w[i] = inverse > 0.0f ? pair_of(low(w[i]) * down, high(w[i]) * down) : 0;
  }
  float y[8][4];
  transform(y, w, signs);
  int sums[2], rows[2];
#pragma unroll
  for (int z = 0; z < 2; z++) {
    const int block = group * GROUP + 2 * (lane % 4) + z;
    const float factor = __shfl_sync(ALL, inverse, 8 * (lane % 4) + 4 * z);
    rows[z] = s.row_of(block);
    sums[z] = 0;
    if (block < total) sums[z] = keep(y, z, factor, s, rows[z], block - rows[z] * s.blocks, lane);
  }
  const int first = s.row_of(group * GROUP);
  if (first == s.row_of(min(group * GROUP + GROUP, total) - 1)) {
    const int sum = __reduce_add_sync(ALL, sums[0] + sums[1]);
    if (lane < CLUSTER) add_to(remote(shared_address(s.row_sum + first), lane), sum);
    return;
  }
  for (int z = 0; z < 2; z++) {
#pragma unroll 1
    for (int i = 0; i < CLUSTER; i++)
      if (sums[z]) add_to(remote(shared_address(s.row_sum + rows[z]), i), sums[z]);
  }
}

// All of it. w: the words of the warp's first group. The rows' sums are complete for all blocks of a
// cluster, and A for this one, after the next barrier.
__device__ __forceinline__ void quantize_rows(u32 (&w)[16], const Share &s, int rank) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = (s.total() + GROUP - 1) / GROUP;
  u32 signs[4];
  make_signs(signs, lane);
  int group = warp;
#pragma unroll 1
  for (;;) {
    measure(w, s, group, lane);
    if (group + WARPS >= groups) break;
    group += WARPS;
    read_group(w, s, group, lane);
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_wait();  // all blocks have begun
  share_rows(s, rank, warp, lane);
  if (CLUSTER > 1) {
    cluster_arrive();  // zeros, too, are seen by all before anything is added
    cluster_wait();
  } else {
    __syncthreads();
  }
  if (threadIdx.x < s.rows) scale_row(s, threadIdx.x, blockIdx.x == 0);
  __syncthreads();
  // From the last group, which is in registers, back to the first.
#pragma unroll 1
  for (;;) {
    if (group < groups) code_group(w, signs, s, group, lane);
    if (group == warp) break;
    group -= WARPS;
    read_group(w, s, group, lane);
  }
}
