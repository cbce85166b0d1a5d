// y = A W^T for few rows of A (1 to 64) and packed low-bit W, which is read from memory once.
//
// A: (rows, bytes), signs as single bits (BITS 1) or int8 of integers. W: (columns, bytes), codes from
// 0 of BITS bits, little-endian within a byte. Both row-major, K a multiple of 128, so that a row of W
// is whole chunks of 16 bytes. The tensor cores multiply W's codes as they are, unsigned, with A:
// m16n8k32 (or, BITS 1, m16n8k256) with 16 rows of W as its rows and 8 rows of A as its columns. What
// the codes lack of integers, the sums of A's rows supply.
//
// The order of K is free where both operands follow it. A step of K is four chunks of each row of W,
// and the four lanes of a fragment's row hold a chunk each: 16 contiguous bytes that they load
// straight from memory into registers. What the masks and shifts below make of such a chunk is the
// fragment. A is put into shared memory in that order once: of every 8 (BITS 4) or 16 (BITS 2)
// elements those that lie under one mask together. A lane then reads two fragments in 16 bytes.
//
// A cluster of CLUSTER blocks has `tiles` tiles of 16 rows of W, and each of its blocks `steps` steps
// of K. A block's warps are `slots` rows of k_warps warps: a slot takes every slots-th tile, its warps
// every k_warps-th step. A warp's tiles and steps are one list of units, DEPTH of which are in flight:
// WARPS DEPTH KB a multiprocessor, asked for before the kernel before has ended. Sums of integers don't
// depend on their order: warps add theirs to the shared memory of the block that writes the tile out.
//
// Written for every element, with acc the int32 sum of integer times code:
//   BITS 1     p = 4 acc - a_sum[i] - w_sum[j] - length, the sum of products of signs
//   otherwise  p = 2 acc - (2^BITS - 1) a_sum[i], that of A's integers and W's odd ones
//   and y = float(p) * (factor * a_scale[i]) * w_scale[j] + bias[j]
#ifndef BITS
#define BITS 4
#endif
#define FLOAT32 1
#define BFLOAT16 2
#define FLOAT16 3
#ifndef OUT
#define OUT BFLOAT16
#endif

typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

// NT (tiles of 8 rows of A), CLUSTER, WARPS and DEPTH come from few.py.
constexpr int THREADS = 32 * WARPS, LOG_WARPS = 4;
static_assert(WARPS == 1 << LOG_WARPS, "warps that take turns with tiles are a power of two");
constexpr int CHUNK = 16;                             // bytes of a row of W that a lane has of a step
constexpr int PARTS = BITS == 1 ? 1 : 8 / BITS;       // chunks of A that meet a chunk of W
constexpr int SWING = 8 / PARTS;                      // see `place`
constexpr int STEP_CHUNKS = NT * PARTS * 32;          // of A, in a step
constexpr int CHAINS = NT <= 2 ? 2 : 1;               // accumulators
// See `unpack`. Half of a row, 2^15 integers to 128 times codes to 15 times 16, is a sum of 2^30 at most.
constexpr int APART = CHAINS > 1 && BITS > 1 ? BITS : 0;
constexpr int TOGETHER = NT <= 2 ? 8 : 16 / NT;       // chunks of A that a thread has in flight
constexpr bool TIGHT = NT >= 4;                       // no registers to spare for what the output needs
constexpr int WIDE = 8192;                            // entries of a row, as in rows.cu
constexpr u32 MASK = BITS == 4 ? 0x0F0F0F0F : 0x03030303;

#include "few_ptx.cuh"
#include "overlap.cuh"
#include "scales.cuh"
#include "bias.cuh"

__device__ __forceinline__ void store(void *out, i64 at, float value) {
  if (OUT == FLOAT32) ((float *)out)[at] = value;
  else ((unsigned short *)out)[at] = narrow(value);
}

// Codes of a chunk of W as the words of two fragments: 0 and 1 of the first, 2 and 3 of the second.
// With accumulators of its own the second stays where it is, 2^APART times as large.
__device__ __forceinline__ void unpack(const uint4 &chunk, int part, u32 (&to)[4]) {
  const u32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 word = BITS == 1 ? words[i] : BITS == 2 ? words[part & 3] >> i % 2 * 4 : words[(2 * part + i % 2) & 3];
    if (BITS == 1) to[i] = word;
    else to[i] = i < 2 ? word & MASK : APART ? word & MASK << BITS : word >> BITS & MASK;
  }
}

