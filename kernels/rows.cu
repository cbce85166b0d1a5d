// The quantizer for blocks of 128, a row a thread block: transform, RMS, codes, mask, packing in one pass.
//
// blocks.cu gives 32 blocks of 128 to a warp, which takes the fewest instructions; of inputs that are not very large
// a warp's time is the kernel's. Here a warp has eight blocks at a time, a thread 32 elements, and nothing but sums
// goes through shared memory. 16 bits are transformed on the tensor cores (`rotate.cuh`); float32, and rows computed
// again, in registers and by shuffles. Of LONG rows, which have more blocks than the thread block's warps hold, all
// is read twice, the second time from the cache.
//
// Formulas and special rows are those of quantize.py.
//
// NORMED: what is quantized are the rows h weight / sqrt(mean(h^2) + eps) of inputs h of 16 bits, computed
// in float32 and rounded once to their dtype.
//
// Macros: those of codes.cuh; EDGE (mask by threshold; else all ones), NORMED, WARPS (of a thread block), LONG.
typedef unsigned int u32;
typedef long long i64;

#include "halves.cuh"
#define HALF (IN == FLOAT16)
#include "codes.cuh"
#include "overlap.cuh"
#include "rotate.cuh"

constexpr int ORDER = 128, GROUP = 8;           // blocks of a warp
constexpr int WIDE = 64;                        // blocks of a row: 8192 entries, as in few.cu
constexpr int SIZE = IN == FLOAT32 ? 4 : 2;     // bytes of an element
constexpr int WORDS = 8 * SIZE;                 // 4-byte words of 32 elements
constexpr int PARTS = SIZE / 2;                 // chunks of 16 bytes that eight elements are
constexpr int SHARES = WARPS > 8 ? 16 : WARPS > 4 ? 8 : WARPS > 2 ? 4 : WARPS;  // a power of two
constexpr u32 ALL = 0xFFFFFFFF;
constexpr int RESIDENT = LONG ? 16 : IN == FLOAT32 ? 24 : 32;  // warps of a multiprocessor that have registers
static_assert(!NORMED || IN != FLOAT32, "a norm takes 16 bits");

__device__ __forceinline__ void meet() {
  if (WARPS > 1) __syncthreads();
  else __syncwarp();
}

// The row's sum of numbers of its blocks, in the same order for each thread: those of a warp, then over the warps.
// A block's is in lane 4 r + r / 2, r its place among the warp's eight.
__device__ __forceinline__ float over_row(float value, float (&slots)[WARPS][GROUP]) {
  const int lane = threadIdx.x % 32;
  if (lane % 4 == lane / 8) slots[threadIdx.x / 32][lane / 4] = value;
  meet();
  const int warp = lane % SHARES;
  float sum = 0.0f;
  if (WARPS == SHARES || warp < WARPS)
    sum = ((slots[warp][0] + slots[warp][1]) + (slots[warp][2] + slots[warp][3])) +
          ((slots[warp][4] + slots[warp][5]) + (slots[warp][6] + slots[warp][7]));
#pragma unroll
  for (int i = 1; i < SHARES; i *= 2) sum += __shfl_xor_sync(ALL, sum, i);
  return sum;
}

// The chunks of eight q, q + 4, q + 8 and q + 12 of a block, q = lane % 4; zeros of a block that is not there.
__device__ __forceinline__ void read(u32 (&w)[WORDS], const char *row, int block, int blocks) {
  const char *from = row + (i64)block * (ORDER * SIZE) + threadIdx.x % 4 * (8 * SIZE);
#pragma unroll
  for (int i = 0; i < 4 * PARTS; i++) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (block < blocks) v = *(const uint4 *)(from + i / PARTS * (32 * SIZE) + i % PARTS * 16);
    w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
  }
}

