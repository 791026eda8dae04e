// Kernels for x86-64 CPUs with AVX-512.
#include "simd_prelude.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define DRL_FAST_ISA avx512
#define DRL_FAST_VECTOR_BYTES 64
#define DRL_FAST_TILE_ROWS 8
#define DRL_FAST_SUM_ROWS 14
#define DRL_FAST_GATHER_VECTORS 16
#define DRL_FAST_LOAD_HALF(p) _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))
#include "simd_kernels.h"

constexpr drl_fast::Capability drl_fast::kAvx512 = drl_fast::avx512::capability("avx512");

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // defined(__x86_64__)
