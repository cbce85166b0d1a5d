// The bias of a column, of any float dtype that an output may have: float32, bfloat16 or float16. As it
// lies in memory, and its value: what is asked for early need not have come where it is made a float.
__device__ __forceinline__ u32 bias_bits(const void *bias, int at, int type) {
  return type == FLOAT32 ? ((const u32 *)bias)[at] : ((const unsigned short *)bias)[at];
}

__device__ __forceinline__ float bias_of(u32 bits, int type) {
  if (type == FLOAT32) return __uint_as_float(bits);
  if (type == BFLOAT16) return __uint_as_float(bits << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)bits));
  return f;
}

__device__ __forceinline__ float bias_at(const void *bias, int at, int type) {
  return bias_of(bias_bits(bias, at, type), type);
}
