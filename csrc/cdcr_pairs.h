// Iteration over the pairs of a batch, for CDCR's operators.
//
// An anchor's partner belongs to the same pair. So a pair's tokens are loaded and normalized once, and stay in L2 while
// the pair is processed. Sums over all anchors are kept for a fixed number of runs of pairs and added in order, so they
// do not depend on the number of threads. The full form's products do: aten::mm may split its sums among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "capability.h"
#include "parallel.h"
#include "sides.h"
#include "tensors.h"

namespace drl_fast {

constexpr int64_t kRuns = 16;
// Rows that are summed in T before they are added to the sums in double; few, so that float rounding stays small.
constexpr int64_t kFlush = 64;

inline Tensor contiguous_like(const Tensor& x) { return empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type()); }

// Which side's tokens are a term's anchors; the partners are the other's.
enum SideName : uint8_t { kText = 0, kVideo = 1 };

// Roles in the order of every (roles, D) tensor: text anchors, their partners, video anchors, their partners.
inline int role_of(int term, bool partner) { return 2 * term + (partner ? 1 : 0); }

// The two sides of a batch of pairs.
template <class T>
struct Sides {
  Sides(const Tensor& text, const Tensor& video, const OptionalTensor& text_mask, const OptionalTensor& video_mask,
        bool normalize)
      : side{Side<T>(text, std::nullopt, text_mask, normalize, false),
             Side<T>(video, std::nullopt, video_mask, normalize, false)},
        pairs(text.size(0)),
        dim(text.size(2)),
        width(padded(dim)) {
    STD_TORCH_CHECK(video.size(0) == pairs && video.size(2) == dim && video.scalar_type() == text.scalar_type(),
                    "drl_fast::cdcr: text and video must have as many rows, one D and one dtype");
    STD_TORCH_CHECK(std::max(length(kText), length(kVideo)) <= 32767, "drl_fast::cdcr: at most 32767 tokens per row");
  }
  int64_t length(int s) const { return side[s].tokens.length; }
  // Rows that a pair and term add to the full form's product. Anchors with one partner are summed before the product,
  // so each token of the shorter side has one row: min(Nt, Nv) rows, for either term.
  int64_t slots() const { return std::min(length(kText), length(kVideo)); }
  int64_t slot_of(int term, int64_t anchor, int64_t partner) const {
    return (term == kVideo) == (length(kVideo) <= length(kText)) ? anchor : partner;
  }
  Side<T> side[2];
  int64_t pairs, dim, width;
};

// One pair's normalized tokens, loaded when they are first asked for.
template <class T>
class PairRows {
 public:
  explicit PairRows(const Sides<T>& sides)
      : sides_(sides),
        first_{0, sides.length(kText)},
        rows_((sides.length(kText) + sides.length(kVideo)) * sides.width),
        inverse_(sides.length(kText) + sides.length(kVideo)),
        loaded_(sides.length(kText) + sides.length(kVideo)) {}
  void start(int64_t pair) {
    pair_ = pair;
    std::ranges::fill(loaded_, 0);
  }
  const T* row(int s, int64_t position) {
    const int64_t at = first_[s] + position;
    const Tokens<T>& tokens = sides_.side[s].tokens;
    const int64_t token = tokens.token_at[pair_ * tokens.length + position];
    T* out = rows_.get() + at * sides_.width;
    const bool in_place = !tokens.normalize && tokens.dtype == dtype_of_arithmetic<T> && sides_.width == sides_.dim;
    if (!loaded_[at] && !in_place) chosen_kernels<T>().load_row(tokens, token, out, &inverse_[at]);
    loaded_[at] = 1;
    return in_place ? reinterpret_cast<const T*>(tokens.row[token]) : out;
  }
  T inverse(int s, int64_t position) const { return inverse_[first_[s] + position]; }
  bool loaded(int s, int64_t position) const { return loaded_[first_[s] + position]; }

 private:
  const Sides<T>& sides_;
  int64_t first_[2], pair_ = 0;
  Buffer<T> rows_;
  std::vector<T> inverse_;
  std::vector<uint8_t> loaded_;
};

// The most threads that may run; each needs scratch memory of its own.
inline int64_t workers() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

template <class T>
std::vector<PairRows<T>> pair_rows(const Sides<T>& sides) {
  std::vector<PairRows<T>> rows;
  rows.reserve(workers());
  for (int64_t worker = 0; worker < workers(); worker++) rows.emplace_back(sides);
  return rows;
}

// Sums of rows: up to kFlush rows in T, which are then added to sums in double.
template <class T>
class Sums {
 public:
  Sums(int64_t rows, int64_t width) : width_(width), recent_(rows * width), total_(rows * width) {}
  T* row(int64_t r) { return recent_.data() + r * width_; }
  // To be called after each addition to the rows.
  void added() {
    if (++count_ == kFlush) flush();
  }
  void flush() {
    for (size_t k = 0; k < total_.size(); k++) {
      total_[k] += recent_[k];
      recent_[k] = 0;
    }
    count_ = 0;
  }
  const double* total(int64_t r) const { return total_.data() + r * width_; }

 private:
  int64_t width_, count_ = 0;
  std::vector<T> recent_;
  std::vector<double> total_;
};

// Run body(run, worker, pair) for pairs [first, last). One worker takes all pairs of a run, in order. A body that sums
// nothing over pairs may have as many runs as there are pairs.
template <class Body>
void for_each_pair(int64_t first, int64_t last, int64_t work, const Body& body, int64_t most_runs = kRuns) {
  const int64_t pairs = last - first, runs = std::min(most_runs, std::max<int64_t>(pairs, 1));
  parallel(runs, threads_for(runs, work), [&](int64_t run, int64_t worker) {
    for (int64_t pair = run * pairs / runs; pair < (run + 1) * pairs / runs; pair++) body(run, worker, first + pair);
  });
}

