// Kernels for any CPU: a vector of 16 bytes is SSE2 on x86-64 and NEON on 64-bit Arm.
#include "simd_prelude.h"

#define DRL_FAST_ISA portable
#define DRL_FAST_VECTOR_BYTES 16
#define DRL_FAST_TILE_ROWS 4
#define DRL_FAST_SUM_ROWS 4
#define DRL_FAST_GATHER_VECTORS 8
#include "simd_kernels.h"

constexpr drl_fast::Capability drl_fast::kPortable = drl_fast::portable::capability("portable");
