// Everything that the kernels use from outside. Every simd_*.cpp includes this before it switches its instruction set
// on: the linker keeps one copy of each inline function, and that copy must run on any CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <numbers>
#include <type_traits>

#include "capability.h"
