// What few.cu asks of PTX. Macros: BITS, CLUSTER, OUT.

// 16 bytes; nothing, and any values, unless `wanted`. Volatile: loads stay in the order written here.
// Not .nc, which the assembler moves behind `wait_for_previous`.
__device__ __forceinline__ void load_weights(uint4 &v, const char *from, bool wanted) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.u32 p, %5, 0;\n"
      " @p ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from), "r"((u32)wanted));
}

// The same; zeros unless `wanted`. Not .nc: the kernel before may still be writing when this one starts.
__device__ __forceinline__ void load_rows(uint4 &v, const char *from, bool wanted) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.u32 p, %5, 0;\n mov.u32 %0, 0;\n mov.u32 %1, 0;\n mov.u32 %2, 0;\n mov.u32 %3, 0;\n"
      " @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"((u32)wanted)
      : "memory");
}

// d (16 rows of W x 8 of A) += a b.
__device__ __forceinline__ void multiply(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BITS == 1
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
#endif
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank = 0;
  if (CLUSTER > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ u32 remote(u32 address, u32 block) {
  if (CLUSTER > 1) asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
  return address;
}

__device__ __forceinline__ void add_to(u32 address, int value) {
  if (CLUSTER > 1)
    asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
  else
    asm volatile("red.relaxed.cta.shared::cta.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// 16 bytes; nothing unless `wanted`.
__device__ __forceinline__ void put_at(u32 address, const uint4 &v, bool wanted) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.u32 p, %5, 0;\n @p st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"r"(address), "r"(v.x),
      "r"(v.y), "r"(v.z), "r"(v.w), "r"((u32)wanted)
      : "memory");
}

__device__ __forceinline__ unsigned short narrow(float value) {
  unsigned short half;
  if (OUT == BFLOAT16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
