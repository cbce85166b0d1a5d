// The quantizer for few rows of blocks of 128, a row a thread block: transform, RMS, codes.
//
// blocks.cu gives 32 blocks of 128 to a warp, which takes the fewest instructions and, of few rows, the time of
// one warp. Here four threads have a block, 32 elements each, and eight blocks are a warp's at a time.
// Of an element's index, bits 0 to 2, 5 and 6 are transformed in a thread's registers, then chunks of
// eight change hands through shared memory, and bits 3 and 4 follow. A thread then holds 32 elements in
// a row. A row of more blocks than the thread block's warps hold is read twice, the second time from
// the cache.
//
// Formulas and special rows are those of quantize.py. There is no mask: few rows are inference.
//
// NORMED: what is quantized are the rows h weight / sqrt(mean(h^2) + eps) of inputs h of 16 bits, computed
// in float32 and rounded once to their dtype.
//
// Macros: IN (the input's dtype), LEVELS, FORM, NORMED.
#define PACKED 1    // codes from 0, of one bit
#define CODES 2     // int8: the code
#define INTEGERS 3  // int8: 2 code + 1, or the code where LEVELS is odd, spread: see codes.cuh
typedef unsigned int u32;
typedef long long i64;

#include "halves.cuh"
#include "codes.cuh"

constexpr int ORDER = 128, GROUP = 8;           // blocks of a warp
constexpr int MAX_WARPS = 16;
constexpr int WIDE = 64;                        // blocks of a row: 8192 entries, as in few.cu
constexpr int SIZE = IN == FLOAT32 ? 4 : 2;     // bytes of an element
constexpr int WORDS = 8 * SIZE;                 // 4-byte words of 32 elements
constexpr int PARTS = SIZE / 2;                 // chunks of 16 bytes that eight elements are
constexpr u32 ALL = 0xFFFFFFFF;
static_assert(!NORMED || IN != FLOAT32, "a norm takes 16 bits");

struct Add { template <typename T> __device__ T operator()(T a, T b) const { return a + b; } };
struct Max { __device__ u32 operator()(u32 a, u32 b) const { return max(a, b); } };

// Over all threads, in the same order for each, of what 0 changes nothing of: slots has a place for each warp.
template <typename T, typename F> __device__ __forceinline__ T over_row(T value, F f, T *slots) {
  const int lane = threadIdx.x % 32;
  for (int i = 1; i < 32; i *= 2) value = f(value, __shfl_xor_sync(ALL, value, i));
  if (lane == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  const int warp = lane % MAX_WARPS;
  value = warp < blockDim.x / 32 ? slots[warp] : T(0);
  for (int i = 1; i < MAX_WARPS; i *= 2) value = f(value, __shfl_xor_sync(ALL, value, i));
  return value;
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

__device__ __forceinline__ float squares(const u32 (&w)[WORDS], float factor) {
  float s[4] = {};
#pragma unroll
  for (int e = 0; e < 32; e++) {
    const float v = element(w, e, factor);
    s[e % 4] = fmaf(v, v, s[e % 4]);
  }
  return (s[0] + s[1]) + (s[2] + s[3]);
}

template <int HALF> __device__ __forceinline__ void stage(float (&y)[32]) {
#pragma unroll
  for (int i = 0; i < 32; i++) {
    if (i & HALF) continue;
    const float a = y[i], b = y[i + HALF];
    y[i] = a + b;
    y[i + HALF] = a - b;
  }
}

// Of a block: elements 8 k + i of the thread, chunk q + 4 k, become elements 32 q + 8 k + i, times 128^0.5.
// tile: the warp's, 512 bytes a block, in pieces of four floats. Piece h of the chunk from q to k lies at
// 8 k + (2 q + h), the last three bits turned by k and by the block, so that neither the threads that
// write at a time nor those that read meet in a bank.
__device__ __forceinline__ void transform(float (&y)[32], float4 *tile) {
  const int lane = threadIdx.x % 32, q = lane % 4, block = lane / 4;
  float4 *own = tile + 32 * block;
  stage<1>(y), stage<2>(y), stage<4>(y), stage<8>(y), stage<16>(y);
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int e = 8 * k + 4 * h;
      own[8 * k + ((2 * q + h) ^ (2 * k + block % 2))] = make_float4(y[e], y[e + 1], y[e + 2], y[e + 3]);
    }
  __syncwarp();
#pragma unroll
  for (int from = 0; from < 4; from++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int e = 8 * from + 4 * h;
      const float4 v = own[8 * q + ((2 * from + h) ^ (2 * q + block % 2))];
      y[e] = v.x, y[e + 1] = v.y, y[e + 2] = v.z, y[e + 3] = v.w;
    }
  __syncwarp();
  stage<8>(y), stage<16>(y);
}

// 32 elements in a row as codes; returns the sum of the codes, counted from 0.
__device__ __forceinline__ int emit(const float (&y)[32], float inverse, char *out, i64 at) {
  int sum = 0;
  if (FORM == PACKED) {
    u32 bits = 0;
#pragma unroll
    for (int e = 31; e >= 0; e--)  // + 0: a negative zero is not negative
      bits = __funnelshift_l(__float_as_uint(y[e] + 0.0f), bits, 1);
    ((u32 *)out)[at] = ~bits;
    return __popc(~bits);
  }
  u32 words[8] = {};
#pragma unroll
  for (int e = 31; e >= 0; e--) words[e / 4] = (words[e / 4] << 8) + code_of(y[e], inverse);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    sum = __dp4a(words[i], 0x01010101u, (u32)sum);
    words[i] = integers_of(words[i]);
  }
  ((uint4 *)out)[2 * at] = make_uint4(words[0], words[1], words[2], words[3]);
  ((uint4 *)out)[2 * at + 1] = make_uint4(words[4], words[5], words[6], words[7]);
  return sum;
}

