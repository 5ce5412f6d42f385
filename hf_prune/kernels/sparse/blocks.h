// Products with blocks of 16 rows of one input: each block is a vector, so that no input is read for a single weight.

#pragma once

#include "row_lists.h"

namespace {

struct Blocks {
  const int32_t* starts;    // (block rows + 1,)
  const uint16_t* columns;  // (blocks,)
  const void* values;       // (blocks, 16)
};

// One row of blocks; panel[input][token]. `sets` of sums take turns, to hide the latency of an addition.
template <int width, int sets, class T>
INLINE void block_row(const Blocks& w, const float* panel, int64_t row, Vector<16> (&sums)[width]) {
  const T* values = static_cast<const T*>(w.values);
  Vector<16> total[sets][width];
#pragma GCC unroll 16
  for (int token = 0; token < width; token++) {
    total[0][token] = sums[token];
#pragma GCC unroll 4
    for (int set = 1; set < sets; set++) total[set][token] = Vector<16>{};
  }
  int64_t block = w.starts[row];
  const int64_t end = w.starts[row + 1];
  for (; block + sets <= end; block += sets) {
#pragma GCC unroll 4
    for (int set = 0; set < sets; set++) {
      const Vector<16> of_block = load16(values + 16 * (block + set));
      const float* inputs = panel + static_cast<size_t>(w.columns[block + set]) * width;
#pragma GCC unroll 16
      for (int token = 0; token < width; token++) total[set][token] += of_block * inputs[token];
    }
  }
  for (; block < end; block++) {
    const Vector<16> of_block = load16(values + 16 * block);
    const float* inputs = panel + static_cast<size_t>(w.columns[block]) * width;
#pragma GCC unroll 16
    for (int token = 0; token < width; token++) total[0][token] += of_block * inputs[token];
  }
#pragma GCC unroll 16
  for (int token = 0; token < width; token++) {
#pragma GCC unroll 4
    for (int set = 1; set < sets; set++) total[0][token] += total[set][token];
    sums[token] = total[0][token];
  }
}

// Rows of blocks [begin, end) for one tile of tokens.
template <int width, int sets, class T>
INLINE void multiply_blocks(const Blocks& w, const float* panel, const float* bias, T* y, int64_t outputs,
                            int64_t tokens, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const int64_t first = 16 * row, rows = std::min<int64_t>(16, outputs - first);
    Vector<16> start{}, sums[width];
    if (bias != nullptr)
      for (int64_t i = 0; i < rows; i++) start[i] = bias[first + i];
    for (int token = 0; token < width; token++) sums[token] = start;
    block_row<width, sets, T>(w, panel, row, sums);
    for (int64_t token = 0; token < std::min<int64_t>(width, tokens); token++) {
      T* to = y + token * outputs + first;
      if (rows == 16) {
        store16(to, sums[token]);
      } else {
        for (int64_t i = 0; i < rows; i++) assign(to[i], sums[token][i]);
      }
    }
  }
}

constexpr int kBlockTile = 16;  // tokens at a time

#define DEFINE_BLOCKS(name, attribute)                                                                                 \
  template <class T>                                                                                                   \
  attribute void blocks_##name(int width, const Blocks& w, const float* panel, const float* bias, T* y,        \
                               int64_t outputs, int64_t tokens, int64_t begin, int64_t end) {                          \
    switch (width) {                                                                                                   \
      case 1: return multiply_blocks<1, 4, T>(w, panel, bias, y, outputs, tokens, begin, end);                         \
      case 4: return multiply_blocks<4, 2, T>(w, panel, bias, y, outputs, tokens, begin, end);                         \
      case 8: return multiply_blocks<8, 1, T>(w, panel, bias, y, outputs, tokens, begin, end);                         \
      default: return multiply_blocks<16, 1, T>(w, panel, bias, y, outputs, tokens, begin, end);                       \
    }                                                                                                                  \
  }

#if defined(__x86_64__)
DEFINE_BLOCKS(avx512, AVX512)
DEFINE_BLOCKS(avx2, AVX2)
#endif
DEFINE_BLOCKS(portable, )

template <class T>
auto blocks_of_level(const std::string& level) {
#if defined(__x86_64__)
  if (level == "avx512") return blocks_avx512<T>;
  if (level == "avx2") return blocks_avx2<T>;
#endif
  return blocks_portable<T>;
}

}  // namespace
