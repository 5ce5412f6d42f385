// Puts packed weights together again; docs/format.md of the project describes how they are stored.
//
// Values are integers of 1, 2, 4 or 8 bytes here. Every function stays inside of the arrays that it is given, whatever
// they hold: they come from files.

#pragma once

#include <array>

#include "vectors.h"

namespace {

constexpr uint8_t kEscape = 255;  // in a gap: 255 weights that are not stored, and no value after them

// --- byte planes -> values -----------------------------------------------------------------------------------

template <bool rotated, class T, size_t... byte>
INLINE void join_bytes(const std::array<const uint8_t*, sizeof(T)>& planes, T* out, int64_t count,
                       std::index_sequence<byte...>) {
  for (int64_t i = 0; i < count; i++) {
    T value = (... | static_cast<T>(static_cast<T>(planes[byte][i]) << 8 * byte));
    if constexpr (rotated) value = static_cast<T>(value >> 1 | value << (8 * sizeof(T) - 1));
    out[i] = value;
  }
}

template <class T>
INLINE void join(const std::array<const uint8_t*, sizeof(T)>& planes, bool rotated, T* out, int64_t count) {
  const auto bytes = std::make_index_sequence<sizeof(T)>();
  rotated ? join_bytes<true, T>(planes, out, count, bytes) : join_bytes<false, T>(planes, out, count, bytes);
}

// --- values -> their positions -------------------------------------------------------------------------------

// What is done with 8 bits at a time, the highest bit first: a value where a bit is 1, otherwise 0.
template <class T>
INLINE int64_t place_byte(uint8_t byte, const T* values, int64_t left, T* out, int64_t room) {
  int64_t used = 0;
  for (int64_t i = 0; i < 8; i++) {
    const bool stored = byte >> (7 - i) & 1;
    if (stored && (used == left || i >= room)) return -1;
    if (i < room) out[i] = stored ? values[used] : T{0};
    used += stored;
  }
  return used;
}

// Places values by bits; the number of values that were used, or -1 if a bit or a value lies outside.
template <class T>
INLINE int64_t place_bits(const uint8_t* bits, int64_t bytes, const T* values, int64_t count, T* out, int64_t length,
                          int64_t first = 0, int64_t used = 0) {
  for (int64_t i = first; i < bytes; i++) {
    const int64_t room = length - 8 * i;
    if (room >= 8 && count - used >= 8) {
      const T* from = values + used;
      for (int j = 0; j < 8; j++) {
        const int stored = bits[i] >> (7 - j) & 1;
        out[8 * i + j] = static_cast<T>(*from & -static_cast<T>(stored));
        from += stored;
      }
      used = from - values;
    } else {
      const int64_t of_byte = place_byte(bits[i], values + used, count - used, out + 8 * i, std::max<int64_t>(0, room));
      if (of_byte < 0) return -1;
      used += of_byte;
    }
  }
  return used;
}

#if defined(__x86_64__)
#define AVX512_EXPAND __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,popcnt")))

INLINE uint64_t first_bit_lowest(const uint8_t* bits, int bytes) {
  uint64_t mask = 0;
  std::memcpy(&mask, bits, bytes);
  mask = (mask >> 1 & 0x5555555555555555) | (mask & 0x5555555555555555) << 1;
  mask = (mask >> 2 & 0x3333333333333333) | (mask & 0x3333333333333333) << 2;
  return (mask >> 4 & 0x0f0f0f0f0f0f0f0f) | (mask & 0x0f0f0f0f0f0f0f0f) << 4;
}

// The same with one instruction for a whole vector, as long as there are enough values to load one.
template <class T>
AVX512_EXPAND int64_t place_bits_avx512(const uint8_t* bits, int64_t bytes, const T* values, int64_t count, T* out,
                                        int64_t length) {
  constexpr int lanes = 64 / sizeof(T), step = lanes / 8;
  int64_t i = 0, used = 0;
  for (; i + step <= bytes && 8 * i + lanes <= length && count - used >= lanes; i += step) {
    const uint64_t mask = first_bit_lowest(bits + i, step);
    const __m512i from = _mm512_loadu_si512(values + used);
    __m512i placed;
    if constexpr (sizeof(T) == 1) placed = _mm512_maskz_expand_epi8(mask, from);
    if constexpr (sizeof(T) == 2) placed = _mm512_maskz_expand_epi16(static_cast<__mmask32>(mask), from);
    if constexpr (sizeof(T) == 4) placed = _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), from);
    if constexpr (sizeof(T) == 8) placed = _mm512_maskz_expand_epi64(static_cast<__mmask8>(mask), from);
    _mm512_storeu_si512(out + 8 * i, placed);
    used += __builtin_popcountll(mask);
  }
  return place_bits(bits, bytes, values, count, out, length, i, used);
}
#endif

