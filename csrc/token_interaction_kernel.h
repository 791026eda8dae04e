// The kernels of one instruction set, for DRL_FAST_VECTOR_BYTES, DRL_FAST_TILE_ROWS and DRL_FAST_GATHER_VECTORS.
// To be included inside an anonymous namespace.
#include "simd.h"
#include "token_interaction_forward.h"
#include "token_interaction_backward.h"

template <class T>
constexpr Kernels<T> kernels() {
  return {Simd<T>::N, load_row<T>, pack_slot<T>, forward<T>, backward<T>, store_gradient<T>};
}
