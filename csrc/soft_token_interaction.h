// The token interaction with softmax or logsumexp in place of the maximum, compiled once per instruction set.
//
// A row token r and a lane item l, whose tokens are the slots, have similarities S; T is the temperature.
//   top   = max over slots of S                    z masked tokens add z similarities of 0
//   e     = exp((S - top) / T), total = sum of e
//   value = sum of e S / total, or top + T log(total)
//   slope = e / total * (1 + (S - value) / T), or e / total             d value / d S
// The lane tokens' values over the rows of one item are the same with the roles exchanged. d loss / d S is
//   grad_logit * scale * (weight of r * slope of r + weight of l * slope of l)
//
// One block of rows against one group: all slots' S are in memory at once, in L2. Sums run in the order of slots or
// rows, so a score does not depend on the batch.
#pragma once

#include "simd.h"
#include "token_interaction_forward.h"

namespace drl_fast::DRL_FAST_ISA {

// Numbers of one floating-point format: log 2 in two parts, of which the first times a small integer is exact.
template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
  static constexpr float kRound = 0x1.8p23F, kLowest = -87.0F, kLog2High = 45426 / 65536.0F, kLog2Low = 0x1.7f7d1cp-20F;
};
template <>
struct Format<double> {
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
  static constexpr double kRound = 0x1.8p52, kLowest = -708.0, kLog2High = 47632711549 / 68719476736.0,
                          kLog2Low = 0x1.cf79abc9e3b39p-40;
};

template <class T>
constexpr T inverse_factorial(int k) {
  double product = 1;
  for (int i = 2; i <= k; i++) product *= i;
  return static_cast<T>(1 / product);
}

template <class T>
DRL_FAST_ALWAYS_INLINE typename Simd<T>::I bits_of(typename Simd<T>::V x) {
  typename Simd<T>::I bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// exp(x) for x <= 0; 0 below the smallest normal number. With n = round(x / log 2) it is 2^n times the Taylor series at
// x - n log 2, which is at most 0.35.
template <class T>
DRL_FAST_ALWAYS_INLINE typename Simd<T>::V exp_of(typename Simd<T>::V x) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  using F = Format<T>;
  const V magic = S::broadcast(F::kRound);
  // Adding 1.5 * 2^mantissa leaves the rounded number in the low bits.
  const V shifted = x * S::broadcast(T(std::numbers::log2e)) + magic;
  const V n = shifted - magic;
  const V r = (x - n * S::broadcast(F::kLog2High)) - n * S::broadcast(F::kLog2Low);
  V sum = S::broadcast(inverse_factorial<T>(F::kTerms));
#pragma GCC unroll 16
  for (int k = F::kTerms - 1; k >= 0; k--) sum = sum * r + S::broadcast(inverse_factorial<T>(k));
  const I exponent = bits_of<T>(shifted) - bits_of<T>(magic) + S::broadcast_int(F::kBias);
  const I power_bits = exponent << F::kMantissa;
  V power;
  __builtin_memcpy(&power, &power_bits, sizeof power);
  // A NaN is not below, and stays NaN.
  return x < S::broadcast(F::kLowest) ? V{} : sum * power;
}

// log(x) for x >= 1: a first guess from the exponent, within 0.06, and two steps of Halley's method for exp(y) = x,
// each of which cubes the error.
template <class T>
DRL_FAST_ALWAYS_INLINE typename Simd<T>::V log_of(typename Simd<T>::V x) {
  using S = Simd<T>;
  using V = typename S::V;
  using F = Format<T>;
  constexpr T kStep = T(std::numbers::ln2) / static_cast<T>(IntOf<T>{1} << F::kMantissa);
  const V one = S::broadcast(T(1));
  const V from_one = __builtin_convertvector(bits_of<T>(x) - bits_of<T>(one), V);
  V y = from_one * S::broadcast(kStep);
  for (int step = 0; step < 2; step++) {
    const V ratio = x * exp_of<T>(-y);
    y += S::broadcast(T(2)) * (ratio - one) / (ratio + one);
  }
  return x == x ? y : x;
}

// The running sums of one vector of pooled values.
template <class T>
struct Pool {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  V top, inverse, total, weighted;

