// Types shared by CDCR's operators (cdcr.cpp) and its row kernels (cdcr_kernels.h, compiled once per instruction set).
//
// A term has anchors x. The partner y of an anchor is the token of the pair's other side that it matches best.
#pragma once

#include <cstdint>

namespace drl_fast {

// Constants of one role's channels. Every array has the padded width, with zeros beyond D.
template <class T>
struct Channels {
  const T* mean;
  const T* mean_rest;    // the mean's rounding error in T
  const T* inverse_std;  // 0 for a constant channel
  const T* offset;       // backward: gradient through the mean
  const T* along;        // backward: gradient through the deviation, per unit of the standardized channel
};

// Gradient of the loss that reaches an anchor and its partner: `diagonal`, or `anchor` and `partner` if C is full.
template <class T>
struct Pull {
  const T* diagonal;  // d loss / d C_dd
  const T* anchor;    // d loss / d (weight x~)
  const T* partner;   // d loss / d y~; null if an earlier anchor of the same row has added it
};

template <class T>
struct CdcrKernels {
  T (*dot)(const T* a, const T* b, int64_t width);
  // sum += row - shift
  void (*sum)(const T* row, const T* shift, int64_t width, T* sum);
  // scatter += (row - mean)^2
  void (*scatter)(const T* row, const Channels<T>&, int64_t width, T* scatter);
  // cross += weight x~ y~, sum_x += weight x~, sum_y += weight y~
  void (*correlate)(const T* x, const T* y, T weight, const Channels<T>& of_x, const Channels<T>& of_y, int64_t width,
                    T* cross, T* sum_x, T* sum_y);
  // weighted = weight x~ (or += of it), partner = y~, sum_x += weight x~, sum_y += weight y~
  void (*standardize)(const T* x, const T* y, T weight, const Channels<T>& of_x, const Channels<T>& of_y, int64_t width,
                      bool add, T* weighted, T* partner, T* sum_x, T* sum_y);
  // Add to the gradients of x and y; return the gradient of the weight.
  T (*pull)(const T* x, const T* y, T weight, const Channels<T>& of_x, const Channels<T>& of_y, const Pull<T>&,
            int64_t width, T* grad_x, T* grad_y);
};

}  // namespace drl_fast
