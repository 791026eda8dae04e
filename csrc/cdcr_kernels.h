// Row kernels of CDCR, compiled once per instruction set (simd_kernels.h).
//
//   x~_d = (x_d - mean_d) / std_d                       std over all anchors (or partners), unbiased
//   C_de = sum over anchors of weight x~_d y~_e         only its diagonal here; the full form uses aten::mm
//   grad x_d = (G_d - offset_d - x~_d along_d) / std_d  G = weight (A y~); offset and along: through mean and std
//
// A kernel handles one row at a time, D channels in vectors. It reads two rows and up to ten channel constants, which
// stay in L1, and writes one to three rows. L1 bandwidth limits it.
#pragma once

#include "simd.h"

namespace drl_fast::DRL_FAST_ISA {

template <class T>
struct Standard {
  using S = Simd<T>;
  const T* row;
  const Channels<T>& of;
  DRL_FAST_ALWAYS_INLINE typename S::V centered(int64_t k) const {
    // In two steps: the rounding of a nearly constant channel's mean can be as large as the channel's deviation.
    return (S::load(row + k) - S::load(of.mean + k)) - S::load(of.mean_rest + k);
  }
  DRL_FAST_ALWAYS_INLINE typename S::V operator()(int64_t k) const { return centered(k) * S::load(of.inverse_std + k); }
};

template <class T>
void cdcr_sum(const T* row, const T* shift, int64_t width, T* sum) {
  using S = Simd<T>;
  for (int64_t k = 0; k < width; k += S::N)
    S::store(sum + k, S::load(sum + k) + (S::load(row + k) - S::load(shift + k)));
}

template <class T>
void cdcr_scatter(const T* row, const Channels<T>& of, int64_t width, T* scatter) {
  using S = Simd<T>;
  const Standard<T> x = {.row = row, .of = of};
  for (int64_t k = 0; k < width; k += S::N) {
    const typename S::V d = x.centered(k);
    S::store(scatter + k, S::load(scatter + k) + d * d);
  }
}

template <class T>
void cdcr_correlate(const T* row_x, const T* row_y, T weight, const Channels<T>& of_x, const Channels<T>& of_y,
                    int64_t width, T* cross, T* sum_x, T* sum_y) {
  using S = Simd<T>;
  const Standard<T> x = {.row = row_x, .of = of_x};
  const Standard<T> y = {.row = row_y, .of = of_y};
  const typename S::V w = S::broadcast(weight);
  for (int64_t k = 0; k < width; k += S::N) {
    const typename S::V a = w * x(k), b = y(k);
    S::store(cross + k, S::load(cross + k) + a * b);
    S::store(sum_x + k, S::load(sum_x + k) + a);
    S::store(sum_y + k, S::load(sum_y + k) + w * b);
  }
}

template <class T>
void cdcr_standardize(const T* row_x, const T* row_y, T weight, const Channels<T>& of_x, const Channels<T>& of_y,
                      int64_t width, bool add, T* weighted, T* partner, T* sum_x, T* sum_y) {
  using S = Simd<T>;
  const Standard<T> x = {.row = row_x, .of = of_x};
  const Standard<T> y = {.row = row_y, .of = of_y};
  const typename S::V w = S::broadcast(weight);
  for (int64_t k = 0; k < width; k += S::N) {
    const typename S::V a = w * x(k), b = y(k);
    S::store(weighted + k, add ? S::load(weighted + k) + a : a);
    S::store(partner + k, b);
    S::store(sum_x + k, S::load(sum_x + k) + a);
    S::store(sum_y + k, S::load(sum_y + k) + w * b);
  }
}

template <class T>
T cdcr_pull(const T* row_x, const T* row_y, T weight, const Channels<T>& of_x, const Channels<T>& of_y,
            const Pull<T>& pull, int64_t width, T* grad_x, T* grad_y) {
  using S = Simd<T>;
  const Standard<T> x = {.row = row_x, .of = of_x};
  const Standard<T> y = {.row = row_y, .of = of_y};
  const typename S::V w = S::broadcast(weight);
  typename S::V product = {};
  for (int64_t k = 0; k < width; k += S::N) {
    const typename S::V a = x(k), b = y(k);
    typename S::V to_x, to_y = {};
    if (pull.diagonal) {
      to_x = S::load(pull.diagonal + k) * b;
      to_y = w * S::load(pull.diagonal + k) * a;
    } else {
      to_x = S::load(pull.anchor + k);
      if (pull.partner) to_y = S::load(pull.partner + k);
    }
    product += a * to_x;
    to_x = w * to_x - S::load(of_x.offset + k) - a * S::load(of_x.along + k);
    to_y = to_y - S::load(of_y.offset + k) - b * S::load(of_y.along + k);
    S::store(grad_x + k, S::load(grad_x + k) + to_x * S::load(of_x.inverse_std + k));
    S::store(grad_y + k, S::load(grad_y + k) + to_y * S::load(of_y.inverse_std + k));
  }
  return S::sum(product);
}

}  // namespace drl_fast::DRL_FAST_ISA
