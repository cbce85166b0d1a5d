// The rotary embedding of pairs of columns, of which a head of a query or key has one in each half: two
// pairs side by side, in words of two outputs. Turned in float32, rounded once: low cos - high sin and
// high cos + low sin, of which no product may be contracted with its sum. Source: arXiv 2104.09864.
__device__ __forceinline__ void turn(u32 &low, u32 &high, float2 cosine, float2 sine) {
  const float a = bias_of(low & 0xFFFF, OUT), b = bias_of(low >> 16, OUT);
  const float c = bias_of(high & 0xFFFF, OUT), d = bias_of(high >> 16, OUT);
  low = pair_of(__fsub_rn(__fmul_rn(a, cosine.x), __fmul_rn(c, sine.x)),
                __fsub_rn(__fmul_rn(b, cosine.y), __fmul_rn(d, sine.y)));
  high = pair_of(__fadd_rn(__fmul_rn(c, cosine.x), __fmul_rn(a, sine.x)),
                 __fadd_rn(__fmul_rn(d, cosine.y), __fmul_rn(b, sine.y)));
}
