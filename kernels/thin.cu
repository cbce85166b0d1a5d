// y = A B^T for low-bit operands and few rows of A on Hopper's tensor cores (sm_90a): the product of
// product.cu where its tiles are too few to fill the GPU.
//
// With few rows the time is that of B's arrival, so all multiprocessors must ask for it. The blocks of a
// cluster have one tile of 64 x 128, and each a share of its K: a producer thread keeps STAGES tiles of
// 128 bytes of K in flight, a warpgroup multiplies. Then each block sends 1 / CLUSTER of its accumulators
// to every block of the cluster, which adds up and writes out as many columns. Sums of integers don't
// depend on their order: every split gives the same bits.
//
// settled: B lay ready before the kernel before this one began. Its first tiles are then asked for while
// that one, which quantizes A, still runs.
//
// A, B, EPILOGUE and OUT are those of product.cu.
#include "product.cuh"

// STAGES and CLUSTER come from thin.py.
constexpr int TILE_M = 64, TILE_N = 128, TILE_K = 128, CONSUMERS = 128, THREADS = CONSUMERS + 32;
constexpr u32 A_BYTES = TILE_M * TILE_K, B_BYTES = TILE_N * TILE_K;
constexpr int SUMS = TILE_M * TILE_N / CONSUMERS;   // of a thread
constexpr int OWN = SUMS / CLUSTER;                 // of them, those of the columns that a block writes out
constexpr int WIDE = TILE_N / CLUSTER;              // these columns
constexpr u32 SENT = TILE_M * TILE_N * 4;           // bytes that a block gets, those from itself included
constexpr u32 A_AT = 0, B_AT = STAGES * A_BYTES, SUMS_AT = B_AT + STAGES * B_BYTES;
constexpr u32 COLUMNS_AT = SUMS_AT + (CLUSTER > 1 ? SENT : 0);
constexpr u32 FULL_AT = COLUMNS_AT + 3 * 4 * WIDE, EMPTY_AT = FULL_AT + 8 * STAGES, SENT_AT = EMPTY_AT + 8 * STAGES;

struct Columns {
  float scale[WIDE], bias[WIDE];
  int sum[WIDE];
};

// Four sums to the place `to` in the shared memory of block `rank` of the cluster, whose barrier counts them.
__device__ __forceinline__ void send(u32 to, const int4 &v, u32 bar, u32 rank) {
  asm volatile(
      "{\n .reg .b32 place, done;\n mapa.shared::cluster.u32 place, %0, %6;\n"
      " mapa.shared::cluster.u32 done, %5, %6;\n"
      " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [place], {%1, %2, %3, %4}, [done];\n}" ::"r"(to),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar), "r"(rank)
      : "memory");
}

// As `barrier_wait`, for what other blocks of the cluster have sent.
__device__ __forceinline__ void sent_wait(u32 bar) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      " @!done bra again;\n}" ::"r"(bar)
      : "memory");
}

template <bool LARGE>
__device__ __forceinline__ void write(const int (&d)[OWN], const Arguments &g, const Row (&rows)[2], const Columns &columns, int row0, int column0) {
  const int lane = threadIdx.x % 32;
  const bool pairs = g.columns % 2 == 0;  // every row begins at a whole pair
#pragma unroll
  for (int j = 0; j < OWN / 4; j++) {
    const int at = 8 * j + 2 * (lane % 4), column = column0 + at;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = row0 + lane / 4 + 8 * h;
      if (row >= g.rows || column >= g.columns) continue;
      int low = d[4 * j + 2 * h], high = d[4 * j + 2 * h + 1];
      u32 both = 0;
      if (EPILOGUE != RAW) {
        const float y0 = finish<LARGE>(low, columns.sum[at], rows[h], columns.scale[at], columns.bias[at]);
        const float y1 = finish<LARGE>(high, columns.sum[at + 1], rows[h], columns.scale[at + 1], columns.bias[at + 1]);
        if (OUT_SIZE == 2) both = pair_of(y0, y1);
        low = __float_as_int(y0), high = __float_as_int(y1);
      }
      char *to = (char *)g.out + ((long long)row * g.columns + column) * OUT_SIZE;
      const bool second = column + 1 < g.columns;
      if (OUT_SIZE == 2) {
        if (pairs) *(u32 *)to = both;
        else {
          *(unsigned short *)to = both;
          if (second) *(unsigned short *)(to + 2) = both >> 16;
        }
      } else if (pairs) {
        *(int2 *)to = make_int2(low, high);
      } else {
        *(int *)to = low;
        if (second) *(int *)(to + 4) = high;
      }
    }
  }
}

