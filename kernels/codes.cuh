// Rows of blocks of 128 as codes: what blocks.cu and rows.cu share. Macro: LEVELS, of a uniform grid.
constexpr int LOWEST = -(LEVELS / 2);
constexpr bool EVEN = LEVELS % 2 == 0;
// Sums of squares between these have lost nothing that counts, and neither has anything else.
constexpr float SMALL = 1.3234889800848443e-23f, GREAT = 1.2676506002282294e30f;  // 2^-76, 2^100
constexpr float NORM = 0.08838834764831845f;                                     // 128^-0.5
constexpr float LARGEST = 3.4028234663852886e38f;

// Codes counted from 0. The product of y and the reciprocal is rounded down beside 1.5 * 2^23 and so
// to a whole number: the floor, and exact.
__device__ __forceinline__ int code_of(float y, float inverse) {
  const float magic = 12582912.0f;
  const float t = EVEN ? __fmaf_rd(y, inverse, magic) : __fadd_rd(fmaf(y, inverse, 0.5f), magic);
  // min(t - magic - LOWEST, LEVELS - 1), at least 0
  return __viaddmin_s32_relu(__float_as_int(t), -0x4B400000 - LOWEST, LEVELS - 1);
}

// Four codes counted from 0, one in each byte, as what they stand for: doubled, 2 code + 1, else the code.
__device__ __forceinline__ u32 integers_of(u32 word, bool doubled) {
  // Minus what codes count from; 2 code + 1 is 2 (code from 0) - (LEVELS - 1).
  return __vsub4(word * (doubled ? 2 : 1), ((doubled ? LEVELS - 1 : -LOWEST) & 0xFF) * 0x01010101u);
}