  // `zeros`: the number of candidates of similarity 0.
  DRL_FAST_ALWAYS_INLINE Pool(V highest, V zeros, T temperature) : inverse(S::broadcast(T(1) / temperature)) {
    const I has = zeros > V{};
    top = (has & (highest < V{})) ? V{} : highest;
    total = has ? zeros * exp_of<T>((V{} - top) * inverse) : V{};
    weighted = V{};
  }
  // Add the candidates where `present`; return their exponentials.
  DRL_FAST_ALWAYS_INLINE V add(V s, I present) {
    const V e = present ? exp_of<T>((s - top) * inverse) : V{};
    total += e;
    // Without a choice here: with one, compilers fuse multiply and add in some callers and not in others.
    weighted += e * s;
    return e;
  }
  DRL_FAST_ALWAYS_INLINE V value(const SoftJob<T>& job) const {
    return job.logsumexp ? top + S::broadcast(job.temperature) * log_of<T>(total) : weighted / total;
  }
};

// The larger of two; a NaN beats every number.
template <class T>
DRL_FAST_ALWAYS_INLINE typename Simd<T>::V larger(typename Simd<T>::V a, typename Simd<T>::V b) {
  return ((b > a) | (b != b)) ? b : a;
}

// d value / d S from the candidate's exponential and 1 / total.
template <class T>
DRL_FAST_ALWAYS_INLINE typename Simd<T>::V slope(typename Simd<T>::V s, typename Simd<T>::V e,
                                                 typename Simd<T>::V factor, typename Simd<T>::V value,
                                                 typename Simd<T>::V inverse, bool logsumexp) {
  using S = Simd<T>;
  const typename S::V probability = e * factor;
  return logsumexp ? probability : probability * (S::broadcast(T(1)) + (s - value) * inverse);
}

// Pool every row token over each lane's slots.
template <class T, int NV, bool BACKWARD>
void pool_rows(const SoftJob<T>& job, const Group<T>& group, int64_t count, const SoftBlock<T>& block) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int W = NV * S::N;
  const int64_t columns = static_cast<int64_t>(group.slots) * W;
  for (int64_t r = 0; r < count; r++)
    for (int j = 0; j < W; j += S::N) {
      const T* s = block.similarity + r * block.stride + j;
      const I tokens = S::load(group.count + j);
      V top = S::load(s);
      // A slot beyond a lane's tokens repeats the first, which changes no maximum.
      for (int slot = 1; slot < group.slots; slot++) top = larger<T>(top, S::load(s + slot * W));
      Pool<T> pool(top, __builtin_convertvector(S::load(group.zeros + j), V), job.temperature);
      for (int slot = 0; slot < group.slots; slot++) {
        const V e = pool.add(S::load(s + slot * W), tokens > S::broadcast_int(slot));
        if constexpr (BACKWARD) S::store(block.exponential + r * columns + slot * W + j, e);
      }
      const I used = tokens > I{};
      S::store(block.row_value + r * W + j, used ? pool.value(job) : V{});
      if constexpr (BACKWARD) S::store(block.row_factor + r * W + j, used ? S::broadcast(T(1)) / pool.total : V{});
    }
}

// Pool one lane token per lane over the rows [begin, end) of one item.
template <class T, int NV, bool BACKWARD>
DRL_FAST_ALWAYS_INLINE Pool<T> pool_column(const SoftJob<T>& job, int32_t zeros, int64_t begin, int64_t end, const T* s,
                                           const SoftBlock<T>& block) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  V top = S::load(s + begin * block.stride);
  for (int64_t r = begin + 1; r < end; r++) top = larger<T>(top, S::load(s + r * block.stride));
  Pool<T> pool(top, S::broadcast(static_cast<T>(zeros)), job.temperature);
  for (int64_t r = begin; r < end; r++) {
    const V e = pool.add(S::load(s + r * block.stride), I{} == I{});
    if constexpr (BACKWARD) S::store(block.column + (r - begin) * S::N, e);
  }
  return pool;
}

template <class T, int NV>
void soft_similarities(const SoftJob<T>& job, const Group<T>& group, int64_t count, const SoftBlock<T>& block) {
  constexpr int N = Simd<T>::N, W = NV * N;
  const int64_t dim = job.rows.dim, width = padded(dim);
  int slot = 0;
  for (; NV == 1 && slot + 1 < group.slots; slot += 2) {
    const Panel<T> two = {.data = static_cast<const T*>(group.panel) + slot * dim * N, .step = N, .apart = dim * N};
    product<T, 2>(block.rows, count, width, two, dim, block.similarity + slot * N, block.stride);
  }
  for (; slot < group.slots; slot++) {
    const Panel<T> one = {.data = static_cast<const T*>(group.panel) + slot * dim * W, .step = W, .apart = N};
    product<T, NV>(block.rows, count, width, one, dim, block.similarity + slot * W, block.stride);
  }
}

