// Products with sparse matrices, and the unpacking of packed weights, as operators of torch.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "blocks.h"
#include "few_tokens.h"
#include "row_lists.h"
#include "unpacking_operators.h"

namespace {

constexpr int64_t kLeastWork = 1 << 17;  // multiplications that are worth a second thread

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

// --- operators -----------------------------------------------------------------------------------------------

// What all products have in common: their inputs checked, and an output to fill.
struct Call {
  at::Tensor x, y, float_bias;
  int64_t tokens;
  std::string level;
  const float* bias() const { return float_bias.defined() ? float_bias.const_data_ptr<float>() : nullptr; }
};

Call prepare(const at::Tensor& x, const at::Tensor& values, const std::optional<at::Tensor>& bias, int64_t outputs,
             int64_t inputs, const std::string& level) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == inputs, "x has ", x.dim() ? x.size(-1) : 0, " features: expected ", inputs);
  TORCH_CHECK(x.scalar_type() == values.scalar_type(), "x has dtype ", x.scalar_type(), ": expected ",
              values.scalar_type(), ", as the weight");
  Call call;
  if (bias.has_value()) {
    call.float_bias = bias->to(at::kFloat).contiguous();
    TORCH_CHECK(bias->numel() == outputs, "bias has ", bias->numel(), " entries: expected ", outputs);
  }
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  call.y = at::empty(shape, x.options());
  call.x = x.contiguous();
  call.tokens = outputs == 0 ? 0 : call.y.numel() / outputs;
  call.level = usable_level(level);
  return call;
}

// The data of a tensor of a weight.
template <class T>
const T* data_of(const at::Tensor& tensor, at::ScalarType dtype, int64_t entries, const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == dtype && tensor.numel() == entries, name, " has ",
              tensor.numel(), " entries of dtype ", tensor.scalar_type(), ": expected ", entries, " of dtype ", dtype);
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Calls a function with a value of the type that stands for a dtype.
template <class F>
void with_float(at::ScalarType dtype, const F& call) {
  switch (dtype) {
    case at::kFloat: return call(float{});
    case at::kBFloat16: return call(Bfloat16{});
#if defined(HAS_FLOAT16)
    case at::kHalf: return call(Float16{});
#endif
    default: TORCH_CHECK(false, "x has dtype ", dtype, ": expected float32, bfloat16 or float16");
  }
}

// Calls a function with parts of a range, on several threads where the work is worth it.
template <class F>
void for_parts(int64_t count, int64_t work, const F& call) {
  if (work < kLeastWork) return call(0, count);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { call(begin, end); });
}

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& starts, const std::optional<at::Tensor>& bias, int64_t outputs,
                         int64_t inputs, int64_t chunk, const std::string& level) {
  const Call call = prepare(x, values, bias, outputs, inputs, level);
  TORCH_CHECK(chunk >= 1 && chunk <= 1 << 16, "chunk is ", chunk, ": expected 1 to 65536");
  Matrix w{outputs, inputs, chunk, nullptr, nullptr, nullptr, call.bias()};
  w.starts = data_of<int32_t>(starts, at::kInt, w.chunks() * outputs + 1, "starts");
  const int64_t nonzero = w.starts[w.chunks() * outputs];
  w.columns = data_of<uint16_t>(columns, at::kShort, nonzero, "columns");
  w.values = data_of<void>(values, values.scalar_type(), nonzero, "values");
  if (call.tokens == 0) return call.y;
  with_float(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    run<T>(w, static_cast<const T*>(call.x.const_data_ptr()), static_cast<T*>(call.y.data_ptr()), call.tokens, nonzero,
           level_named<T>(call.level));
  });
  return call.y;
}

at::Tensor sliced_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& starts, const at::Tensor& rows, const std::optional<at::Tensor>& bias,
                         int64_t outputs, int64_t inputs, const std::string& level) {
  const Call call = prepare(x, values, bias, outputs, inputs, level);
  const int64_t slices = (outputs + kSlice - 1) / kSlice;
  Slices w;
  w.starts = data_of<int32_t>(starts, at::kInt, slices + 1, "starts");
  const int64_t entries = static_cast<int64_t>(w.starts[slices]) * kSlice;
  w.columns = data_of<uint16_t>(columns, at::kShort, entries, "columns");
  w.values = data_of<void>(values, values.scalar_type(), entries, "values");
  w.rows = data_of<int32_t>(rows, at::kInt, slices * kSlice, "rows");
  if (call.tokens == 0) return call.y;
  at::Tensor padded = at::zeros({call.tokens, inputs + 1}, at::kFloat);
  padded.narrow(1, 0, inputs).copy_(call.x.view({call.tokens, inputs}));
  const float* inputs_of = padded.const_data_ptr<float>();
  with_float(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    for_parts(slices, entries * call.tokens, [&](int64_t begin, int64_t end) {
      multiply_slices<T>(call.level, w, inputs_of, inputs + 1, call.bias(), static_cast<T*>(call.y.data_ptr()), outputs,
                         call.tokens, begin, end);
    });
  });
  return call.y;
}

