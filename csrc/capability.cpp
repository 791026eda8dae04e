// The choice of instruction set, and the operator drl_fast::cpu_capability, which returns its name.
#include "capability.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

namespace drl_fast {
namespace {

const Capability& choose() {
  // The variable that limits PyTorch's own kernels.
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = wanted ? wanted : "";
  if (limit == "default") return kPortable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && limit != "avx2") return kAvx512;
  if (has_avx2) return kAvx2;
#endif
  return kPortable;
}

std::string cpu_capability() { return capability().name; }

}  // namespace

const Capability& capability() {
  static const Capability& chosen = choose();
  return chosen;
}

STABLE_TORCH_LIBRARY_IMPL(drl_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace drl_fast
