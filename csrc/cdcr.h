// What the CDCR driver (cdcr.cpp) and its kernels (one object file an instruction set) share.
//
// A term has anchors x and, for each, its partner y: the token of the pair's other side that it matches best.
#pragma once

#include <cstdint>

namespace drl_fast {

// What the kernels know of one role's channels; every array has the padded width, zeros behind D.
template <class T>
struct Channels {
  const T* mean;
  const T* mean_rest;    // what the mean loses by being rounded to T
  const T* inverse_std;  // 0 for a constant channel
  const T* offset;       // backward: the gradient that comes back through the mean ...
  const T* along;        // ... and, a unit of the standardised channel, through the deviation
};

// What an anchor and its partner get back.
template <class T>
struct Pull {
  const T* diagonal;  // d loss / d C_dd, or null where C is full; then, of this anchor's row,
  const T* anchor;    // d loss / d (weight x~) ...
  const T* partner;   // ... and d loss / d y~, null where an earlier anchor of the row has brought it
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
  // Adds to the gradients of x and y, and returns that of the weight.
  T (*pull)(const T* x, const T* y, T weight, const Channels<T>& of_x, const Channels<T>& of_y, const Pull<T>&,
            int64_t width, T* grad_x, T* grad_y);
};

}  // namespace drl_fast
