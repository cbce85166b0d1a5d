// The quantizer for Hadamard blocks of 128, eight of them at a time by a warp: transform, RMS, codes, mask,
// packing in one pass.
//
// A warp holds TILE blocks, 16 or 32, in GROUPS of eight. Of an element's index in its block, bits 0 and 3 to 5 are
// transformed by a product on the tensor cores (`rotate.cuh`), of the inputs' 16 bits as they are, and bits
// 1, 2 and 6 by additions in a lane: no shuffle. Lane 4 r + q reads of block r of a group the chunks of
// eight elements q + 4 i, and has, transformed, elements 64 p + 8 r and the next seven of blocks 2 q and
// 2 q + 1. float32 has no product: five stages in a lane, and two more once pieces have changed hands.
// Sums of squares are products as well, but of float32 (`squares_of_group`). Sums and scales of a block are held by
// the lane of its number: `of_blocks` and `counted` bring them there.
//
// A team of `warps` warps holds a row. Where a row alone would leave many threads idle it holds ROWS of
// them, whose blocks lie one behind the other: a warp may have parts of several. Where `segment` < TILE a
// warp holds TILE / segment rows. (Which is when: `Shape` in blocks.py.)
// Blocks wait in shared memory, where each lane of 16 bits finds what it has copied itself. The next unit's are
// asked for as soon as a group's are used up; a second input's come to registers, a group ahead.
//
// Formulas and special rows are those of quantize.py. A row whose sum of squares is far from 1 (or
// zero, or not finite) is brought near 1 by a power of two: the RARE path.
//
// A prologue makes the rows, in float32 and rounded once to the inputs' dtype, which is of 16 bits:
//   GATED   silu(gate) value
//   NORMED  h weight / sqrt(mean(h^2) + eps)
//   ADDED   the same of h = x + beside, rounded, which is written too
// Inputs may be rows of a wider tensor.
//
// Macros: REGISTERS (of a thread), TILE, IN (the input's dtype), LEVELS, EDGE (mask by threshold; else all
// ones), FORM, BITS, PROLOGUE, SHOWN (the rows that a prologue made are written, too), and SAVED: of
// integers, the bits an entry, 2 or 4, in which the codes are written as well; or 0. ROWS: of a team; WARPS:
// of a team of several rows; of one, 0 where rows share a warp, 1, or 2 for as many as `warps` says.
#define PLAIN 0     // no prologue
#define GATED 1
#define NORMED 2
#define ADDED 3
typedef unsigned int u32;
typedef long long i64;

#include "halves.cuh"
#define HALF (IN == FLOAT16)
#include "codes.cuh"
#include "exchange.cuh"
#include "gate.cuh"
#include "overlap.cuh"
#include "rotate.cuh"

constexpr int IN_BITS = IN == FLOAT32 ? 32 : 16;
constexpr int ORDER = 128, CHUNKS = IN_BITS;  // elements of a block; its 16-byte chunks
constexpr int GROUP = 8, GROUPS = TILE / GROUP;  // blocks of a group; groups of a warp
constexpr int WORD = 32 / IN_BITS;            // elements of 4 bytes
constexpr int WORDS = 32 / WORD;              // of a lane and a group
constexpr bool WIDE = IN == FLOAT32;
constexpr bool NORMS = PROLOGUE == NORMED || PROLOGUE == ADDED;
constexpr int MAX_TEAMS = ROWS > 1 ? 4 / WARPS : 4;
constexpr int SUMS = NORMS ? 2 : 1;  // turns of `first` that a unit takes: sums of squares
constexpr int GATHER = NARROW ? NARROW : 1;  // bits an element of what is gathered in shared memory
static_assert(PROLOGUE == PLAIN || IN != FLOAT32, "a prologue takes 16 bits");

// 16 bytes, SPAN bytes beyond an address, if `wanted`; else nothing.
template <int SPAN> __device__ __forceinline__ void copy_in(u32 to, const void *from, bool wanted) {
  asm volatile("{.reg .pred p;\n setp.ne.u32 p, %2, 0;\n @p cp.async.cg.shared.global [%0], [%1 + %3], 16;\n}" ::"r"(to),
               "l"(from), "r"((u32)wanted), "n"(SPAN)
               : "memory");
}

