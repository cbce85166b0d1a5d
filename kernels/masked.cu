// y = (x masked) H^T, for Hadamard blocks of 128 and 16 bits: what reaches an input behind its trust mask.
//
// A thread block is a warp, which takes a group of eight blocks. What the mask drops becomes 0 in the words as
// they were read; four of seven stages are products on the tensor cores, three are additions (`transform_group`
// in rotate.cuh). H is symmetric. Signs are 2^-7, so that no sum leaves float32's range: no value of 16 bits
// loses a bit by that.
//
// Macros: IN (x's dtype, of 16 bits), OUT (y's: the same or FLOAT32).
typedef unsigned int u32;
typedef long long i64;

#include "halves.cuh"
#define HALF (IN == FLOAT16)
#include "rotate.cuh"

constexpr int CHUNKS = 16;          // of a block, of 16 bytes of x
constexpr float NORM = 11.313708498984761f;  // 128^-0.5, times 2^7

// Leaves of two elements in a word what bits say: those that lie highest in bytes 0 and 1 of `bits`, or 2 and 3.
template <bool UPPER> __device__ __forceinline__ u32 kept(u32 word, u32 bits) {
  u32 whole;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(whole) : "r"(bits), "n"(UPPER ? 0xBBAA : 0x9988));
  return word & whole;
}

// Four words of 16 bits whose eight elements a byte's bits keep, the lowest first.
__device__ __forceinline__ void drop(u32 *w, u32 byte) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    // Bit k of four to the top of byte k: copies seven bits apart don't overlap.
    const u32 bits = (byte >> 4 * i & 15) * 0x10204080;
    w[2 * i] = kept<false>(w[2 * i], bits), w[2 * i + 1] = kept<true>(w[2 * i + 1], bits);
  }
}

// x, y: blocks, of which there are `total`; mask: 16 bytes a block.
extern "C" __global__ void __launch_bounds__(32)
    masked(const uint4 *x, const uint4 *mask, uint4 *y, i64 total) {
  const int lane = threadIdx.x, quad = lane % 4, eighth = lane / 4;
  const i64 first = (i64)blockIdx.x * 8, own = first + eighth;
  u32 signs[4], w[16] = {};
  make_signs(signs, lane, HALF ? 0x20002000 : 0x3C003C00);
  if (own < total) {
    const uint4 bits = mask[own];
    const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4 v = x[own * CHUNKS + quad + 4 * i];
      w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) drop(w + 4 * i, words[i] >> 8 * quad);
  }
  float made[32];
  __syncwarp();
  transform_group(made, w, signs);
#pragma unroll
  for (int c = 0; c < 4; c++) {
    const i64 block = first + 2 * quad + c / 2;
    if (block >= total) continue;
    const i64 at = block * CHUNKS + 8 * (c % 2) + eighth;
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = made[8 * c + e] * NORM;
#if OUT == FLOAT32
#pragma unroll
    for (int h = 0; h < 2; h++)
      y[2 * at + h] = make_uint4(__float_as_uint(v[4 * h]), __float_as_uint(v[4 * h + 1]), __float_as_uint(v[4 * h + 2]),
                                 __float_as_uint(v[4 * h + 3]));
#else
    y[at] = make_uint4(pair_of(v[0], v[1]), pair_of(v[2], v[3]), pair_of(v[4], v[5]), pair_of(v[6], v[7]));
#endif
  }
}