// The row of a thread block further on, of 16 bits, into the L2 cache: 128 bytes a thread.
__device__ __forceinline__ void ask_ahead(const char *row, int blocks) {
  if (threadIdx.x < ORDER * SIZE / 128 * blocks) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + 128 * threadIdx.x));
}

// h, as `read` has it, as the row that is quantized; `shown` gets it too, or is null.
__device__ __forceinline__ void norm(u32 (&w)[WORDS], const u32 (&by)[WORDS], float inverse, char *shown, int block, int blocks) {
#pragma unroll
  for (int i = 0; i < WORDS; i++)
    w[i] = pair_of(__fmul_rn(__fmul_rn(low(w[i]), inverse), low(by[i])), __fmul_rn(__fmul_rn(high(w[i]), inverse), high(by[i])));
  if (!shown || block >= blocks) return;
  char *to = shown + (i64)block * (ORDER * SIZE) + threadIdx.x % 4 * (8 * SIZE);
#pragma unroll
  for (int i = 0; i < 4; i++) *(uint4 *)(to + 64 * i) = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
}

// Element 8 k + i: of chunk k of the four, times `factor`.
__device__ __forceinline__ float element(const u32 (&w)[WORDS], int e, float factor) {
  if (SIZE == 4) return __uint_as_float(w[e % WORDS]) * factor;
  return (e % 2 ? high(w[e / 2]) : low(w[e / 2])) * factor;
}

// The sum of squares of a block's elements, times `factor`, in each of its four lanes.
__device__ __forceinline__ float squares_of(const u32 (&w)[WORDS], float factor) {
  float s[4] = {};
#pragma unroll
  for (int e = 0; e < 32; e++) {
    const float v = element(w, e, factor);
    s[e % 4] = fmaf(v, v, s[e % 4]);
  }
  float sum = (s[0] + s[1]) + (s[2] + s[3]);
  sum += __shfl_xor_sync(ALL, sum, 1);
  return sum + __shfl_xor_sync(ALL, sum, 2);
}

// The same as they are, in lane 4 r + r / 2 of block r.
__device__ __forceinline__ float squares(const u32 (&w)[WORDS]) {
#if IN == FLOAT32
  return squares_of(w, 1.0f);
#else
  return squares_of_group(w);
#endif
}

// What a thread has of the warp's blocks, transformed, times 128^0.5: four chunks of eight elements in a row, chunk
// c = 2 z + p at first + across z + along p, counted over the blocks. So of four lanes that are `next` apart, the
// k-th of which is this one, chunk k lies side by side: those from 4 `word` on.
struct Chunks { int first, across, along, next, k, word; };

// 16 bits: chunks 8 p + r of blocks 2 q + z.
__device__ __forceinline__ Chunks by_products(float (&y)[32], const u32 (&w)[WORDS], const u32 (&signs)[4]) {
  const int lane = threadIdx.x % 32, q = lane % 4, r = lane / 4;
#if IN != FLOAT32
  transform_group(y, w, signs);
#endif
  return {32 * q + r, 16, 8, 4, r % 4, 8 * q + 2 * (r % 4) + r / 4};
}

// How a row is computed again: over its own power of two, `field`; or as zeros.
struct Again { bool rare, zeros; int field; };

__device__ __forceinline__ u32 top_of(const u32 (&w)[WORDS]) {
  u32 top = 0;
#pragma unroll
  for (int e = 0; e < 32; e++) top = max(top, __float_as_uint(element(w, e, 1.0f)) & 0x7FFFFFFF);
  return top;
}
__device__ __forceinline__ int field_of(u32 top) { return min(max((int)(top >> 23), 1), 253); }

