// Pooling of one text's similarities with its candidates, compiled once per instruction set (simd_kernels.h).
//
// Maxima, sums and their order are those of token_interaction_forward.h and soft_token_interaction.h, so a score has
// the same bits as there.
#pragma once

#include "simd.h"
#include "soft_token_interaction.h"

namespace drl_fast::DRL_FAST_ISA {

// A NaN beats every number; of equal values the first wins.
template <class T>
void pool_maximum(const Columns<T>& c, int64_t column) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  V best = S::load(c.similarity + column);
  I chosen = {};
  for (int64_t r = 1; r < c.rows; r++) {
    const V s = S::load(c.similarity + r * c.stride + column);
    const I better = (s > best) | ((s != s) & (best == best));
    best = better ? s : best;
    chosen = better ? S::broadcast_int(static_cast<IntOf<T>>(r)) : chosen;
  }
  if (c.zeros > 0) {
    const I lost = best < V{};
    best = lost ? V{} : best;
    chosen = lost ? S::broadcast_int(-1) : chosen;
  }
  S::store(c.value + column, best);
  if (!c.slope) return;
  for (int64_t r = 0; r < c.rows; r++)
    S::store(c.slope + r * c.stride + column,
             chosen == S::broadcast_int(static_cast<IntOf<T>>(r)) ? S::broadcast(T(1)) : V{});
}

template <class T>
void pool_softly(const Columns<T>& c, int64_t column, const SoftJob<T>& job) {
  using S = Simd<T>;
  using V = typename S::V;
  const T* s = c.similarity + column;
  V top = S::load(s);
  for (int64_t r = 1; r < c.rows; r++) top = larger<T>(top, S::load(s + r * c.stride));
  Pool<T> pool(top, S::broadcast(c.zeros), job.temperature);
  for (int64_t r = 0; r < c.rows; r++) {
    const V e = pool.add(S::load(s + r * c.stride), typename S::I{} == typename S::I{});
    if (c.slope) S::store(c.slope + r * c.stride + column, e);
  }
  const V value = pool.value(job);
  S::store(c.value + column, value);
  if (!c.slope) return;
  const V factor = S::broadcast(T(1)) / pool.total;
  for (int64_t r = 0; r < c.rows; r++) {
    T* e = c.slope + r * c.stride + column;
    S::store(e, slope<T>(S::load(s + r * c.stride), S::load(e), factor, value, pool.inverse, job.logsumexp));
  }
}

template <class T>
void pool_columns(const Columns<T>& c, Pooling pooling, T temperature) {
  SoftJob<T> job = {};
  job.temperature = temperature;
  job.logsumexp = pooling == Pooling::logsumexp;
  for (int64_t column = 0; column < c.columns; column += Simd<T>::N) {
    if (pooling == Pooling::max)
      pool_maximum(c, column);
    else
      pool_softly(c, column, job);
  }
}

// Element 0 of a sum of vectors, of which the others are not used: token_interaction sums vectors, and compilers do not
// fuse multiply and add in the same way in a loop over single numbers. Reads one vector from each value on.
template <class T>
T weighted_sum(const T* weight, const T* value, int64_t count) {
  using S = Simd<T>;
  typename S::V sum = {};
  for (int64_t i = 0; i < count; i++) sum += S::broadcast(weight[i]) * S::load(value + i);
  return sum[0];
}

}  // namespace drl_fast::DRL_FAST_ISA