template <class T, int NV, bool ROWS, bool LANES>
void soft_forward_block(const SoftJob<T>& job, const Group<T>& group, const SoftBlock<T>& block) {
  using S = Simd<T>;
  using V = typename S::V;
  constexpr int W = NV * S::N;
  const int64_t row0 = job.rows.start[block.first_item], count = job.rows.start[block.last_item] - row0;
  soft_similarities<T, NV>(job, group, count, block);
  if constexpr (ROWS) pool_rows<T, NV, false>(job, group, count, block);
  for (int64_t item = block.first_item; item < block.last_item; item++) {
    const int64_t begin = job.rows.start[item] - row0, end = job.rows.start[item + 1] - row0;
    if (begin == end) continue;
    alignas(64) T logit[W];
    for (int j = 0; j < W; j += S::N) {
      V total = {};
      if constexpr (LANES)
        for (int slot = 0; slot < group.slots; slot++) {
          const int64_t at = static_cast<int64_t>(slot) * W + j;
          const Pool<T> pool =
              pool_column<T, NV, false>(job, job.rows.zeros[item], begin, end, block.similarity + at, block);
          const V after = total + S::load(group.weight + at) * pool.value(job);
          total = S::load(group.count + j) > S::broadcast_int(slot) ? after : total;
        }
      if constexpr (ROWS) {
        V sum = {};
        for (int64_t r = begin; r < end; r++)
          sum += S::broadcast(job.rows.weight[row0 + r]) * S::load(block.row_value + r * W + j);
        total += sum;
      }
      S::store(logit + j, total * S::broadcast(job.scale));
    }
    for (int l = 0; l < W; l++)
      if (group.count[l] > 0)
        job.logits[item * job.logits_stride_row + group.item[l] * job.logits_stride_lane] = logit[l];
  }
}

// Turn S into d loss / d S, and sum the weights' gradients over the block.
template <class T, int NV, bool ROWS, bool LANES>
void soft_backward_block(const SoftJob<T>& job, const Group<T>& group, const SoftBlock<T>& block) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int W = NV * S::N;
  const int64_t row0 = job.rows.start[block.first_item], count = job.rows.start[block.last_item] - row0;
  const int64_t columns = static_cast<int64_t>(group.slots) * W;
  const V inverse = S::broadcast(T(1) / job.temperature);
  soft_similarities<T, NV>(job, group, count, block);
  if constexpr (ROWS) pool_rows<T, NV, true>(job, group, count, block);
  for (int64_t c = 0; c < columns; c++) block.grad_lane_weight[c] = 0;
  for (int64_t r = 0; r < count; r++) block.grad_row_weight[r] = 0;
  for (int64_t item = block.first_item; item < block.last_item; item++) {
    const int64_t begin = job.rows.start[item] - row0, end = job.rows.start[item + 1] - row0;
    if (begin == end) continue;
    alignas(64) T grad[W];
    for (int l = 0; l < W; l++)
      grad[l] =
          group.count[l] == 0
              ? T(0)
              : job.scale * job.grad_logits[item * job.logits_stride_row + group.item[l] * job.logits_stride_lane];
    for (int j = 0; j < W; j += S::N) {
      const V g = S::load(grad + j);
      for (int slot = 0; slot < group.slots; slot++) {
        const int64_t at = static_cast<int64_t>(slot) * W + j;
        const I present = S::load(group.count + j) > S::broadcast_int(slot);
        V value = {}, factor = {}, lane_weight = {};
        if constexpr (LANES) {
          const Pool<T> pool =
              pool_column<T, NV, true>(job, job.rows.zeros[item], begin, end, block.similarity + at, block);
          value = pool.value(job);
          factor = S::broadcast(T(1)) / pool.total;
          lane_weight = S::load(group.weight + at);
          const V before = S::load(block.grad_lane_weight + at);
          S::store(block.grad_lane_weight + at, present ? before + g * value : before);
        }
        for (int64_t r = begin; r < end; r++) {
          T* s = block.similarity + r * block.stride + at;
          const V x = S::load(s);
          V sum = {};
          if constexpr (ROWS)
            sum += S::broadcast(job.rows.weight[row0 + r]) *
                   slope<T>(x, S::load(block.exponential + r * columns + at), S::load(block.row_factor + r * W + j),
                            S::load(block.row_value + r * W + j), inverse, job.logsumexp);
          if constexpr (LANES)
            sum += lane_weight *
                   slope<T>(x, S::load(block.column + (r - begin) * S::N), factor, value, inverse, job.logsumexp);
          S::store(s, present ? g * sum : V{});
        }
      }
      if constexpr (ROWS)
        for (int64_t r = begin; r < end; r++)
          block.grad_row_weight[r] += S::sum(g * S::load(block.row_value + r * W + j));
    }
  }
}

