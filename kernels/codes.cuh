// Rows of blocks of 128 as codes: what blocks.cu and rows.cu share. Macros: IN (the input's dtype), LEVELS (of a
// uniform grid), FORM, BITS, and SAVED: of integers, the bits an entry, 2 or 4, in which the codes are written as
// well; or 0.
#define VALUES 0    // dequantized, in the input's dtype
#define PACKED 1    // codes from 0, BITS each
#define CODES 2     // int8: the code
#define INTEGERS 3  // int8: 2 code + 1, or the code where LEVELS is odd, spread: see below
constexpr int LOWEST = -(LEVELS / 2);
constexpr bool EVEN = LEVELS % 2 == 0;
// An integer is STRIDE times the code counted from 0, less TOP: 2 code + 1, or the code where LEVELS is
// odd; as INTEGERS times the largest power of two that leaves it in a byte. (`operands.Form`: their
// lowest bits are always 0, and cost the tensor cores no power.)
constexpr int LARGEST_INTEGER = EVEN ? LEVELS - 1 : LEVELS / 2;
constexpr int ROOM = LARGEST_INTEGER > 63 ? 1 : LARGEST_INTEGER > 31 ? 2 : LARGEST_INTEGER > 15 ? 4 : LARGEST_INTEGER > 7 ? 8
                     : LARGEST_INTEGER > 3 ? 16 : LARGEST_INTEGER > 1 ? 32 : 64;
constexpr int SPREAD = FORM == INTEGERS ? ROOM : 1;
constexpr int STRIDE = (EVEN ? 2 : 1) * SPREAD, TOP = LARGEST_INTEGER * SPREAD;
// Sums of squares between these have lost nothing that counts, and neither has anything else.
constexpr float SMALL = 1.3234889800848443e-23f, GREAT = 1.2676506002282294e30f;  // 2^-76, 2^100
constexpr float NORM = 0.08838834764831845f;                                     // 128^-0.5
constexpr float LARGEST = 3.4028234663852886e38f;
constexpr float ROOT = 11.313708498984761f;                                      // 128^0.5
constexpr int OUT_BITS = FORM == VALUES ? (IN == FLOAT32 ? 32 : 16) : FORM == PACKED ? BITS : 8;  // of an element
// Bits an element of what a lane's piece is too small to be written by itself; or 0. (A mask's is, too.)
constexpr int NARROW = FORM == PACKED && BITS < 4 ? BITS : SAVED == 2 ? 2 : 0;
constexpr bool COUNTS = FORM == CODES || FORM == INTEGERS || OUT_BITS == 1;  // there are sums
static_assert(SAVED == 0 || FORM == INTEGERS && (SAVED == 2 || SAVED == 4), "integers are saved in 2 or 4 bits");

// A power of two, as floats count them.
__device__ __forceinline__ float power(int field) { return __uint_as_float((u32)field << 23); }

// Beside 1.5 * 2^23 a float counts whole numbers, in its last bits. The product of y and the reciprocal,
// counted from the lowest level, is rounded down there, and so to a whole number: the floor, and exact.
__device__ __forceinline__ int whole_of(float y, float inverse) {
  constexpr float MAGIC = 12582912.0f - LOWEST;
  return __float_as_int(EVEN ? __fmaf_rd(y, inverse, MAGIC) : __fadd_rd(fmaf(y, inverse, 0.5f), MAGIC));
}

// Codes counted from 0.
__device__ __forceinline__ int code_of(float y, float inverse) {
  return __viaddmin_s32_relu(whole_of(y, inverse), -0x4B400000, LEVELS - 1);
}

// Of four elements, one in each byte. Of whole numbers below 2^15 the low halves say all: two at a time.
__device__ __forceinline__ u32 codes_of(float a, float b, float c, float d, float inverse) {
  constexpr u32 MOST = (LEVELS - 1) * 0x10001u;
  const u32 even = __byte_perm(whole_of(a, inverse), whole_of(c, inverse), 0x5410);
  const u32 odd = __byte_perm(whole_of(b, inverse), whole_of(d, inverse), 0x5410);
  return __vimin_s16x2_relu(even, MOST) + (__vimin_s16x2_relu(odd, MOST) << 8);
}

// Four codes counted from 0, one in each byte, as what is stored: integers, or CODES. Added up from 0x80 they
// stay in their bytes: STRIDE times the last code is 2 TOP.
__device__ __forceinline__ u32 integers_of(u32 word) {
  if (FORM == CODES) return word + (0x80 + LOWEST) * 0x01010101u ^ 0x80808080u;
  return word * STRIDE + (0x80 - TOP) * 0x01010101u ^ 0x80808080u;
}

// Sign bits of so many numbers, the first lowest.
template <int COUNT = 8, typename F> __device__ __forceinline__ u32 signs_of(F value) {
  u32 bits = 0;
#pragma unroll
  for (int e = COUNT - 1; e >= 0; e--) bits = __funnelshift_l(__float_as_uint(value(e)), bits, 1);
  return bits;
}

// A word of codes from 0, one in each byte, in 4 bits each: bytes 1 and 3. A product puts the codes side by
// side, each bit in a place of its own: nothing carries.
__device__ __forceinline__ u32 in_fours(u32 first, u32 second) {
  return __byte_perm(first * 0x110, second * 0x110, 0x7531);
}
// In 2 bits each: the highest byte.
__device__ __forceinline__ u32 in_twos(u32 first, u32 second) {
  return __byte_perm(first * 0x01041040, second * 0x01041040, 0x0073) & 0xFFFF;
}

// A code's value. Beside 2^22 a float counts halves: code + 1/2, or code, from a few cheap instructions.
__device__ __forceinline__ float value_of(float y, float inverse, float step, float sigma) {
  const float whole = __int_as_float(0x4A800000 + 2 * code_of(y, inverse));
  return (whole - (4194304.0f - LOWEST - (EVEN ? 0.5f : 0.0f))) * step * sigma;
}
