// What the threads that hold a row, or rows, have in common: a number for each row.
//
// Where a team has one row (ROWS = 1) each warp makes one number of its threads' and leaves it, and each
// fetches those of all. (Rows that share a warp need no more than the warp.) In a team of several rows, of
// one warp or more, a warp may have parts of several: each thread leaves its own number, and each warp
// makes those of all rows of them, LANES a row, in the order in which a row by itself adds: what a row gets
// depends neither on where among the team's it lies nor on how many rows a team has.
//
// Macros: ROWS, WARPS, TILE, as in blocks.cu.
constexpr int MAX_WARPS = 12;
constexpr int LANES = ROWS > 4 ? 4 : ROWS > 2 ? 8 : 16;
constexpr u32 ALL = 0xFFFFFFFF;

struct Add { template <typename T> __device__ T operator()(T a, T b) const { return a + b; } };
struct Max { __device__ u32 operator()(u32 a, u32 b) const { return max(a, b); } };

// Over the threads of a warp that share a row: `segment`, a power of two.
template <typename T, typename F> __device__ __forceinline__ T over_warp(T value, F f, int segment) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2)
    if (i < segment) value = f(value, __shfl_xor_sync(ALL, value, i));
  return value;
}

// Where a thread is: warps of its team, its warp among them, threads of a warp that share a row, blocks of
// a row, and its row among the team's.
struct Place { int warps, part, segment, blocks, row; };

struct Nothing { template <typename T> __device__ void operator()(int, T) const {} };

// Two sets of slots in turn: who leaves a number for a turn knows that all have fetched those of the turn
// before the last, since it fetched those of the last.
//
// A warp may skip a fetch if, before its next turn here, all fetch from another exchange, in which all arrive
// after their turn here (of the codes' sums in blocks.cu: from that of the squares). Then all have arrived for
// the turn that it skipped, and have fetched: no slot is still read, no phase gets two arrivals of a warp, and
// the next fetch finds the barrier in its own phase or the next, which the parity tells apart.
template <typename T, bool ORDERED = false> struct Exchange {
  unsigned long long barrier;
  T slots[2][ROWS > 1 ? TILE * WARPS : MAX_WARPS];

  __device__ u32 at() { return (u32)__cvta_generic_to_shared(&barrier); }
  __device__ void init(int warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at()), "r"(ROWS > 1 ? 32 * warps : warps) : "memory");
  }
  __device__ void arrive() {
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(at()) : "memory");
  }

  // A thread's number; what it returns is for `fetch`.
  template <typename F> __device__ __forceinline__ T leave(T value, F f, int turn, const Place &p) {
    if (ROWS > 1) {
      if (TILE == 32 || threadIdx.x % 32 < TILE) slots[turn & 1][TILE * p.part + threadIdx.x % 32] = value;
      arrive();  // each lane for itself: what it fetched before lies before its arrival, too
      return value;
    }
    value = over_warp(value, f, WARPS ? 32 : p.segment);
    if (WARPS > 1) {
      if (threadIdx.x % 32 == 0) {
        slots[turn & 1][p.part] = value;
        arrive();
      }
    }
    return value;
  }

  // The number of a thread's row, once all have left theirs. each(row, number): of a team of several rows,
  // of each by some threads of the warp; row may be one that there is not.
  template <typename F, typename G = Nothing>
  __device__ __forceinline__ T fetch(T left, F f, int turn, const Place &p, G each = G()) {
    if (ROWS == 1 && WARPS <= 1) return left;
    asm volatile(
        "{.reg .pred done;\nagain:\n mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
        " @!done bra again;\n}" ::"r"(at()), "r"(turn & 1) : "memory");
    T own = T();
    if (ROWS > 1) {
      int lane = threadIdx.x % 32;
      asm volatile("" : "+r"(lane));  // or all places are kept from row to row, and more is spilled
      const int row = lane / LANES;
      constexpr int MOST = TILE * WARPS / ROWS;  // blocks of a row
      // Of floats in the order of a row that has warps of its own: a tree over each TILE blocks, and these one
      // by one. What has no order takes fewer instructions.
      constexpr int SPAN = ORDERED ? TILE : MOST;
#pragma unroll
      for (int first = 0; first < MOST; first += SPAN) {
        T part[SPAN / LANES + 1] = {};
#pragma unroll
        for (int g = 0; g * LANES < SPAN && first + g * LANES < MOST; g++) {
          const int block = first + g * LANES + lane % LANES;
          T value = T();
          if (row < ROWS && block < p.blocks) value = slots[turn & 1][row * p.blocks + block];
          if (ORDERED) part[g] = over_warp(value, f, LANES);
          else part[0] = f(part[0], value);
        }
#pragma unroll
        for (int step = 1; ORDERED && step < TILE / LANES; step *= 2)
#pragma unroll
          for (int g = 0; g < TILE / LANES; g += 2 * step)
            if (first + (g + step) * LANES < MOST) part[g] = f(part[g], part[g + step]);
        own = f(own, ORDERED ? part[0] : over_warp(part[0], f, LANES));
      }
      each(row, own);
      return __shfl_sync(ALL, own, p.row * LANES);
    }
    // Of one lane, that which arrives: its reads lie before its arrival at the next turn.
    if (threadIdx.x % 32 == 0) {
      own = slots[turn & 1][0];
      for (int i = 1; i < p.warps; i++) own = f(own, slots[turn & 1][i]);
    }
    return __shfl_sync(ALL, own, 0);
  }
};
