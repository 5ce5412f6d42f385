// Products for few tokens, which read each weight once and hardly compute: what counts is how few bytes that takes.
//
// Sliced: rows sorted by length, 16 of them side by side, so that a vector holds one value of each and its inputs are
// gathered. Shorter rows of a slice are filled up with zeros that read an input of zero behind the others. Bits: one bit
// for each weight and the values that are not zero; a vector of values is spread to where its bits are.

#pragma once

#include "vectors.h"

namespace {

constexpr int kSlice = 16;

// --- slices --------------------------------------------------------------------------------------------------

struct Slices {
  const int32_t* starts;    // (slices + 1,): where each begins, in steps of 16 values
  const uint16_t* columns;  // (steps, 16)
  const void* values;       // (steps, 16)
  const int32_t* rows;      // (slices * 16,): the row of each lane; behind the last row, the number of rows
};

template <class T>
INLINE void sliced_sums(const Slices& w, const float* x, int64_t slice, Vector<16>& sum) {
  const T* values = static_cast<const T*>(w.values);
  for (int64_t step = w.starts[slice]; step < w.starts[slice + 1]; step++) {
    Vector<16> inputs;
    for (int lane = 0; lane < kSlice; lane++) inputs[lane] = x[w.columns[step * kSlice + lane]];
    sum += load16(values + step * kSlice) * inputs;
  }
}

#if defined(__x86_64__)
AVX512 INLINE __m512 sliced_values(const float* values) { return _mm512_loadu_ps(values); }
AVX512 INLINE __m512 sliced_values(const Bfloat16* values) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#if defined(HAS_FLOAT16)
AVX512 INLINE __m512 sliced_values(const Float16* values) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}
#endif

template <class T>
AVX512 INLINE __m512 sliced_product(const Slices& w, const float* x, int64_t step, __m512 sum) {
  const auto* columns = reinterpret_cast<const __m256i*>(w.columns + step * kSlice);
  const __m512i index = _mm512_cvtepu16_epi32(_mm256_loadu_si256(columns));
  return _mm512_fmadd_ps(sliced_values(static_cast<const T*>(w.values) + step * kSlice),
                         _mm512_i32gather_ps(index, x, 4), sum);
}

template <class T>
AVX512 void sliced_sums_avx512(const Slices& w, const float* x, int64_t slice, Vector<16>& sum) {
  __m512 total[4] = {_mm512_loadu_ps(&sum), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t step = w.starts[slice];
  const int64_t end = w.starts[slice + 1];
  for (; step + 4 <= end; step += 4)
    for (int i = 0; i < 4; i++) total[i] = sliced_product<T>(w, x, step + i, total[i]);
  for (; step < end; step++) total[0] = sliced_product<T>(w, x, step, total[0]);
  _mm512_storeu_ps(&sum, _mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3])));
}

template <class T>
AVX2 void sliced_sums_avx2(const Slices& w, const float* x, int64_t slice, Vector<16>& sum) {
  sliced_sums<T>(w, x, slice, sum);
}
#endif

// Slices [begin, end) for some tokens; x has `stride` floats for each, of which the last is zero.
template <class T>
void multiply_slices(const std::string& level, const Slices& w, const float* x, int64_t stride, const float* bias, T* y,
                     int64_t outputs, int64_t tokens, int64_t begin, int64_t end) {
  for (int64_t slice = begin; slice < end; slice++) {
    const int32_t* rows = w.rows + slice * kSlice;
    for (int64_t token = 0; token < tokens; token++) {
      Vector<16> sum{};
      if (bias != nullptr)
        for (int lane = 0; lane < kSlice; lane++) sum[lane] = rows[lane] < outputs ? bias[rows[lane]] : 0.0f;
#if defined(__x86_64__)
      if (level == "avx512")
        sliced_sums_avx512<T>(w, x + token * stride, slice, sum);
      else if (level == "avx2")
        sliced_sums_avx2<T>(w, x + token * stride, slice, sum);
      else
#endif
        sliced_sums<T>(w, x + token * stride, slice, sum);
      for (int lane = 0; lane < kSlice; lane++)
        if (rows[lane] < outputs) assign(y[token * outputs + rows[lane]], sum[lane]);
    }
  }
}

// --- bits ----------------------------------------------------------------------------------------------------

struct Bits {
  int64_t words;          // of a row
  const int32_t* starts;  // (outputs + 1,): the first value of each row
  const uint32_t* bits;   // (outputs, words): the lowest bit is the first input
  const void* values;     // (nonzero + 32,): room to load a vector anywhere
};

constexpr int kSpare = 32;

// One row and one token; x has 32 values for each word.
template <class T>
INLINE float bit_sum(const Bits& w, const T* x, int64_t row) {
  const T* values = static_cast<const T*>(w.values) + w.starts[row];
  float sum = 0.0f;
  for (int64_t word = 0; word < w.words; word++)
    for (uint32_t bits = w.bits[row * w.words + word]; bits; bits &= bits - 1)
      sum += to_float(*values++) * to_float(x[32 * word + __builtin_ctz(bits)]);
  return sum;
}

#if defined(__x86_64__)
#define AVX512_DOT                                                                                                     \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,fma,f16c,popcnt")))

INLINE uint64_t two_words(const uint32_t* words) {
  uint64_t both;
  std::memcpy(&both, words, 8);
  return both;
}