// 16 bytes, if `wanted`; else what was there. Volatile: asked for where it is written.
__device__ __forceinline__ void load(u32 &a, u32 &b, u32 &c, u32 &d, const uint4 *from, bool wanted) {
  asm volatile("{.reg .pred p;\n setp.ne.u32 p, %5, 0;\n @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(a), "+r"(b), "+r"(c), "+r"(d)
               : "l"(from), "r"((u32)wanted));
}

// What a prologue makes of an element and what is beside it.
struct Gate {
  __device__ float operator()(float a, float b) const { return PROLOGUE == GATED ? gated(a, b) : __fadd_rn(a, b); }
};
struct Norm {
  float inverse;
  __device__ float operator()(float h, float weight) const { return __fmul_rn(__fmul_rn(h, inverse), weight); }
};

__device__ __forceinline__ void put(u32 (&w)[WORDS], int i, const uint4 &v) {
  w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
}

// Puts f(own, beside) of a lane's words of a group where they lie, and to `shown`, its chunks there, or null.
template <typename F> __device__ __forceinline__ void make(uint4 *own, const u32 (&beside)[WORDS], uint4 *shown, F f) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 v = own[32 * i];
    u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
      w[k] = pair_of(f(low(w[k]), low(beside[4 * i + k])), f(high(w[k]), high(beside[4 * i + k])));
    own[32 * i] = make_uint4(w[0], w[1], w[2], w[3]);
    if (shown) shown[4 * i] = own[32 * i];
  }
}

__device__ __forceinline__ float squares_of(const u32 (&w)[WORDS], float factor) {
  float s[4] = {};
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    const float a = low(w[i]) * factor, b = WORD == 2 ? high(w[i]) * factor : 0.0f;
    s[i % 4] = fmaf(a, a, s[i % 4]);
    if (WORD == 2) s[i % 4] = fmaf(b, b, s[i % 4]);
  }
  return (s[0] + s[1]) + (s[2] + s[3]);
}

__device__ __forceinline__ u32 top_of(const u32 (&w)[WORDS]) {
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    top = max(top, __float_as_uint(low(w[i])) & 0x7FFFFFFF);
    if (WORD == 2) top = max(top, __float_as_uint(high(w[i])) & 0x7FFFFFFF);
  }
  return top;
}

// value(g): what each lane of four has of a block of group g; f over those lanes, of block `lane`.
template <int UNROLL, typename T, typename G, typename F> __device__ __forceinline__ T of_blocks(G value, F f, int lane) {
  T own = T();
#pragma unroll UNROLL
  for (int g = 0; g < GROUPS; g++) {
    T v = value(g);
    v = f(v, __shfl_xor_sync(ALL, v, 1));
    v = f(v, __shfl_xor_sync(ALL, v, 2));
    if (lane % 4 == g) own = v;
  }
  return __shfl_sync(ALL, own, 4 * (lane % GROUP) + lane / GROUP);
}

// Where chunk c of block r of a group of float32 lies: of those that are read or written at a time, by four lanes
// for each of two blocks, none meet in a bank. Chunks 8 q + i, q + 4 i, or 2 q + 8 i and one further, for some i:
// turned(r, a ^ b) is turned(r, a) ^ turned(0, b), so that a lane finds its own for one exclusive or each.
__device__ __forceinline__ constexpr int turned(int r, int c) { return 32 * r ^ c ^ c / 8 ^ 5 * (r & 1); }

// What a lane has of a group, transformed, times 128^0.5: y[8 c + e], e of eight in a row, c of four such.
// 16 bits: see `transform_group`. float32: of block r, from 32 c + 8 q.
__device__ __forceinline__ void transform(float (&y)[32], const u32 (&w)[WORDS], const u32 (&signs)[4], uint4 *tile) {
#if IN == FLOAT32
  // Elements 32 q and on; what index bits 3 and 4 tell and what 5 and 6 change places, through the tile, where a
  // lane first puts what it has read.
  const int q = threadIdx.x % 4, r = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 32; i++) y[i] = __uint_as_float(w[i]);
  stage<1>(y), stage<2>(y), stage<4>(y), stage<8>(y), stage<16>(y);
