// Everything the kernels need from outside, to be included before an instruction set is switched on.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "capability.h"

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