// 16 elements of A (BITS 1: 128) in the order of `unpack`.
__device__ __forceinline__ uint4 arranged(const uint4 &v) {
  if (BITS == 4)  // even elements, odd ones
    return make_uint4(__byte_perm(v.x, v.y, 0x6420), __byte_perm(v.z, v.w, 0x6420),
                      __byte_perm(v.x, v.y, 0x7531), __byte_perm(v.z, v.w, 0x7531));
  if (BITS == 2) {  // every fourth element: bytes 0 of the words, bytes 2, 1 and 3
    const u32 a = __byte_perm(v.x, v.y, 0x5140), b = __byte_perm(v.z, v.w, 0x5140);
    const u32 c = __byte_perm(v.x, v.y, 0x7362), d = __byte_perm(v.z, v.w, 0x7362);
    return make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(c, d, 0x5410),
                      __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x7632));
  }
  return v;
}

// The place of a row's chunk 32 group + lane of A, counted from the block's first: by step, tile, part
// and lane. Lanes are turned by the part, so that eight chunks in a row (BITS 1: four) lie in different
// banks.
__device__ __forceinline__ u32 place_of(u32 lane) {
  const u32 chunk = lane / PARTS, part = lane % PARTS;
  return chunk / 4 * STEP_CHUNKS + part * 32 + (chunk % 4 ^ part * SWING);
}
__device__ __forceinline__ u32 place(u32 row, u32 group, u32 of_lane) {
  return (of_lane ^ 4 * (row % 8)) + group * (8 / PARTS * STEP_CHUNKS) + (NT > 1 ? row / 8 * (PARTS * 32) : 0);
}
constexpr u32 NOWHERE = 0xFFFFFFFF;

// The compiler takes it as it is, and does not make it anew where it is used.
template <typename T> __device__ __forceinline__ void kept(T *&value) { asm("" : "+l"(value)); }
__device__ __forceinline__ void kept(u32 &value) { asm("" : "+r"(value)); }
__device__ __forceinline__ void kept_here(u32 &value) { asm volatile("" : "+r"(value)); }

// Chunks of the two rows of W that a lane has in a fragment.
struct Unit { uint4 low, high; };

__device__ __forceinline__ void step(const Unit &unit, const uint4 *rows, int lane, int (&d)[CHAINS][NT][4]) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    u32 low[4], high[4];
    unpack(unit.low, part, low);
    unpack(unit.high, part, high);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint4 b = rows[(n * PARTS + part) * 32 + (lane ^ part * SWING)];
      multiply(d[0][n], low[0], high[0], low[1], high[1], b.x, b.y);
      multiply(d[CHAINS - 1][n], low[2], high[2], low[3], high[3], b.z, b.w);
    }
  }
}

