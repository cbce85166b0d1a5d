// CUDA C++ on a CPU: what a kernel's source, translated by `translate`, is compiled with. See runtime.cpp.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
// What kernels call of <cmath>, which would be a quarter of a variant's time to compile.
extern "C" {
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float fminf(float, float) noexcept;
float fmaf(float, float, float) noexcept;
double fma(double, double, double) noexcept;
float exp2f(float) noexcept;
}

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __shared__ static __attribute__((section("emulated_shared")))
#define __CUDA_ARCH__ 900

struct Dimensions { unsigned x, y, z; };
extern "C" Dimensions threadIdx, blockIdx, blockDim, gridDim;
extern "C" unsigned emulated_rank;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of this library: where the compiler puts what is __shared__.
extern __attribute__((visibility("hidden"))) char __start_emulated_shared[], __stop_emulated_shared[];
static __attribute__((section("emulated_shared"), used)) char no_shared_memory[16];  // lest a kernel have none

namespace emulated {

struct Fragments { unsigned a[4], b[2]; };  // of a lane

extern "C" {
const char *emulated_run(void (*body)(void **), void **parameters, int blocks, int cluster, int threads,
                         int bytes, unsigned seed, char *shared, char *shared_end);
void *emulated_dynamic();
unsigned emulated_to_shared(const void *at);
// shared: addresses of the thread's own block; else those of any of its cluster.
unsigned emulated_map(unsigned at, unsigned rank);
void emulated_put(unsigned at, const void *from, int bytes);
void emulated_add(unsigned at, unsigned value, bool shared);
void emulated_aligned(const void *at, int bytes);  // or it fails
// d of a warp's mma.sync, see mma.h: becomes that plus a b.
void emulated_mma_u8_s8(int (&d)[4], const Fragments &own, int line);
void emulated_mma_and_popc(int (&d)[4], const Fragments &own, int line);
void emulated_mma_f16(float (&d)[4], const Fragments &own, int line);
void emulated_mma_bf16(float (&d)[4], const Fragments &own, int line);
// stmatrix.x4 of a warp; turned: with .trans.
void emulated_stmatrix(unsigned to, const unsigned (&own)[4], bool turned, int line);
void emulated_cluster_arrive(bool releases, int line);
void emulated_cluster_wait(int line);
void emulated_copy(unsigned to, const void *from, int bytes);
void emulated_commit();
void emulated_wait_for_previous();
void emulated_prefetch(const void *at);
void emulated_wait_copies(int left);
void emulated_barrier_init(unsigned at, unsigned count);
void emulated_barrier_fence();
void emulated_barrier_arrive(unsigned at, bool shared);
void emulated_barrier_expect(unsigned at, unsigned bytes);
void emulated_barrier_wait(unsigned at, unsigned parity);
// What `createpolicy` makes; and that a bulk copy is told nothing else.
uint64_t emulated_policy(bool first);
void emulated_cached(uint64_t policy);
// ranks: a bit for each block of the cluster that it goes to; 0: where it is told to go.
void emulated_load(unsigned to, const void *map, int x, int y, unsigned at, unsigned ranks);
// entries: 0, bytes; 1, bits; 2, bytes, of a sparse A, of which metadata tell.
void emulated_wgmma(int *registers, int columns, int entries, uint64_t a, uint64_t b, unsigned metadata, int add,
                    int line);
void emulated_wgmma_fence();
void emulated_wgmma_commit();
void emulated_wgmma_wait(int left);
void emulated_bar_sync(unsigned id, int count, int line);
// Of a warp, or (`block`) of all: returns once all have come, with what each left.
const uint64_t *emulated_meet(bool block, unsigned mask, uint64_t value, const char *what, int line);
}

template <typename T> T *dynamic_shared() { return (T *)emulated_dynamic(); }

template <typename T> uint64_t packed(T value) {
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}
template <typename T> T unpacked(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}

inline float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }
inline float half_at(unsigned word, int shift) { return (float)unpacked<_Float16>(word >> shift & 0xFFFF); }
inline unsigned half_of(float x) { return (unsigned)packed((_Float16)x); }
inline unsigned bfloat_of(float x) {
  const uint32_t bits = (uint32_t)packed(x);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
// The largest float that is not above a + b, which in double may be rounded.
inline float add_down(double a, double b) {
  const double sum = a + b, part = sum - a, rest = (a - (sum - part)) + (b - part);
  const float near = (float)sum;
  return (double)near > sum || ((double)near == sum && rest < 0) ? __builtin_nextafterf(near, -__builtin_inff()) : near;
}

// Nothing, and any values, from nowhere.
inline void load(unsigned &a, unsigned &b, unsigned &c, unsigned &d, const void *from) {
  a = b = c = d = 0xA5C3A5C3;
  if (from) {
    emulated_aligned(from, 16);
    const unsigned *words = (const unsigned *)from;
    a = words[0], b = words[1], c = words[2], d = words[3];
  }
}
inline void put(unsigned at, uint4 words) { emulated_put(at, &words, sizeof words); }

// A launch's own, which are there from the beginning: no access of a thread's.
template <typename T> __attribute__((no_sanitize("thread"))) T parameter(const void *at) {
  std::remove_const_t<T> value;
  memcpy(&value, at, sizeof value);
  return value;
}
template <typename... A, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void **parameters, std::index_sequence<I...>) {
  kernel(parameter<A>(parameters[I])...);
}
template <typename... A> void call(void (*kernel)(A...), void **parameters) {
  call(kernel, parameters, std::index_sequence_for<A...>());
}

}  // namespace emulated