// The grid has a cluster for each tile; tiles of the same columns stand beside each other.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2)
    thin(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, void *out,
         const float *row_scale, const float *column_scale, const float *bias, const int *row_sum,
         const int *column_sum, int rows, int columns, int bytes, int length, float factor, int settled) {
  const Arguments g = {out, row_scale, column_scale, bias, row_sum, column_sum, rows, columns, bytes, length, factor};
  extern __shared__ __align__(1024) char raw[];  // the swizzle counts from 1024-byte boundaries
  const u32 base = (u32)__cvta_generic_to_shared(raw);
  const int thread = threadIdx.x, lane = thread % 32;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int down = (rows + TILE_M - 1) / TILE_M, tile = blockIdx.x / CLUSTER;
  const int row0 = tile % down * TILE_M, column0 = tile / down * TILE_N;
  // This block's share of K, in tiles of 128 bytes.
  const int all = (bytes + TILE_K - 1) / TILE_K, share = (all + CLUSTER - 1) / CLUSTER;
  const int first = min((int)rank * share, all), steps = min(share, all - first);
  auto load_b = [&](int k) {
    const u32 stage = k % STAGES;
    load(base + B_AT + stage * B_BYTES, &b_map, (first + k) * TILE_K, column0, base + FULL_AT + 8 * stage);
  };
  const int early = settled ? min(steps, STAGES) : 0;
  if (thread == CONSUMERS) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(base + FULL_AT + 8 * s, 1);
      barrier_init(base + EMPTY_AT + 8 * s, 4);
    }
    barrier_init(base + SENT_AT, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (CLUSTER > 1) barrier_expect(base + SENT_AT, SENT);
    for (int k = 0; k < early; k++) {
      barrier_expect(base + FULL_AT + 8 * k, A_BYTES + B_BYTES);
      load_b(k);
    }
  }
  __syncwarp();
  // All blocks have begun, and their barriers stand. A release here would be a fence of the whole GPU's memory.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
  wait_for_previous();
  if (thread >= CONSUMERS) {
    if (thread > CONSUMERS) return;
    for (int k = 0; k < steps; k++) {
      const u32 stage = k % STAGES, full = base + FULL_AT + 8 * stage;
      if (k >= STAGES) barrier_wait(base + EMPTY_AT + 8 * stage, (k / STAGES - 1) & 1);
      if (k >= early) {
        barrier_expect(full, A_BYTES + B_BYTES);
        load_b(k);
      }
      load(base + A_AT + stage * A_BYTES, &a_map, (first + k) * TILE_K, row0, full);
    }
    return;
  }
  // What the output needs, while the tiles come: a thread's column, and its two rows.
  Columns &mine = *(Columns *)(raw + COLUMNS_AT);
  const int column = column0 + (int)rank * WIDE, row = row0 + 16 * (thread / 32);
  Row own[2] = {};
  bool large = false;
  if (EPILOGUE != RAW) {
    if (thread < WIDE) {
      const bool inside = column + thread < columns;
      mine.scale[thread] = inside ? column_scale[column + thread] : 0.0f;
      mine.bias[thread] = inside && bias ? bias[column + thread] : 0.0f;
      mine.sum[thread] = EPILOGUE == CORRECTED && inside && column_sum ? column_sum[column + thread] : 0;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int at = row + lane / 4 + 8 * h;
      const bool inside = at < rows;
      const float scale = inside ? row_scale[at] : 0.0f;
      own[h] = row_of(g, scale, EPILOGUE == CORRECTED && inside && row_sum ? row_sum[at] : 0);
      large |= scale >= BIG;
    }
  }
  int d[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; i++) d[i] = 0;  // a block without a share of K
  for (int k = 0; k < steps; k++) {
    const u32 stage = k % STAGES;
    barrier_wait(base + FULL_AT + 8 * stage, (k / STAGES) & 1);
    const u64 a = descriptor(base + A_AT + stage * A_BYTES), b = descriptor(base + B_AT + stage * B_BYTES);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < TILE_K / 32; i++) multiply(d, a + 2 * i, b + 2 * i, 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    // The products of the stage before are done: give it back.
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (k > 0 && lane == 0) barrier_arrive(base + EMPTY_AT + 8 * ((k - 1) % STAGES), rank);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  int sums[OWN];
  if (CLUSTER > 1) {
    // From each block, four sums of each thread beside each other: neighbours write and read 16 bytes each.
#pragma unroll
    for (int to = 0; to < CLUSTER; to++)
#pragma unroll
      for (int i = 0; i < OWN / 4; i++) {
        const int at = OWN * to + 4 * i;
        send(base + SUMS_AT + ((rank * (OWN / 4) + i) * CONSUMERS + thread) * 16,
             make_int4(d[at], d[at + 1], d[at + 2], d[at + 3]), base + SENT_AT, to);
      }
    sent_wait(base + SENT_AT);
#pragma unroll
    for (int i = 0; i < OWN / 4; i++) {
      int4 total = make_int4(0, 0, 0, 0);
#pragma unroll
      for (int from = 0; from < CLUSTER; from++) {
        const int4 v = *(const int4 *)(raw + SUMS_AT + ((from * (OWN / 4) + i) * CONSUMERS + thread) * 16);
        total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
      }
      sums[4 * i] = total.x, sums[4 * i + 1] = total.y, sums[4 * i + 2] = total.z, sums[4 * i + 3] = total.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < OWN; i++) sums[i] = d[i];
  }
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");  // the columns stand
  if (__any_sync(0xFFFFFFFF, large)) write<true>(sums, g, own, mine, row, column);
  else write<false>(sums, g, own, mine, row, column);
}
