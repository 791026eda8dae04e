// Backward of the token interaction from its matches, compiled once per instruction set (simd_kernels.h).
//
//   own[t]   = sum over the tokens s that t chose of g * s            grad weight of t = <t, own[t]>
//   grad[t]  = weight of t * own[t] + sum over the tokens s that chose t of g * weight of s * s
//
// Two gathers per target token, DRL_FAST_GATHER_VECTORS vectors of D at a time, with the sums in registers; one if only
// the weight's gradient is wanted. Source tokens come in chunks that fit L2 together with the block of target
// gradients. FLOP: 2 D per match and side, about (Nt + Nv) / (Nt Nv) of the forward's per side. Each multiply-add loads
// one vector, so L2 bandwidth is the limit. There are no atomics and the order is fixed, so the bits do not depend on
// the run, the number of threads, or which gradients are wanted.
//
// Matches index memory, and whoever holds them or the masks may have written to them since the forward. A match is read
// once and used only if it names a real token; otherwise the task reports it and the operator raises.
#pragma once

#include "simd.h"

namespace drl_fast::DRL_FAST_ISA {

// "None chosen" in uint8 matches; int16 ones hold -1.
constexpr int64_t kNoneChosen = 255;

// The tokens that the matches of one array may name. A local copy: the loops' stores would make them be read again.
template <class T, class Index>
struct Chosen {
  const Index* match;
  const int32_t* token_at;
  int64_t length;
  bool stale = false;  // whether a match named a token that is masked or beyond its row

  Chosen(const Matches& m, const Tokens<T>& named)
      : match(static_cast<const Index*>(m.data)), token_at(named.token_at), length(named.length) {}

  // Find the token of `item` that a match names; negative for none.
  DRL_FAST_ALWAYS_INLINE int32_t token(int64_t at, int64_t item) {
    const int64_t position = match[at];
    // "None chosen" lies beyond every row as well, so an ordinary match takes one test.
    if (static_cast<uint64_t>(position) >= static_cast<uint64_t>(length)) {
      stale |= std::is_same_v<Index, uint8_t> ? position != kNoneChosen : position >= 0;
      return -1;
    }
    const int32_t token = token_at[item * length + position];
    stale |= token < 0;
    return token;
  }
};

// Rows of features with their coefficients.
template <class T>
struct List {
  const T* const* row;
  const T* coefficient;
  int64_t count;
};

// Add weight * (sum of `own`) + (sum of `other`) to NV vectors of grad, and return <token, sum of `own`>. If grad is
// null, only the product is wanted.
template <class T, int NV>
T gather(int64_t at, const List<T>& own, const List<T>& other, T weight, const T* token, T* grad) {
  using S = Simd<T>;
  using V = typename S::V;
  V acc[NV];
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) acc[j] = V{};
  for (int64_t n = 0; n < own.count; n++) {
    const T* from = own.row[n] + at;
    const V c = S::broadcast(own.coefficient[n]);
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) acc[j] += c * S::load(from + j * S::N);
  }
  V product = {}, base[NV];
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) product += acc[j] * S::load(token + at + j * S::N);
  if (!grad) return S::sum(product);
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) {
    base[j] = S::load(grad + at + j * S::N) + S::broadcast(weight) * acc[j];
    // The second sum starts from 0 as well: many small terms on top of a large one would each round like that one.
    acc[j] = V{};
  }
  for (int64_t n = 0; n < other.count; n++) {
    const T* from = other.row[n] + at;
    const V c = S::broadcast(other.coefficient[n]);
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) acc[j] += c * S::load(from + j * S::N);
  }
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++) S::store(grad + at + j * S::N, base[j] + acc[j]);
  return S::sum(product);
}

template <class T>
T gather_run(int64_t width, const List<T>& own, const List<T>& other, T weight, const T* token, T* grad) {
  constexpr int N = Simd<T>::N, WIDE = DRL_FAST_GATHER_VECTORS;
  T product = 0;
  int64_t k = 0;
  for (; k + WIDE * N <= width; k += WIDE * N) product += gather<T, WIDE>(k, own, other, weight, token, grad);
  for (; k + 4 * N <= width; k += 4 * N) product += gather<T, 4>(k, own, other, weight, token, grad);
  for (; k < width; k += N) product += gather<T, 1>(k, own, other, weight, token, grad);
  return product;
}