// bias: of dtype `bias_type`, as OUT counts them, or null. chunks: of a row of W. tiles: of a cluster;
// own: those that a block writes out, ceil(tiles / CLUSTER). steps: of a block. shift: a tile's warps
// are 2^shift. inverse: ceil(2^31 / groups of 32 chunks of A in `steps`).
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, 1)
    few(void *out, const char *a, const char *w, const float *a_scale, const float *w_scale, const void *bias,
        const int *a_sum, const int *w_sum, int rows, int columns, int chunks, int length, int tiles,
        int own, int steps, int shift, u32 inverse, float factor, int bias_type) {
  extern __shared__ uint4 raw[];
  let_next_start();
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;

  // The warp's list of units, by tile and then step, as chunks of its lanes counted from the cluster's
  // first. What is asked for lies in the cluster's rows; behind a row's end that may be the next one's,
  // and what lies nowhere is not asked for: A is 0 there, and rows that are not there are not written.
  const u32 first_step = rank * steps, k_warps = 1u << shift, k_warp = warp & (k_warps - 1);
  const u32 slots = WARPS >> shift, slot = warp >> shift, first_tile = cluster * tiles;
  // Not rounded up by a sum, which may leave 32 bits; there are columns.
  const int here = min(tiles, (int)((columns - 1u) / 16 + 1 - first_tile));
  const int mine = min(steps, (int)((chunks + 3u) / 4 - first_step)) - (int)k_warp;
  const int turns = mine > 0 ? (mine + k_warps - 1) >> shift : 0;  // steps of a tile
  int left = turns * ((here - slot + slots - 1) >> (LOG_WARPS - shift));  // units
  const u32 inside = min(16u * here, columns - 16 * first_tile) * chunks;
  const u32 inside_high = inside - min(inside, 8u * chunks);
  u32 hop = 4 * k_warps, jump = 16 * slots * chunks - (turns - 1) * hop, stride = k_warps * STEP_CHUNKS * CHUNK;
  u32 next = (16 * slot + lane / 4) * chunks + 4 * (first_step + k_warp) + lane % 4;
  const char *low = w + (u64)first_tile * (16u * CHUNK * chunks), *high = low + 8u * CHUNK * chunks;
  kept(low), kept(high), kept(hop), kept(jump), kept(stride);
  int asked = 0;
  auto fetch = [&](Unit &unit) {
    load_weights(unit.low, low + (u64)CHUNK * next, next < inside);
    load_weights(unit.high, high + (u64)CHUNK * next, next < inside_high);
    const bool ends = ++asked == turns;
    next += ends ? jump : hop;
    if (ends) asked = 0;
  };
  Unit ring[DEPTH];
  auto ask = [&] {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) fetch(ring[i]);
  };
  // Where rows.cu may not have read its rows yet, a little later: what is asked for before is in their way.
  const bool wide_rows = chunks > WIDE * BITS / (8 * CHUNK), has_units = left > 0;
  if (wide_rows && has_units) ask();

  const int t = threadIdx.x;
  const int span = 16 * own, hop_of_sums = span + 4;  // of a row of sums: warps that add meet no bank twice
  uint4 *const held = raw;
  int *const sums = (int *)(held + steps * STEP_CHUNKS);
  float *const column_scale = (float *)(sums + rows * hop_of_sums), *const column_bias = column_scale + span;
  int *const column_sum = (int *)(column_bias + span);
  float *const row_scale = (float *)(column_sum + span);
  int *const row_sum = (int *)(row_scale + rows);
  // A warp takes groups of 32 chunks of a row, of this block's steps.
  const u32 a_chunks = chunks * PARTS, a_first = first_step * 4 * PARTS, a_own = steps * 4 * PARTS;
  const u32 groups = (a_own + 31) / 32, all = rows * groups;
  const int there = min(a_own, a_chunks - min(a_chunks, a_first));
  const char *own_a = a + (u64)CHUNK * (a_first + lane);
  u32 of_lane = place_of(lane);
  kept(own_a), kept(of_lane);
  u32 from[TOGETHER], to[TOGETHER];
  auto find = [&](u32 first) {
#pragma unroll
    for (int e = 0; e < TOGETHER; e++) {
      const u32 i = first + e * WARPS;
      from[e] = to[e] = NOWHERE;
      if (i >= all) continue;
      const u32 row = (u64)i * inverse >> 31, group = i - row * groups;
      if ((int)(32 * group + lane) < there) from[e] = row * a_chunks + 32 * group;
      if (32 * group + lane < a_own) to[e] = shared_address(held) + CHUNK * place(row, group, of_lane);
    }
  };
  uint4 v[TOGETHER];
  auto bring = [&] {
#pragma unroll
    for (int e = 0; e < TOGETHER; e++) load_rows(v[e], own_a + (u64)CHUNK * from[e], from[e] != NOWHERE);
  };
  auto put = [&] {
#pragma unroll
    for (int e = 0; e < TOGETHER; e++) put_at(to[e], arranged(v[e]), to[e] != NOWHERE);
  };
  find(warp);  // some 200 instructions
