// The kernels for x86 CPUs with AVX2.
#include "isa.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define DRL_FAST_VECTOR_BYTES 32
#define DRL_FAST_TILE_ROWS 6
#define DRL_FAST_GATHER_VECTORS 8

namespace drl_fast {
namespace {
#include "token_interaction_kernel.h"
#include "cdcr_kernel.h"
}  // namespace

extern const Capability avx2 = {"avx2", kernels<float>(), kernels<double>(), cdcr_kernels<float>(),
                                   cdcr_kernels<double>()};
}  // namespace drl_fast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
