// The Hadamard transform of 16-bit floats by the tensor cores: four index bits by one product with a 16 x 16
// matrix of signs, for blocks.cu and few_rows.cuh. Of an element's index, bit 0 lies in a pair, two bits in
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

// A lane's words of the matrix of signs, as ones of 16 bits: parity of the bits that meet.
__device__ __forceinline__ void make_signs(u32 (&signs)[4], int lane) {
  const u32 one = HALF ? 0x3C003C00 : 0x3F803F80, r = lane / 4;
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
