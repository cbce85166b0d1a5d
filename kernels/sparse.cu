// y = x w^T for int8 operands on Hopper's sparse tensor cores (sm_90a), w 2:4 sparse and compressed,
// with the dequantizing epilogue of product.cu; CORRECTED sums beyond 2^24 whose weight is of 7 bits are
// rounded twice here.
//
// The sparse operand of `wgmma` is its A. So a tile is one of y^T: its rows are w's rows, features,
// and its columns are x's rows, tokens. w: values (features, width / 2) and metadata (features,
// words) as compress.py makes them; x: (tokens, width). Strides are multiples of 16 bytes.
//
// One cluster: CLUSTER blocks, one above the other in w, that share a tile of x: each loads its part
// of it and sends it to all. One block: a producer warpgroup that keeps STAGES tiles of TILE_K
// entries in flight through the bulk copy engine, and consumer warpgroups of 64 x TILE_N
// int32 accumulators each. The grid is persistent.
//
// Metadata goes from memory to registers: of a block of 256 entries a lane needs four words, one for
// each of four instructions, which lie side by side. It is asked for one tile of K ahead.
//
// Written for every element, with acc the int32 sum over K:
//   RAW        acc
//   PLAIN      p = acc
//   CORRECTED  p = acc + feature_sum[j] / 4, for x of codes
//   and y = float(p) * (factor * token_scale[i]) * feature_scale[j] + bias[j]
#include "hopper.cuh"
#include "scales.cuh"
#include "bias.cuh"
#include "overlap.cuh"

// TILE_N, STAGES, CLUSTER and CONSUMERS come from sparse.py.
constexpr int TILE_K = 128;  // entries: as many bytes of x, half of them of w
constexpr int THREADS = 128 * (CONSUMERS + 1), TILE_M = 64 * CONSUMERS;
constexpr u32 A_BYTES = TILE_M * TILE_K / 2, B_BYTES = TILE_N * TILE_K, PART_B = B_BYTES / CLUSTER;
constexpr int SPAN = 64 / OUT_SIZE;                      // tokens that a warpgroup stages at a time
constexpr u32 STAGE_ROW = 64 * OUT_SIZE + 16;            // padded: stores and loads meet no bank twice
constexpr u32 STAGING = 2 * SPAN * STAGE_ROW;            // two spans: one is written, one read
constexpr u32 A_AT = 0, B_AT = STAGES * A_BYTES, OUT_AT = B_AT + STAGES * B_BYTES;
constexpr u32 TOKENS_AT = OUT_AT + CONSUMERS * STAGING;  // scales of a warpgroup's tokens
constexpr u32 FULL_AT = TOKENS_AT + CONSUMERS * 8 * TILE_N, EMPTY_AT = FULL_AT + 8 * STAGES;
constexpr int GROUP = 8;                                 // clusters of row tiles that share the L2 cache

// Rows of 64 bytes, swizzled by 64 bytes; groups of eight rows are 512 bytes apart.
__device__ __forceinline__ u64 descriptor_64(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (32ull << 32) | (2ull << 62);
}

// d (64 x TILE_N of a warpgroup) = 64 entries of K, added to d unless `add` is 0.
__device__ __forceinline__ void multiply(int (&d)[64], u64 a, u64 b, u32 metadata, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %67, 0;\n "
      "wgmma.mma_async.sp.sync.aligned.m64n128k64.s32.s8.s8 "
      "{" NAMES_64 "}, "
      "%64, %65, %66, 0, p;\n}"
      : D64(0)
      : "l"(a), "l"(b), "r"(metadata), "r"(add));
}

__device__ __forceinline__ void multiply(int (&d)[128], u64 a, u64 b, u32 metadata, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %131, 0;\n "
      "wgmma.mma_async.sp.sync.aligned.m64n256k64.s32.s8.s8 "
      "{" NAMES_128 "}, "
      "%128, %129, %130, 0, p;\n}"
      : D64(0), D64(64)
      : "l"(a), "l"(b), "r"(metadata), "r"(add));
}

struct Arguments {
  const int *metadata;
  void *out;
  const float *feature_scale, *token_scale;
  const void *bias;  // of dtype `bias_type`, as OUT counts them; or null
  const int *feature_sum;
  int features, tokens, blocks, bias_type;  // blocks: of 256 entries
  float factor;
};

// The tile of a turn: clusters of row tiles in groups of GROUP, so that the blocks that run at a time
// share rows of w and of x.
__device__ __forceinline__ void place(int turn, int down, int across, int &row, int &column) {
  int in_group = GROUP * across, first = turn / in_group * GROUP;
  int height = min(GROUP, down - first), rest = turn % in_group;
  row = first + rest % height;
  column = rest / height;
}

// The first token of a tile. The last tile begins early rather than hang over, as in product.cu.
__device__ __forceinline__ int first_token(int column, int tokens) {
  return min(column * TILE_N, max(tokens - TILE_N, 0));
}

// A `Scale` of each token.
struct Tokens { float near[TILE_N], far[TILE_N]; };
struct Feature { float scale, bias; int sum; };

