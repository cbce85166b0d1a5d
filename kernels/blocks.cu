// The quantizer for Hadamard blocks of 128, a block a thread: transform, RMS, codes, mask, packing in
// one pass.
//
// A thread holds a block of 128 floats in registers, so that the butterfly is additions and nothing
// else. (Two threads a block leave room for more warps; what they exchange costs more than that gains.)
// A team of `warps` warps holds a row. Where a row alone would leave many threads idle it holds ROWS of
// them, whose blocks lie one behind the other: a warp may have parts of several. Where `segment` < 32 a
// warp holds 32 / segment rows. (Which is when: `Shape` in blocks.py.)
// Rows come to shared memory by asynchronous copies, the next while this one is computed (of float32,
// where a second buffer would halve the warps, after it); both ways a block's 16-byte chunks lie
// swizzled, so that threads read their own blocks, and warps write whole lines, without bank conflicts.
//
// Formulas and special rows are those of quantize.py. A row whose sum of squares is far from 1 (or
// zero, or not finite) is computed again, brought near 1 by a power of two: the RARE path.
//
// A prologue makes the rows, in float32 and rounded once to the inputs' dtype, which is of 16 bits:
//   GATED   silu(gate) value
//   NORMED  h weight / sqrt(mean(h^2) + eps)
//   ADDED   the same of h = x + beside, rounded, which is written too
// Inputs may be rows of a wider tensor. What the rest works on is what was rounded, which lies where x,
// the first input, was.
//
// Macros: REGISTERS (of a thread), IN (the input's dtype), LEVELS, EDGE (mask by threshold; else all
// ones), FORM, BITS, PROLOGUE, SHOWN (the rows that a prologue made are written, too), and SAVED: of
// integers, the bits an entry, 2 or 4, in which the codes are written as well; or 0. ROWS: of a team; WARPS:
// of a team of several rows, else of no account.
#define VALUES 0    // dequantized, in the input's dtype
#define PACKED 1    // codes from 0, BITS each
#define CODES 2     // int8: the code
#define INTEGERS 3  // int8: 2 code + 1, or the code where LEVELS is odd, spread: see codes.cuh
#define PLAIN 0     // no prologue
#define GATED 1
#define NORMED 2
#define ADDED 3
typedef unsigned int u32;
typedef long long i64;

#include "halves.cuh"
#include "codes.cuh"
#include "exchange.cuh"

constexpr int IN_BITS = IN == FLOAT32 ? 32 : 16;
constexpr int ORDER = 128, CHUNKS = IN_BITS;  // elements of a block; its 16-byte chunks
constexpr int WORD = 32 / IN_BITS;            // elements of 4 bytes
constexpr int SOURCES = PROLOGUE == GATED || PROLOGUE == ADDED ? 2 : 1;  // tiles of a unit that a warp reads
constexpr int BUFFERS = WORD / SOURCES;             // units whose tiles a warp has room for
constexpr int TILE = 32;                 // blocks of a warp
constexpr int MAX_TEAMS = ROWS > 1 ? 4 / WARPS : 4;
constexpr bool NORMS = PROLOGUE == NORMED || PROLOGUE == ADDED;
constexpr int SUMS = NORMS ? 2 : 1;  // turns of `first` that a unit takes: sums of squares
// Of an element; also the chunks of 16 bytes that a block becomes.
constexpr int OUT_BITS = FORM == VALUES ? IN_BITS : FORM == PACKED ? BITS : 8;
constexpr float ROOT = 11.313708498984761f;  // 128^0.5
static_assert(PROLOGUE == PLAIN || IN != FLOAT32, "a prologue takes 16 bits");
static_assert(SAVED == 0 || FORM == INTEGERS && (SAVED == 2 || SAVED == 4), "integers are saved in 2 or 4 bits");

// 16 bytes, SPAN_TO and SPAN_FROM bytes beyond the addresses, unless `skip`.
template <int SPAN_TO, int SPAN_FROM>
__device__ __forceinline__ void copy_in(u32 to, const void *from, bool skip) {
  asm volatile(
      "{.reg .pred p;\n setp.eq.u32 p, %2, 0;\n @p cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16;\n}" ::"r"(to),
      "l"(from), "r"((u32)skip), "n"(SPAN_TO), "n"(SPAN_FROM)
      : "memory");
}

