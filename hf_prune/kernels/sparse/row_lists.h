// The product with lists of the values of each row, in chunks of neighbouring inputs.
//
// W lies in chunks of neighbouring inputs, and in a chunk row by row: the values that are not zero, and for each the
// number of its input inside the chunk (16 bits). x is first copied into panels, input by input, with the tokens of a
// tile side by side: a value then multiplies a whole vector of tokens, and the part of a panel that belongs to one chunk
// stays in the first-level cache while all rows pass over it. Sums are in float32. 16 rows at a time are turned back
// into the layout of y.

#pragma once

#include "vectors.h"

namespace {

constexpr int kRows = 16;  // of a block that is transposed together

struct Matrix {
  int64_t outputs, inputs, chunk;
  const int32_t* starts;    // (chunks * outputs + 1,)
  const uint16_t* columns;  // (nonzero,) inside the chunk
  const void* values;       // (nonzero,)
  const float* bias;        // (outputs,) or null
  int64_t chunks() const { return std::max<int64_t>(1, (inputs + chunk - 1) / chunk); }
};

// Copies inputs [begin, end) of up to `width` tokens into panel[input][token]; tokens that are missing become zero.
template <int width, class T>
INLINE void fill_panel(const T* x, int64_t inputs, int64_t tokens, float* panel, int64_t begin, int64_t end) {
  int64_t input = begin;
  if constexpr (width % 16 == 0) {
    for (; input + 16 <= end; input += 16) {
      for (int first = 0; first < width; first += 16) {
        Vector<16> block[16];
        for (int i = 0; i < 16; i++)
          block[i] = first + i < tokens ? load16(x + (first + i) * inputs + input) : Vector<16>{};
        transpose(block);
        for (int i = 0; i < 16; i++) store16(panel + (input + i) * width + first, block[i]);
      }
    }
  }
  for (; input < end; input++)
    for (int token = 0; token < width; token++)
      panel[input * width + token] = token < tokens ? to_float(x[token * inputs + input]) : 0.0f;
}

// Writes 16 rows of sums, block[row][token], to y[token][row].
template <int width, class T>
INLINE void store_rows(const float* block, int rows, int64_t tokens, T* y, int64_t outputs) {
  if constexpr (width % 16 == 0) {
    if (rows == kRows) {
      for (int first = 0; first < width && first < tokens; first += 16) {
        Vector<16> part[16];
        for (int row = 0; row < 16; row++) part[row] = load16(block + row * width + first);
        transpose(part);
        int count = std::min<int64_t>(16, tokens - first);
        for (int i = 0; i < count; i++) store16(y + (first + i) * outputs, part[i]);
      }
      return;
    }
  }
  for (int64_t token = 0; token < std::min<int64_t>(width, tokens); token++)
    for (int row = 0; row < rows; row++) assign(y[token * outputs + row], block[row * width + token]);
}

// --- the product ---------------------------------------------------------------------------------------------

// Four values, repeated over a vector, so that `spread` needs no memory access to fill a vector with one of them. Compilers
// would widen a vector through memory, hence the instructions by name.
template <int lanes>
INLINE Vector<lanes> load_four(const float* from) {
  struct Four {
    float values[4];
  };
  Vector<lanes> result;
#if defined(__x86_64__)
  if constexpr (lanes == 16) asm("vbroadcastf32x4 %1, %0" : "=v"(result) : "m"(*reinterpret_cast<const Four*>(from)));
  if constexpr (lanes == 8) asm("vbroadcastf128 %1, %0" : "=x"(result) : "m"(*reinterpret_cast<const Four*>(from)));
#endif
  if constexpr (lanes == 4) std::memcpy(&result, from, 16);
  return result;
}

// A vector filled with the value `i` of four.
template <int i, int lanes>
INLINE Vector<lanes> spread(Vector<lanes> v) {
  if constexpr (lanes == 4) return __builtin_shufflevector(v, v, i, i, i, i);
  if constexpr (lanes == 8) return __builtin_shufflevector(v, v, i, i, i, i, 4 + i, 4 + i, 4 + i, 4 + i);
  if constexpr (lanes == 16)
    return __builtin_shufflevector(v, v, i, i, i, i, 4 + i, 4 + i, 4 + i, 4 + i, 8 + i, 8 + i, 8 + i, 8 + i, 12 + i,
                                   12 + i, 12 + i, 12 + i);
}

template <int parts, int lanes>
INLINE void add_product(Vector<lanes> value, const float* x, Vector<lanes>* total) {
#pragma GCC unroll 16
  for (int part = 0; part < parts; part++) {
    Vector<lanes> tokens;
    std::memcpy(&tokens, x + part * lanes, sizeof(tokens));
    total[part] += value * tokens;
  }
}

// Adds the entries [begin, end) of one row to sums[token]; `sets` of sums take turns, to hide the latency of an addition.
template <int width, int lanes, int sets, class T>
INLINE void add_row(const float* panel, const uint16_t* columns, const T* values, int32_t begin, int32_t end,
                    float* sums) {
  constexpr int parts = width / lanes;
  using V = Vector<lanes>;
  V total[sets][parts];
#pragma GCC unroll 16
  for (int part = 0; part < parts; part++) {
    std::memcpy(&total[0][part], sums + part * lanes, sizeof(V));
#pragma GCC unroll 4
    for (int set = 1; set < sets; set++) total[set][part] = V{};
  }
  int32_t entry = begin;
  for (; entry + 4 <= end; entry += 4) {
    uint64_t four;  // columns at once
    std::memcpy(&four, columns + entry, 8);
    const auto input = [&](int i) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
      return panel + static_cast<size_t>(four >> 16 * i & 0xffff) * width;
#else
      return panel + static_cast<size_t>(columns[entry + i]) * width;
#endif
    };
    if constexpr (lanes == 1) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) total[i % sets][0] += to_float(values[entry + i]) * *input(i);
    } else if constexpr (!std::is_same_v<T, float>) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        add_product<parts, lanes>(V{} + to_float(values[entry + i]), input(i), total[i % sets]);
    } else {
      const V value = load_four<lanes>(values + entry);
      add_product<parts, lanes>(spread<0, lanes>(value), input(0), total[0]);
      add_product<parts, lanes>(spread<1, lanes>(value), input(1), total[1 % sets]);
      add_product<parts, lanes>(spread<2, lanes>(value), input(2), total[2 % sets]);
      add_product<parts, lanes>(spread<3, lanes>(value), input(3), total[3 % sets]);
    }
  }
  for (; entry < end; entry++) {
    const float* x = panel + static_cast<size_t>(columns[entry]) * width;
    add_product<parts, lanes>(V{} + to_float(values[entry]), x, total[0]);
  }
