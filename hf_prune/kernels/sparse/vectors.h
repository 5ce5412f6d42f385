// Vectors of any instruction set, 16-bit floats, and what all kernels do with them.
//
// The code is written once, with vector extensions, and compiled for several instruction sets; which one runs is decided
// at run time.

#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

template <int N>
struct VectorOf {
  typedef float type __attribute__((vector_size(4 * N), aligned(4), may_alias));
};
template <>
struct VectorOf<1> {
  typedef float type;
};
template <int N>
using Vector = typename VectorOf<N>::type;

struct Bfloat16 {
  uint16_t bits;
};

INLINE float to_float(float value) { return value; }
INLINE float to_float(Bfloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
INLINE void assign(float& place, float value) { place = value; }
INLINE void assign(Bfloat16& place, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // Round to nearest, ties to even; NaN stays NaN.
  place.bits = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#if defined(__FLT16_MAX__)
#define HAS_FLOAT16 1
using Float16 = _Float16;
INLINE float to_float(Float16 value) { return static_cast<float>(value); }
INLINE void assign(Float16& place, float value) { place = static_cast<Float16>(value); }
#endif

// --- transposition -------------------------------------------------------------------------------------------

// Interleaves two vectors: one step of a transposition. Four of them move the number of a row to the place of a lane.
INLINE void interleave(Vector<16> a, Vector<16> b, Vector<16>& low, Vector<16>& high) {
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

INLINE void transpose(Vector<16> (&rows)[16]) {
  Vector<16> other[16];
  for (int i = 0; i < 8; i++) interleave(rows[i], rows[i + 8], other[2 * i], other[2 * i + 1]);
  for (int i = 0; i < 8; i++) interleave(other[i], other[i + 8], rows[2 * i], rows[2 * i + 1]);
  for (int i = 0; i < 8; i++) interleave(rows[i], rows[i + 8], other[2 * i], other[2 * i + 1]);
  for (int i = 0; i < 8; i++) interleave(other[i], other[i + 8], rows[2 * i], rows[2 * i + 1]);
}

template <class T>
INLINE Vector<16> load16(const T* from) {
  Vector<16> result;
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&result, from, 64);
  } else {
    for (int i = 0; i < 16; i++) result[i] = to_float(from[i]);
  }
  return result;
}

template <class T>
INLINE void store16(T* to, Vector<16> values) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, &values, 64);
  } else {
    for (int i = 0; i < 16; i++) assign(to[i], values[i]);
  }
}

// --- instruction sets ----------------------------------------------------------------------------------------

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,popcnt")))
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#endif

std::string best_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("f16c")) return "portable";
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

// The level to use: the one that is asked for, or the best if none is.
std::string usable_level(const std::string& name) {
  const std::string best = best_level();
  if (name.empty()) return best;
  TORCH_CHECK(name == "portable" || (name == "avx2" && best != "portable") || name == best, "this processor has no ",
              name, ": expected ", best, " or a lower level");
  return name;
}

}  // namespace
