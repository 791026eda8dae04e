// How the CDCR operators walk over the batch.
//
// Pair by pair: an anchor's partner lies in its own pair, so a pair's tokens are loaded and normalised once and stay in
// L2 while all of it is done. Sums over all anchors are kept for a fixed number of runs of pairs and added up in order,
// so that they do not depend on the number of threads.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "capability.h"
#include "sides.h"

namespace drl_fast {
namespace {

constexpr int64_t kRuns = 16;
// Rows that are summed in T before they go into the double sums: few enough that float loses nothing that shows.
constexpr int64_t kFlush = 64;

Tensor contiguous_like(const Tensor& x) {
  return torch::stable::empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
}

Tensor zeros(std::vector<int64_t> size, ScalarType dtype, int64_t bytes) {
  Tensor x = torch::stable::empty(size, dtype);
  std::memset(x.mutable_data_ptr(), 0, x.numel() * bytes);
  return x;
}

// Which side's tokens are a term's anchors; the partners are the other's.
enum SideName { kText = 0, kVideo = 1 };

// Roles in the order of every (roles, D) tensor: text anchors, their partners, video anchors, their partners.
int role_of(int term, bool partner) { return 2 * term + partner; }

// The two sides, and a pair's unit tokens, loaded when first asked for.
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
    STD_TORCH_CHECK(std::max(length(kText), length(kVideo)) <= 32767, "drl_fast::cdcr: at most 32767 tokens a row");
  }
  int64_t length(int s) const { return side[s].tokens.length; }
  // A product has one row for each token of the shorter side: what chose it there, or what it chose, is added up before
  // the product, which so has min(Nt, Nv) rows a pair and term instead of Nt and Nv.
  int64_t slots() const { return std::min(length(kText), length(kVideo)); }
  int64_t slot_of(int term, int64_t anchor, int64_t partner) const {
    return (term == kVideo) == (length(kVideo) <= length(kText)) ? anchor : partner;
  }
  Side<T> side[2];
  int64_t pairs, dim, width;
};

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
    std::fill(loaded_.begin(), loaded_.end(), 0);
  }
  const T* row(int s, int64_t position) {
    const int64_t at = first_[s] + position;
    const Tokens<T>& tokens = sides_.side[s].tokens;
    const int64_t token = tokens.token_at[pair_ * tokens.length + position];
    T* out = rows_.get() + at * sides_.width;
    const bool as_it_is = !tokens.normalize && size_of(tokens.dtype) == sizeof(T) && sides_.width == sides_.dim;
    if (!loaded_[at] && !as_it_is) chosen_kernels<T>().load_row(tokens, token, out, &inverse_[at]);
    loaded_[at] = 1;
    return as_it_is ? reinterpret_cast<const T*>(tokens.row[token]) : out;
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

// Threads that may take part; what one of them works in is not shared.
int64_t workers() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

template <class T>
std::vector<PairRows<T>> pair_rows(const Sides<T>& sides) {
  std::vector<PairRows<T>> rows;
  for (int64_t worker = 0; worker < workers(); worker++) rows.emplace_back(sides);
  return rows;
}

// Sums of rows, in T for a while and in double for good.
template <class T>
class Sums {
 public:
  Sums(int64_t rows, int64_t width) : width_(width), recent_(rows * width), total_(rows * width) {}
  T* row(int64_t r) { return recent_.data() + r * width_; }
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

// Run body(run, worker, pair) for pairs [first, last); a run's pairs come in order, whatever worker takes the run.
// Where nothing is summed over pairs there may be as many runs as pairs.
template <class Body>
void over_pairs(int64_t first, int64_t last, int64_t work, const Body& body, int64_t most_runs = kRuns) {
  const int64_t pairs = last - first, runs = std::min(most_runs, std::max<int64_t>(pairs, 1));
  parallel(runs, threads_for(runs, work), [&](int64_t run, int64_t worker) {
    for (int64_t pair = run * pairs / runs; pair < (run + 1) * pairs / runs; pair++) body(run, worker, first + pair);
  });
}

template <class T>
int64_t work_of(const Sides<T>& sides) {
  return 8 * sides.pairs * (sides.length(kText) + sides.length(kVideo)) * sides.width;
}

// (rows, D) float64 from the runs' sums, in their order, plus a constant.
template <class T>
Tensor collect(std::vector<Sums<T>>& runs, int64_t rows, int64_t dim) {
  Tensor out = zeros({rows, dim}, ScalarType::Double, 8);
  double* to = static_cast<double*>(out.mutable_data_ptr());
  for (Sums<T>& run : runs) {
    run.flush();
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < dim; k++) to[r * dim + k] += run.total(r)[k];
  }
  return out;
}

// The constants of every role, padded, from (kinds, roles, D) float64.
template <class T>
class ChannelTable {
 public:
  ChannelTable(int64_t roles, int64_t dim)
      : width_(padded(dim)), dim_(dim), data_(roles * 5 * width_), of_(roles) {
    for (int64_t r = 0; r < roles; r++) {
      const T* at = data_.data() + r * 5 * width_;
      of_[r] = {at, at + width_, at + 2 * width_, at + 3 * width_, at + 4 * width_};
    }
  }
  ChannelTable(const Tensor& channels, int64_t kinds, int64_t roles, int64_t dim) : ChannelTable(roles, dim) {
    STD_TORCH_CHECK(has_sizes(channels, {kinds, roles, dim}) && channels.scalar_type() == ScalarType::Double,
                    "drl_fast::cdcr: channels must be (kinds, roles, D) float64");
    const Tensor dense = torch::stable::contiguous(channels);
    const double* from = static_cast<const double*>(dense.const_data_ptr());
    for (int64_t kind = 0; kind < kinds; kind++)
      for (int64_t r = 0; r < roles; r++) {
        const double* row = from + (kind * roles + r) * dim;
        if (kind == 0) set_mean(r, row);
        else std::copy(row, row + dim, slot(r, kind + 1));
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
  T* slot(int64_t role, int64_t kind) { return data_.data() + (role * 5 + kind) * width_; }
  int64_t width_, dim_;
  std::vector<T> data_;
  std::vector<Channels<T>> of_;
};

// Each anchor's partner and weight, as the operators hand them on.
template <class T>
struct Anchors {
  // Without weights: 1 for every anchor of a term that there is.
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
    weight[term] = static_cast<const T*>(held[2 * term]->const_data_ptr());
    index[term] = static_cast<const int16_t*>(held[2 * term + 1]->const_data_ptr());
    for (int64_t i = 0; i < sides.pairs * length; i++)
      STD_TORCH_CHECK(index[term][i] < others, "drl_fast::cdcr: a partner lies beyond its row");
  }
  int terms;
  std::optional<Tensor> held[4];
  const T* weight[2];
  const int16_t* index[2];
};

// Run body(term, position, x, y, weight) for the anchors of one pair.
template <class T, class Body>
void over_anchors(const Sides<T>& sides, const Anchors<T>& anchors, PairRows<T>& rows, int64_t pair, const Body& body) {
  rows.start(pair);
  for (int term = 0; term < anchors.terms; term++)
    for (int64_t i = 0; i < sides.length(term); i++) {
      const int64_t at = pair * sides.length(term) + i, partner = anchors.index[term][at];
      if (partner >= 0)
        body(term, i, partner, rows.row(term, i), rows.row(1 - term, partner),
             anchors.weight[term] ? anchors.weight[term][at] : T(1));
    }
}

}  // namespace
}  // namespace drl_fast