#pragma unroll
  for (int e = 0; e < TOGETHER; e++) kept_here(from[e]), kept_here(to[e]);
  if (!wide_rows && has_units) ask();
  wait_for_previous();

  // While the weights come: A, what the output needs, and zeros.
  bring();
  const int column0 = (cluster * tiles + rank * own) * 16;
  const int wide = min(16 * min(own, here - rank * own), columns - column0);  // written here; may be < 0
  float scale_of_column = 0.0f, bias_of_column = 0.0f;
  int sum_of_column = 0;
  if (t < wide) {
    scale_of_column = w_scale[column0 + t];
    if (bias) bias_of_column = bias_at(bias, column0 + t, bias_type);
    if (BITS == 1) sum_of_column = w_sum[column0 + t];
  }
  float scale_of_row = 0.0f;
  int sum_of_row = 0;
  if (t < rows) scale_of_row = a_scale[t], sum_of_row = a_sum[t];
#pragma unroll 1
  for (int i = t; i < rows * hop_of_sums; i += THREADS) sums[i] = 0;
  if (CLUSTER > 1) cluster_arrive();
  auto settle = [&] {
#pragma unroll 1
    for (int i = t; i < wide; i += THREADS) {
      const bool again = i != t;  // more columns than threads
      column_scale[i] = again ? w_scale[column0 + i] : scale_of_column;
      column_bias[i] = again ? bias ? bias_at(bias, column0 + i, bias_type) : 0.0f : bias_of_column;
      if (BITS == 1) column_sum[i] = again ? w_sum[column0 + i] : sum_of_column;
    }
    if (t < rows) row_scale[t] = scale_of_row, row_sum[t] = sum_of_row;
  };
  put();
#pragma unroll 1
  for (u32 i = warp + TOGETHER * WARPS; i < all; i += TOGETHER * WARPS) find(i), bring(), put();
  if (TIGHT) settle();
  __syncthreads();
  if (CLUSTER > 1) cluster_wait();  // nothing is added before it is 0

  int d[CHAINS][NT][4] = {};
  const u32 base = shared_address(sums) + 4 * (lane / 4);
  const char *const first = (const char *)(held + k_warp * STEP_CHUNKS), *at = first;
  int tile = slot, turn = 0;
#pragma unroll 1
  for (; left > 0; left -= DEPTH) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      if (i >= left) break;
      step(ring[i], (const uint4 *)at, lane, d);
      fetch(ring[i]);
      at += stride;
      if (++turn < turns) continue;
      const int owner = CLUSTER > 1 ? tile / own : 0;
      const u32 to = remote(base, owner) + 64 * (tile - owner * own);
#pragma unroll
      for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int row = 8 * n + 2 * (lane % 4) + r;
          if (row >= rows) continue;
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int second = CHAINS > 1 ? d[CHAINS - 1][n][2 * half + r] >> APART : 0;
            add_to(to + 4 * (row * hop_of_sums + 8 * half), d[0][n][2 * half + r] + second);
          }
        }
#pragma unroll
        for (int r = 0; r < 4; r++)
          for (int c = 0; c < CHAINS; c++) d[c][n][r] = 0;
      }
      turn = 0;
      at = first;
      tile += slots;
    }
  }

  if (!TIGHT) settle();
  if (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  // 32, 64 or 128 threads a row.
  const int bits = span <= 32 ? 5 : span <= 64 ? 6 : 7;
#pragma unroll 1
  for (int row = t >> bits; row < rows; row += THREADS >> bits) {
    const Scale scale = scale_of(factor, row_scale[row]);
    const int sum = row_sum[row];
    auto finish = [&](bool far) {
#pragma unroll 1
      for (int i = t & ((1 << bits) - 1); i < wide; i += 1 << bits) {
        const int acc = sums[row * hop_of_sums + i];
        const int whole = BITS == 1 ? 4 * acc - sum - column_sum[i] - length : 2 * acc - ((1 << BITS) - 1) * sum;
        const float c = column_scale[i], b = column_bias[i];
        const float y = far ? scaled<true>((float)whole, factor, scale, c, b) : scaled<false>((float)whole, factor, scale, c, b);
        store(out, (i64)row * columns + column0 + i, y);
      }
    };
    // Two loops: one that asks for each element took 1 to 4 percent of the kernel's time.
    if (__builtin_expect(scale.far == 0.0f, 1)) finish(false);
    else finish(true);
  }
}