// 32 bits, and rows that are computed again: chunks q + 4 c of block r. No zero of these is negative.
__device__ __forceinline__ Chunks by_shuffles(float (&y)[32], const u32 (&w)[WORDS], const Again &again) {
  const int lane = threadIdx.x % 32, q = lane % 4, r = lane / 4;
  float factor = 1.0f, half = 1.0f, rest = 1.0f;
  if (again.rare) {
    // By the block's own power, so that nothing of it is lost; then to the row's, in two steps: one alone may be less
    // than a float can be.
    u32 top = top_of(w);
    top = max(top, __shfl_xor_sync(ALL, top, 1)), top = max(top, __shfl_xor_sync(ALL, top, 2));
    const int own = field_of(top), further = own - again.field;
    factor = again.zeros ? 0.0f : power(254 - own);
    half = power(127 + further / 2), rest = power(127 + further - further / 2);
  }
#pragma unroll
  for (int e = 0; e < 32; e++) y[e] = factor > 0.0f ? element(w, e, factor) : 0.0f;
  stage<1>(y), stage<2>(y), stage<4>(y), stage<8>(y), stage<16>(y);
#pragma unroll
  for (int i = 1; i < 4; i *= 2)
#pragma unroll
    for (int e = 0; e < 32; e++) {
      const float other = __shfl_xor_sync(ALL, y[e], i);
      y[e] = q & i ? other - y[e] : y[e] + other;
    }
  if (again.rare)
#pragma unroll
    for (int e = 0; e < 32; e++) y[e] = y[e] * half * rest;
  // What is lost is not negative. (Never contracted: that would leave it so.)
#pragma unroll
  for (int e = 0; e < 32; e++) y[e] = __fadd_rn(y[e], 0.0f);
  return {16 * r + q, 8, 4, 1, q, 4 * r + q};
}

// Of four lanes the k-th gets byte k of each one's word, in their order.
__device__ __forceinline__ u32 side_by_side(u32 word, const Chunks &c) {
  u32 other = __shfl_xor_sync(ALL, word, c.next);
  word = __byte_perm(word, other, c.k & 1 ? 0x3715 : 0x6240);
  other = __shfl_xor_sync(ALL, word, 2 * c.next);
  return __byte_perm(word, other, c.k & 2 ? 0x3276 : 0x5410);
}

// The same of four pieces of two bytes.
__device__ __forceinline__ uint2 side_by_side(uint2 words, const Chunks &c) {
  const uint2 other = make_uint2(__shfl_xor_sync(ALL, words.x, c.next), __shfl_xor_sync(ALL, words.y, c.next));
  const u32 order = c.k & 1 ? 0x3276 : 0x5410;
  words = make_uint2(__byte_perm(words.x, other.x, order), __byte_perm(words.y, other.y, order));
  const u32 far = __shfl_xor_sync(ALL, c.k & 2 ? words.x : words.y, 2 * c.next);
  return c.k & 2 ? make_uint2(far, words.y) : make_uint2(words.x, far);
}

// Where a row's numbers go, and by what they are made.
struct Made { char *out; u32 *mask; char *saved; float inverse, above, sigma, step; };