template <class T>
void soft_forward(const SoftJob<T>& job, const Group<T>& group, const SoftBlock<T>& block) {
  const bool rows = job.rows.weight, lanes = job.lanes.weight, two = group.width > Simd<T>::N;
  auto run = two ? (rows && lanes ? soft_forward_block<T, 2, true, true>
                    : rows        ? soft_forward_block<T, 2, true, false>
                                  : soft_forward_block<T, 2, false, true>)
                 : (rows && lanes ? soft_forward_block<T, 1, true, true>
                    : rows        ? soft_forward_block<T, 1, true, false>
                                  : soft_forward_block<T, 1, false, true>);
  run(job, group, block);
}

template <class T>
void soft_backward(const SoftJob<T>& job, const Group<T>& group, const SoftBlock<T>& block) {
  const bool rows = job.rows.weight, lanes = job.lanes.weight, two = group.width > Simd<T>::N;
  auto run = two ? (rows && lanes ? soft_backward_block<T, 2, true, true>
                    : rows        ? soft_backward_block<T, 2, true, false>
                                  : soft_backward_block<T, 2, false, true>)
                 : (rows && lanes ? soft_backward_block<T, 1, true, true>
                    : rows        ? soft_backward_block<T, 1, true, false>
                                  : soft_backward_block<T, 1, false, true>);
  run(job, group, block);
}

// Add one tile of a product to `out`. The tile's sum starts from 0: many small terms on top of a large one would each
// round like that one.
template <class T, int M, int NV, bool TRANSPOSED>
void add_tile(const T* a, int64_t stride, const Panel<T>& panel, int64_t depth, T* out, int64_t width) {
  using S = Simd<T>;
  constexpr int W = NV * S::N;
  alignas(64) T sum[M * W];
  tile<T, M, NV, TRANSPOSED>(a, stride, panel, depth, false, sum, W);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < W; j += S::N) {
      T* to = out + i * width + j;
      S::store(to, S::load(to) + S::load(sum + i * W + j));
    }
}

template <class T, int NV, bool TRANSPOSED>
void add_columns(const T* a, int64_t stride, int64_t count, int64_t depth, const T* panel, int64_t width, T* out) {
  constexpr int M = DRL_FAST_SUM_ROWS, N = Simd<T>::N;
  const Panel<T> all = {.data = panel, .step = NV * N, .apart = N};
  const auto at = [&](int64_t i) { return a + i * (TRANSPOSED ? 1 : stride); };
  int64_t i = 0;
  for (; i + M <= count; i += M) add_tile<T, M, NV, TRANSPOSED>(at(i), stride, all, depth, out + i * width, width);
  while (i + 4 <= count) {
    add_tile<T, 4, NV, TRANSPOSED>(at(i), stride, all, depth, out + i * width, width);
    i += 4;
  }
  if (i + 2 <= count) {
    add_tile<T, 2, NV, TRANSPOSED>(at(i), stride, all, depth, out + i * width, width);
    i += 2;
  }
  for (; i < count; i++) add_tile<T, 1, NV, TRANSPOSED>(at(i), stride, all, depth, out + i * width, width);
}

// Panels of two vectors of D: [width / two vectors][depth][two vectors], the last of one vector if the width is odd.
template <class T>
void add_product(const T* a, int64_t stride, bool transposed, int64_t count, int64_t depth, const T* panels,
                 int64_t width, T* out) {
  constexpr int64_t N = Simd<T>::N;
  for (int64_t d = 0; d < width; d += 2 * N) {
    const bool two = d + 2 * N <= width;
    const auto add = transposed ? (two ? add_columns<T, 2, true> : add_columns<T, 1, true>)
                                : (two ? add_columns<T, 2, false> : add_columns<T, 1, false>);
    add(a, stride, count, depth, panels + d * depth, width, out + d);
  }
}

}  // namespace drl_fast::DRL_FAST_ISA
