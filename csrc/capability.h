// The instruction set in use: one table of kernels per set, chosen once, when the first operator runs.
#pragma once

#include <type_traits>

#include "cdcr.h"
#include "rerank.h"
#include "token_interaction.h"

namespace drl_fast {

struct Capability {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  CdcrKernels<float> cdcr_f32;
  CdcrKernels<double> cdcr_f64;
  RerankKernels<float> rerank_f32;
  RerankKernels<double> rerank_f64;
};

extern const Capability kPortable;
#if defined(__x86_64__)
extern const Capability kAvx2;
extern const Capability kAvx512;
#endif

const Capability& capability();

template <class T>
const Kernels<T>& chosen_kernels() {
  if constexpr (std::is_same_v<T, double>)
    return capability().f64;
  else
    return capability().f32;
}

template <class T>
const CdcrKernels<T>& chosen_cdcr_kernels() {
  if constexpr (std::is_same_v<T, double>)
    return capability().cdcr_f64;
  else
    return capability().cdcr_f32;
}

template <class T>
const RerankKernels<T>& chosen_rerank_kernels() {
  if constexpr (std::is_same_v<T, double>)
    return capability().rerank_f64;
  else
    return capability().rerank_f32;
}

}  // namespace drl_fast
