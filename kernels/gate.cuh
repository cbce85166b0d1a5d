// silu(gate) value. 2^t errs by 2^-22 and the reciprocal by 2^-23 (PTX ISA, ex2.approx, rcp.approx); a
// reciprocal below 2^-126 is 0.
__device__ __forceinline__ float gated(float gate, float value) {
  float e, sigmoid;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__fmul_rn(gate, -1.4426950408889634f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(__fadd_rn(1.0f, e)));
  return __fmul_rn(__fmul_rn(gate, sigmoid), value);
}
