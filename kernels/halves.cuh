// Floats in words: pairs of 16-bit ones or, where IN is FLOAT32, one. IN: their dtype.
#define FLOAT32 1
#define BFLOAT16 2
#define FLOAT16 3

__device__ __forceinline__ float low(u32 pair) {
  if (IN == FLOAT32) return __uint_as_float(pair);
  if (IN == BFLOAT16) return __uint_as_float(pair << 16);
  float f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(pair));
  return f;
}

__device__ __forceinline__ float high(u32 pair) {
  if (IN == BFLOAT16) return __uint_as_float(pair & 0xFFFF0000);
  float f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(pair));
  return f;
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
  u32 both;
  if (IN == FLOAT16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
