// Types shared by the operator rerank (rerank.cpp) and its kernels (rerank_kernels.h, compiled once per instruction
// set).
#pragma once

#include <cstdint>

namespace drl_fast {

enum class Pooling : uint8_t { max, softmax, logsumexp };

// A matrix of similarities whose columns are pooled, one value each.
template <class T>
struct Columns {
  const T* similarity;            // [rows][stride]
  int64_t rows, columns, stride;  // at least one row; `columns` is a multiple of the vector
  T zeros;                        // number of further candidates, all of similarity 0
  T* value;                       // [columns]
  T* slope;                       // [rows][stride] d value / d similarity; null: not wanted
};

template <class T>
struct RerankKernels {
  void (*pool)(const Columns<T>&, Pooling, T temperature);
  T (*weighted_sum)(const T* weight, const T* value, int64_t count);  // `value` has one more vector of memory
};

}  // namespace drl_fast