// What becomes of a lane's chunks in the group of blocks from `group` on, of which the row has `left` chunks. Returns
// the sum of their codes, counted from 0.
__device__ __forceinline__ int emit(const float (&y)[32], const Chunks &c, const Made &made, i64 group, int left) {
  int sum = 0;
  u32 inside = 0, twos[2] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int chunk = c.first + i / 2 * c.across + i % 2 * c.along;
    const bool there = chunk < left;
    const i64 at = 16 * group + chunk;
    const float *v = y + 8 * i;
    inside |= there ? 0xFF << 8 * i : 0;
    if (OUT_BITS == 1) continue;
    if constexpr (FORM == VALUES) {
      u32 words[2 * SIZE];
#pragma unroll
      for (int e = 0; e < 8; e += 4 / SIZE) {
        const float a = value_of(v[e], made.inverse, made.step, made.sigma);
        words[e * SIZE / 4] = SIZE == 4 ? __float_as_uint(a) : pair_of(a, value_of(v[e + 1], made.inverse, made.step, made.sigma));
      }
      uint4 *to = (uint4 *)made.out + PARTS * at;
      if (there)
        for (int k = 0; k < PARTS; k++) to[k] = make_uint4(words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]);
    } else {
      const u32 codes[2] = {codes_of(v[0], v[1], v[2], v[3], made.inverse), codes_of(v[4], v[5], v[6], v[7], made.inverse)};
      if (NARROW == 2) twos[i / 2] |= in_twos(codes[0], codes[1]) << 16 * (i % 2);
      if (there) {
        if (SAVED == 4) ((u32 *)made.saved)[at] = in_fours(codes[0], codes[1]);
        if (FORM == PACKED && BITS == 4) ((u32 *)made.out)[at] = in_fours(codes[0], codes[1]);
        if (FORM == PACKED && BITS == 8) ((uint2 *)made.out)[at] = make_uint2(codes[0], codes[1]);
        if (FORM != PACKED) ((uint2 *)made.out)[at] = make_uint2(integers_of(codes[0]), integers_of(codes[1]));
      }
      if (COUNTS && there) sum = __dp4a(codes[1], 0x01010101u, __dp4a(codes[0], 0x01010101u, (u32)sum));
    }
  }
  const i64 word = 4 * group + c.word;
  const bool there = 4 * c.word < left;
  if (EDGE) {
    const u32 mask = side_by_side(signs_of<32>([&](int e) { return fabsf(y[e]) - made.above; }), c);
    if (there) made.mask[word] = mask;
  } else if (made.mask && there) made.mask[word] = ALL;
  if (OUT_BITS == 1) {
    const u32 bits = ~signs_of<32>([&](int e) { return y[e]; });
    const u32 codes = side_by_side(bits, c);
    if (there) ((u32 *)made.out)[word] = codes;
    sum = __popc(bits & inside);
  }
  if (NARROW == 2) {
    const uint2 codes = side_by_side(make_uint2(twos[0], twos[1]), c);
    if (there) ((uint2 *)(FORM == PACKED ? made.out : made.saved))[word] = codes;
  }
  return sum;
}

