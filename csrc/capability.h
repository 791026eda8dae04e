// Which instruction set serves: one table of kernels for each, chosen once when the first operator runs.
#pragma once

#include "cdcr.h"
#include "token_interaction.h"

namespace drl_fast {

struct Capability {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  CdcrKernels<float> cdcr_f32;
  CdcrKernels<double> cdcr_f64;
};

extern const Capability portable;
#if defined(__x86_64__)
extern const Capability avx2, avx512;
#endif

const Capability& capability();

template <class T>
const Kernels<T>& chosen_kernels() {
  if constexpr (sizeof(T) == 8)
    return capability().f64;
  else
    return capability().f32;
}

template <class T>
const CdcrKernels<T>& chosen_cdcr_kernels() {
  if constexpr (sizeof(T) == 8)
    return capability().cdcr_f64;
  else
    return capability().cdcr_f32;
}

}  // namespace drl_fast