template <class T>
int64_t work_of(const Sides<T>& sides) {
  return 8 * sides.pairs * (sides.length(kText) + sides.length(kVideo)) * sides.width;
}

// Add up the runs' sums in order: (rows, D) float64.
template <class T>
Tensor collect(std::vector<Sums<T>>& runs, int64_t rows, int64_t dim) {
  Tensor out = zeros({rows, dim}, ScalarType::Double);
  double* to = data_of<double>(out);
  for (Sums<T>& run : runs) {
    run.flush();
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < dim; k++) to[r * dim + k] += run.total(r)[k];
  }
  return out;
}

// The channel constants of every role, padded, from (kinds, roles, D) float64.
template <class T>
class ChannelTable {
 public:
  ChannelTable(int64_t roles, int64_t dim)
      : width_(padded(dim)), dim_(dim), data_(roles * kKinds * width_), of_(roles) {
    for (int64_t r = 0; r < roles; r++) {
      of_[r] = {
          .mean = slot(r, 0),
          .mean_rest = slot(r, 1),
          .inverse_std = slot(r, 2),
          .offset = slot(r, 3),
          .along = slot(r, 4),
      };
    }
  }
  ChannelTable(const Tensor& channels, int64_t kinds, int64_t roles, int64_t dim) : ChannelTable(roles, dim) {
    STD_TORCH_CHECK(has_sizes(channels, {kinds, roles, dim}) && channels.scalar_type() == ScalarType::Double,
                    "drl_fast::cdcr: channels must be (kinds, roles, D) float64");
    const Tensor dense = torch::stable::contiguous(channels);
    const double* from = const_data_of<double>(dense);
    for (int64_t kind = 0; kind < kinds; kind++)
      for (int64_t r = 0; r < roles; r++) {
        const double* row = from + (kind * roles + r) * dim;
        if (kind == 0)
          set_mean(r, row);
        else
          std::copy(row, row + dim, slot(r, kind + 1));
      }
  }
  void set_mean(int64_t role, const double* mean) {
    for (int64_t k = 0; k < dim_; k++) {
      const T rounded = static_cast<T>(mean[k]);
      slot(role, 0)[k] = rounded;
      slot(role, 1)[k] = static_cast<T>(mean[k] - rounded);
    }
  }
  const Channels<T>& operator[](int64_t role) const { return of_[role]; }

 private:
  static constexpr int64_t kKinds = 5;  // arrays of Channels

  T* slot(int64_t role, int64_t kind) { return data_.data() + (role * kKinds + kind) * width_; }
  int64_t width_, dim_;
  std::vector<T> data_;
  std::vector<Channels<T>> of_;
};

// Every anchor's partner and weight.
template <class T>
struct Anchors {
  // Without weights every anchor has weight 1.
  Anchors(int terms, const int16_t* video_index, const int16_t* text_index)
      : terms(terms), weight{nullptr, nullptr}, index{video_index, text_index} {}
  Anchors(const Sides<T>& sides, const Tensor& text_weight, const OptionalTensor& video_weight,
          const Tensor& video_index, const Tensor& text_index)
      : terms(video_weight ? 2 : 1) {
    take(sides, kText, text_weight, video_index);
    if (video_weight) take(sides, kVideo, *video_weight, text_index);
  }
  void take(const Sides<T>& sides, int term, const Tensor& given_weight, const Tensor& given_index) {
    const int64_t length = sides.length(term), others = sides.length(1 - term);
    STD_TORCH_CHECK(has_sizes(given_weight, {sides.pairs, length}) && given_weight.scalar_type() == scalar_type<T>,
                    "drl_fast::cdcr: weights must be (B, tokens), float32 (float64 with float64)");
    STD_TORCH_CHECK(has_sizes(given_index, {sides.pairs, length}) && given_index.scalar_type() == ScalarType::Short,
                    "drl_fast::cdcr: partners must be (B, tokens) int16");
    held[2 * term] = torch::stable::contiguous(given_weight);
    held[2 * term + 1] = torch::stable::contiguous(given_index);
    weight[term] = const_data_of<T>(*held[2 * term]);
    index[term] = const_data_of<int16_t>(*held[2 * term + 1]);
    for (int64_t i = 0; i < sides.pairs * length; i++)
      STD_TORCH_CHECK(index[term][i] < others, "drl_fast::cdcr: a partner lies beyond its row");
  }
  int terms;
  std::optional<Tensor> held[4];  // owns what weight and index point into
  const T* weight[2] = {};
  const int16_t* index[2] = {};
};

// Run body(term, position, x, y, weight) for the anchors of one pair.
template <class T, class Body>
void for_each_anchor(const Sides<T>& sides, const Anchors<T>& anchors, PairRows<T>& rows, int64_t pair,
                     const Body& body) {
  rows.start(pair);
  for (int term = 0; term < anchors.terms; term++)
    for (int64_t i = 0; i < sides.length(term); i++) {
      const int64_t at = pair * sides.length(term) + i, partner = anchors.index[term][at];
      if (partner >= 0)
        body(term, i, partner, rows.row(term, i), rows.row(1 - term, partner),
             anchors.weight[term] ? anchors.weight[term][at] : T(1));
    }
}

}  // namespace drl_fast