// x: rows of `blocks` blocks, `stride` bytes apart, each at a multiple of 16. scale: (rows,); sums: (rows,) or null.
// out, mask or null and, with SAVED, saved by chunks. The grid has a thread block for each row. ahead: how much further
// on the row lies that a thread block asks for beside its own, or 0. weight: a row; shown: rows, or null.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT / WARPS)
    rows(const char *x, float *scale, char *out, u32 *mask, int *sums, char *saved, i64 stride, int blocks, int ahead, float step, float threshold
#if NORMED
         , const char *weight, char *shown, float eps
#endif
    ) {
  alignas(16) __shared__ float first[WARPS][GROUP], second[WARPS][GROUP];
  __shared__ u32 largest[WARPS];
  __shared__ int counts[WARPS];
  // The product's weights are in the way of rows that are read when it has started: of wide ones this block asks for
  // the first of its own before.
  const bool wide = blocks > WIDE;
  if (!wide) let_next_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = GROUP * warp + lane / 4;
  constexpr int HOP = GROUP * WARPS;
  const float mean = 1.0f / (128.0f * blocks);
  u32 signs[4];
  make_signs(signs, lane);
  // What the kernel before wrote is read, and what it still reads may be written here. The product may have started
  // by then, and asked for its weight: see `settled` in few.py.
  wait_for_previous();
  const char *row = x + blockIdx.x * stride;
  int block = begin;
  u32 w[WORDS];
  float s = 0.0f;
#if NORMED
  alignas(16) __shared__ float before[WARPS][GROUP];
  u32 by[WORDS];
#endif
#pragma unroll 1
  for (;; block += HOP) {
    read(w, row, block, blocks);
#if NORMED
    if (!LONG) read(by, weight, block, blocks);
#endif
    if (wide && block == begin) let_next_start();
    // Else memory would have nothing to do while those that run at a time compute.
    if (!LONG && SIZE == 2 && ahead && blockIdx.x + ahead < gridDim.x) ask_ahead(row + ahead * stride, blocks);
    s += squares(w);
    if (!LONG || block - begin + HOP >= blocks) break;  // alike for all: each warp has as many turns
  }
  const int last = block;
#if NORMED
  const float root = 1.0f / sqrtf(over_row(s, before) * mean + eps);
  if (shown) shown += (i64)blockIdx.x * blocks * (ORDER * SIZE);
  s = 0.0f;
  // In the order in which rows as they are add their squares.
#pragma unroll 1
  for (block = begin;; block += HOP) {
    if (LONG) read(w, row, block, blocks), read(by, weight, block, blocks);
    norm(w, by, root, shown, block, blocks);
    s += squares(w);
    if (block == last) break;
  }
  // A group; where there is but one it is there.
  auto fetch = [&](int block) {
    if (!LONG) return;
    read(w, row, block, blocks), read(by, weight, block, blocks);
    norm(w, by, root, nullptr, block, blocks);
  };
#else
  auto fetch = [&](int block) {
    if (LONG) read(w, row, block, blocks);
  };
#endif
  float y[32];
  Again again = {false, false, 0};
  auto turn = [&]() { return IN == FLOAT32 || again.rare ? by_shuffles(y, w, again) : by_products(y, w, signs); };
  Chunks chunks = turn();  // of the last group, while the sums come
  s = over_row(s, first);
  float sigma = sqrtf(s * mean), inner = sigma;
  if (__builtin_expect(!(s >= SMALL && s <= GREAT), 0)) {  // alike for all
    u32 top = 0;
#pragma unroll 1
    for (block = begin;; block += HOP) {
      fetch(block);
      top = max(top, top_of(w));
      if (block == last) break;
    }
    top = __reduce_max_sync(ALL, top);
    if (lane == 0) largest[warp] = top;
    meet();
    for (int i = 0; i < WARPS; i++) top = max(top, largest[i]);
    again.rare = true, again.field = field_of(top);
    const float down = power(254 - again.field);
    s = 0.0f;
#pragma unroll 1
    for (block = begin;; block += HOP) {
      fetch(block);
      s += squares_of(w, down);
      if (block == last) break;
    }
    s = over_row(s, second);
    sigma = fminf(sqrtf(s * mean) * power(again.field), LARGEST);
    inner = sigma * down;
    if (top >= 0x7F800000) sigma = __int_as_float(0x7FC00000), inner = 0.0f;
    again.zeros = !(inner > 0.0f);
    chunks = turn();
  }
  const float inverse = inner > 0.0f ? NORM / (inner * step) : 0.0f;
  // Zeros lie within the limit, and all within one that float32 lacks; nothing of a row that is not finite does.
  const float limit = fminf(threshold * inner * ROOT, LARGEST);
  const float above = sigma == sigma ? __uint_as_float(__float_as_uint(limit) + 1) : -1.0f;
  const Made made = {out, mask, saved, inverse, above, sigma, step};
  if (threadIdx.x == 0) scale[blockIdx.x] = sigma;
  int sum = 0;
  // From the last group, which is in registers, back to the first.
#pragma unroll 1
  for (;;) {
    const int start = block - lane / 4;
    sum += emit(y, chunks, made, (i64)blockIdx.x * blocks + start, 16 * (blocks - start));
    if (!LONG || block == begin) break;
    block -= HOP;
    fetch(block);
    chunks = turn();
  }
  if (!COUNTS || !sums) return;
  sum = __reduce_add_sync(ALL, sum);
  if (lane == 0) counts[warp] = sum;
  meet();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < WARPS; i++) sum += counts[i];
  sums[blockIdx.x] = STRIDE * sum - TOP * 128 * blocks;  // of integers, from codes counted from 0
}
