// y = A B^T for low-bit operands on Hopper's tensor cores (sm_90a), with the dequantizing epilogue.
//
// A: (rows, bytes) and B: (columns, bytes), row-major, stride a multiple of 16 bytes. A byte of K is
// one int8, or (BINARY) eight bits; both run as wgmma of 32 bytes of K, which lie alike in shared
// memory, so that one kernel serves both and the int8 form checks the layout of the other.
//
// One cluster: two blocks, one above the other in A, that share a tile of B: each loads half of it
// and sends it to both. One block: a producer warpgroup that keeps STAGES tiles of TILE_K bytes in
// flight through the bulk copy engine, and two consumer warpgroups of 64 x 256 int32 accumulators.
// The grid is persistent: while the consumers write a tile out, the producer loads the next.
//
// Written for every element, with acc the int32 sum over K:
//   RAW        acc
//   PLAIN      p = acc
//   CORRECTED  BINARY: p = 4 acc - row_sum[i] - column_sum[j] - length, the sum of products of signs
//              int8: p = acc + (row_sum[i] + column_sum[j] - length) / 4, that of code + 1/2
//   and y = float(p) * (factor * row_scale[i]) * column_scale[j] + bias[j]
#ifndef BINARY
#define BINARY 0
#endif
#define RAW 0
#define PLAIN 1
#define CORRECTED 2
#ifndef EPILOGUE
#define EPILOGUE PLAIN
#endif
#define INT32 0
#define FLOAT32 1
#define BFLOAT16 2
#define FLOAT16 3
#ifndef OUT
#define OUT BFLOAT16
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(64) TensorMap { u64 opaque[16]; };

// TILE_M, TILE_N, TILE_K (bytes), STAGES, CLUSTER and CONSUMERS come from product.py.
constexpr int WARPS = 4 * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
constexpr u32 A_BYTES = TILE_M * TILE_K, B_BYTES = TILE_N * TILE_K, HALF_B = B_BYTES / CLUSTER;
constexpr int OUT_SIZE = OUT >= BFLOAT16 ? 2 : 4;
constexpr int SPAN = 128 / OUT_SIZE;                  // columns that a warp stages at a time
constexpr u32 STAGE_ROW = 128 + 8 * OUT_SIZE;         // padded: its stores and loads meet no bank twice
constexpr u32 STAGING = 16 * STAGE_ROW;               // bytes of a warp's 16 rows
constexpr u32 A_AT = 0, B_AT = STAGES * A_BYTES, OUT_AT = B_AT + STAGES * B_BYTES;
constexpr u32 FULL_AT = OUT_AT + WARPS * STAGING, EMPTY_AT = FULL_AT + 8 * STAGES;
constexpr int GROUP = 8;                              // pairs of row tiles that share the L2 cache

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar, u32 block) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(block)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again;\n}" ::"r"(bar), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void load(u32 to, const TensorMap *map, int k, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map), "r"(k), "r"(row), "r"(bar)
      : "memory");
}

__device__ __forceinline__ void load_to_all(u32 to, const TensorMap *map, int k, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(k), "r"(row),
      "r"(bar), "h"((unsigned short)((1 << CLUSTER) - 1))
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// Rows of 128 bytes, swizzled by 128 bytes; groups of eight rows are 1024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#define D(i) "+r"(d[i])
#define D8(i) D(i), D(i + 1), D(i + 2), D(i + 3), D(i + 4), D(i + 5), D(i + 6), D(i + 7)
#define D64(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24), D8(i + 32), D8(i + 40), D8(i + 48), D8(i + 56)
#if BINARY
#define WGMMA "wgmma.mma_async.sync.aligned.m64n256k256.s32.b1.b1.and.popc "
#else
#define WGMMA "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
#endif

// d (64 x 256 of a warpgroup) = 32 bytes of K, added to d unless `add` is 0.
__device__ __forceinline__ void multiply(int (&d)[128], u64 a, u64 b, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n " WGMMA
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, %128, %129, p;\n}"
      : D64(0), D64(64)
      : "l"(a), "l"(b), "r"(add));
}

struct Arguments {
  void *out;
  const float *row_scale, *column_scale, *bias;  // bias may be null
  const int *row_sum, *column_sum;
  int rows, columns, bytes, length;
  float factor;
};

// The tile of a turn: pairs of row tiles in groups of GROUP, so that the blocks that run at a time
// share rows of A and of B.
__device__ __forceinline__ void place(int turn, int pairs, int across, int &pair, int &column) {
  int in_group = GROUP * across, first = turn / in_group * GROUP;
  int height = min(GROUP, pairs - first), rest = turn % in_group;
  pair = first + rest % height;
  column = rest / height;
}