#pragma unroll
  for (int i = 0; i < 8; i++)
    ((float4 *)tile)[turned(r, 8 * q) ^ turned(0, i)] = make_float4(y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float4 v = ((const float4 *)tile)[turned(r, 2 * q) ^ turned(0, 8 * (i / 2) + i % 2)];
    y[4 * i] = v.x, y[4 * i + 1] = v.y, y[4 * i + 2] = v.z, y[4 * i + 3] = v.w;
  }
  __syncwarp();
  stage<8>(y), stage<16>(y);
#else
  transform_group(y, w, signs);
#endif
}

// Where a warp's lanes gather what is narrow: for each block 16 bytes of mask, and NARROW bits an element.
struct Gathered { u32 mask[TILE][4]; u32 codes[TILE][4 * GATHER]; };

// What becomes of eight elements in a row, v(e): chunk c of a block, whose mask and narrow codes are gathered
// at `mask` and `narrow`; the others' place is `to`, and that of what is saved in 4 bits `saved`. Returns the
// sum of their codes, counted from 0, unless those are gathered.
struct Scaled { float inverse, above, sigma; };
template <typename F>
__device__ __forceinline__ u32 emit(F v, const Scaled &by, float step, bool inside, unsigned char *mask,
                                    unsigned char *narrow, char *to, char *saved) {
  if (EDGE) *mask = signs_of([&](int e) { return fabsf(v(e)) - by.above; });
  if (OUT_BITS == 1) {
    // A negative zero is not negative. (Sums of the tensor cores are none: they begin at 0. Nor are those of rows
    // that are computed again.)
    *narrow = ~signs_of([&](int e) { return WIDE ? v(e) + 0.0f : v(e); });
    return 0;
  }
  if constexpr (FORM == VALUES) {
    u32 words[8 / WORD];
#pragma unroll
    for (int e = 7; e >= 0; e--) {
      const float value = value_of(v(e), by.inverse, step, by.sigma);
      // Of 16-bit floats the second comes first, and waits for the first in the word.
      u32 &word = words[e / WORD];
      word = WORD == 1 || e % 2 ? __float_as_uint(value) : pair_of(value, __uint_as_float(word));
    }
    if (inside)
      for (int i = 0; i < 2 / WORD; i++)
        ((uint4 *)to)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    return 0;
  } else {
    const u32 codes[2] = {codes_of(v(0), v(1), v(2), v(3), by.inverse), codes_of(v(4), v(5), v(6), v(7), by.inverse)};
    if (NARROW == 2) *(unsigned short *)narrow = in_twos(codes[0], codes[1]);
    if (inside) {
      if (SAVED == 4) *(u32 *)saved = in_fours(codes[0], codes[1]);
      if (FORM == PACKED && BITS == 4) *(u32 *)to = in_fours(codes[0], codes[1]);
      if (FORM == PACKED && BITS == 8) *(uint2 *)to = make_uint2(codes[0], codes[1]);
      if (FORM != PACKED) *(uint2 *)to = make_uint2(integers_of(codes[0]), integers_of(codes[1]));
    }
    return !COUNTS ? 0 : __dp4a(codes[1], 0x01010101u, __dp4a(codes[0], 0x01010101u, 0u));
  }
}