INLINE int64_t count_ones(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, bits + i, 8);
    count += __builtin_popcountll(eight);
  }
  for (; i < bytes; i++) count += __builtin_popcount(bits[i]);
  return count;
}

// Places values by the number of zeros before each, into zeros; the position after them, or -1 if one lies outside.
template <class T>
INLINE int64_t place_gaps(const uint8_t* gaps, int64_t bytes, const T* values, int64_t count, T* out, int64_t length) {
  int64_t position = 0, used = 0;
  for (int64_t i = 0; i < bytes; i++) {
    position += gaps[i];
    if (gaps[i] == kEscape) continue;
    if (position >= length || used == count) return -1;
    out[position++] = values[used++];
  }
  return used == count ? position : -1;
}

// Places values by patterns of which each byte is a number, into zeros; whether every byte and position is inside.
template <class T>
INLINE bool place_groups(const uint8_t* numbers, int64_t bytes, const uint8_t* patterns, int64_t known, int64_t per_byte,
                         int64_t width, const T* values, int64_t count, T* out, int64_t length) {
  int64_t used = 0;
  for (int64_t i = 0; i < bytes; i++) {
    if (numbers[i] >= known) return false;
    const uint8_t* pattern = patterns + numbers[i] * per_byte;
    const int64_t last = std::min(per_byte, count - used);
    for (int64_t j = 0; j < last; j++) {
      const int64_t position = i * width + pattern[j];
      if (position >= length) return false;
      out[position] = values[used + j];
    }
    used += last;
  }
  return used == count;
}

// --- instruction sets ----------------------------------------------------------------------------------------

#if defined(__x86_64__)
template <class T>
AVX512 void join_avx512(const std::array<const uint8_t*, sizeof(T)>& planes, bool rotated, T* out, int64_t count) {
  join<T>(planes, rotated, out, count);
}
template <class T>
AVX2 void join_avx2(const std::array<const uint8_t*, sizeof(T)>& planes, bool rotated, T* out, int64_t count) {
  join<T>(planes, rotated, out, count);
}
#endif

template <class T>
void join_planes(const std::string& level, const std::array<const uint8_t*, sizeof(T)>& planes, bool rotated, T* out,
                 int64_t count) {
#if defined(__x86_64__)
  if (level == "avx512") return join_avx512<T>(planes, rotated, out, count);
  if (level == "avx2") return join_avx2<T>(planes, rotated, out, count);
#endif
  join<T>(planes, rotated, out, count);
}

template <class T>
int64_t place_by_bits(const std::string& level, const uint8_t* bits, int64_t bytes, const T* values, int64_t count,
                      T* out, int64_t length) {
#if defined(__x86_64__)
  if (level == "avx512" && __builtin_cpu_supports("avx512vbmi2"))
    return place_bits_avx512<T>(bits, bytes, values, count, out, length);
#endif
  return place_bits<T>(bits, bytes, values, count, out, length);
}

}  // namespace