// The place of a block's chunk among chunks of 16 bytes, COUNT a block: such that the same chunk of
// eight blocks in a row lies in eight different banks.
template <int COUNT> __device__ __forceinline__ int place(int block, int chunk) {
  return block * COUNT + (chunk ^ (COUNT > 8 ? block & 7 : block / (8 / COUNT) & (COUNT - 1)));
}


// A block's chunk c, of CHUNKS.
__device__ __forceinline__ const uint4 &chunk_of(const uint4 *tile, int block, int c) {
  return tile[place<CHUNKS>(block, c)];
}

#include "gate.cuh"

// Puts f(a, b) of a thread's block, and of what lies beside it, where the block lies.
// By itself and not on the way to registers: there it leaves the compiler too few of them, and it spills.
template <typename F>
__device__ __forceinline__ void make(uint4 *tile, int lane, const uint4 *beside, int block, uint4 *shown, F f) {
#pragma unroll 2
  for (int c = 0; c < CHUNKS; c++) {
    uint4 &own = tile[place<CHUNKS>(lane, c)];
    const uint4 w = own, v = chunk_of(beside, block, c);
    const u32 first[4] = {w.x, w.y, w.z, w.w}, second[4] = {v.x, v.y, v.z, v.w};
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = pair_of(f(low(first[i]), low(second[i])), f(high(first[i]), high(second[i])));
    own = make_uint4(words[0], words[1], words[2], words[3]);
    if (SHOWN && shown) shown[c] = own;
  }
}

// The sum of a block's squares, as it lies in the tile.
__device__ __forceinline__ float squares_of(const uint4 *tile, int lane) {
  float s[4] = {};
#pragma unroll 2
  for (int c = 0; c < CHUNKS; c++) {
    const uint4 w = chunk_of(tile, lane, c);
    const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float a = low(words[i]), b = high(words[i]);
      s[i] = fmaf(a, a, fmaf(b, b, s[i]));
    }
  }
  return (s[0] + s[1]) + (s[2] + s[3]);
}

__device__ __forceinline__ void read(float (&y)[ORDER], const uint4 *tile, int lane, float factor) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const uint4 w = chunk_of(tile, lane, c);
    const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = (4 * c + i) * WORD;
      y[at] = low(words[i]) * factor;
      if (WORD == 2) y[at + WORD - 1] = high(words[i]) * factor;
    }
  }
}

__device__ __forceinline__ float squares(const float (&y)[ORDER]) {
  float s[8] = {};
#pragma unroll
  for (int i = 0; i < ORDER; i++) s[i % 8] = fmaf(y[i], y[i], s[i % 8]);
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

// The butterfly's stages from spans of 2 FROM to spans of TO.
template <int FROM, int TO> __device__ __forceinline__ void butterfly(float (&y)[ORDER]) {
#pragma unroll
  for (int half = FROM; half < TO; half *= 2) {
#pragma unroll
    for (int i = 0; i < ORDER; i++) {
      if (i & half) continue;
      const float a = y[i], b = y[i + half];
      y[i] = a + b;
      y[i + half] = a - b;
    }
  }
}

// The codes of a chunk's words, one in each byte, in SAVED bits each: words w of a chunk of those.
// A product puts the codes of a word side by side, each bit in a place of its own: nothing carries.
__device__ __forceinline__ u32 narrowed(const u32 (&codes)[4], int w) {
  if (SAVED == 4) return __byte_perm(codes[2 * w] * 0x110, codes[2 * w + 1] * 0x110, 0x7531);
  const u32 low = __byte_perm(codes[0] * 0x01041040, codes[1] * 0x01041040, 0x0073);
  return __byte_perm(low, __byte_perm(codes[2] * 0x01041040, codes[3] * 0x01041040, 0x7300), 0x7610);
}

// Blocks of a warp: where the first lies among those of all rows, and how many there are.
struct Held { i64 start; int count; };

// Writes tiles of COUNT chunks a block to where they lie in a row: whole lines.
template <int COUNT> __device__ __forceinline__ void write(const uint4 *tile, uint4 *out, const Held &held) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int id = 32 * i + lane, block = id / COUNT;
    if (block < held.count) out[held.start * COUNT + id] = tile[place<COUNT>(block, id % COUNT)];
  }
}

