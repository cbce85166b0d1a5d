// y = p (factor scale) column + bias for a sum p, below 2^31 in size and no smaller than 1/4, or 0; or for
// 4 p, with a quarter of the factor once `scale_of` has judged it.
//
// Where factor times scale is very large or small, p times it may leave float32's normal range, though
// the column's scale brings it back. Such a row is far, well before that, and multiplied in double. So
// are those of negative scales and of NaN; one of 0 is not.
constexpr float LEAST_NEAR = 7.888609052210118e-31f, MOST_NEAR = 1.2379400392853803e27f;  // 2^-100, 2^90

struct Scale {
  float near;  // factor times the scale
  float far;   // the scale itself, of a row that is far; else 0
};

__device__ __forceinline__ Scale scale_of(float factor, float scale) {
  const float near = factor * scale;
  const bool inside = near >= LEAST_NEAR && near <= MOST_NEAR;
  return {near, inside ? 0.0f : scale};
}

// FAR: some row may be far. Another rounds as it would beside any rows: it may be multiplied by two
// blocks, beside different ones.
template <bool FAR>
__device__ __forceinline__ float scaled(float p, float factor, Scale scale, float column, float bias) {
  if (FAR && scale.far != 0.0f)
    return (float)fma((double)p * ((double)factor * (double)scale.far), (double)column, (double)bias);
  return fmaf(p * scale.near, column, bias);
}