// x: (rows, 128 blocks) as chunks; scale (rows,), sums (rows,) or null; out, mask or null and, with SAVED,
// saved by blocks.
// units: what a team holds at a time: a row; or ROWS rows, of which the last unit may have fewer; or, where
// segment < TILE, TILE blocks. total: blocks of all rows; blocks: of a row; warps: of a team; teams: of a
// thread block. beside: the second input, or null; shown: like x, or null; pitch: chunks from a row of x,
// or of `beside`, to the next; weight: a row; added: h, as rows.
extern "C" __global__ void __maxnreg__(REGISTERS)
    quantize(const uint4 *x, float *scale, char *out, uint4 *mask, int *sums, char *saved, i64 units, i64 total,
             int blocks, int warps, int segment, int teams, float step, float threshold
#if PROLOGUE != PLAIN
             , const uint4 *beside, uint4 *shown, int x_pitch, int beside_pitch, const uint4 *weight, uint4 *added,
             float eps
#endif
    ) {
  extern __shared__ uint4 tiles[];  // of each warp; then what each gathers
  __shared__ Exchange<float, true> first[MAX_TEAMS], second[MAX_TEAMS];
  __shared__ Exchange<u32> largest[MAX_TEAMS];
  __shared__ Exchange<int> counts[MAX_TEAMS];
  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, eighth = lane / 4;
  const int mine = WIDE ? eighth : 2 * quad, piece = WIDE ? quad : eighth;  // see `transform`
  const int team = ROWS == 1 && WARPS <= 1 ? warp : warp / warps, part = warp - team * warps;
  // Of 16 bits a lane's chunks lie 32 apart, and no other lane sees them; see `turned`.
  constexpr int SLOT = GROUP * CHUNKS;  // chunks of a group
  uint4 *const tile = tiles + warp * GROUPS * SLOT;
  Gathered &gathered = ((Gathered *)(tiles + blockDim.x / 32 * GROUPS * SLOT))[warp];
  const i64 stride = (i64)gridDim.x * teams;
  constexpr bool packs = ROWS == 1 && WARPS == 0;  // rows into a warp
  constexpr bool several = ROWS > 1 || packs;
  // Blocks lie one behind the other whatever their rows. The first that a warp holds of its next unit is `hop`
  // further on; how many it holds follows from where it starts.
  const int whole = packs ? TILE : ROWS * blocks;
  const i64 hop = stride * whole;
  auto count_of = [&](i64 start) {
    if (!several) return max(min(blocks - part * TILE, TILE), 0);
    const int most = packs ? TILE : min(whole - part * TILE, TILE);
    return (int)max(min(total - start, (i64)most), 0ll);
  };
  // Of a block of the team, its row among the team's; of one behind them the last.
  auto row_of = [&](int block) {
    int row = 0;
#pragma unroll
    for (int r = 1; r < ROWS; r++) row += block >= r * blocks;
    return row;
  };
  const Place at{warps, part, segment, blocks, row_of(part * TILE + lane)};
  // Of a number that each lane has of its block, that of another; of a row alone all are the same.
  auto of_block = [&](float value, int block) { return several ? __shfl_sync(ALL, value, block) : value; };
  const int log = __ffs(segment) - 1;
#if PROLOGUE != PLAIN
  // The chunks of block b of a unit's in a tensor with a pitch.
  auto pitched = [&](const uint4 *base, int pitch, i64 unit, int b) {
    if (packs) return base + unit * (TILE >> log) * pitch + (u32)((b >> log) * pitch + (b & (segment - 1)) * CHUNKS);
    const int row = row_of(part * TILE + b);
    return base + unit * ROWS * pitch + (u32)(row * pitch + (part * TILE + b - row * blocks) * CHUNKS);
  };
#endif
  // Asks for chunks q + 4 i of a lane's block, from chunk q on, of a group that will lie at `slot`.
  auto ask = [&](const uint4 *from, uint4 *slot, bool wanted) {
#if IN == FLOAT32
#define TO(i) slot + (turned(eighth, quad) ^ turned(0, 4 * (i)))
#else
#define TO(i) slot + lane + 32 * (i)
#endif
#define COPY(i) copy_in<64 * (i)>((u32)__cvta_generic_to_shared(TO(i)), from, wanted)
    COPY(0), COPY(1), COPY(2), COPY(3);
    if (WIDE) COPY(4), COPY(5), COPY(6), COPY(7);
#undef COPY
#undef TO
  };
  auto fetch = [&](i64 unit, i64 start, int count, int g) {
    const int b = GROUP * g + eighth;
#if PROLOGUE == PLAIN
    const uint4 *from = x + (start + b) * CHUNKS;
#else
    const uint4 *from = pitched(x, x_pitch, unit, b);
#endif
    ask(from + quad, tile + g * SLOT, b < count);
  };
#if PROLOGUE == GATED || PROLOGUE == ADDED
  u32 other[WORDS] = {};  // of the second input
  auto fetch_other = [&](i64 unit, int count, int g) {
    const int b = GROUP * g + eighth;
    const uint4 *from = pitched(beside, beside_pitch, unit, b) + quad;
#pragma unroll
    for (int i = 0; i < 4; i++)
      load(other[4 * i], other[4 * i + 1], other[4 * i + 2], other[4 * i + 3], from + 4 * i, b < count);
  };
#endif
  auto words_of = [&](u32 (&w)[WORDS], int g) {
    const uint4 *const slot = tile + g * SLOT;
#pragma unroll
    for (int i = 0; i < CHUNKS / 4; i++)
      put(w, i, WIDE ? slot[turned(eighth, 8 * quad) ^ turned(0, i)] : slot[lane + 32 * i]);
  };
  u32 signs[4];
  make_signs(signs, lane);
  if (ROWS > 1 || WARPS > 1) {
    if (threadIdx.x < teams) {
      first[threadIdx.x].init(warps), second[threadIdx.x].init(warps);
      largest[threadIdx.x].init(warps), counts[threadIdx.x].init(warps);
    }
    __syncthreads();
  }
  int turn = 0, rares = 0;
  i64 unit = (i64)blockIdx.x * teams + team, start = unit * whole + (packs ? 0 : part * TILE);
  int count = unit < units ? count_of(start) : 0;
#pragma unroll 1
  for (int g = 0; g < GROUPS; g++) fetch(unit, start, count, g);
#if PROLOGUE == GATED || PROLOGUE == ADDED
  fetch_other(unit, count, 0);
#endif
  asm volatile("cp.async.commit_group;" ::: "memory");
  const float mean = 1.0f / (128.0f * blocks);
  for (; unit < units; unit += stride, turn++) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    if (WIDE) __syncwarp();  // others copied, too
    const bool inside = lane < count;
    const i64 ahead = start + hop;
    const int wanted = unit + stride < units ? count_of(ahead) : 0;
#if PROLOGUE == GATED || PROLOGUE == ADDED
#pragma unroll 1
    for (int g = 0; g < GROUPS; g++) {
      u32 w[WORDS];
#pragma unroll
      for (int i = 0; i < WORDS; i++) w[i] = other[i];
      const bool last = g == GROUPS - 1;
      fetch_other(last ? unit + stride : unit, last ? wanted : count, last ? 0 : g + 1);
      const int b = GROUP * g + eighth;
      uint4 *const shows = PROLOGUE == ADDED ? added : SHOWN ? shown : nullptr;
      make(tile + g * SLOT + lane, w, b < count && shows ? shows + (start + b) * CHUNKS + quad : nullptr, Gate());
    }
#endif
    // Of block `lane`, as it lies in the tile.
    auto squares = [&]() {
#if IN == FLOAT32
      return of_blocks<GROUPS, float>([&](int g) {
        u32 w[WORDS];
        words_of(w, g);
        return squares_of(w, 1.0f);
      }, Add(), lane);
#else
      float sum = 0.0f;
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        u32 w[WORDS];
        words_of(w, g);
        const float found = __shfl_sync(ALL, squares_of_group(w), 4 * (lane % GROUP) + lane % GROUP / 2);
        if (lane / GROUP == g) sum = found;
      }
      return sum;
#endif
    };