// Writes out what follows from a row's transform: its codes, or values, its mask, and what is saved.
// Returns the sum of the block's codes, counted from 0 (of its bits, for codes of one bit).
// held(): says it anew, rather than keep it while a transform takes all registers.
template <typename F>
__device__ __forceinline__ int emit(const float (&y)[ORDER], float inverse, float limit, float step, float sigma,
                                    uint4 *tile, uint4 *out, uint4 *mask, uint4 *saved, F held) {
  const int lane = threadIdx.x % 32;
  int sum = 0;
  // Four words at a time: each is a chain that waits for itself at every step.
  u32 flags[4] = {};
  if (EDGE) {
#pragma unroll
    for (int i = 31; i >= 0; i--)
#pragma unroll
      for (int w = 0; w < 4; w++)
        flags[w] = __funnelshift_l(__float_as_uint(limit - fabsf(y[32 * w + i])), flags[w], 1);
  }
  if (mask) {
    const Held its = held();
    if (lane < its.count) mask[its.start + lane] = make_uint4(~flags[0], ~flags[1], ~flags[2], ~flags[3]);
  }
  if (OUT_BITS == 1) {
    u32 words[4] = {};
#pragma unroll
    for (int i = 31; i >= 0; i--)
#pragma unroll
      for (int w = 0; w < 4; w++)  // + 0: a negative zero is not negative
        words[w] = __funnelshift_l(__float_as_uint(y[32 * w + i] + 0.0f), words[w], 1);
    const Held its = held();
    if (lane < its.count) out[its.start + lane] = make_uint4(~words[0], ~words[1], ~words[2], ~words[3]);
    return ORDER - __popc(words[0]) - __popc(words[1]) - __popc(words[2]) - __popc(words[3]);
  }
  constexpr int SAVED_WORDS = SAVED / 2;  // of a chunk of bytes
  uint4 *const behind = tile + TILE * OUT_BITS;  // which leaves room for what is saved
  u32 narrow[4];
#pragma unroll
  for (int c = 0; c < OUT_BITS; c++) {
    constexpr int PER = 32 / OUT_BITS;
    u32 words[4] = {};
#pragma unroll
    for (int i = PER - 1; i >= 0; i--)
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const float v = y[(4 * c + w) * PER + i];
        if (FORM == VALUES) {
          // Beside 2^22 a float counts halves: code + 1/2, or code, from a few cheap instructions.
          const float whole = __int_as_float(0x4A800000 + 2 * code_of(v, inverse));
          const float value = (whole - (4194304.0f - LOWEST - (EVEN ? 0.5f : 0.0f))) * step * sigma;
          // Of 16-bit floats the second comes first, and waits for the first in the word.
          words[w] = i || PER == 1 ? __float_as_uint(value) : pair_of(value, __uint_as_float(words[w]));
        } else {
          words[w] = (words[w] << OUT_BITS) + code_of(v, inverse);
        }
      }
    if constexpr (SAVED) {
#pragma unroll
      for (int w = 0; w < SAVED_WORDS; w++) narrow[(SAVED_WORDS * c + w) % 4] = narrowed(words, w);
      if (SAVED_WORDS * (c + 1) % 4 == 0)
        behind[place<SAVED>(lane, SAVED_WORDS * c / 4)] = make_uint4(narrow[0], narrow[1], narrow[2], narrow[3]);
    }
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if (FORM == CODES || FORM == INTEGERS) {
        sum = __dp4a(words[w], 0x01010101u, (u32)sum);
        words[w] = integers_of(words[w]);
      }
    }
    const uint4 chunk = make_uint4(words[0], words[1], words[2], words[3]);
    tile[place<OUT_BITS>(lane, c)] = chunk;
  }
  __syncwarp();
  write<OUT_BITS>(tile, out, held());
  if constexpr (SAVED) write<SAVED>(behind, saved, held());
  return sum;
}

