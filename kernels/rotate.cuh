// The Hadamard transform of 16-bit floats by the tensor cores: four index bits by one product with a 16 x 16
// matrix of signs, for blocks.cu, rows.cu and masked.cu. Of an element's index, bit 0 lies in a pair, two bits in
// the lane, and one tells the second word of b; of the outcome bit 0 is a row's upper half, and the other
// three are the row.
//
// Products with signs are exact; the tensor cores cut what lies 2^-24 below the largest of 16 terms, and the
// sum to float32, which together is less than what the four stages of a butterfly round, unless terms below
// 2^-17 of the largest meet it.
//
// Macro: HALF, of float16; else of bfloat16.
#if HALF
#define MMA(K) "mma.sync.aligned.m16n8k" #K ".row.col.f32.f16.f16.f32"
#else
#define MMA(K) "mma.sync.aligned.m16n8k" #K ".row.col.f32.bf16.bf16.f32"
#endif

// A lane's words of the matrix of signs, as pairs of `one` of 16 bits: parity of the bits that meet.
__device__ __forceinline__ void make_signs(u32 (&signs)[4], int lane, u32 one = HALF ? 0x3C003C00 : 0x3F803F80) {
  const u32 r = lane / 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 odd = __popc(r & (lane % 4 + (i >= 2 ? 4 : 0))) & 1;
    signs[i] = one ^ odd * 0x80008000 ^ (i % 2 ? 0x80000000 : 0);
  }
}

// d (16 x 8) = a (16 x 16) b, summed in float32.
__device__ __forceinline__ void rotate(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(MMA(16) " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// d (16 x 8) += a (16 x 8) b, summed in float32.
__device__ __forceinline__ void accumulate(float (&d)[4], u32 a0, u32 a1, u32 b) {
  asm volatile(MMA(8) " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// The stage of index bits of value HALF, of a lane's 32 elements.
template <int HALF_SPAN> __device__ __forceinline__ void stage(float (&y)[32]) {
#pragma unroll
  for (int i = 0; i < 32; i++) {
    if (i & HALF_SPAN) continue;
    const float a = y[i], b = y[i + HALF_SPAN];
    y[i] = a + b;
    y[i + HALF_SPAN] = a - b;
  }
}

// A group is eight blocks of 128. Lane 4 r + q has of block r the chunks of eight elements q + 4 i, in words 4 i and
// on, and gets, transformed, times 128^0.5: y[8 c + e], c = 2 z + p, of block 2 q + z element 64 p + 8 r + e.
__device__ __forceinline__ void transform_group(float (&y)[32], const u32 (&w)[16], const u32 (&signs)[4]) {
  float made[8][4];  // [j][z + 2 h]: of block 2 q + z, element 64 (j / 4) + 8 r + 2 (j % 4) + h
#pragma unroll
  for (int j = 0; j < 8; j++) rotate(made[j], signs, w[j / 4 * 8 + j % 4], w[j / 4 * 8 + j % 4 + 4]);
#pragma unroll
  for (int i = 0; i < 32; i++) y[i] = made[i / 8 % 2 * 4 + i % 8 / 2][i / 16 + i % 2 * 2];
  stage<2>(y), stage<4>(y), stage<8>(y);
}

// The sums of squares of a group's blocks are the diagonal of the group's product with itself: that of block r in
// lane 4 r + r / 2. In four chains of four products, which cut less than as many additions would round.
__device__ __forceinline__ float squares_of_group(const u32 (&w)[16]) {
  float even[2][4] = {}, odd[2][4] = {};  // words in a's upper rows, and in its lower ones
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    accumulate(even[i / 2 % 2], w[i], w[i + 1], w[i]);
    accumulate(odd[i / 2 % 2], w[i], w[i + 1], w[i + 1]);
  }
  const bool second = threadIdx.x / 4 % 2;
  return ((second ? even[0][1] : even[0][0]) + (second ? even[1][1] : even[1][0])) +
         ((second ? odd[0][3] : odd[0][2]) + (second ? odd[1][3] : odd[1][2]));
}
