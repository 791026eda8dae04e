// All kernels of one instruction set and its table of them.
//
// Every simd_*.cpp includes this file once, after it has switched its instruction set on and defined
//   DRL_FAST_ISA             the set's name, which is also the namespace of everything compiled here
//   DRL_FAST_VECTOR_BYTES    bytes of a vector
//   DRL_FAST_TILE_ROWS       rows of the forward's register tile
//   DRL_FAST_SUM_ROWS        rows of the register tile of add_product, whose sums are longer
//   DRL_FAST_GATHER_VECTORS  vectors of D that the backward's gather sums in registers at once
//   DRL_FAST_LOAD_HALF(p)    a vector of float from float16 at p; without it, number by number
#pragma once

#include "cdcr_kernels.h"
#include "rerank_kernels.h"
#include "simd.h"
#include "soft_token_interaction.h"
#include "token_interaction_backward.h"
#include "token_interaction_forward.h"

namespace drl_fast::DRL_FAST_ISA {

template <class T>
constexpr Kernels<T> token_interaction_kernels() {
  return {
      .vector = Simd<T>::N,
      .load_row = load_row<T>,
      .pack_slot = pack_slot<T>,
      .forward = forward<T>,
      .widen = widen<T>,
      .backward = backward<T>,
      .soft_forward = soft_forward<T>,
      .soft_backward = soft_backward<T>,
      .add_product = add_product<T>,
      .store_gradient = store_gradient<T>,
  };
}

template <class T>
constexpr CdcrKernels<T> cdcr_kernels() {
  return {
      .dot = dot<T>,
      .sum = cdcr_sum<T>,
      .scatter = cdcr_scatter<T>,
      .correlate = cdcr_correlate<T>,
      .standardize = cdcr_standardize<T>,
      .pull = cdcr_pull<T>,
  };
}

template <class T>
constexpr RerankKernels<T> rerank_kernels() {
  return {.pool = pool_columns<T>, .weighted_sum = weighted_sum<T>};
}

constexpr Capability capability(const char* name) {
  return {
      .name = name,
      .f32 = token_interaction_kernels<float>(),
      .f64 = token_interaction_kernels<double>(),
      .cdcr_f32 = cdcr_kernels<float>(),
      .cdcr_f64 = cdcr_kernels<double>(),
      .rerank_f32 = rerank_kernels<float>(),
      .rerank_f64 = rerank_kernels<double>(),
  };
}

}  // namespace drl_fast::DRL_FAST_ISA