// x: rows of `blocks` blocks, `stride` bytes apart, each at a multiple of 16. scale, sums: (rows,). out: by 32
// elements. The grid has a thread block for each row. weight: a row; shown: rows, or null.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS)
    rows(const char *x, float *scale, char *out, int *sums, i64 stride, int blocks, float step
#if NORMED
         , const char *weight, char *shown, float eps
#endif
    ) {
  extern __shared__ float4 tiles[];
  __shared__ float first[MAX_WARPS], second[MAX_WARPS];
  __shared__ u32 largest[MAX_WARPS];
  __shared__ int counts[MAX_WARPS];
  // The product may start where there is room. Its weights are in the way of rows that are read then: of wide
  // ones this block asks for the first of its own before.
  auto let_next_start = [] {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  };
  const bool wide = blocks > WIDE;
  if (!wide) let_next_start();
#if __CUDA_ARCH__ >= 900
  // Until the kernel before has ended: what it wrote is read, and what it still reads may be written here.
  // The product may have started by then, and asked for its weight: see `settled` in few.py.
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, hop = GROUP * (blockDim.x / 32);
  const char *row = x + blockIdx.x * stride;
  const int begin = GROUP * warp + lane / 4;
  int block = begin;
  u32 w[WORDS];
  float s = 0.0f;
#pragma unroll 1
  for (;; block += hop) {
    read(w, row, block, blocks);
    if (wide && block == begin) let_next_start();
    s += squares(w, 1.0f);
    if (block - begin + hop >= blocks) break;  // alike for all: each warp has as many turns
  }
  const float n = 128.0f * blocks;
#if NORMED
  __shared__ float before[MAX_WARPS];
  u32 by[WORDS];
  read(by, weight, block, blocks);  // while the sums come
  const float root = 1.0f / sqrtf(over_row(s, Add(), before) / n + eps);
  if (shown) shown += (i64)blockIdx.x * blocks * (ORDER * SIZE);
  // From the last group, which is in registers, back to the first; and where there are more the last again.
  s = 0.0f;
  const int end = block;
#pragma unroll 1
  for (;;) {
    norm(w, by, root, shown, block, blocks);
    s += squares(w, 1.0f);
    if (block == begin) break;
    block -= hop;
    read(w, row, block, blocks), read(by, weight, block, blocks);
  }
  auto fetch = [&](int block) {
    read(w, row, block, blocks), read(by, weight, block, blocks);
    norm(w, by, root, nullptr, block, blocks);
  };
  if (end != begin) fetch(block = end);
#else
  auto fetch = [&](int block) { read(w, row, block, blocks); };
#endif
  float y[32];
  auto rotate = [&](float factor) {
#pragma unroll
    for (int e = 0; e < 32; e++) y[e] = factor > 0.0f ? element(w, e, factor) : 0.0f;
    transform(y, tiles + 32 * GROUP * warp);
  };
  rotate(1.0f);  // of the last group, while the sums come
  s = over_row(s, Add(), first);
  float sigma = sqrtf(s / n), inner = sigma, down = 1.0f;
  if (!(s >= SMALL && s <= GREAT)) {  // alike for all
    const int last = block;
    u32 top = 0;
#pragma unroll 1
    for (block = begin;; block += hop) {
      fetch(block);
#pragma unroll
      for (int e = 0; e < 32; e++) top = max(top, __float_as_uint(element(w, e, 1.0f)) & 0x7FFFFFFF);
      if (block == last) break;
    }
    top = over_row(top, Max(), largest);
    const u32 field = min(max(top >> 23, 1u), 253u);
    down = __uint_as_float((254 - field) << 23);
    s = 0.0f;
#pragma unroll 1
    for (block = begin;; block += hop) {
      fetch(block);
      s += squares(w, down);
      if (block == last) break;
    }
    s = over_row(s, Add(), second);
    sigma = fminf(sqrtf(s / n) * __uint_as_float(field << 23), LARGEST);
    inner = sigma * down;
    if (top >= 0x7F800000) sigma = __int_as_float(0x7FC00000), inner = 0.0f;
    if (!(inner > 0.0f)) down = 0.0f;  // the row counts as zeros
    rotate(down);
  }
  const float inverse = inner > 0.0f ? NORM / (inner * step) : 0.0f;
  if (threadIdx.x == 0) scale[blockIdx.x] = sigma;
  int sum = 0;
  // From the last group, which is in registers, back to the first.
#pragma unroll 1
  for (;;) {
    if (block < blocks) sum += emit(y, inverse, out, ((i64)blockIdx.x * blocks + block) * 4 + lane % 4);
    if (block == begin) break;
    block -= hop;
    fetch(block);
    rotate(down);
  }
  sum = over_row(sum, Add(), counts);
  // Of integers, from codes counted from 0.
  if (threadIdx.x == 0)
    sums[blockIdx.x] = STRIDE * sum - TOP * 128 * blocks;
}