at::Tensor bits_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& bits, const at::Tensor& starts,
                       const std::optional<at::Tensor>& bias, int64_t outputs, int64_t inputs,
                       const std::string& level) {
  const Call call = prepare(x, values, bias, outputs, inputs, level);
  Bits w;
  w.words = (inputs + 31) / 32;
  w.starts = data_of<int32_t>(starts, at::kInt, outputs + 1, "starts");
  w.bits = data_of<uint32_t>(bits, at::kInt, outputs * w.words, "bits");
  w.values = data_of<void>(values, values.scalar_type(), w.starts[outputs] + kSpare, "values");
  if (call.tokens == 0) return call.y;
  at::Tensor padded = call.x.view({call.tokens, inputs});
  if (inputs % 32 != 0) {
    padded = at::zeros({call.tokens, 32 * w.words}, x.options());
    padded.narrow(1, 0, inputs).copy_(call.x.view({call.tokens, inputs}));
  }
  with_float(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    for_parts(outputs, w.starts[outputs] * call.tokens, [&](int64_t begin, int64_t end) {
      multiply_bits<T>(call.level, w, static_cast<const T*>(padded.const_data_ptr()), 32 * w.words, call.bias(),
                       static_cast<T*>(call.y.data_ptr()), outputs, call.tokens, begin, end);
    });
  });
  return call.y;
}

at::Tensor blocks_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& starts, const std::optional<at::Tensor>& bias, int64_t outputs,
                         int64_t inputs, const std::string& level) {
  const Call call = prepare(x, values, bias, outputs, inputs, level);
  const int64_t rows = (outputs + 15) / 16;
  Blocks w;
  w.starts = data_of<int32_t>(starts, at::kInt, rows + 1, "starts");
  const int64_t blocks = w.starts[rows];
  w.columns = data_of<uint16_t>(columns, at::kShort, blocks, "columns");
  w.values = data_of<void>(values, values.scalar_type(), 16 * blocks, "values");
  if (call.tokens == 0) return call.y;
  const int64_t tiles = (call.tokens + kBlockTile - 1) / kBlockTile;
  const auto width_of = [&](int64_t tile) {
    return std::min(tile_width(call.tokens - tile * kBlockTile), kBlockTile);
  };
  at::Tensor panels = at::empty({tiles, inputs * std::min(tile_width(call.tokens), kBlockTile)}, at::kFloat);
  float* panel = panels.data_ptr<float>();
  const int64_t panel_size = panels.size(1);
  with_float(x.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    const Level<T> level_of = level_named<T>(call.level);
    const auto multiply = blocks_of_level<T>(call.level);
    const T* from = static_cast<const T*>(call.x.const_data_ptr());
    for_parts(tiles, 16 * blocks * call.tokens, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; tile++)
        level_of.fill(width_of(tile), from + tile * kBlockTile * inputs, inputs, call.tokens - tile * kBlockTile,
                      panel + tile * panel_size, 0, inputs);
    });
    for_parts(tiles * rows, 16 * blocks * call.tokens, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t tile = begin / rows, first = begin % rows, last = std::min(rows, first + end - begin);
        multiply(width_of(tile), w, panel + tile * panel_size, call.bias(),
                 static_cast<T*>(call.y.data_ptr()) + tile * kBlockTile * outputs, outputs,
                 call.tokens - tile * kBlockTile, first, last);
        begin += last - first;
      }
    });
  });
  return call.y;
}

}  // namespace

TORCH_LIBRARY(hf_prune, m) {
  m.def(
      "sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor starts, Tensor? bias, int outputs, int inputs, "
      "int chunk, str level) -> Tensor");
  m.def(
      "sliced_linear(Tensor x, Tensor values, Tensor columns, Tensor starts, Tensor rows, Tensor? bias, int outputs, "
      "int inputs, str level) -> Tensor");
  m.def(
      "bits_linear(Tensor x, Tensor values, Tensor bits, Tensor starts, Tensor? bias, int outputs, int inputs, "
      "str level) -> Tensor");
  m.def(
      "blocks_linear(Tensor x, Tensor values, Tensor columns, Tensor starts, Tensor? bias, int outputs, int inputs, "
      "str level) -> Tensor");
  m.def("sparse_level() -> str", [] { return best_level(); });
  m.def("multiplies_pairs() -> bool", [] { return multiplies_pairs(); });
  m.def("join_planes(Tensor[] planes, bool rotated, Tensor(a!) out, str level='') -> ()");
  m.def("count_ones(Tensor bits) -> int");
  m.def("place_bits(Tensor bits, Tensor values, Tensor(a!) out, str level='') -> int");
  m.def("place_gaps(Tensor gaps, Tensor values, Tensor(a!) out) -> int");
  m.def("place_groups(Tensor numbers, Tensor patterns, int width, Tensor values, Tensor(a!) out) -> bool");
}

TORCH_LIBRARY_IMPL(hf_prune, CPU, m) {
  m.impl("sparse_linear", sparse_linear);
  m.impl("sliced_linear", sliced_linear);
  m.impl("bits_linear", bits_linear);
  m.impl("blocks_linear", blocks_linear);
  m.impl("join_planes", join_planes_into);
  m.impl("count_ones", ones);
  m.impl("place_bits", place_bits_into);
  m.impl("place_gaps", place_gaps_into);
  m.impl("place_groups", place_groups_into);
}
