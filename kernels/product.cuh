// A product of int8 or, BINARY, of single bits on Hopper's tensor cores, and its value from the
// accumulators. Macros: BINARY, EPILOGUE, OUT, CLUSTER; BIAS, its dtype as OUT counts them, 0 for none:
// what nobody adds need not be fetched.
//
// Written for every element, with acc the int32 sum over K:
//   RAW        acc
//   PLAIN      p = acc
//   CORRECTED  BINARY: p = 4 acc - row_sum[i] - column_sum[j] - length, the sum of products of signs
//              int8: p = acc + (row_sum[i] + column_sum[j] - length) / 4, that of code + 1/2
//   and y = float(p) * (factor * row_scale[i]) * column_scale[j] + bias[j]
// Of BINARY p, 4 acc - column_sum[j] and row_sum[i] + length must be below 2^22 in size.
#ifndef BINARY
#define BINARY 0
#endif
#ifndef BIAS
#define BIAS 0
#endif
#include "hopper.cuh"
#include "scales.cuh"

#if BINARY
#define WGMMA(N) "wgmma.mma_async.sync.aligned.m64n" #N "k256.s32.b1.b1.and.popc "
#else
#define WGMMA(N) "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 "
#endif

// d (64 x 128 or 256 of a warpgroup) = 32 bytes of K, added to d unless `add` is 0.
__device__ __forceinline__ void multiply(int (&d)[64], u64 a, u64 b, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n " WGMMA(128)
      "{" NAMES_64 "}, "
      "%64, %65, p;\n}"
      : D64(0)
      : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void multiply(int (&d)[128], u64 a, u64 b, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n " WGMMA(256)
      "{" NAMES_128 "}, "
      "%128, %129, p;\n}"
      : D64(0), D64(64)
      : "l"(a), "l"(b), "r"(add));
}

struct Arguments {
  void *out;
  const float *row_scale, *column_scale;
  const void *bias;  // of dtype BIAS
  const int *row_sum, *column_sum;
  int rows, columns, bytes, length;
  float factor;
  const void *residual;  // what is added to y, of its dtype, where the kernel does that
  const float *cosine, *sine;  // (positions, half a head), where the kernel turns the first columns of y
  int positions, turned;       // row r lies at position r % positions
};

// Of single bits, 4 acc less a column's sum is below 2^22 in size: beside 1.5 * 2^23 it stands in a float's last bits,
// which saves a conversion at a quarter of the rate. A column's sum comes with that number, and a row's leaves with
// it, in the one subtraction that an element needs; all of it is exact.
constexpr int WHOLE = 0x4B400000;
constexpr float WHOLE_FLOAT = 12582912.0f;
#if BINARY
typedef float OfRow;
#else
typedef int OfRow;
#endif

// What a row brings to an element.
struct Row { Scale scale; OfRow sum; };

// What one of a sum counts: that of code + 1/2 is a number of quarters.
constexpr bool QUARTERS = EPILOGUE == CORRECTED && !BINARY;
constexpr float UNIT = QUARTERS ? 0.25f : 1.0f;
// The longest K whose quarters fit int32, of bytes of any codes: 255 * 255 * 32768 < 2^31.
constexpr int LONG = QUARTERS ? 32768 : 2147483647;

// RARE: some row of the warp may be far, or K is LONG. column_sum: as `of_column` has it.
template <bool RARE>
__device__ __forceinline__ float finish(int acc, int column_sum, float factor, const Row &row, float column, float bias) {
  float p;
  if (EPILOGUE == CORRECTED && BINARY) {
    p = __int_as_float(4 * acc + column_sum) - row.sum;
  } else if (QUARTERS) {
    // Rounded once either way. Of unsigned numbers, for 4 acc alone may leave int32.
    if (RARE) p = (float)fma(4.0, (double)acc, (double)(row.sum + column_sum));
    else p = (float)(int)(4u * acc + (u32)(row.sum + column_sum));
  } else {
    p = (float)acc;
  }
  return scaled<RARE>(p, UNIT * factor, row.scale, column, bias);
}

__device__ __forceinline__ Row row_of(const Arguments &g, float scale, int sum) {
  Scale of = scale_of(g.factor, scale);
  of.near *= UNIT;
  return {of, BINARY ? OfRow(WHOLE_FLOAT + (sum + g.length)) : OfRow(sum - g.length)};
}

// What a column's sum brings to an element.
__device__ __forceinline__ int of_column(int sum) { return BINARY ? WHOLE - sum : sum; }

// 16 rows, `row` bytes apart, of two groups of eight outputs of 16 bits, the first of them `group`: four 8 x 8 matrices,
// of which a lane has the words that an accumulator's place gives it. It names eight outputs of one row.
__device__ __forceinline__ void store(const u32 (&words)[4], char *stage, u32 row, int group) {
  const int lane = threadIdx.x % 32;
  const u32 to = (u32)__cvta_generic_to_shared(stage) + lane % 16 * row + 16 * (group + lane / 16);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
