// Tensors of PyTorch's stable ABI: what the operators ask of them, and new ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <vector>

#include "token_interaction.h"

namespace drl_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// T is what the kernels compute in: double for float64 features, float for every other dtype.
template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
template <class T>
constexpr Dtype dtype_of_arithmetic = std::is_same_v<T, double> ? Dtype::f64 : Dtype::f32;

inline bool computes_in_double(const Tensor& features) { return features.scalar_type() == ScalarType::Double; }

inline Dtype dtype_of(const Tensor& features) {
  switch (features.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      STD_TORCH_CHECK(false,
                      "drl_fast::token_interaction: features must be float32, float64, float16 or bfloat16; cast them");
  }
}

// Whether a tensor has exactly these sizes. Kernels index without bounds checks, so operators ask first.
inline bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  if (x.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t dimension = 0;
  for (const int64_t size : sizes)
    if (x.size(dimension++) != size) return false;
  return true;
}

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
const T* const_data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) { return torch::stable::empty(sizes, dtype); }

// A new tensor with every byte set to `byte`.
inline Tensor filled(const std::vector<int64_t>& sizes, ScalarType dtype, int byte) {
  Tensor x = empty(sizes, dtype);
  const size_t bytes = static_cast<size_t>(x.numel()) * x.element_size();
  // An empty tensor may have no memory, and memset must not get a null pointer, not even for 0 bytes.
  if (bytes > 0) std::memset(x.mutable_data_ptr(), byte, bytes);
  return x;
}

inline Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype) { return filled(sizes, dtype, 0); }

}  // namespace drl_fast