__device__ __forceinline__ float finish(int acc, int sum, float row, float column, float bias) {
  float p = (float)acc;
  if (EPILOGUE == CORRECTED && BINARY) p = (float)(4 * acc - sum);
  // The correction may be a fraction, and 4 acc may leave int32: whole and quarter parts apart.
  if (EPILOGUE == CORRECTED && !BINARY) p = (float)(acc + (sum >> 2)) + 0.25f * (float)(sum & 3);
  return fmaf(p * row, column, bias);
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
  u32 both;
  if (OUT == BFLOAT16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Two neighbours of a vector of n, 0 beyond its end.
template <typename T> __device__ __forceinline__ void two(const T *from, int at, int n, T &a, T &b) {
  a = from && at < n ? from[at] : T(0);
  b = from && at + 1 < n ? from[at + 1] : T(0);
}

// Writes a warp's 16 x 256 accumulators, SPAN columns at a time, through its own shared memory, so
// that rows are written 16 bytes a thread and 128 bytes a row.
__device__ __forceinline__ void write(int (&d)[128], const Arguments &g, char *stage, int row0, int column0) {
  const int lane = threadIdx.x % 32, top = row0 + lane / 4;
  float scale[2] = {};
  int sum[2] = {};
  for (int h = 0; h < 2; h++) {
    bool inside = top + 8 * h < g.rows;
    if (EPILOGUE != RAW && inside) scale[h] = g.factor * g.row_scale[top + 8 * h];
    if (EPILOGUE == CORRECTED && inside) sum[h] = BINARY ? g.length : -g.length;
    if (EPILOGUE == CORRECTED && inside && g.row_sum) sum[h] += g.row_sum[top + 8 * h];
  }
  // Whole vectors of 16 bytes, where every row begins at one.
  const bool vectors = g.columns % (16 / OUT_SIZE) == 0;
#pragma unroll
  for (int c = 0; c < TILE_N / SPAN; c++) {
#pragma unroll
    for (int j = 0; j < SPAN / 8; j++) {
      const int i = c * (SPAN / 8) + j, column = column0 + 8 * i + 2 * (lane % 4);
      float s0 = 0, s1 = 0, b0 = 0, b1 = 0;
      int t0 = 0, t1 = 0;
      if (EPILOGUE != RAW) {
        two(g.column_scale, column, g.columns, s0, s1);
        two(g.bias, column, g.columns, b0, b1);
      }
      if (EPILOGUE == CORRECTED) two(g.column_sum, column, g.columns, t0, t1);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int low = d[4 * i + 2 * h], high = d[4 * i + 2 * h + 1];
        char *at = stage + (lane / 4 + 8 * h) * STAGE_ROW + (8 * j + 2 * (lane % 4)) * OUT_SIZE;
        if (EPILOGUE == RAW) {
          *(int2 *)at = make_int2(low, high);
        } else {
          float y0 = finish(low, sum[h] + t0, scale[h], s0, b0);
          float y1 = finish(high, sum[h] + t1, scale[h], s1, b1);
          if (OUT_SIZE == 2) *(u32 *)at = pair_of(y0, y1);
          else *(float2 *)at = make_float2(y0, y1);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = 4 * i + lane / 8, row = row0 + r;
      const int column = column0 + c * SPAN + lane % 8 * (16 / OUT_SIZE);
      const char *from = stage + r * STAGE_ROW + lane % 8 * 16;
      char *to = (char *)g.out + ((long long)row * g.columns + column) * OUT_SIZE;
      if (row >= g.rows) continue;
      if (vectors) {
        if (column < g.columns) *(int4 *)to = *(const int4 *)from;
      } else {
        for (int e = 0; e < 16 && column + e / OUT_SIZE < g.columns; e += OUT_SIZE) {
          if (OUT_SIZE == 2) *(unsigned short *)(to + e) = *(const unsigned short *)(from + e);
          else *(int *)(to + e) = *(const int *)(from + e);
        }
      }
    }
    __syncwarp();
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
            void *out, const float *row_scale, const float *column_scale, const float *bias,
            const int *row_sum, const int *column_sum, int rows, int columns, int bytes, int length,
            float factor) {
  const Arguments g = {out, row_scale, column_scale, bias, row_sum, column_sum, rows, columns, bytes, length, factor};
  extern __shared__ char raw[];
  u32 base = (u32)__cvta_generic_to_shared(raw);
  const u32 gap = (1024 - base % 1024) % 1024;  // the swizzle counts from 1024-byte boundaries
  base += gap;
  const int group = threadIdx.x / 128;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(base + FULL_AT + 8 * s, 1);
      barrier_init(base + EMPTY_AT + 8 * s, CLUSTER * WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  const int pairs = (g.rows + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M);
  const int across = (g.columns + TILE_N - 1) / TILE_N, steps = (g.bytes + TILE_K - 1) / TILE_K;
  int stage = 0, phase = 0;
  if (group == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 128 * CONSUMERS) {
      for (int turn = blockIdx.x / CLUSTER; turn < pairs * across; turn += gridDim.x / CLUSTER) {
        int pair, column;
        place(turn, pairs, across, pair, column);
        for (int k = 0; k < steps; k++) {
          const u32 full = base + FULL_AT + 8 * stage;
          barrier_wait(base + EMPTY_AT + 8 * stage, phase ^ 1);
          barrier_expect(full, A_BYTES + B_BYTES);
          load(base + A_AT + stage * A_BYTES, &a_map, k * TILE_K, (CLUSTER * pair + rank) * TILE_M, full);
          load_to_all(base + B_AT + stage * B_BYTES + rank * HALF_B, &b_map, k * TILE_K,
                      column * TILE_N + rank * (TILE_N / CLUSTER), full);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int d[128];
    for (int turn = blockIdx.x / CLUSTER; turn < pairs * across; turn += gridDim.x / CLUSTER) {
      int pair, column, last = 0;
      place(turn, pairs, across, pair, column);
      for (int k = 0; k < steps; k++) {
        barrier_wait(base + FULL_AT + 8 * stage, phase);
        const u64 a = descriptor(base + A_AT + stage * A_BYTES + group * 64 * TILE_K);
        const u64 b = descriptor(base + B_AT + stage * B_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < TILE_K / 32; i++) multiply(d, a + 2 * i, b + 2 * i, k | i);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // The products of the stage before are done: give it back to both blocks' producers.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k > 0 && lane < CLUSTER) barrier_arrive(base + EMPTY_AT + 8 * last, lane);
        last = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane < CLUSTER) barrier_arrive(base + EMPTY_AT + 8 * last, lane);
      write(d, g, raw + gap + OUT_AT + warp * STAGING, (CLUSTER * pair + rank) * TILE_M + 16 * warp,
            column * TILE_N);
    }
  }
  cluster_sync();  // no block leaves while the other may still write to its shared memory
}
