// The unpacking of packed weights, for tensors: everything is checked here that the functions of unpacking.h take as given.

#pragma once

#include <ATen/core/Tensor.h>

#include "unpacking.h"

namespace {

// Calls a function with a value of the unsigned integer type that has as many bytes.
template <class F>
auto with_integer(int64_t bytes, const F& call) {
  switch (bytes) {
    case 1: return call(uint8_t{});
    case 2: return call(uint16_t{});
    case 4: return call(uint32_t{});
    default: TORCH_CHECK(bytes == 8, "values have ", bytes, " bytes: expected 1, 2, 4 or 8"); return call(uint64_t{});
  }
}

const uint8_t* bytes_of(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kByte && tensor.dim() == 1 && tensor.is_contiguous(),
              "expected a row of bytes");
  return tensor.const_data_ptr<uint8_t>();
}

void check_values(const at::Tensor& values, const at::Tensor& out) {
  TORCH_CHECK(values.is_contiguous() && out.is_contiguous() && values.itemsize() == out.itemsize(),
              "expected contiguous values and weights of one size");
}

void join_planes_into(at::TensorList planes, bool rotated, const at::Tensor& out, const std::string& level) {
  TORCH_CHECK(out.is_contiguous() && static_cast<int64_t>(planes.size()) == out.itemsize(), "there are ", planes.size(),
              " planes: expected one for each of the ", out.itemsize(), " bytes of a value");
  const std::string name = usable_level(level);
  with_integer(out.itemsize(), [&](auto kind) {
    using T = decltype(kind);
    std::array<const uint8_t*, sizeof(T)> of_byte;
    for (size_t i = 0; i < sizeof(T); i++) {
      of_byte[i] = bytes_of(planes[i]);
      TORCH_CHECK(planes[i].numel() == out.numel(), "a plane has ", planes[i].numel(), " bytes: expected ", out.numel());
    }
    join_planes<T>(name, of_byte, rotated, static_cast<T*>(out.data_ptr()), out.numel());
  });
}

int64_t ones(const at::Tensor& bits) { return count_ones(bytes_of(bits), bits.numel()); }

int64_t place_bits_into(const at::Tensor& bits, const at::Tensor& values, const at::Tensor& out,
                        const std::string& level) {
  check_values(values, out);
  const std::string name = usable_level(level);
  return with_integer(out.itemsize(), [&](auto kind) {
    using T = decltype(kind);
    return place_by_bits<T>(name, bytes_of(bits), bits.numel(), static_cast<const T*>(values.const_data_ptr()),
                            values.numel(), static_cast<T*>(out.data_ptr()), out.numel());
  });
}

int64_t place_gaps_into(const at::Tensor& gaps, const at::Tensor& values, const at::Tensor& out) {
  check_values(values, out);
  return with_integer(out.itemsize(), [&](auto kind) {
    using T = decltype(kind);
    return place_gaps<T>(bytes_of(gaps), gaps.numel(), static_cast<const T*>(values.const_data_ptr()), values.numel(),
                         static_cast<T*>(out.data_ptr()), out.numel());
  });
}

bool place_groups_into(const at::Tensor& numbers, const at::Tensor& patterns, int64_t width, const at::Tensor& values,
                       const at::Tensor& out) {
  check_values(values, out);
  TORCH_CHECK(patterns.dim() == 2 && width >= 1, "expected a table of patterns, and their width");
  const at::Tensor flat = patterns.flatten();
  return with_integer(out.itemsize(), [&](auto kind) {
    using T = decltype(kind);
    return place_groups<T>(bytes_of(numbers), numbers.numel(), bytes_of(flat), patterns.size(0), patterns.size(1), width,
                           static_cast<const T*>(values.const_data_ptr()), values.numel(),
                           static_cast<T*>(out.data_ptr()), out.numel());
  });
}

}  // namespace
