// The rotary embedding, in a product's epilogue. Of a head of a query or key a pair of columns has one in each
// half. Source: arXiv 2104.09864. Macro: ROTARY, half a head's width; or 0, and nothing is turned.
#if ROTARY
// Two pairs side by side, in words of two outputs. Turned in float32, rounded once: low cos - high sin and
// high cos + low sin, of which no product may be contracted with its sum.
__device__ __forceinline__ void turn(u32 &low, u32 &high, float2 cosine, float2 sine) {
  const float a = bias_of(low & 0xFFFF, OUT), b = bias_of(low >> 16, OUT);
  const float c = bias_of(high & 0xFFFF, OUT), d = bias_of(high >> 16, OUT);
  low = pair_of(__fsub_rn(__fmul_rn(a, cosine.x), __fmul_rn(c, sine.x)),
                __fsub_rn(__fmul_rn(b, cosine.y), __fmul_rn(d, sine.y)));
  high = pair_of(__fadd_rn(__fmul_rn(c, cosine.x), __fmul_rn(a, sine.x)),
                 __fadd_rn(__fmul_rn(d, cosine.y), __fmul_rn(b, sine.y)));
}

// Of a thread's two rows, for its two columns of eight of a head's half.
struct Pairs { float2 cosine[2], sine[2]; };

// Those of a tile, eight columns ahead of what is turned. The first are asked for before the tile's last products
// have ended; more at a time is no faster.
struct Angles {
  const float *cosine[2], *sine[2];
  Pairs next;
  bool some;  // else nothing in this tile is turned

  __device__ __forceinline__ void ask(int j) {
    if (!some || j >= ROTARY / 8) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      next.cosine[h] = *(const float2 *)(cosine[h] + 8 * j);
      next.sine[h] = *(const float2 *)(sine[h] + 8 * j);
    }
  }

  __device__ __forceinline__ void begin(const Arguments &g, int row, int column0) {
    some = column0 < g.turned;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const long long at = (long long)((row + 8 * h) % g.positions) * ROTARY + 2 * (threadIdx.x % 4);
      cosine[h] = g.cosine + at, sine[h] = g.sine + at;
    }
    ask(0);
  }
};

// Makes a warp's rows of y in place: the two outputs of d[2 n] and d[2 n + 1] stand in d[2 n], turned where
// their head is. All heads of a tile have the same angles, which are read once.
template <bool RARE>
__device__ __forceinline__ void make_heads(int (&d)[TILE_N / 2], const Arguments &g, const Row (&rows)[2], const Columns &columns, Angles &angles, int column0) {
  const int own = 2 * (threadIdx.x % 4);
  constexpr int HEADS = TILE_N / (2 * ROTARY);
#pragma unroll
  for (int j = 0; j < ROTARY / 8; j++) {
    const Pairs pairs = angles.next;
    angles.ask(j + 1);
#pragma unroll
    for (int head = 0; head < HEADS; head++) {
      const bool turned = column0 + 2 * ROTARY * head < g.turned;
      float2 scale[2], bias[2];
      int2 sum[2];
#pragma unroll
      for (int p = 0; p < 2; p++) {
        const int column = ROTARY * (2 * head + p) + 8 * j + own;
        scale[p] = *(const float2 *)&columns.scale[column];
        bias[p] = BIAS ? *(const float2 *)&columns.bias[column] : make_float2(0.0f, 0.0f);
        sum[p] = EPILOGUE == CORRECTED ? *(const int2 *)&columns.sum[column] : make_int2(0, 0);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u32 y[2];
#pragma unroll
        for (int p = 0; p < 2; p++) {
          const int i = 4 * (ROTARY / 8 * (2 * head + p) + j) + 2 * h;
          y[p] = pair_of(finish<RARE>(d[i], sum[p].x, g.factor, rows[h], scale[p].x, bias[p].x),
                         finish<RARE>(d[i + 1], sum[p].y, g.factor, rows[h], scale[p].y, bias[p].y));
        }
        if (turned) turn(y[0], y[1], pairs.cosine[h], pairs.sine[h]);
#pragma unroll
        for (int p = 0; p < 2; p++) d[4 * (ROTARY / 8 * (2 * head + p) + j) + 2 * h] = y[p];
      }
      // Or all that the tile's columns bring is read at once, and registers are spilled.
      if (head % 2) __syncwarp();
    }
  }
}
#else
struct Angles {};
#endif