// x: (rows, 128 blocks) as chunks; scale (rows,), sums (rows,) or null; out, mask or null and, with SAVED,
// saved by blocks.
// units: what a team holds at a time: a row; or ROWS rows, of which the last unit may have fewer; or, where
// segment < TILE, TILE blocks. total: blocks of all rows; blocks: of a row; warps: of a team; teams: of a
// thread block. beside: the second input, or null; shown: like x, or null; pitch: chunks from a row of x,
// or of `beside`, to the next; weight: a row; added: h, as rows.
extern "C" __global__ void __maxnreg__(REGISTERS)
    quantize(const uint4 *x, float *scale, uint4 *out, uint4 *mask, int *sums, uint4 *saved, i64 units, i64 total,
             int blocks, int warps, int segment, int teams, float step, float threshold
#if PROLOGUE != PLAIN
             , const uint4 *beside, uint4 *shown, int x_pitch, int beside_pitch, const uint4 *weight, uint4 *added,
             float eps
#endif
    ) {
  extern __shared__ uint4 tiles[];
  __shared__ Exchange<float, true> first[MAX_TEAMS], second[MAX_TEAMS];
  __shared__ Exchange<u32> largest[MAX_TEAMS];
  __shared__ Exchange<int> counts[MAX_TEAMS];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // the product may start where there is room
#endif
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int team = warp / warps, part = warp % warps;
  uint4 *own = tiles + warp * BUFFERS * SOURCES * TILE * CHUNKS;
  const i64 stride = (i64)gridDim.x * teams;
  const bool packs = segment < TILE;  // rows into a warp
  // Blocks lie one behind the other whatever their rows: those of a unit are `whole`, but for the last.
  const int whole = ROWS * blocks;
  auto of_unit = [&](i64 unit) { return ROWS > 1 ? (int)min((i64)whole, total - unit * whole) : blocks; };
  auto held = [&](i64 unit) {
    const i64 left = packs ? total - unit * TILE : of_unit(unit) - part * TILE;
    return Held{packs ? unit * TILE : unit * whole + part * TILE, left < 0 ? 0 : left < TILE ? (int)left : TILE};
  };
  // Of a block of the team, its row among the team's; of one behind them the last.
  auto row_of = [&](int block) {
    int row = 0;
#pragma unroll
    for (int r = 1; r < ROWS; r++) row += block >= r * blocks;
    return row;
  };
  auto here = [&] {
    int block = part * TILE + lane;
    if (ROWS > 1) asm volatile("" : "+r"(block));  // not kept: a transform takes all registers
    return Place{warps, part, segment, blocks, row_of(block)};
  };
  // A copy of a thread: chunk id % CHUNKS of block id / CHUNKS, id = 32 i + lane. Its place repeats
  // eight blocks further on.
  constexpr int AT_ONCE = 32 / CHUNKS, SPOTS = 8 / AT_ONCE;
  const int half = lane / CHUNKS;
  u32 spot[SPOTS];
  for (int i = 0; i < SPOTS; i++)
    spot[i] = (u32)__cvta_generic_to_shared(own + place<CHUNKS>(AT_ONCE * i + half, lane % CHUNKS)) - 512 * i;
#define COPY(i) copy_in<512 * (i), 512 * (i)>(spot[(i) % SPOTS] + shift, from, left <= AT_ONCE * (i))
#define EIGHT(F, i) F(i), F(i + 1), F(i + 2), F(i + 3), F(i + 4), F(i + 5), F(i + 6), F(i + 7)
#if PROLOGUE == PLAIN
  auto fetch = [&](i64 unit, int buffer) {
    if (unit < units) {
      const Held its = held(unit);
      const uint4 *from = x + its.start * CHUNKS + lane;
      const u32 shift = buffer * TILE * CHUNKS * 16;
      const int left = its.count - half;
      EIGHT(COPY, 0), EIGHT(COPY, 8);
      if (CHUNKS == 32) EIGHT(COPY, 16), EIGHT(COPY, 24);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#else
  // Into slot 1 comes what is beside x, where there are two sources; else the next unit of x.
  const int log = __ffs(segment) - 1;
  auto fetch = [&](i64 unit, int slot) {
    if (unit < units) {
      const uint4 *base = SOURCES > 1 && slot ? beside : x;
      const int pitch = SOURCES > 1 && slot ? beside_pitch : x_pitch;
      u32 shift = slot * TILE * CHUNKS * 16;
      const int left = held(unit).count - half;
      int offset = packs || ROWS > 1 ? lane % CHUNKS : part * TILE * CHUNKS + lane;
      asm volatile("" : "+r"(offset));  // not kept from row to row: that would be one register too many
      const uint4 *from = base + (packs ? unit << (5 - log) : unit * ROWS) * pitch + offset;
      if (packs || ROWS > 1) {
        // Four copies at a time: what the compiler would keep of all sixteen places, it spills.
#pragma unroll 1
        for (int b = half; b < TILE; b += 4 * AT_ONCE, shift += 4 * 512) {
          auto block_at = [&](int block) {
            if (ROWS == 1) return from + (u32)((block >> log) * pitch + (block & (segment - 1)) * CHUNKS);
            const int row = row_of(part * TILE + block);
            return from + (u32)(row * pitch + (part * TILE + block - row * blocks) * CHUNKS);
          };
#define COPY_ROW(i) copy_in<512 * (i), 0>(spot[i] + shift, block_at(b + AT_ONCE * (i)), left <= AT_ONCE * (i) + b - half)
          COPY_ROW(0), COPY_ROW(1), COPY_ROW(2), COPY_ROW(3);
#undef COPY_ROW
        }
      } else {
        EIGHT(COPY, 0), EIGHT(COPY, 8);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#endif
#undef EIGHT
#undef COPY
  if (ROWS > 1 || warps > 1) {
    if (threadIdx.x < teams) {
      first[threadIdx.x].init(warps), second[threadIdx.x].init(warps);
      largest[threadIdx.x].init(warps), counts[threadIdx.x].init(warps);
    }
    __syncthreads();
  }
#if PROLOGUE != PLAIN
  uint4 *weights = tiles + blockDim.x / 32 * BUFFERS * SOURCES * TILE * CHUNKS;
  if (NORMS) {
    for (int i = threadIdx.x; i < blocks * CHUNKS; i += blockDim.x)
      weights[place<CHUNKS>(i / CHUNKS, i % CHUNKS)] = weight[i];
    __syncthreads();
  }
#endif
  int turn = 0, rares = 0;
  i64 unit = (i64)blockIdx.x * teams + team;
  fetch(unit, 0);
  if (SOURCES > 1) fetch(unit, 1);
  for (; unit < units; unit += stride, turn++) {
    const int buffer = BUFFERS == 1 ? 0 : turn & 1;
    if (BUFFERS > 1) fetch(unit + stride, buffer ^ 1);
    asm volatile("cp.async.wait_group %0;" ::"n"(BUFFERS - 1) : "memory");
    __syncwarp();
    uint4 *tile = own + buffer * TILE * CHUNKS;
    const Held its = held(unit);
    const bool inside = lane < its.count;
    const Place at = here();
    const float n = 128.0f * blocks;
#if PROLOGUE != PLAIN
    uint4 *const seen = SHOWN && inside ? shown + (its.start + lane) * CHUNKS : nullptr;
    if (SOURCES > 1) {
      if (PROLOGUE == GATED) make(tile, lane, tile + TILE * CHUNKS, lane, seen, gated);
      else make(tile, lane, tile + TILE * CHUNKS, lane, nullptr, [](float a, float b) { return __fadd_rn(a, b); });
      __syncwarp();  // all have read what lies beside: the next may come there
      fetch(unit + stride, 1);
    }
    if (PROLOGUE == ADDED) {
#pragma unroll 4
      for (int i = 0; i < CHUNKS; i++) {
        const int id = 32 * i + lane, block = id / CHUNKS;
        if (block < its.count) added[its.start * CHUNKS + id] = chunk_of(tile, block, id % CHUNKS);
      }
    }
    if (NORMS) {
      float s = first[team].leave(inside ? squares_of(tile, lane) : 0.0f, Add(), SUMS * turn, at);
      s = first[team].fetch(s, Add(), SUMS * turn, at);
      const float inverse = 1.0f / sqrtf(s / n + eps);
      const int block = packs ? lane & (segment - 1) : inside ? part * TILE + lane - at.row * blocks : 0;
      __syncwarp();  // h is written as it lies there
      make(tile, lane, weights, block, seen, [&](float h, float w) { return __fmul_rn(__fmul_rn(h, inverse), w); });
    }
#endif
    float y[ORDER];
    read(y, tile, lane, 1.0f);
    // Three stages make the sum of squares eight times as large. (Of the inputs themselves, the compiler
    // would convert them twice.)
    butterfly<1, 8>(y);
    float s = first[team].leave(inside ? 0.125f * squares(y) : 0.0f, Add(), SUMS * turn + SUMS - 1, at);
    butterfly<8, ORDER>(y);  // while the others' sums come
    bool far = false;  // a row of a team of several, whichever
    s = first[team].fetch(s, Add(), SUMS * turn + SUMS - 1, at, [&](int row, float sum) {
      far = !(sum >= SMALL && sum <= GREAT) && row * blocks < of_unit(unit);
    });
    float sigma = sqrtf(s / n), inner = sigma;
    // Rows that share a warp, or a team, are computed again together. Those that had no need get the same
    // bits: a row's numbers are its own, whatever lies beside it.
    const bool rare = !(s >= SMALL && s <= GREAT);
    if (ROWS > 1 ? __any_sync(ALL, far) : packs ? __any_sync(ALL, rare && inside) : rare) {
      // A chunk at a time: the code stays short.
      u32 top = 0;
#pragma unroll 1
      for (int c = 0; c < CHUNKS; c++) {
        const uint4 w = chunk_of(tile, lane, c);
        const u32 words[4] = {w.x, w.y, w.z, w.w};
        for (int i = 0; i < 4; i++) {
          top = max(top, __float_as_uint(low(words[i])) & 0x7FFFFFFF);
          if (WORD == 2) top = max(top, __float_as_uint(high(words[i])) & 0x7FFFFFFF);
        }
      }
      top = largest[team].leave(inside ? top : 0, Max(), rares, at);
      top = largest[team].fetch(top, Max(), rares, at);
      const u32 field = rare ? min(max(top >> 23, 1u), 253u) : 127;
      const float down = __uint_as_float((254 - field) << 23), up = __uint_as_float(field << 23);
      const bool finite = top < 0x7F800000;
      float again = 0.0f;
#pragma unroll 1
      for (int c = 0; c < CHUNKS; c++) {
        const uint4 w = chunk_of(tile, lane, c);
        const u32 words[4] = {w.x, w.y, w.z, w.w};
        for (int i = 0; i < 4; i++) {
          const float a = low(words[i]) * down, b = WORD == 2 ? high(words[i]) * down : 0.0f;
          again = fmaf(a, a, fmaf(b, b, again));
        }
      }
      again = second[team].leave(inside ? again : 0.0f, Add(), rares, at);
      again = second[team].fetch(again, Add(), rares++, at);
      if (rare) s = again;
      sigma = fminf(sqrtf(s / n) * up, LARGEST);
      inner = sigma * down;
      if (!finite) sigma = __int_as_float(0x7FC00000), inner = 0.0f;
      read(y, tile, lane, down);
      if (!(inner > 0.0f)) {
#pragma unroll
        for (int i = 0; i < ORDER; i++) y[i] = 0.0f;
      }
      butterfly<1, ORDER>(y);
    }
    const float inverse = inner > 0.0f ? NORM / (inner * step) : 0.0f;
    // Zeros lie within the limit; nothing of a row that is not finite does.
    const float limit = sigma == sigma ? threshold * inner * ROOT : -1.0f;
    __syncwarp();  // all have read their blocks of the tile
    int sum = emit(y, inverse, limit, step, sigma, tile, out, mask, saved, [&] { return held(unit); });
    const Place now = here();
    const i64 row = packs ? (its.start + lane) / segment : unit * ROWS + now.row;
    const bool leads =
        (ROWS > 1 ? part * TILE + lane == now.row * blocks : part == 0 && lane % segment == 0) && inside;
    if (leads) scale[row] = sigma;
    if (FORM != VALUES && sums) {
      sum = counts[team].leave(inside ? sum : 0, Add(), turn, now);
      // Who leads no row needs no sum. That it may go on stands in exchange.cuh.
      if (ROWS > 1 ? __any_sync(ALL, leads) : warps > 1 && part == 0)
        sum = counts[team].fetch(sum, Add(), turn, now);
      if (leads) sums[row] = STRIDE * sum - TOP * 128 * blocks;  // of integers, from codes counted from 0
    }
    __syncwarp();  // the tile is free for the copy of the unit after next, or of the next
    if (BUFFERS == 1) fetch(unit + stride, 0);
  }
}
