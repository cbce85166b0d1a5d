// y = A B^T for low-bit operands on Hopper's tensor cores (sm_90a), with the dequantizing epilogue.
//
// A: (rows, bytes) and B: (columns, bytes), row-major, stride a multiple of 16 bytes. A byte of K is
// one int8, or (BINARY) eight bits; both run as wgmma of 32 bytes of K, which lie alike in shared
// memory, so that one kernel serves both and the int8 form checks the layout of the other.
//
// One cluster: two blocks, one above the other in A, that share a tile of B: each loads half of it
// and sends it to both. One block: a producer warpgroup that keeps STAGES tiles of TILE_K bytes in
// flight through the bulk copy engine, and two consumer warpgroups of 64 x TILE_N int32 accumulators.
// The grid is persistent. A TEAM of two consumers shares a tile of 128 rows, which asks shared memory
// for the fewest bytes: int8 of long K, whose time is the tensor cores'. They wait for tiles of K alone,
// never for each other. In TEAMs of one, a consumer computes a tile of 64 rows while the other writes its
// own out: where K is short, and BINARY, which takes as long to write. (Which when: COSTS in product.py.)
//
// GATE: B is a gate's weight with a value's below it, and y = silu(gate) value of the two products, each
// rounded to the output's dtype as if it were written. Half of a tile's columns are the gate's, the other
// the same columns of the value, so that a thread has both.
//
// RESIDUAL: y = residual + the product, which is rounded to the output's dtype as if it were written.
// Not in place: rows that two tiles have would be added twice.
//
// ROTARY: half a head's width. The first g.turned columns of y, whole heads of queries and keys, are turned
// by the rotary embedding of their row's position, once the product is rounded to the output's dtype as if
// it were written. A pair of columns is half a head apart, in one tile, so that a thread has both.
#ifndef GATE
#define GATE 0
#endif
#ifndef RESIDUAL
#define RESIDUAL 0
#endif
#ifndef ROTARY
#define ROTARY 0
#endif
#include "product.cuh"
#include "bias.cuh"
#include "gate.cuh"
#include "overlap.cuh"

// TILE_N, TILE_K (bytes), TEAM, STAGES, CLUSTER and CONSUMERS come from product.py.
constexpr int WARPS = 4 * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
constexpr int TILE_M = 64 * TEAM, TEAMS = CONSUMERS / TEAM;
constexpr u32 A_BYTES = TILE_M * TILE_K, B_BYTES = TILE_N * TILE_K, HALF_B = B_BYTES / CLUSTER;
constexpr int SPAN = 128 / OUT_SIZE;                  // columns that a warp stages at a time
constexpr u32 STAGE_ROW = 128 + 8 * OUT_SIZE;         // padded: its stores and loads meet no bank twice
constexpr u32 STAGING = 16 * STAGE_ROW;               // bytes of a warp's 16 rows
constexpr u32 A_AT = 0, B_AT = STAGES * A_BYTES, OUT_AT = B_AT + STAGES * B_BYTES;
constexpr u32 COLUMNS_AT = OUT_AT + WARPS * STAGING;  // scales, biases and sums of a consumer's columns
constexpr u32 FULL_AT = COLUMNS_AT + CONSUMERS * 3 * 4 * TILE_N, EMPTY_AT = FULL_AT + 8 * STAGES;
constexpr u32 TURN_AT = EMPTY_AT + 8 * STAGES;        // a barrier for each team
// What a tile's epilogue asks for, and finding the next tile, by divisions then, took 900 cycles of a
// tile's 21000 between two tiles. They hide behind the tensor cores' work; of two teams, behind the
// other's, whose turn they must not put off.
constexpr bool BEHIND = TEAMS == 1;
constexpr int GROUP = 8;                              // pairs of row tiles that share the L2 cache
constexpr int PARTS = 1 + GATE, TILE_OUT = TILE_N / PARTS;  // products behind a column of y; of a tile
static_assert(!GATE || CLUSTER == 2 && OUT_SIZE == 2 && EPILOGUE != RAW, "a gate is of 16 bits, each block loads one part");
static_assert(!ROTARY || !GATE && !RESIDUAL && OUT_SIZE == 2 && EPILOGUE != RAW && ROTARY % 8 == 0 && TILE_N % (2 * ROTARY) == 0,
              "heads of 16 bits, whole in a tile, are turned");
static_assert(!RESIDUAL || !GATE && EPILOGUE != RAW, "a residual is added to y itself, of its dtype");