// FAR: some token of the tile may be far.
template <bool FAR>
__device__ __forceinline__ float finish(int acc, float factor, const Feature &f, float near, float far) {
  float p = (float)acc;
  if (EPILOGUE == CORRECTED) p = (float)(acc + (f.sum >> 2)) + 0.25f * (float)(f.sum & 3);
  return scaled<FAR>(p, factor, {near, far}, f.scale, f.bias);
}

__device__ __forceinline__ void meet(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Writes a warpgroup's 64 features x TILE_N tokens, SPAN tokens at a time, through shared memory: a
// lane holds two tokens of a feature, and a row of y is contiguous in the features.
template <bool FAR>
__device__ __forceinline__ void write(int (&d)[TILE_N / 2], const Arguments &g, const Feature (&features)[2], const Tokens &tokens, char *staging, int group, int feature0, int token0) {
  constexpr int PIECE = 16 / OUT_SIZE, PIECES = 64 / PIECE, ROWS = 128 / PIECES;
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  // Whole vectors of 16 bytes, where every row begins at one.
  const bool vectors = g.features % PIECE == 0;
#pragma unroll
  for (int c = 0; c < TILE_N / SPAN; c++) {
    if (token0 + c * SPAN >= g.tokens) return;
    char *stage = staging + c % 2 * SPAN * STAGE_ROW;
    u32 packed[4];
#pragma unroll
    for (int j = 0; j < SPAN / 8; j++) {
      const int at = c * SPAN + 8 * j + 2 * (lane % 4);
      float2 near = make_float2(0.0f, 0.0f), far = near;
      if (EPILOGUE != RAW) near = *(const float2 *)&tokens.near[at];
      if (FAR) far = *(const float2 *)&tokens.far[at];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int i = 4 * (c * (SPAN / 8) + j) + 2 * h;
        int y0 = d[i], y1 = d[i + 1];
        if (EPILOGUE != RAW) {
          const float low = finish<FAR>(y0, g.factor, features[h], near.x, far.x);
          const float high = finish<FAR>(y1, g.factor, features[h], near.y, far.y);
          if (OUT_SIZE == 2) packed[2 * (j % 2) + h] = pair_of(low, high);
          y0 = __float_as_int(low), y1 = __float_as_int(high);
        }
        if (OUT_SIZE == 4) {
          char *to = stage + (8 * j + 2 * (lane % 4)) * STAGE_ROW + (16 * warp + lane / 4 + 8 * h) * 4;
          *(int *)to = y0, *(int *)(to + STAGE_ROW) = y1;
        }
      }
      if (OUT_SIZE == 2 && j % 2 == 1) {
        // Four 8 x 8 matrices, transposed: a lane gives the address of eight features of a token.
        const int token = 8 * (j - 1 + lane / 16) + lane % 8, feature = 16 * warp + lane / 8 % 2 * 8;
        const u32 to = (u32)__cvta_generic_to_shared(stage) + token * STAGE_ROW + feature * 2;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                     "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                     : "memory");
      }
    }
    // One barrier a span: who writes a buffer again has met all who read it at the barrier between.
    meet(group);
    const int feature = feature0 + thread % PIECES * PIECE;
#pragma unroll
    for (int i = 0; i < SPAN / ROWS; i++) {
      const int row = thread / PIECES + i * ROWS, token = token0 + c * SPAN + row;
      const char *from = stage + row * STAGE_ROW + thread % PIECES * 16;
      char *to = (char *)g.out + ((long long)token * g.features + feature) * OUT_SIZE;
      if (token >= g.tokens) continue;
      if (vectors) {
        if (feature < g.features) *(int4 *)to = *(const int4 *)from;
      } else {
#pragma unroll 1
        for (int e = 0; e < PIECE && feature + e < g.features; e++) {
          if (OUT_SIZE == 2) ((unsigned short *)to)[e] = ((const unsigned short *)from)[e];
          else ((int *)to)[e] = ((const int *)from)[e];
        }
      }
    }
  }
}

// The consumer's place in the ring of stages.
struct Ring { u32 base, at, last; };