#pragma GCC unroll 16
  for (int part = 0; part < parts; part++) {
#pragma GCC unroll 4
    for (int set = 1; set < sets; set++) total[0][part] += total[set][part];
    std::memcpy(sums + part * lanes, &total[0][part], sizeof(V));
  }
}

// Rows [begin, end) for one tile of tokens. `partial` holds (end - begin) x width sums between chunks.
template <int width, int lanes, int sets, class T>
INLINE void multiply(const Matrix& w, const float* panel, float* partial, T* y, int64_t tokens, int64_t begin,
                     int64_t end) {
  const T* values = static_cast<const T*>(w.values);
  const int64_t chunks = w.chunks();
  alignas(64) float block[kRows * width];
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const float* inputs = panel + chunk * w.chunk * width;
    const int32_t* starts = w.starts + chunk * w.outputs;
    for (int64_t first = begin; first < end; first += kRows) {
      const int rows = std::min<int64_t>(kRows, end - first);
      float* sums = chunks == 1 ? block : partial + (first - begin) * width;
      for (int i = 0; i < rows; i++) {
        float* of_row = sums + i * width;
        if (chunk == 0) {
          const float start = w.bias == nullptr ? 0.0f : w.bias[first + i];
          for (int token = 0; token < width; token++) of_row[token] = start;
        }
        add_row<width, lanes, sets, T>(inputs, w.columns, values, starts[first + i], starts[first + i + 1], of_row);
      }
      if (chunk + 1 == chunks) store_rows<width, T>(sums, rows, tokens, y + first, w.outputs);
    }
  }
}

// --- instruction sets ----------------------------------------------------------------------------------------

template <class T>
struct Level {
  void (*fill)(int width, const T* x, int64_t inputs, int64_t tokens, float* panel, int64_t begin, int64_t end);
  void (*multiply)(int width, const Matrix& w, const float* panel, float* partial, T* y, int64_t tokens, int64_t begin,
                   int64_t end);
};

#define DEFINE_LEVEL(name, attribute, lanes, sets32, sets64)                                                           \
  template <class T>                                                                                                   \
  attribute void fill_##name(int width, const T* x, int64_t inputs, int64_t tokens, float* panel, int64_t begin,       \
                             int64_t end) {                                                                            \
    switch (width) {                                                                                                   \
      case 1: return fill_panel<1, T>(x, inputs, tokens, panel, begin, end);                                           \
      case 4: return fill_panel<4, T>(x, inputs, tokens, panel, begin, end);                                           \
      case 8: return fill_panel<8, T>(x, inputs, tokens, panel, begin, end);                                           \
      case 16: return fill_panel<16, T>(x, inputs, tokens, panel, begin, end);                                         \
      case 32: return fill_panel<32, T>(x, inputs, tokens, panel, begin, end);                                         \
      default: return fill_panel<64, T>(x, inputs, tokens, panel, begin, end);                                         \
    }                                                                                                                  \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  attribute void multiply_##name(int width, const Matrix& w, const float* panel, float* partial, T* y, int64_t tokens, \
                                 int64_t begin, int64_t end) {                                                         \
    switch (width) {                                                                                                   \
      case 1: return multiply<1, 1, 4, T>(w, panel, partial, y, tokens, begin, end);                                   \
      case 4: return multiply<4, 4, 4, T>(w, panel, partial, y, tokens, begin, end);                                   \
      case 8: return multiply<8, std::min(8, lanes), 4, T>(w, panel, partial, y, tokens, begin, end);                  \
      case 16: return multiply<16, lanes, 4, T>(w, panel, partial, y, tokens, begin, end);                             \
      case 32: return multiply<32, lanes, sets32, T>(w, panel, partial, y, tokens, begin, end);                        \
      default: return multiply<64, lanes, sets64, T>(w, panel, partial, y, tokens, begin, end);                        \
    }                                                                                                                  \
  }

#if defined(__x86_64__)
DEFINE_LEVEL(avx512, AVX512, 16, 2, 2)
DEFINE_LEVEL(avx2, AVX2, 8, 2, 1)
#endif
DEFINE_LEVEL(portable, , 4, 1, 1)

template <class T>
Level<T> level_named(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") return {fill_avx512<T>, multiply_avx512<T>};
  if (name == "avx2") return {fill_avx2<T>, multiply_avx2<T>};
#endif
  return {fill_portable<T>, multiply_portable<T>};
}

int tile_width(int64_t tokens) {
  for (int width : {1, 4, 8, 16, 32})
    if (tokens <= width) return width;
  return 64;
}

}  // namespace
