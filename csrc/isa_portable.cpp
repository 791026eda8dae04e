// The kernels for any CPU: 16-byte vectors are SSE2 on x86-64 and NEON on 64-bit Arm.
#include "isa.h"

#define DRL_FAST_VECTOR_BYTES 16
#define DRL_FAST_TILE_ROWS 4
#define DRL_FAST_GATHER_VECTORS 8

namespace drl_fast {
namespace {
#include "token_interaction_kernel.h"
#include "cdcr_kernel.h"
}  // namespace

extern const Capability portable = {"portable", kernels<float>(), kernels<double>(), cdcr_kernels<float>(),
                                   cdcr_kernels<double>()};
}  // namespace drl_fast
