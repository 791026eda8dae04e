// Vectors of one instruction set, and how a token's features become a row of them.
//
// Kernels call nothing of the standard library: its templates would be compiled for this instruction set under a name
// that the linker merges with other files' copies, and a CPU without the set could then run them.
#pragma once

#include "simd_prelude.h"

#define DRL_FAST_ALWAYS_INLINE inline __attribute__((always_inline))

namespace drl_fast::DRL_FAST_ISA {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class T>
struct Simd {
  static constexpr int N = DRL_FAST_VECTOR_BYTES / static_cast<int>(sizeof(T));
  using V __attribute__((vector_size(DRL_FAST_VECTOR_BYTES))) = T;
  using I __attribute__((vector_size(DRL_FAST_VECTOR_BYTES))) = IntOf<T>;
  static DRL_FAST_ALWAYS_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static DRL_FAST_ALWAYS_INLINE I load(const IntOf<T>* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  template <class X, class P>
  static DRL_FAST_ALWAYS_INLINE void store(P* p, X v) {
    __builtin_memcpy(p, &v, sizeof v);
  }
  static DRL_FAST_ALWAYS_INLINE V broadcast(T x) { return x - V{}; }
  static DRL_FAST_ALWAYS_INLINE I broadcast_int(IntOf<T> x) { return x - I{}; }
  static DRL_FAST_ALWAYS_INLINE T sum(V v) {
    T s = 0;
    for (int i = 0; i < N; i++) s += v[i];
    return s;
  }
};

// One vector of T from numbers of T; of float also from a 16-bit type.
template <class T>
DRL_FAST_ALWAYS_INLINE typename Simd<T>::V load_as(const T* p) {
  return Simd<T>::load(p);
}

template <class T>
DRL_FAST_ALWAYS_INLINE typename Simd<T>::V load_as(const Half* p) {
#if defined(DRL_FAST_LOAD_HALF)
  return DRL_FAST_LOAD_HALF(p);
#else
  typename Simd<T>::V v;
  for (int i = 0; i < Simd<T>::N; i++) v[i] = static_cast<T>(p[i]);
  return v;
#endif
}

// A bfloat16 is the upper half of a float.
template <class T>
DRL_FAST_ALWAYS_INLINE typename Simd<T>::V load_as(const BFloat16* p) {
  using U __attribute__((vector_size(DRL_FAST_VECTOR_BYTES / 2))) = uint16_t;
  U upper;
  __builtin_memcpy(&upper, p, sizeof upper);
  const typename Simd<T>::I bits = __builtin_convertvector(upper, typename Simd<T>::I) << 16;
  typename Simd<T>::V v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

template <class T>
T dot(const T* a, const T* b, int64_t padded_dim) {
  using S = Simd<T>;
  typename S::V acc = {};
  for (int64_t k = 0; k < padded_dim; k += S::N) acc += S::load(a + k) * S::load(b + k);
  return S::sum(acc);
}

template <class T, class From>
void convert_row(const char* from, T* to, int64_t n) {
  const From* p = reinterpret_cast<const From*>(from);
  for (int64_t k = 0; k < n; k++) to[k] = static_cast<T>(p[k]);
}

// out[i] = from[i]; `count` is a multiple of a vector.
template <class T, class P>
void widen_as(const void* from, int64_t count, T* out) {
  for (int64_t k = 0; k < count; k += Simd<T>::N) Simd<T>::store(out + k, load_as<T>(static_cast<const P*>(from) + k));
}

template <class T>
void widen(const void* from, Dtype dtype, int64_t count, T* out) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == Dtype::f16) return widen_as<T, Half>(from, count, out);
    if (dtype == Dtype::bf16) return widen_as<T, BFloat16>(from, count, out);
  }
  widen_as<T, T>(from, count, out);
}

template <class T, class To>
void store_row(const T* from, char* to, int64_t n) {
  To* p = reinterpret_cast<To*>(to);
  for (int64_t k = 0; k < n; k++) p[k] = static_cast<To>(from[k]);
}

// A token with a smaller norm counts as zero.
constexpr double kNormEps = 1e-12;

// Load one token's features as T, normalize them if the side asks for it, and write zeros up to the padded width.
template <class T>
void load_row(const Tokens<T>& side, int64_t token, T* out, T* inverse_norm) {
  const char* from = side.row[token];
  switch (side.dtype) {
    case Dtype::f32:
      convert_row<T, float>(from, out, side.dim);
      break;
    case Dtype::f64:
      convert_row<T, double>(from, out, side.dim);
      break;
    case Dtype::f16:
      convert_row<T, Half>(from, out, side.dim);
      break;
    case Dtype::bf16:
      convert_row<T, BFloat16>(from, out, side.dim);
      break;
  }
  const int64_t width = padded(side.dim);
  for (int64_t k = side.dim; k < width; k++) out[k] = 0;
  T inverse = 1;
  if (side.normalize) {
    const T norm = __builtin_sqrt(dot(out, out, width));
    inverse = norm <= T(kNormEps) ? T(0) : 1 / norm;
    for (int64_t k = 0; k < width; k++) out[k] *= inverse;
  }
  if (inverse_norm) *inverse_norm = inverse;
}

// Take the gradient of a normalized token (row) through the normalization and store it in the features' dtype.
template <class T>
void store_gradient(const Tokens<T>& side, T* grad, const T* row, T inverse_norm, char* out) {
  const int64_t width = padded(side.dim);
  if (side.normalize) {
    const T along = inverse_norm == 0 ? T(0) : dot(row, grad, width);
    for (int64_t k = 0; k < width; k++) grad[k] = inverse_norm == 0 ? T(0) : (grad[k] - row[k] * along) * inverse_norm;
  }
  switch (side.dtype) {
    case Dtype::f32:
      store_row<T, float>(grad, out, side.dim);
      break;
    case Dtype::f64:
      store_row<T, double>(grad, out, side.dim);
      break;
    case Dtype::f16:
      store_row<T, Half>(grad, out, side.dim);
      break;
    case Dtype::bf16:
      store_row<T, BFloat16>(grad, out, side.dim);
      break;
  }
}

}  // namespace drl_fast::DRL_FAST_ISA