// How the tiles of a product are taken: pairs of row tiles in groups of GROUP, so that the blocks that run at a time
// share rows of A and of B. Divisors are multipliers and shifts: a block does nothing before it knows its first tile.
struct Divisor { u32 multiplier; int shift; };
struct Turns {
  int count, pairs, across;
  Divisor group, last;  // by GROUP * across, and by the pairs of the last group
};
static_assert(sizeof(Turns) == 28, "product.py says so");

__device__ __forceinline__ int quotient(int n, Divisor by) { return (int)((u64)(u32)n * by.multiplier >> by.shift); }

// The tile of a turn; behind the last turn, any.
__device__ __forceinline__ void place(int turn, const Turns &turns, int &pair, int &column) {
  const int group = quotient(turn, turns.group), rest = turn - group * GROUP * turns.across;
  const int left = turns.pairs - group * GROUP;
  column = rest / GROUP;
  if (left < GROUP) column = quotient(rest, turns.last);
  pair = group * GROUP + rest - column * min(left, GROUP);
}

// The first row of a tile, -1 where it has none. The last tile begins early rather than hang over: rows
// that two tiles have are written twice, the same bits. (Bulk copies of rows outside of a matrix took
// longer than those of rows inside.)
template <int TILE> __device__ __forceinline__ int first_row(int tile, int rows) {
  return tile * TILE >= rows ? -1 : min(tile * TILE, max(rows - TILE, 0));
}

// What the columns of a tile bring, in shared memory: read there once for each row.
struct Columns {
  float scale[TILE_N], bias[TILE_N];
  int sum[TILE_N];
};

// What a thread fetches for its tile's epilogue: columns for all, and its own two rows. Asked for
// before the main loop, or in its first step (BEHIND), and used after it.
struct Fetched {
  static constexpr int PER = TILE_N / 128;  // a consumer's threads take as many columns each
  float scale[PER], row_scale[2];
  u32 bias[PER];  // as it lies in memory
  int sum[PER], row_sum[2];

  __device__ __forceinline__ void ask(const Arguments &g, int row, int column0) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int at = i * 128 + threadIdx.x % 128, part = GATE ? at / TILE_OUT : 0;
      const int y = column0 + at - part * TILE_OUT, j = part * g.columns + y;
      const bool inside = y < g.columns;
      scale[i] = inside ? g.column_scale[j] : 0.0f;
      bias[i] = BIAS && inside ? bias_bits(g.bias, j, BIAS) : 0;
      sum[i] = EPILOGUE == CORRECTED && inside && g.column_sum ? g.column_sum[j] : 0;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const bool inside = row + 8 * h < g.rows;
      row_scale[h] = inside ? g.row_scale[row + 8 * h] : 0.0f;
      row_sum[h] = EPILOGUE == CORRECTED && inside && g.row_sum ? g.row_sum[row + 8 * h] : 0;
    }
  }

  __device__ __forceinline__ void put(Columns &to) const {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int at = i * 128 + threadIdx.x % 128;
      to.scale[at] = scale[i];
      if (BIAS) to.bias[at] = bias_of(bias[i], BIAS);
      if (EPILOGUE == CORRECTED) to.sum[at] = of_column(sum[i]);
    }
  }

  // The rows' parts; whether one is far.
  __device__ __forceinline__ bool own(const Arguments &g, Row (&rows)[2]) const {
    bool far = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      rows[h] = row_of(g, row_scale[h], row_sum[h]);
      far |= rows[h].scale.far != 0.0f;
    }
    return far;
  }
};