// Products of pairs of bfloat16, added in float32; a zero weight times an infinite input is NaN, as in a dense product.
template <int tokens>
AVX512_DOT void bit_sums_dot(const Bits& w, const Bfloat16* x, int64_t stride, int64_t row, float* sums) {
  const Bfloat16* values = static_cast<const Bfloat16*>(w.values) + w.starts[row];
  const uint32_t* bits = w.bits + row * w.words;
  __m512 total[tokens][2];
  for (int token = 0; token < tokens; token++) total[token][0] = total[token][1] = _mm512_setzero_ps();
  const auto add = [&](int64_t word, const Bfloat16* from, int set) AVX512_DOT {
    const auto spread = (__m512bh)_mm512_maskz_expand_epi16(bits[word], _mm512_loadu_si512(from));
    for (int token = 0; token < tokens; token++) {
      const auto inputs = (__m512bh)_mm512_loadu_si512(x + token * stride + 32 * word);
      total[token][set] = _mm512_dpbf16_ps(total[token][set], spread, inputs);
    }
  };
  int64_t word = 0;
  for (; word + 4 <= w.words; word += 4) {  // four counts at once, since each place depends on the count before
    const Bfloat16* second = values + __builtin_popcount(bits[word]);
    const Bfloat16* third = values + __builtin_popcountll(two_words(bits + word));
    const Bfloat16* fourth = third + __builtin_popcount(bits[word + 2]);
    add(word, values, 0);
    add(word + 1, second, 1);
    add(word + 2, third, 0);
    add(word + 3, fourth, 1);
    values = third + __builtin_popcountll(two_words(bits + word + 2));
  }
  for (; word < w.words; word++) {
    add(word, values, 0);
    values += __builtin_popcount(bits[word]);
  }
  for (int token = 0; token < tokens; token++)
    sums[token] = _mm512_reduce_add_ps(_mm512_add_ps(total[token][0], total[token][1]));
}

template <int tokens>
AVX512 void bit_sums_avx512(const Bits& w, const float* x, int64_t stride, int64_t row, float* sums) {
  const float* values = static_cast<const float*>(w.values) + w.starts[row];
  const uint32_t* bits = w.bits + row * w.words;
  __m512 total[tokens][2];
  for (int token = 0; token < tokens; token++) total[token][0] = total[token][1] = _mm512_setzero_ps();
  const auto add = [&](int64_t word, const float* from) AVX512 {
    const float* places[2] = {from, from + __builtin_popcount(bits[word] & 0xffff)};
    for (int i = 0; i < 2; i++) {
      const __mmask16 half = static_cast<__mmask16>(bits[word] >> 16 * i);
      const __m512 spread = _mm512_maskz_expand_ps(half, _mm512_loadu_ps(places[i]));
      for (int token = 0; token < tokens; token++) {
        const __m512 inputs = _mm512_loadu_ps(x + token * stride + 32 * word + 16 * i);
        total[token][i] = _mm512_mask3_fmadd_ps(spread, inputs, total[token][i], half);
      }
    }
  };
  int64_t word = 0;
  for (; word + 2 <= w.words; word += 2) {
    add(word, values);
    add(word + 1, values + __builtin_popcount(bits[word]));
    values += __builtin_popcountll(two_words(bits + word));
  }
  if (word < w.words) add(word, values);
  for (int token = 0; token < tokens; token++)
    sums[token] = _mm512_reduce_add_ps(_mm512_add_ps(total[token][0], total[token][1]));
}
#endif

bool multiplies_pairs() {  // of bfloat16
#if defined(__x86_64__)
  return best_level() == "avx512" && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

template <int tokens, class T>
void bit_sums(const std::string& level, const Bits& w, const T* x, int64_t stride, int64_t row, float* sums) {
#if defined(__x86_64__)
  if (level == "avx512") {
    if constexpr (std::is_same_v<T, float>) return bit_sums_avx512<tokens>(w, x, stride, row, sums);
    if constexpr (std::is_same_v<T, Bfloat16>)
      if (multiplies_pairs()) return bit_sums_dot<tokens>(w, x, stride, row, sums);
  }
#endif
  for (int token = 0; token < tokens; token++) sums[token] = bit_sum<T>(w, x + token * stride, row);
}

// Rows [begin, end) for some tokens; x has `stride` values for each.
template <class T>
void multiply_bits(const std::string& level, const Bits& w, const T* x, int64_t stride, const float* bias, T* y,
                   int64_t outputs, int64_t tokens, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float start = bias == nullptr ? 0.0f : bias[row];
    float sums[4];
    for (int64_t token = 0; token < tokens; token += 4) {
      const T* of_tokens = x + token * stride;
      const int64_t count = std::min<int64_t>(4, tokens - token);
      switch (count) {
        case 1: bit_sums<1, T>(level, w, of_tokens, stride, row, sums); break;
        case 2: bit_sums<2, T>(level, w, of_tokens, stride, row, sums); break;
        case 3: bit_sums<3, T>(level, w, of_tokens, stride, row, sums); break;
        default: bit_sums<4, T>(level, w, of_tokens, stride, row, sums);
      }
      for (int64_t i = 0; i < count; i++) assign(y[(token + i) * outputs + row], start + sums[i]);
    }
  }
}

}  // namespace