// What Python calls: null, or what went wrong. cluster: blocks of one.
#define EMULATED(kernel, cluster)                                                                         \
  extern "C" const char *emulate(void **parameters, int blocks, int threads, int bytes, unsigned seed) { \
    return emulated::emulated_run([](void **p) { emulated::call(kernel, p); }, parameters, blocks,       \
                                  cluster, threads, bytes, seed, __start_emulated_shared,               \
                                  __stop_emulated_shared);                                               \
  }

#define __syncwarp() emulated::emulated_meet(false, 0xFFFFFFFF, 0, "__syncwarp", __builtin_LINE())
#define __syncthreads() emulated::emulated_meet(true, 0xFFFFFFFF, 0, "__syncthreads", __builtin_LINE())

template <typename T> T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  return emulated::unpacked<T>(emulated::emulated_meet(false, mask, emulated::packed(value), "__shfl_sync", line)[lane & 31]);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  const int lane = (threadIdx.x ^ by) & 31;
  return emulated::unpacked<T>(emulated::emulated_meet(false, mask, emulated::packed(value), "__shfl_xor_sync", line)[lane]);
}
inline int __any_sync(unsigned mask, bool value, int line = __builtin_LINE()) {
  const uint64_t *left = emulated::emulated_meet(false, mask, value, "__any_sync", line);
  for (int i = 0; i < 32; i++)
    if (left[i]) return 1;
  return 0;
}

inline int __reduce_add_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  const uint64_t *left = emulated::emulated_meet(false, mask, emulated::packed(value), "__reduce_add_sync", line);
  unsigned sum = 0;
  for (int i = 0; i < 32; i++) sum += (unsigned)left[i];
  return (int)sum;
}
template <typename T> T __reduce_max_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  const uint64_t *left = emulated::emulated_meet(false, mask, emulated::packed(value), "__reduce_max_sync", line);
  for (int i = 0; i < 32; i++) value = value < (T)left[i] ? (T)left[i] : value;
  return value;
}

template <typename A, typename B> std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T)b < (T)a ? (T)b : (T)a;
}
template <typename A, typename B> std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return (T)a < (T)b ? (T)b : (T)a;
}
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline unsigned __cvta_generic_to_shared(const void *at) { return emulated::emulated_to_shared(at); }
inline float __uint_as_float(unsigned x) { return emulated::unpacked<float>(x); }
inline float __int_as_float(int x) { return emulated::unpacked<float>((unsigned)x); }
inline unsigned __float_as_uint(float x) { return (unsigned)emulated::packed(x); }
inline int __float_as_int(float x) { return (int)emulated::packed(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fadd_rd(float a, float b) { return emulated::add_down(a, b); }
inline float __fmaf_rd(float a, float b, float c) { return emulated::add_down((double)a * b, c); }
inline int __viaddmin_s32_relu(int a, int b, int c) { return max(min((int)((unsigned)a + (unsigned)b), c), 0); }
// Of both halves: max(min(a + b, c), 0).
inline unsigned __viaddmin_s16x2_relu(unsigned a, unsigned b, unsigned c) {
  unsigned r = 0;
  for (int i = 0; i < 32; i += 16) {
    const int16_t sum = (int16_t)((a >> i) + (b >> i)), most = (int16_t)(c >> i);
    r |= (unsigned)max(min((int)sum, (int)most), 0) << i;
  }
  return r;
}
inline unsigned __vimin_s16x2_relu(unsigned a, unsigned b) { return __viaddmin_s16x2_relu(a, 0, b); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return (unsigned)((((uint64_t)high << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const uint64_t both = (uint64_t)y << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned pick = s >> (4 * i) & 15, byte = (unsigned)(both >> (8 * (pick & 7))) & 0xFF;
    r |= (pick & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);
  }
  return r;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xFF) * (b >> i & 0xFF);
  return c;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += (int8_t)(a >> i) * (int8_t)(b >> i);
  return c;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