#if PROLOGUE != PLAIN
    if (NORMS) {
      float sum = squares();
      sum = first[team].leave(inside ? sum : 0.0f, Add(), SUMS * turn, at);
      sum = first[team].fetch(sum, Add(), SUMS * turn, at);
      const float root = 1.0f / sqrtf(sum * mean + eps);
#pragma unroll 1
      for (int g = 0; g < GROUPS; g++) {
        const int b = GROUP * g + eighth, of_team = part * TILE + b;
        const int block = b >= count ? 0 : packs ? b & (segment - 1) : of_team - row_of(of_team) * blocks;
        const float inverse = of_block(root, b);
        u32 w[WORDS];
#pragma unroll
        for (int i = 0; i < 4; i++) put(w, i, weight[block * CHUNKS + quad + 4 * i]);
        uint4 *const shows = SHOWN && b < count ? shown + (start + b) * CHUNKS + quad : nullptr;
        make(tile + g * SLOT + lane, w, shows, Norm{inverse});
      }
    }
#endif
    float s = squares();
    s = first[team].leave(inside ? s : 0.0f, Add(), SUMS * turn + SUMS - 1, at);
    bool far = false;  // a row of a team of several, whichever
    s = first[team].fetch(s, Add(), SUMS * turn + SUMS - 1, at, [&](int row, float sum) {
      far = row < ROWS && !(sum >= SMALL && sum <= GREAT) && row * blocks < total - unit * whole;
    });
    float sigma = sqrtf(s * mean), inner = sigma;
    // Powers of two, as floats count them: of a row, and of block `lane`, which 16 bits hold at its own.
    int field = 127, block_field = 127;
    // Rows that share a warp, or a team, are computed again together. Those that had no need get the same
    // bits: a row's numbers are its own, whatever lies beside it.
    const bool rare = !(s >= SMALL && s <= GREAT);
    const bool again = ROWS > 1 ? __any_sync(ALL, far) : packs ? __any_sync(ALL, rare && inside) : rare;
    if (again) {
      const u32 own_top = of_blocks<1, u32>([&](int g) {
        u32 w[WORDS];
        words_of(w, g);
        return top_of(w);
      }, Max(), lane);
      u32 top = largest[team].leave(inside ? own_top : 0, Max(), rares, at);
      top = largest[team].fetch(top, Max(), rares, at);
      if (rare) field = min(max((int)(top >> 23), 1), 253), block_field = min(max((int)(own_top >> 23), 1), 253);
      const float down = power(254 - field);
      float sum = of_blocks<1, float>([&](int g) {
        u32 w[WORDS];
        words_of(w, g);
        return squares_of(w, of_block(down, GROUP * g + eighth));
      }, Add(), lane);
      sum = second[team].leave(inside ? sum : 0.0f, Add(), rares, at);
      sum = second[team].fetch(sum, Add(), rares++, at);
      if (rare) s = sum;
      sigma = fminf(sqrtf(s * mean) * power(field), LARGEST);
      inner = sigma * down;
      if (top >= 0x7F800000) sigma = __int_as_float(0x7FC00000), inner = 0.0f;
    }
    const float inverse = inner > 0.0f ? NORM / (inner * step) : 0.0f;
    // Zeros lie within the limit, and all within one that float32 lacks; nothing of a row that is not finite does.
    const float limit = fminf(threshold * inner * ROOT, LARGEST);
    const float above = sigma == sigma ? __uint_as_float(__float_as_uint(limit) + 1) : -1.0f;
    // Of the group, from which all else is so many bytes away.
    char *to = out + (start + mine) * (ORDER * OUT_BITS / 8) + piece * OUT_BITS;
    char *kept = saved + (start + mine) * (ORDER / 2) + 4 * piece;
    unsigned char *masks = (unsigned char *)gathered.mask[mine] + piece;
    unsigned char *narrow = (unsigned char *)gathered.codes[mine] + GATHER * piece;
    u32 counted = 0;  // of codes, of blocks 2 q (low half) and 2 q + 1 of the group of block `lane`
    const uint4 *from = x + (ahead + eighth) * CHUNKS + quad;
    auto code = [&](const bool rescaled) {
      // Groups that it lacks are not computed; nor asked for, since its next unit has no more.
#pragma unroll 1
      for (int g = 0; g * GROUP < count; g++) {
        u32 w[WORDS], in_group = 0;
        words_of(w, g);
        auto ask_ahead = [&]() {
#if PROLOGUE == PLAIN
          ask(from, tile + g * SLOT, GROUP * g + eighth < wanted);
          from += GROUP * CHUNKS;
#else
          fetch(unit + stride, ahead, wanted, g);
#endif
        };
        if (!WIDE) ask_ahead();
        if (rescaled) {
          const int b = GROUP * g + eighth;
          const float factor = power(254 - __shfl_sync(ALL, block_field, b)), reciprocal = __shfl_sync(ALL, inverse, b);
#pragma unroll
          for (int i = 0; i < WORDS; i++) {
            const u32 near = WORD == 2 ? pair_of(low(w[i]) * factor, high(w[i]) * factor) : __float_as_uint(low(w[i]) * factor);
            w[i] = reciprocal > 0.0f ? near : 0;
          }
        }
        float y[32];
        transform(y, w, signs, tile + g * SLOT);
        if (WIDE) ask_ahead();
        if (rescaled) {
#pragma unroll
          for (int z = 0; z < 2; z++) {
            // From the block's power to the row's, in two steps: one alone may be less than a float can be.
            const int further = __shfl_sync(ALL, block_field - field, GROUP * g + mine + (WIDE ? 0 : z));
            const float half = power(127 + further / 2), rest = power(127 + further - further / 2);
            // What is lost is not negative. (Never contracted: that would leave it so.)
#pragma unroll
            for (int i = 16 * z; i < 16 * z + 16; i++) y[i] = __fadd_rn(y[i] * half * rest, 0.0f);
          }
        }
#pragma unroll
        for (int z = 0; z < 2; z++) {
          const int b = GROUP * g + mine + (WIDE ? 0 : z);
          const Scaled by{of_block(inverse, b), of_block(above, b), of_block(sigma, b)};
#pragma unroll
          for (int p = 0; p < 2; p++) {
            const int c = 2 * z + p, further = WIDE ? 4 * c : 16 * z + 8 * p;  // chunks of eight from the lane's first
            in_group += emit([&](int e) { return y[8 * c + e]; }, by, step, b < count, masks + further, narrow + GATHER * further,
                          to + further * OUT_BITS, kept + 4 * further)
                     << (WIDE ? 0 : 16 * z);
          }
        }
        to += GROUP * (ORDER * OUT_BITS / 8), kept += GROUP * (ORDER / 2);
        masks += GROUP * 16, narrow += GATHER * GROUP * 16;
        if (COUNTS && OUT_BITS > 1) {
#pragma unroll
          for (int i = WIDE ? 1 : 4; i < (WIDE ? 4 : 32); i *= 2) in_group += __shfl_xor_sync(ALL, in_group, i);
          if (g == (WIDE ? quad : lane / GROUP)) counted = in_group;
        }
      }
    };
    if (WIDE) code(again);  // a loop of its own for rare rows is no faster there
    else if (again) code(true);
    else code(false);
    asm volatile("cp.async.commit_group;" ::: "memory");
    int sum = 0;
    if (EDGE || NARROW) __syncwarp();  // it is gathered
    if (mask && inside) {
      const u32 *bits = gathered.mask[lane];
      mask[start + lane] = EDGE ? make_uint4(bits[0], bits[1], bits[2], bits[3]) : make_uint4(ALL, ALL, ALL, ALL);
    }
    if (NARROW) {
      uint4 *lines = (uint4 *)(FORM == PACKED ? out : saved);
#pragma unroll
      for (int i = 0; i < (TILE * NARROW + 31) / 32; i++) {
        const int id = 32 * i + lane;
        const uint4 v = id < TILE * NARROW ? ((const uint4 *)gathered.codes)[id] : make_uint4(0, 0, 0, 0);
        if (id / GATHER < count) lines[start * NARROW + id] = v;
        if (OUT_BITS == 1) sum = __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
      }
    }
    const i64 row = packs ? start + lane >> log : unit * ROWS + at.row;
    const bool leads = (ROWS > 1 ? part * TILE + lane == at.row * blocks : part == 0 && (packs ? lane % segment == 0 : lane == 0)) && inside;
    if (leads) scale[row] = sigma;
    if (COUNTS && sums) {
      if (OUT_BITS > 1) {
        counted = __shfl_sync(ALL, counted, WIDE ? 4 * (lane % GROUP) + lane / GROUP : lane / GROUP * GROUP + lane % GROUP / 2);
        sum = WIDE ? counted : lane % 2 ? counted >> 16 : counted & 0xFFFF;
      }
      sum = counts[team].leave(inside ? sum : 0, Add(), turn, at);
      // Who leads no row needs no sum. That it may go on stands in exchange.cuh.
      if (ROWS > 1 ? __any_sync(ALL, leads) : WARPS > 1 && part == 0)
        sum = counts[team].fetch(sum, Add(), turn, at);
      if (leads) sums[row] = STRIDE * sum - TOP * 128 * blocks;  // of integers, from codes counted from 0
    }
    if (EDGE || NARROW) __syncwarp();  // and has been read
    start = ahead, count = wanted;
  }
}