// Terms that are summed before they are added to the gradient; few, so that a long sum's rounding stays small.
constexpr int64_t kRun = 64;

// The entries of a list's run that begins at `first`.
template <class T>
List<T> run_of(const List<T>& list, int64_t first) {
  const int64_t left = list.count - first;
  if (left <= 0) return {.row = list.row, .coefficient = list.coefficient, .count = 0};
  return {.row = list.row + first, .coefficient = list.coefficient + first, .count = left < kRun ? left : kRun};
}

template <class T>
T gather_row(int64_t width, const List<T>& own, const List<T>& other, T weight, const T* token, T* grad) {
  const int64_t longest = own.count > other.count ? own.count : other.count;
  T product = 0;
  for (int64_t n = 0; n < longest; n += kRun)
    product += gather_run(width, run_of(own, n), run_of(other, n), weight, token, grad);
  return product;
}

// List the source tokens of one chunk that chose a token of `item`, sorted by that token (a counting sort).
template <class T, class Index>
void sort_choosers(const BackwardJob<T>& job, int64_t item, int64_t source0, int64_t source1,
                   BackwardScratch<T>& scratch) {
  const Tokens<T>& target = job.target;
  const Tokens<T>& source = job.source;
  const int64_t first = target.start[item], count = target.start[item + 1] - first;
  int32_t* const begin = scratch.begin;
  for (int64_t p = 0; p <= count; p++) begin[p] = 0;
  if (!source.weight || !job.grad_features) return;
  const Matches m = job.source_matches;
  Chosen<T, Index> chosen(m, target);
  const int64_t* const start = source.start;
  const int32_t* const position = source.position;
  int32_t* const chooser_of = scratch.chooser_of;
  const int64_t q0 = start[source0];
  for (int64_t s = source0; s < source1; s++) {
    const int64_t at = s * m.stride_item + item * m.stride_other;
    for (int64_t q = start[s], end = start[s + 1]; q < end; q++) {
      const int32_t token = chosen.token(at + position[q] * m.stride_position, item);
      const int32_t p = token < 0 ? -1 : static_cast<int32_t>(token - first);
      chooser_of[q - q0] = p;
      if (p >= 0) begin[p + 1]++;
    }
  }
  scratch.stale_match |= chosen.stale;
  for (int64_t p = 0; p < count; p++) begin[p + 1] += begin[p];
  const int32_t total = begin[count];
  const T** const other_row = scratch.other_row;
  T* const other_coefficient = scratch.other_coefficient;
  for (int64_t s = source1; s-- > source0;) {
    const T g = scratch.grad_logit[s - source0];
    for (int64_t q = start[s + 1], end = start[s]; q-- > end;) {
      const int32_t p = chooser_of[q - q0];
      if (p < 0) continue;
      const int32_t at = --begin[p + 1];
      other_row[at] = job.source_row[q];
      other_coefficient[at] = g * source.weight[q] * (job.source_scale ? job.source_scale[q] : T(1));
    }
  }
  // The loop above moved begin[p + 1] from the end of p's entries to their start.
  for (int64_t p = 0; p < count; p++) begin[p] = begin[p + 1];
  begin[count] = total;
}

// List the source tokens of one chunk that token p of `item` chose; return their number.
template <class T, class Index>
int64_t list_chosen(const BackwardJob<T>& job, int64_t item, int64_t p, int64_t source0, int64_t source1,
                    BackwardScratch<T>& scratch) {
  if (!job.target.weight) return 0;
  const Matches m = job.target_matches;
  Chosen<T, Index> chosen(m, job.source);
  const T* const* const source_row = job.source_row;
  const T* const source_scale = job.source_scale;
  const T** const own_row = scratch.own_row;
  const int64_t at = item * m.stride_item + job.target.position[p] * m.stride_position;
  int64_t count = 0;
  for (int64_t s = source0; s < source1; s++) {
    const int32_t q = chosen.token(at + s * m.stride_other, s);
    if (q < 0) continue;
    own_row[count] = source_row[q];
    scratch.own_coefficient[count] = scratch.grad_logit[s - source0] * (source_scale ? source_scale[q] : T(1));
    count++;
  }
  scratch.stale_match |= chosen.stale;
  return count;
}