// One tile of K: two instructions, of a word of metadata each. On return the tile before is done and
// given back, and with it the registers of its metadata.
__device__ __forceinline__ void step(int (&d)[TILE_N / 2], Ring &ring, int first, int member, u32 low, u32 high) {
  const u32 stage = ring.at % STAGES;
  barrier_wait(ring.base + FULL_AT + 8 * stage, (ring.at / STAGES) & 1);
  const u64 a = descriptor_64(ring.base + A_AT + stage * A_BYTES + member * 64 * (TILE_K / 2));
  const u64 b = descriptor(ring.base + B_AT + stage * B_BYTES);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  multiply(d, a, b, low, !first);
  multiply(d, a + 2, b + 4, high, 1);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  const int lane = threadIdx.x % 32;
  if (!first && lane < CLUSTER) barrier_arrive(ring.base + EMPTY_AT + 8 * ring.last, lane);
  ring.last = stage;
  ring.at++;
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    sparse(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
           const int *metadata, void *out, const float *feature_scale, const float *token_scale,
           const void *bias, const int *feature_sum, int features, int tokens, int blocks, float factor,
           int bias_type) {
  const Arguments g = {metadata, out, feature_scale, token_scale, bias, feature_sum, features, tokens, blocks, bias_type, factor};
  extern __shared__ __align__(1024) char raw[];  // the swizzle counts from 1024-byte boundaries
  const u32 base = (u32)__cvta_generic_to_shared(raw);
  const int group = threadIdx.x / 128;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(base + FULL_AT + 8 * s, 1);
      barrier_init(base + EMPTY_AT + 8 * s, CLUSTER * CONSUMERS * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  wait_for_previous();  // which may have made x
  // Not rounded up by a sum, which may leave int32; neither is 0.
  const int down = (g.features - 1) / (CLUSTER * TILE_M) + 1, across = (g.tokens - 1) / TILE_N + 1;
  const int first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
  if (group == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 3 ? 32 : 40));
    if (threadIdx.x == 128 * CONSUMERS) {
      u32 at = 0;  // tiles of K that were loaded before
      for (int turn = first; turn < down * across; turn += stride) {
        int row, column;
        place(turn, down, across, row, column);
        for (int k = 0; k < 2 * g.blocks; k++, at++) {
          const u32 stage = at % STAGES, full = base + FULL_AT + 8 * stage;
          barrier_wait(base + EMPTY_AT + 8 * stage, ((at / STAGES) & 1) ^ 1);
          barrier_expect(full, A_BYTES + B_BYTES);
          load(base + A_AT + stage * A_BYTES, &a_map, k * (TILE_K / 2), (CLUSTER * row + rank) * TILE_M, full);
          load_to_all(base + B_AT + stage * B_BYTES + rank * PART_B, &b_map, k * TILE_K,
                      first_token(column, g.tokens) + rank * (TILE_N / CLUSTER), full);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMERS == 3 ? 160 : 232));
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Tokens &scales = ((Tokens *)(raw + TOKENS_AT))[group];
    Ring ring = {base, 0, 0};
    int d[TILE_N / 2];
    for (int turn = first; turn < down * across; turn += stride) {
      int row, column;
      place(turn, down, across, row, column);
      const int feature0 = (CLUSTER * row + rank) * TILE_M + 64 * group, token0 = first_token(column, g.tokens);
      // A lane's metadata: of which row and which half of an instruction's 64 entries.
      const int source = min(feature0 + 16 * warp + 8 * (lane % 2) + lane / 4, g.features - 1);
      const int4 *words = (const int4 *)g.metadata + 2ll * source * g.blocks + lane / 2 % 2;
      int4 even = words[0], odd;
      for (int k = 0; k < g.blocks; k += 2) {
        step(d, ring, k == 0, group, even.x, even.y);
        if (k + 1 < g.blocks) odd = words[2 * (k + 1)];
        step(d, ring, 0, group, even.z, even.w);
        if (k + 1 == g.blocks) break;
        step(d, ring, 0, group, odd.x, odd.y);
        if (k + 2 < g.blocks) even = words[2 * (k + 2)];
        step(d, ring, 0, group, odd.z, odd.w);
      }
      float scale[TILE_N / 128] = {};
      Feature own[2] = {};
      if (EPILOGUE != RAW) {
#pragma unroll
        for (int i = 0; i < TILE_N / 128; i++) {
          const int token = token0 + 128 * i + threadIdx.x % 128;
          if (token < g.tokens) scale[i] = g.token_scale[token];
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int feature = feature0 + 16 * warp + lane / 4 + 8 * h;
          if (feature >= g.features) continue;
          own[h].scale = g.feature_scale[feature];
          if (g.bias) own[h].bias = bias_at(g.bias, feature, g.bias_type);
          if (EPILOGUE == CORRECTED) own[h].sum = g.feature_sum[feature];
        }
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane < CLUSTER) barrier_arrive(base + EMPTY_AT + 8 * ring.last, lane);
      bool far = false;
      meet(group);  // all have read the scales and the spans of the tile before
      if (EPILOGUE != RAW) {
#pragma unroll
        for (int i = 0; i < TILE_N / 128; i++) {
          const Scale each = scale_of(g.factor, scale[i]);
          scales.near[128 * i + threadIdx.x % 128] = each.near;
          scales.far[128 * i + threadIdx.x % 128] = each.far;
        }
        meet(group);  // the scales stand
        for (int i = 0; i < TILE_N / 32; i++) far |= scales.far[32 * i + lane] != 0.0f;
      }
      char *staging = raw + OUT_AT + group * STAGING;
      if (__any_sync(0xFFFFFFFF, far)) write<true>(d, g, own, scales, staging, group, feature0, token0);
      else write<false>(d, g, own, scales, staging, group, feature0, token0);
    }
  }
  cluster_sync();  // no block leaves while another may still write to its shared memory
}
