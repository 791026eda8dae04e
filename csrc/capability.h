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

}  // namespace drl_fast