__device__ __forceinline__ void meet(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// An output as it lies in memory.
__device__ __forceinline__ u32 output_at(const char *at) {
  return OUT_SIZE == 2 ? *(const unsigned short *)at : *(const u32 *)at;
}

// residual + y in a word of outputs, one of 32 bits or two of 16: added in float32, rounded once.
__device__ __forceinline__ u32 sum_of(u32 residual, u32 y) {
  if (OUT_SIZE == 4) return __float_as_uint(__fadd_rn(__uint_as_float(residual), __uint_as_float(y)));
  return pair_of(__fadd_rn(bias_of(residual & 0xFFFF, OUT), bias_of(y & 0xFFFF, OUT)),
                 __fadd_rn(bias_of(residual >> 16, OUT), bias_of(y >> 16, OUT)));
}

__device__ __forceinline__ int4 sums_of(const int4 &residual, const int4 &y) {
  return make_int4(sum_of(residual.x, y.x), sum_of(residual.y, y.y), sum_of(residual.z, y.z), sum_of(residual.w, y.w));
}

// What a thread adds to the four vectors of a span that it stores: at this row, and every fourth below.
__device__ __forceinline__ void ask_residual(int4 (&to)[4], const Arguments &g, int row, int column) {
  const char *from = (const char *)g.residual + ((long long)row * g.columns + column) * OUT_SIZE;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (row + 4 * i < g.rows && column < g.columns) to[i] = *(const int4 *)(from + (long long)4 * i * g.columns * OUT_SIZE);
}

#include "rotary.cuh"

// Rows of y that are no whole vectors are written where rare ones are, so that instructions that are met lie close
// together: 1 to 4 percent of single bits. (With a gate nothing, of turned heads 0 to 5 percent more.)
constexpr bool APART = !GATE && !ROTARY;

// Writes a warp's 16 rows of a tile, SPAN columns at a time, through its own shared memory, so
// that rows are written 16 bytes a thread and 128 bytes a row.
template <bool RARE>
__device__ __forceinline__ void write(int (&d)[TILE_N / 2], const Arguments &g, const Row (&rows)[2], const Columns &columns, Angles &angles, char *stage, int row0, int column0) {
  const int lane = threadIdx.x % 32;
  // Whole vectors of 16 bytes, where every row begins at one.
  const bool vectors = (APART && !RARE) || g.columns % (16 / OUT_SIZE) == 0;
  // Groups of eight columns whose scales are held at a time; fewer where a residual takes registers.
  constexpr int READ = SPAN / 8 / (PARTS + (BIAS ? 3 : 1) * RESIDUAL);
#if ROTARY
  make_heads<RARE>(d, g, rows, columns, angles, column0);
#endif
#pragma unroll
  for (int c = 0; c < TILE_OUT / SPAN; c++) {
    int4 residual[4];
    // First, so that it comes while the values are made.
    if (RESIDUAL && vectors) ask_residual(residual, g, row0 + lane / 8, column0 + c * SPAN + lane % 8 * (16 / OUT_SIZE));
#pragma unroll
    for (int first = 0; first < SPAN / 8; first += READ) {
      // Read before anything is stored, or each read waits for the stores before it.
      float2 scale[PARTS][READ], bias[PARTS][READ];
      int2 sum[PARTS][READ];
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
#pragma unroll
        for (int j = 0; j < READ && EPILOGUE != RAW && !ROTARY; j++) {
          const int column = p * TILE_OUT + c * SPAN + 8 * (first + j) + 2 * (lane % 4);
          scale[p][j] = *(const float2 *)&columns.scale[column];
          bias[p][j] = BIAS ? *(const float2 *)&columns.bias[column] : make_float2(0.0f, 0.0f);
          sum[p][j] = EPILOGUE == CORRECTED ? *(const int2 *)&columns.sum[column] : make_int2(0, 0);
        }
      }
      u32 words[4];  // of outputs of 16 bits, for `store`
#pragma unroll
      for (int j = 0; j < READ; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          char *at = stage + (lane / 4 + 8 * h) * STAGE_ROW + (8 * (first + j) + 2 * (lane % 4)) * OUT_SIZE;
          u32 &word = words[j % 2 * 2 + h];
          float y[PARTS][2];
#pragma unroll
          for (int p = 0; p < PARTS; p++) {
            const int i = 4 * (p * (TILE_OUT / 8) + c * (SPAN / 8) + first + j) + 2 * h;
            if (ROTARY) {
              word = d[i];
            } else if (EPILOGUE == RAW) {
              *(int2 *)at = make_int2(d[i], d[i + 1]);
            } else {
              y[p][0] = finish<RARE>(d[i], sum[p][j].x, g.factor, rows[h], scale[p][j].x, bias[p][j].x);
              y[p][1] = finish<RARE>(d[i + 1], sum[p][j].y, g.factor, rows[h], scale[p][j].y, bias[p][j].y);
            }
          }
          if (GATE) {
            const u32 gate = pair_of(y[0][0], y[0][1]), value = pair_of(y[PARTS - 1][0], y[PARTS - 1][1]);
            word = pair_of(gated(bias_of(gate & 0xFFFF, OUT), bias_of(value & 0xFFFF, OUT)),
                           gated(bias_of(gate >> 16, OUT), bias_of(value >> 16, OUT)));
          } else if (EPILOGUE != RAW && !ROTARY) {
            if (OUT_SIZE == 2) word = pair_of(y[0][0], y[0][1]);
            else *(float2 *)at = make_float2(y[0][0], y[0][1]);
          }
        }
        if (OUT_SIZE == 2 && j % 2) store(words, stage, STAGE_ROW, first + j - 1);
      }
    }
    __syncwarp();
    const int column = column0 + c * SPAN + lane % 8 * (16 / OUT_SIZE);
    char *to = (char *)g.out + ((long long)(row0 + lane / 8) * g.columns + column) * OUT_SIZE;
    const char *from = stage + lane / 8 * STAGE_ROW + lane % 8 * 16;
    if (vectors) {
      int4 part[4];
#pragma unroll
      for (int i = 0; i < 4; i++) part[i] = *(const int4 *)(from + 4 * i * STAGE_ROW);
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (row0 + lane / 8 + 4 * i < g.rows && column < g.columns)
          *(int4 *)(to + (long long)4 * i * g.columns * OUT_SIZE) = RESIDUAL ? sums_of(residual[i], part[i]) : part[i];
    } else {
      for (int i = 0; i < 4 && row0 + lane / 8 + 4 * i < g.rows; i++) {
        const char *near = from + 4 * i * STAGE_ROW;
        char *far = to + (long long)4 * i * g.columns * OUT_SIZE;
        const char *beside = (const char *)g.residual + (far - (char *)g.out);
        for (int e = 0; e < 16 && column + e / OUT_SIZE < g.columns; e += OUT_SIZE) {
          const u32 y = RESIDUAL ? sum_of(output_at(beside + e), output_at(near + e)) : output_at(near + e);
          if (OUT_SIZE == 2) *(unsigned short *)(far + e) = y;
          else *(u32 *)(far + e) = y;
        }
      }
    }
    __syncwarp();
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
            void *out, const float *row_scale, const float *column_scale, const void *bias,
            const int *row_sum, const int *column_sum, int rows, int columns, int bytes, int length,
            float factor, int held, int settled, Turns turns
#if RESIDUAL
            , const void *residual) {
#elif ROTARY
            , const float *cosine, const float *sine, int positions, int turned) {
#else
            ) {
#endif
#if !RESIDUAL
  constexpr void *residual = nullptr;
#endif
#if !ROTARY
  constexpr float *cosine = nullptr, *sine = nullptr;
  constexpr int positions = 0, turned = 0;
#endif
  const Arguments g = {out, row_scale, column_scale, bias, row_sum, column_sum, rows, columns, bytes, length, factor, residual, cosine, sine, positions, turned};
  extern __shared__ __align__(1024) char raw[];  // the swizzle counts from 1024-byte boundaries
  const u32 base = (u32)__cvta_generic_to_shared(raw);
  const int group = threadIdx.x / 128;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(base + FULL_AT + 8 * s, 1);
      barrier_init(base + EMPTY_AT + 8 * s, CLUSTER * TEAM * 4);
    }
    for (int t = 0; t < TEAMS; t++) barrier_init(base + TURN_AT + 8 * t, 4 * TEAM);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // Relaxed, for the fence has released what is to be seen: a release here would be one of all memory.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  const int steps = (g.bytes + TILE_K - 1) / TILE_K;
  const int first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
  int pair, column;
  place(first, turns, pair, column);
  asm volatile("" : "+r"(pair), "+r"(column));  // here, while the other block comes
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (group == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 128 * CONSUMERS) {
      // No loop over K is unrolled here: instructions of a launch come from memory, or the L2 cache at best.
      const u32 a_bytes = held * TILE_K;
      // B passes the L2 cache once for each group of rows. Where there is but one it leaves the place to what is
      // read again: activations, and it seems instructions of kernels that are due again a layer later.
      const u64 policy = cache_policy(turns.pairs <= GROUP);
      // A tile of K of B, and room for what A adds to it: a block without rows has none.
      auto begin = [&](u32 at, int k, int column, bool there) {
        const u32 stage = at % STAGES, full = base + FULL_AT + 8 * stage;
        barrier_expect(full, B_BYTES + (there ? a_bytes : 0));
        load_to_all(base + B_AT + stage * B_BYTES + rank * HALF_B, &b_map, k * TILE_K,
                    column * TILE_OUT + rank * (GATE ? g.columns : TILE_N / CLUSTER), full, policy);
      };
      const int early = settled && first < turns.count ? min(steps, STAGES) : 0;
      u32 at = 0;  // tiles of K that were loaded before
      for (int turn = first; turn < turns.count; turn += stride) {
        if (turn != first) place(turn, turns, pair, column);
        const int row = first_row<TILE_M>(CLUSTER * pair + rank, g.rows);
        const bool there = row >= 0;
        if (turn == first) {
#pragma unroll 1
          for (int k = 0; k < early; k++) begin(k, k, column, there);
          wait_for_previous();  // which may have made A
        }
#pragma unroll 1
        for (int k = 0; k < steps; k++, at++) {
          const u32 stage = at % STAGES, full = base + FULL_AT + 8 * stage;
          if (turn != first || k >= early) {
            barrier_wait(base + EMPTY_AT + 8 * stage, ((at / STAGES) & 1) ^ 1);
            begin(at, k, column, there);
          }
          if (there) load(base + A_AT + stage * A_BYTES, &a_map, k * TILE_K, row, full);
        }
      }
      let_next_start();  // the quantizer behind it, whose blocks take the places of blocks that have ended
      // No block leaves while the other may still give back stages here. (What it loads to here, the
      // consumers have waited for.)
      const u32 held_back = at < STAGES ? at : STAGES;
#pragma unroll 1
      for (u32 k = at - held_back; k < at; k++) barrier_wait(base + EMPTY_AT + 8 * (k % STAGES), (k / STAGES) & 1);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int team = group / TEAM, member = group % TEAM;
    Columns &columns = ((Columns *)(raw + COLUMNS_AT))[group];
    wait_for_previous();
    u32 at = team * steps, tiles = 0;
    int d[TILE_N / 2];
    for (int turn = first + team * stride; turn < turns.count; turn += TEAMS * stride) {
      u32 last = 0;
      if (!BEHIND) place(turn, turns, pair, column);
      const int tile_row = first_row<TILE_M>(CLUSTER * pair + rank, g.rows), column0 = column * TILE_OUT;
      const int row0 = tile_row + 64 * member + 16 * (warp % 4);
      Fetched fetched;
      if (!BEHIND && EPILOGUE != RAW && tile_row >= 0) fetched.ask(g, row0 + lane / 4, column0);
      // The other team must have met all stages of the tile before: a barrier's parity tells a phase
      // from the next, and not from the one after.
      if (TEAMS > 1) barrier_wait(base + TURN_AT + 8 * team, (tiles++ + team + 1) & 1);
      if (tile_row < 0) {
        // Nothing but to give back the tiles of B that the other block shares.
        for (int k = 0; k < steps; k++, at++) {
          const u32 stage = at % STAGES;
          barrier_wait(base + FULL_AT + 8 * stage, (at / STAGES) & 1);
          __syncwarp();  // no lane is so late that it finds the phase after the next, and waits for ever
          if (lane < CLUSTER) barrier_arrive(base + EMPTY_AT + 8 * stage, lane);
        }
        if (TEAMS > 1 && lane == 0) barrier_arrive(base + TURN_AT + 8 * (team ^ 1), rank);
        at += (TEAMS - 1) * steps;
        if (BEHIND) place(turn + stride, turns, pair, column);
        continue;
      }
      for (int k = 0; k < steps; k++, at++) {
        const u32 stage = at % STAGES;
        barrier_wait(base + FULL_AT + 8 * stage, (at / STAGES) & 1);
        const u64 a = descriptor(base + A_AT + stage * A_BYTES + member * 64 * TILE_K);
        const u64 b = descriptor(base + B_AT + stage * B_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < TILE_K / 32; i++) multiply(d, a + 2 * i, b + 2 * i, k | i);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (BEHIND && k == 0) {
          // The last one finds no tile.
          if (EPILOGUE != RAW) fetched.ask(g, row0 + lane / 4, column0);
          place(turn + stride, turns, pair, column);
          asm volatile("" : "+r"(pair), "+r"(column));  // here, and not where they are read
        }
        // The products of the stage before are done: give it back to both blocks' producers.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k > 0 && lane < CLUSTER) barrier_arrive(base + EMPTY_AT + 8 * last, lane);
        last = stage;
      }
      if (TEAMS > 1 && lane == 0) barrier_arrive(base + TURN_AT + 8 * (team ^ 1), rank);
      Angles angles;
#if ROTARY
      angles.begin(g, row0 + lane / 4, column0);
#endif
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane < CLUSTER) barrier_arrive(base + EMPTY_AT + 8 * last, lane);
      at += (TEAMS - 1) * steps;
      Row own[2] = {};
      bool rare = APART && g.columns % (16 / OUT_SIZE) != 0;
      if (EPILOGUE != RAW) {
        meet(group);  // all have read the columns of the tile before
        fetched.put(columns);
        rare |= fetched.own(g, own) || g.bytes > LONG;
        meet(group);  // the columns stand
      }
      char *staging = raw + OUT_AT + warp * STAGING;
      if (__any_sync(0xFFFFFFFF, rare)) write<true>(d, g, own, columns, angles, staging, row0, column0);
      else write<false>(d, g, own, columns, angles, staging, row0, column0);
    }
  }
}