// Add one chunk of source items' contribution to the gradients of one target item.
template <class T>
void accumulate_item(const BackwardJob<T>& job, int64_t item, int64_t row0, int64_t source0, int64_t source1,
                     BackwardScratch<T>& scratch) {
  const Tokens<T>& target = job.target;
  const int64_t first = target.start[item], last = target.start[item + 1], width = padded(target.dim);
  if (first == last) return;
  const T* grad_logits = job.grad_logits + item * job.grad_stride_target;
  for (int64_t s = source0; s < source1; s++)
    scratch.grad_logit[s - source0] = job.scale * grad_logits[s * job.grad_stride_source];
  (job.source_matches.wide ? sort_choosers<T, int16_t> : sort_choosers<T, uint8_t>)(job, item, source0, source1,
                                                                                    scratch);
  const auto list = job.target_matches.wide ? list_chosen<T, int16_t> : list_chosen<T, uint8_t>;
  for (int64_t p = first; p < last; p++) {
    const int32_t begin = scratch.begin[p - first], end = scratch.begin[p - first + 1];
    const int64_t chosen = list(job, item, p, source0, source1, scratch);
    const List<T> own = {.row = scratch.own_row, .coefficient = scratch.own_coefficient, .count = chosen};
    const List<T> other = {
        .row = scratch.other_row + begin, .coefficient = scratch.other_coefficient + begin, .count = end - begin};
    T* grad = job.grad_features ? scratch.grad + (p - row0) * width : nullptr;
    scratch.grad_weight[p - row0] +=
        gather_row(width, own, other, target.weight ? target.weight[p] : T(0), scratch.row + (p - row0) * width, grad);
  }
}

// Store one target item's gradients, those of features in their dtype. Masked tokens get zeros.
template <class T>
void write_item(const BackwardJob<T>& job, int64_t item, int64_t row0, BackwardScratch<T>& scratch) {
  const Tokens<T>& target = job.target;
  const int64_t width = padded(target.dim);
  const int64_t size = size_of(target.dtype);
  for (int64_t position = 0; position < target.length; position++) {
    const int64_t token = target.token_at[item * target.length + position];
    job.grad_weight[item * target.length + position] = token < 0 ? T(0) : scratch.grad_weight[token - row0];
    if (!job.grad_features) continue;
    char* out = job.grad_features + (item * target.length + position) * target.dim * size;
    if (token < 0) {
      for (int64_t k = 0; k < target.dim * size; k++) out[k] = 0;
      continue;
    }
    T* grad = scratch.grad + (token - row0) * width;
    const T* row = scratch.row + (token - row0) * width;
    store_gradient(target, grad, row, scratch.inverse_norm[token - row0], out);
  }
}

// Run one task: the gradients of one block of target items, over all chunks of source items.
template <class T>
void backward(const BackwardJob<T>& job, int64_t task, BackwardScratch<T>& scratch) {
  const Tokens<T>& target = job.target;
  const int64_t item0 = job.block[task], item1 = job.block[task + 1], width = padded(target.dim);
  const int64_t row0 = target.start[item0], row1 = target.start[item1];
  for (int64_t p = row0; p < row1; p++) {
    load_row(target, p, scratch.row + (p - row0) * width, scratch.inverse_norm + (p - row0));
    for (int64_t k = 0; k < width; k++) scratch.grad[(p - row0) * width + k] = 0;
    scratch.grad_weight[p - row0] = 0;
  }
  for (int64_t c = 0; c < job.chunk_count; c++)
    for (int64_t item = item0; item < item1; item++)
      accumulate_item(job, item, row0, job.chunk[c], job.chunk[c + 1], scratch);
  for (int64_t item = item0; item < item1; item++) write_item(job, item, row0, scratch);
}

}  // namespace drl_fast::DRL_FAST_ISA
