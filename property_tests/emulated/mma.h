// What the lanes of a warp make of each other's registers: products and transposed matrices.
//
// mma.sync, 16 x 8 by 16 rows and 8 columns: a lane has four words of a, two of b and four of d.
//
// K is eight words, of 4 bytes, 32 bits or two floats each. Lane 4 g + t has of word t and of word t + 4 of K those
// of rows g and g + 8 of a and of column g of b: {(g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)} and {(t, g),
// (t + 4, g)}; and d of these rows and columns 2 t and 2 t + 1.
// Source: PTX ISA, Matrix Fragments for mma.m16n8k16, m16n8k32 and m16n8k256; `stmatrix`.
//
// Part of runtime.cpp: in a kernel's library each access would be watched.
#pragma once

namespace {

struct Fragments { unsigned a[4], b[2]; };

// does(d, words of a, words of b): what becomes of an element of d.
template <typename T, typename F> void mma(T (&d)[4], const Fragments &own, const char *what, int line, F does) {
  const Met met = meet(false, 0xFFFFFFFF, what, line, [&](Meeting &m, int turn) {
    memcpy(&m.more[turn][current % WARP], &own, sizeof own);
  });
  const auto *const all = (const Fragments *)met.meeting.more[met.turn];
  const int lane = current % WARP, g = lane / 4, t = lane % 4;
  for (int r = 0; r < 4; r++) {
    unsigned a[8], b[8];
    for (int word = 0; word < 8; word++) {
      a[word] = all[4 * g + word % 4].a[r / 2 + word / 4 * 2];
      b[word] = all[4 * (2 * t + r % 2) + word % 4].b[word / 4];
    }
    d[r] = does(d[r], a, b);
  }
}

// As Hopper's tensor cores add, as far as is known: of each product what lies 2^-24 below the largest is cut, and of
// their sum what float32 doesn't hold. Source: Fasi, Higham, Mikaitis and Pranesh 2021, on the V100 and A100.
float cut_sum(const double (&terms)[17]) {
  double largest = 0, sum = 0;
  for (const double term : terms) largest = std::fmax(largest, std::fabs(term)), sum += term;
  if (largest == 0 || !std::isfinite(sum)) return (float)sum;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  sum = 0;
  for (const double term : terms) sum += std::trunc(term / unit) * unit;
  const float near = (float)sum;
  return std::fabs((double)near) > std::fabs(sum) ? std::nextafterf(near, 0.0f) : near;
}

template <typename Value> void mma_float(float (&d)[4], const Fragments &own, const char *what, int line, Value value) {
  mma(d, own, what, line, [=](float sum, const unsigned (&a)[8], const unsigned (&b)[8]) {
    double terms[17] = {sum};
    for (int i = 0; i < 16; i++)
      terms[i + 1] = (double)value(a[i / 2] >> i % 2 * 16 & 0xFFFF) * value(b[i / 2] >> i % 2 * 16 & 0xFFFF);
    return cut_sum(terms);
  });
}

template <typename T, typename Bits> T seen(Bits bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

extern "C" {

void emulated_mma_u8_s8(int (&d)[4], const Fragments &own, int line) {
  mma(d, own, "mma m16n8k32", line, [](int sum, const unsigned (&a)[8], const unsigned (&b)[8]) {
    for (int i = 0; i < 32; i++) sum += (int)(uint8_t)(a[i / 4] >> i % 4 * 8) * (int8_t)(b[i / 4] >> i % 4 * 8);
    return sum;
  });
}

void emulated_mma_and_popc(int (&d)[4], const Fragments &own, int line) {
  mma(d, own, "mma m16n8k256", line, [](int sum, const unsigned (&a)[8], const unsigned (&b)[8]) {
    for (int i = 0; i < 8; i++) sum += __builtin_popcount(a[i] & b[i]);
    return sum;
  });
}

void emulated_mma_f16(float (&d)[4], const Fragments &own, int line) {
  mma_float(d, own, "mma m16n8k16 of f16", line, [](uint16_t bits) { return seen<_Float16>(bits); });
}
void emulated_mma_bf16(float (&d)[4], const Fragments &own, int line) {
  mma_float(d, own, "mma m16n8k16 of bf16", line, [](uint16_t bits) { return seen<float>((uint32_t)bits << 16); });
}

// Four 8 x 8 matrices of 16 bits. Lane 4 r + c has, of row r of each, columns 2 c and 2 c + 1; turned: of column r, rows.
// Lane 8 m + r writes row r of matrix m.
void emulated_stmatrix(unsigned to, const unsigned (&own)[4], bool turned, int line) {
  const Met met = meet(false, 0xFFFFFFFF, "stmatrix", line, [&](Meeting &m, int turn) {
    memcpy(&m.more[turn][current % WARP], own, sizeof own);
  });
  const int lane = current % WARP, matrix = lane / 8, row = lane % 8;
  uint16_t made[8];
  for (int column = 0; column < 8; column++) {
    const int from = turned ? column : row, half = turned ? row : column;
    made[column] = (uint16_t)(met.meeting.more[met.turn][4 * from + half / 2].words[matrix] >> half % 2 * 16);
  }
  emulated_put(to, made, sizeof made);
}

}  // extern "C"
