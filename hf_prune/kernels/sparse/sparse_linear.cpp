// y = x Wᵀ + bias for a sparse W on the CPU.
//
// W lies in chunks of neighbouring inputs, and in a chunk row by row: the values that are not zero, and for each the
// number of its input inside the chunk (16 bits). x is first copied into panels, input by input, with the tokens of a
// tile side by side: a value then multiplies a whole vector of tokens, and the part of a panel that belongs to one chunk
// stays in the first-level cache while all rows pass over it. Sums are in float32. 16 rows at a time are turned back
// into the layout of y.
//
// The code is written once, with vector extensions, and compiled for several instruction sets; which one runs is decided
// at run time.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int kRows = 16;  // of a block that is transposed together
constexpr int64_t kLeastWork = 1 << 17;  // multiplications that are worth a second thread

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

struct Matrix {
  int64_t outputs, inputs, chunk;
  const int32_t* starts;    // (chunks * outputs + 1,)
  const uint16_t* columns;  // (nonzero,) inside the chunk
  const void* values;       // (nonzero,)
  const float* bias;        // (outputs,) or null
  int64_t chunks() const { return std::max<int64_t>(1, (inputs + chunk - 1) / chunk); }
};

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
DEFINE_LEVEL(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), 16, 2, 2)
DEFINE_LEVEL(avx2, __attribute__((target("avx2,fma"))), 8, 2, 1)
#endif
DEFINE_LEVEL(portable, , 4, 1, 1)

std::string best_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

template <class T>
Level<T> level_named(const std::string& name) {
#if defined(__x86_64__)
  const std::string best = best_level();
  if (name == "avx512" && best == "avx512") return {fill_avx512<T>, multiply_avx512<T>};
  if (name == "avx2" && best != "portable") return {fill_avx2<T>, multiply_avx2<T>};
#endif
  TORCH_CHECK(name == "portable", "this processor has no ", name, ": expected ", best_level(), " or a lower level");
  return {fill_portable<T>, multiply_portable<T>};
}

// --- operators -----------------------------------------------------------------------------------------------

int tile_width(int64_t tokens) {
  for (int width : {1, 4, 8, 16, 32})
    if (tokens <= width) return width;
  return 64;
}

template <class T>
void run(const Matrix& w, const T* x, T* y, int64_t tokens, int64_t nonzero, const Level<T>& level) {
  const int widest = tile_width(tokens);
  const int64_t tiles = (tokens + widest - 1) / widest;
  // The last tile may be narrower than the others.
  const auto width_of = [&](int64_t tile) { return tile_width(std::min<int64_t>(widest, tokens - tile * widest)); };
  const int64_t panel_size = w.inputs * widest;
  const bool is_panel = widest == 1 && std::is_same_v<T, float>;  // one token lies as its panel would
  at::Tensor panels = at::empty({is_panel ? 0 : tiles * panel_size}, at::kFloat);
  float* panel = panels.data_ptr<float>();
  const int64_t threads = nonzero * tokens < kLeastWork ? 1 : at::get_num_threads();
  const int64_t splits = std::max<int64_t>(1, std::min<int64_t>((threads + tiles - 1) / tiles, w.outputs / kRows));
  const int64_t rows = ((w.outputs + splits - 1) / splits + kRows - 1) / kRows * kRows;
  at::Tensor partials = at::empty({w.chunks() == 1 ? 0 : tiles * splits * rows * widest}, at::kFloat);
  float* partial = partials.data_ptr<float>();
  const auto for_each = [&](int64_t tasks, const auto& task) {
    if (threads == 1) {
      for (int64_t i = 0; i < tasks; i++) task(i);
    } else {
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) task(i);
      });
    }
  };
  if (!is_panel) {
    const int64_t parts = std::min<int64_t>(splits, std::max<int64_t>(1, w.inputs / kRows));
    const int64_t inputs = ((w.inputs + parts - 1) / parts + kRows - 1) / kRows * kRows;
    for_each(tiles * parts, [&](int64_t i) {
      const int64_t tile = i / parts, begin = i % parts * inputs, end = std::min(w.inputs, begin + inputs);
      if (begin < end)
        level.fill(width_of(tile), x + tile * widest * w.inputs, w.inputs, tokens - tile * widest,
                   panel + tile * panel_size, begin, end);
    });
  }
  for_each(tiles * splits, [&](int64_t i) {
    const int64_t tile = i / splits, begin = i % splits * rows, end = std::min(w.outputs, begin + rows);
    const float* of_tile = is_panel ? reinterpret_cast<const float*>(x) : panel + tile * panel_size;
    if (begin < end)
      level.multiply(width_of(tile), w, of_tile, partial + i * rows * widest, y + tile * widest * w.outputs,
                     tokens - tile * widest, begin, end);
  });
}

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& starts, const std::optional<at::Tensor>& bias, int64_t outputs,
                         int64_t inputs, int64_t chunk, const std::string& level) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == inputs, "x has ", x.dim() ? x.size(-1) : 0, " features: expected ", inputs);
  TORCH_CHECK(x.scalar_type() == values.scalar_type(), "x has dtype ", x.scalar_type(), ": expected ",
              values.scalar_type(), ", as the weight");
  TORCH_CHECK(values.is_contiguous() && columns.is_contiguous() && starts.is_contiguous(),
              "the weight is not contiguous");
  TORCH_CHECK(columns.scalar_type() == at::kShort && starts.scalar_type() == at::kInt,
              "expected columns of int16 and starts of int32");
  Matrix w{outputs, inputs, chunk, starts.const_data_ptr<int32_t>(),
           reinterpret_cast<const uint16_t*>(columns.const_data_ptr<int16_t>()), values.const_data_ptr(), nullptr};
  TORCH_CHECK(chunk >= 1 && chunk <= 1 << 16 && starts.numel() == w.chunks() * outputs + 1,
              "starts has ", starts.numel(), " entries: expected one for each chunk and output, and one more");
  TORCH_CHECK(columns.numel() == values.numel() && w.starts[starts.numel() - 1] == values.numel(),
              "the weight has ", values.numel(), " values and ", columns.numel(), " columns: expected as many");
  at::Tensor float_bias;
  if (bias.has_value()) {
    float_bias = bias->to(at::kFloat).contiguous();
    TORCH_CHECK(float_bias.numel() == outputs, "bias has ", float_bias.numel(), " entries: expected ", outputs);
    w.bias = float_bias.const_data_ptr<float>();
  }
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor y = at::empty(shape, x.options());
  const at::Tensor rows = x.contiguous();
  const int64_t tokens = outputs == 0 ? 0 : y.numel() / outputs;
  if (tokens == 0) return y;
  const std::string name = level.empty() ? best_level() : level;
  if (x.scalar_type() == at::kFloat) {
    run<float>(w, rows.const_data_ptr<float>(), y.data_ptr<float>(), tokens, values.numel(), level_named<float>(name));
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x has dtype ", x.scalar_type(), ": expected float32 or bfloat16");
    run<Bfloat16>(w, static_cast<const Bfloat16*>(rows.const_data_ptr()), static_cast<Bfloat16*>(y.data_ptr()), tokens,
                  values.numel(), level_named<Bfloat16>(name));
  }
  return y;
}

}  // namespace

TORCH_LIBRARY(hf_prune, m) {
  m.def(
      "sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor starts, Tensor? bias, int outputs, int inputs, "
      "int chunk, str level) -> Tensor");
  m.def("sparse_level() -> str", [] { return best_level(); });
}

TORCH_LIBRARY_IMPL(hf_prune, CPU, m) { m.impl("sparse_linear", sparse_linear); }
