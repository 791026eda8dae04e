// Kernels for x86-64 CPUs with AVX2.
#include "simd_prelude.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define DRL_FAST_ISA avx2
#define DRL_FAST_VECTOR_BYTES 32
#define DRL_FAST_TILE_ROWS 6
#define DRL_FAST_SUM_ROWS 6
#define DRL_FAST_GATHER_VECTORS 8
#define DRL_FAST_LOAD_HALF(p) _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
#include "simd_kernels.h"

constexpr drl_fast::Capability drl_fast::kAvx2 = drl_fast::avx2::capability("avx2");

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // defined(__x86_64__)
