// Who holds which blocks of which rows, a thread a block; and what the threads of a row exchange.
//
// Rows of a power of two below 32 blocks share a warp, each a segment of it; of 32 and more a row has a
// team of warps. Other rows would leave threads idle: they lie in PIECES, segments of powers of two.
//   More than A blocks and no more than 3/2 A, A a power of two: a team of three warps has 64 / A rows. Two
//   warps hold the first A blocks of each, the third the rest, in segments of A / 2: of 44 blocks two
//   rows, of 20 four.
//   More than 3/2 A, and below 32: each row has a segment of 2 A.
// A row's numbers do not depend on where among the team's it lies: sums are those of a tree over each
// piece, and of the two.
//
// Macros: PIECES.
constexpr int TILE = 32;  // blocks of a warp
constexpr int MAX_WARPS = 12;
constexpr u32 ALL = 0xFFFFFFFF;

struct Add { template <typename T> __device__ T operator()(T a, T b) const { return a + b; } };
struct Max { __device__ u32 operator()(u32 a, u32 b) const { return max(a, b); } };
struct Nothing { template <typename T> __device__ void operator()(int, T) const {} };

// Over the threads of a warp that share a row.
template <typename T, typename F> __device__ __forceinline__ T over_warp(T value, F f, int segment) {
  for (int i = 1; i < segment; i *= 2) value = f(value, __shfl_xor_sync(ALL, value, i));
  return value;
}

// Where a warp's threads are among the team's rows.
struct Place {
  int warps, part;     // of the team; the warp's number among them
  int segment;         // threads of the warp that share a row
  int rows, row;       // of the team; the warp's first
  int first, columns;  // block of a row; blocks of it that there are

  __device__ __forceinline__ Place(int warps, int part, int segment_, int blocks)
      : warps(warps), part(part), segment(segment_), rows(1), row(0), first(0), columns(blocks) {
    if (!PIECES) return;
    rows = (warps > 1 ? 2 * TILE : TILE) / segment_;
    if (part < 2) {
      row = part * (TILE / segment_);
      columns = min(segment_, blocks);
    } else {
      segment = segment_ / 2, first = segment_, columns = blocks - segment_;
    }
  }
  __device__ __forceinline__ int own() const { return row + threadIdx.x % 32 / segment; }  // row of a thread
};

// Where a warp's blocks lie among those of all rows, one behind the other.
struct Held {
  i64 start;      // of its first
  int count;      // how many it has, or in PIECES rows of the warp
  int log, mask;  // of a segment
  int blocks, columns;

  __device__ __forceinline__ bool there(int block) const {
    return PIECES ? (block & mask) < columns && (block >> log) < count : block < count;
  }
  __device__ __forceinline__ i64 at(int block) const {
    return PIECES ? start + (block >> log) * blocks + (block & mask) : start + block;
  }
};

// Two sets of slots in turn: who leaves a number for a turn knows that all have fetched those of the turn
// before the last. A warp's number stands in its slot; of PIECES those of a row beside each other.
template <typename T> struct Exchange {
  unsigned long long barrier;
  T slots[2][PIECES ? 2 * TILE : MAX_WARPS];

  __device__ u32 at() { return (u32)__cvta_generic_to_shared(&barrier); }
  __device__ void init(int warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at()), "r"(warps) : "memory");
  }
  __device__ void arrive() {
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(at()) : "memory");
  }

  // A thread's number; what it returns is for `fetch`.
  template <typename F> __device__ __forceinline__ T leave(T value, F f, int turn, const Place &p) {
    value = over_warp(value, f, p.segment);
    if (p.warps > 1) {
      if (PIECES) {
        if (threadIdx.x % p.segment == 0) slots[turn & 1][p.part / 2 * TILE + p.own()] = value;
        __syncwarp();  // also what they fetched before lies before the arrival
        if (threadIdx.x % 32 == 0) arrive();
      } else if (threadIdx.x % 32 == 0) {
        slots[turn & 1][p.part] = value;
        arrive();
      }
    }
    return value;
  }

  // The number of a thread's row, once all have left theirs. each(row, number): of all rows of a team in
  // PIECES, each by one thread of the warp.
  template <typename F, typename G = Nothing>
  __device__ __forceinline__ T fetch(T left, F f, int turn, const Place &p, G each = G()) {
    if (p.warps == 1) return left;
    asm volatile(
        "{.reg .pred done;\nagain:\n mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
        " @!done bra again;\n}" ::"r"(at()), "r"(turn & 1) : "memory");
    const int lane = threadIdx.x % 32;
    T value = T();
    if (PIECES) {
      if (lane < p.rows) {
        value = f(slots[turn & 1][lane], slots[turn & 1][TILE + lane]);
        each(lane, value);
      }
      return __shfl_sync(ALL, value, p.own());
    }
    // Of one lane, that which arrives: its reads lie before its arrival at the next turn.
    if (lane == 0) {
      value = slots[turn & 1][0];
      for (int i = 1; i < p.warps; i++) value = f(value, slots[turn & 1][i]);
    }
    return __shfl_sync(ALL, value, 0);
  }
};
