// CDCR's operators on the CPU: partners and channel statistics, the correlation matrix C or its diagonal, the gradient.
// The mathematics is in cdcr_kernels.h, the iteration over pairs in cdcr_pairs.h.
#include "cdcr.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "capability.h"
#include "cdcr_pairs.h"
#include "cdcr_products.h"
#include "parallel.h"
#include "sides.h"
#include "tensors.h"

namespace drl_fast {
namespace {

// Find the best partner of every real token of one pair. Of equals the lowest index wins; -1: the other side is empty.
template <class T>
void find_partners(const Sides<T>& sides, PairRows<T>& rows, int64_t pair, std::vector<T>& best, int16_t* frame_of,
                   int16_t* word_of) {
  const Tokens<T>& text = sides.side[kText].tokens;
  const Tokens<T>& video = sides.side[kVideo].tokens;
  std::fill(frame_of, frame_of + text.length, -1);
  std::fill(word_of, word_of + video.length, -1);
  rows.start(pair);
  for (int64_t i = 0; i < text.length; i++) {
    if (text.token_at[pair * text.length + i] < 0) continue;
    T of_word = 0;
    for (int64_t j = 0; j < video.length; j++) {
      if (video.token_at[pair * video.length + j] < 0) continue;
      const T s = chosen_cdcr_kernels<T>().dot(rows.row(kText, i), rows.row(kVideo, j), sides.width);
      // A NaN beats every number.
      auto beats = [s](int16_t index, T top) { return index < 0 || s > top || (std::isnan(s) && !std::isnan(top)); };
      if (beats(frame_of[i], of_word)) {
        of_word = s;
        frame_of[i] = static_cast<int16_t>(j);
      }
      if (beats(word_of[j], best[j])) {
        best[j] = s;
        word_of[j] = static_cast<int16_t>(i);
      }
    }
  }
}

// Set the shift that a term's sums subtract from every row: the first anchor and its partner, or zeros without an
// anchor. It makes a constant channel sum to exactly 0. Returns the number of anchors.
template <class T>
int64_t first_rows(const Sides<T>& sides, const Anchors<T>& anchors, int term, PairRows<T>& rows,
                   std::vector<double>* shift) {
  const int64_t length = sides.length(term), places = sides.pairs * length;
  int64_t count = 0;
  shift[0].assign(sides.dim, 0.0);
  shift[1].assign(sides.dim, 0.0);
  for (int64_t at = 0; at < places; at++) {
    const int64_t partner = anchors.index[term][at];
    if (partner < 0 || count++ > 0) continue;
    rows.start(at / length);
    const T* x = rows.row(term, at % length);
    const T* y = rows.row(1 - term, partner);
    shift[0].assign(x, x + sides.dim);
    shift[1].assign(y, y + sides.dim);
  }
  return count;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(const Tensor& text, const Tensor& video,
                                                      const OptionalTensor& text_mask, const OptionalTensor& video_mask,
                                                      bool normalize, bool both) {
  const Sides<T> sides(text, video, text_mask, video_mask, normalize);
  const int64_t nt = sides.length(kText), nv = sides.length(kVideo), dim = sides.dim, roles = both ? 4 : 2;
  Tensor video_index = empty({sides.pairs, nt}, ScalarType::Short);
  Tensor text_index = empty({sides.pairs, nv}, ScalarType::Short);
  int16_t* index[2] = {data_of<int16_t>(video_index), data_of<int16_t>(text_index)};
  std::vector<PairRows<T>> rows = pair_rows(sides);
  std::vector<std::vector<T>> best(workers(), std::vector<T>(nv));
  auto find = [&](int64_t, int64_t worker, int64_t pair) {
    find_partners(sides, rows[worker], pair, best[worker], index[kText] + pair * nt, index[kVideo] + pair * nv);
  };
  for_each_pair(0, sides.pairs, work_of(sides) * 4, find, sides.pairs);

  const Anchors<T> anchors(both ? 2 : 1, index[kText], index[kVideo]);
  ChannelTable<T> table(roles, dim);
  std::vector<double> shift[4];
  int64_t count[2] = {0, 0};
  for (int term = 0; term < anchors.terms; term++)
    count[term] = first_rows(sides, anchors, term, rows[0], shift + 2 * term);
  for (int64_t r = 0; r < roles; r++) table.set_mean(r, shift[r].data());
  auto sum_over = [&](auto kernel) {
    std::vector<Sums<T>> runs(kRuns, Sums<T>(roles, sides.width));
    for_each_pair(0, sides.pairs, work_of(sides), [&](int64_t run, int64_t worker, int64_t pair) {
      for_each_anchor(sides, anchors, rows[worker], pair, [&](int term, int64_t, int64_t, const T* x, const T* y, T) {
        kernel(x, role_of(term, false), runs[run].row(role_of(term, false)));
        kernel(y, role_of(term, true), runs[run].row(role_of(term, true)));
        runs[run].added();
      });
    });
    return collect(runs, roles, dim);
  };
  Tensor mean = sum_over(
      [&](const T* x, int role, T* to) { chosen_cdcr_kernels<T>().sum(x, table[role].mean, sides.width, to); });
  double* means = data_of<double>(mean);
  for (int64_t r = 0; r < roles; r++) {
    const double divisor = static_cast<double>(std::max<int64_t>(1, count[r / 2]));
    for (int64_t k = 0; k < dim; k++) means[r * dim + k] = shift[r][k] + means[r * dim + k] / divisor;
    table.set_mean(r, means + r * dim);
  }
  Tensor scatter =
      sum_over([&](const T* x, int role, T* to) { chosen_cdcr_kernels<T>().scatter(x, table[role], sides.width, to); });
  return {video_index, text_index, mean, scatter};
}

// Each term's diagonal of C (terms, D), and the sums of weighted anchors and partners (roles, D).
template <class T>
std::tuple<Tensor, Tensor> diagonal(const Sides<T>& sides, const Anchors<T>& anchors, const ChannelTable<T>& table) {
  std::vector<Sums<T>> runs(kRuns, Sums<T>(3 * anchors.terms, sides.width));
  std::vector<PairRows<T>> rows = pair_rows(sides);
  for_each_pair(0, sides.pairs, work_of(sides), [&](int64_t run, int64_t worker, int64_t pair) {
    for_each_anchor(
        sides, anchors, rows[worker], pair, [&](int term, int64_t, int64_t, const T* x, const T* y, T weight) {
          chosen_cdcr_kernels<T>().correlate(x, y, weight, table[role_of(term, false)], table[role_of(term, true)],
                                             sides.width, runs[run].row(2 * anchors.terms + term),
                                             runs[run].row(role_of(term, false)), runs[run].row(role_of(term, true)));
          runs[run].added();
        });
  });
  const Tensor all = collect(runs, 3 * anchors.terms, sides.dim);
  const double* from = const_data_of<double>(all);
  Tensor cross = empty({anchors.terms, sides.dim}, scalar_type<T>);
  Tensor sums = empty({2 * anchors.terms, sides.dim}, ScalarType::Double);
  std::copy_n(from, sums.numel(), data_of<double>(sums));
  std::copy_n(from + sums.numel(), cross.numel(), data_of<T>(cross));
  return {cross, sums};
}

// Each term's C (terms, D, D), and the sums of weighted anchors and partners (roles, D).
template <class T>
std::tuple<Tensor, Tensor> full(const Sides<T>& sides, const Anchors<T>& anchors, const ChannelTable<T>& table) {
  std::vector<Sums<T>> sums(kRuns, Sums<T>(2 * anchors.terms, sides.width));
  ProductRows<T> block(sides, anchors, table);
  Tensor cross = zeros({anchors.terms, sides.dim, sides.dim}, scalar_type<T>);
  Tensor part = empty({sides.dim, sides.dim}, scalar_type<T>);
  const T* from = const_data_of<T>(part);
  for (int64_t first = 0; first < sides.pairs; first += block.pairs()) {
    block.load(first, &sums);
    for (int term = 0; term < anchors.terms; term++) {
      mm_out(torch::stable::transpose(block.weighted(term), 0, 1), block.partners(term), part);
      T* to = data_of<T>(cross) + term * sides.dim * sides.dim;
      parallel(sides.dim, threads_for(sides.dim, 8 * sides.dim * sides.dim), [&](int64_t d, int64_t) {
        for (int64_t e = d * sides.dim; e < (d + 1) * sides.dim; e++) to[e] += from[e];
      });
    }
  }
  return {cross, collect(sums, 2 * anchors.terms, sides.dim)};
}

// What the gradients of all pairs are computed from, and where they go.
template <class T>
struct GradientJob {
  const Sides<T>& sides;
  const Anchors<T>& anchors;
  const ChannelTable<T>& table;
  const T* diagonal;            // d loss / d C_dd; null if C is full
  const ProductRows<T>* block;  // if C is full: the gradients of the product's rows
  Tensor grad[2], grad_weight[2];
};

// Compute the gradients of pairs [first, last).
template <class T>
void pull_pairs(GradientJob<T>& job, int64_t first, int64_t last, std::vector<PairRows<T>>& rows) {
  const Sides<T>& sides = job.sides;
  const int64_t lengths[2] = {sides.length(kText), sides.length(kVideo)}, slots = sides.slots();
  const int64_t size = size_of(sides.side[kText].tokens.dtype);
  std::vector<std::vector<T>> into(workers(), std::vector<T>((lengths[0] + lengths[1]) * sides.width));
  std::vector<std::vector<T>> scratch(workers(), std::vector<T>(2 * sides.width));
  std::vector<std::vector<uint8_t>> seen(workers(), std::vector<uint8_t>(2 * slots));
  for_each_pair(
      first, last, 2 * work_of(sides),
      [&](int64_t, int64_t worker, int64_t pair) {
        auto gradient_of = [&](int s, int64_t position) {
          return into[worker].data() + (s * lengths[0] + position) * sides.width;
        };
        std::fill(into[worker].begin(), into[worker].end(), T(0));
        std::fill(seen[worker].begin(), seen[worker].end(), 0);
        for_each_anchor(sides, job.anchors, rows[worker], pair,
                        [&](int term, int64_t i, int64_t j, const T* x, const T* y, T weight) {
                          Pull<T> pull = {.diagonal = job.diagonal, .anchor = nullptr, .partner = nullptr};
                          if (job.block) {
                            const int64_t slot = sides.slot_of(term, i, j);
                            uint8_t& was_here = seen[worker][term * slots + slot];
                            pull = job.block->pull(term, pair, slot, !was_here, scratch[worker].data());
                            was_here = 1;
                          }
                          data_of<T>(job.grad_weight[term])[pair * lengths[term] + i] = chosen_cdcr_kernels<T>().pull(
                              x, y, weight, job.table[role_of(term, false)], job.table[role_of(term, true)], pull,
                              sides.width, gradient_of(term, i), gradient_of(1 - term, j));
                        });
        for (int s = 0; s < 2; s++)
          for (int64_t p = 0; p < lengths[s]; p++) {
            char* out = data_of<char>(job.grad[s]) + (pair * lengths[s] + p) * sides.dim * size;
            if (rows[worker].loaded(s, p))
              chosen_kernels<T>().store_gradient(sides.side[s].tokens, gradient_of(s, p), rows[worker].row(s, p),
                                                 rows[worker].inverse(s, p), out);
            else
              std::fill_n(out, sides.dim * size, char{0});
          }
      },
      last - first);
}

template <class T>
std::tuple<Tensor, Tensor> correlation(const Tensor& text, const Tensor& video, const Tensor& text_weight,
                                       const OptionalTensor& video_weight, const Tensor& video_index,
                                       const Tensor& text_index, const Tensor& channels, bool normalize, bool all) {
  const Sides<T> sides(text, video, std::nullopt, std::nullopt, normalize);
  const Anchors<T> anchors(sides, text_weight, video_weight, video_index, text_index);
  const ChannelTable<T> table(channels, 2, 2 * anchors.terms, sides.dim);
  return all ? full(sides, anchors, table) : diagonal(sides, anchors, table);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> gradient(const Tensor& text, const Tensor& video, const Tensor& text_weight,
                                                    const OptionalTensor& video_weight, const Tensor& video_index,
                                                    const Tensor& text_index, const Tensor& channels,
                                                    const Tensor& pull, bool normalize) {
  const Sides<T> sides(text, video, std::nullopt, std::nullopt, normalize);
  const Anchors<T> anchors(sides, text_weight, video_weight, video_index, text_index);
  const ChannelTable<T> table(channels, 4, 2 * anchors.terms, sides.dim);
  const bool all = pull.dim() == 2;
  STD_TORCH_CHECK(pull.scalar_type() == scalar_type<T> &&
                      (all ? has_sizes(pull, {sides.dim, sides.dim}) : has_sizes(pull, {sides.dim})),
                  "drl_fast::cdcr_gradient: pull must be (D,) or (D, D), float32 (float64 with float64)");
  const Tensor dense = torch::stable::contiguous(pull);
  std::vector<T> diagonal(sides.width);
  if (!all) std::copy_n(const_data_of<T>(dense), sides.dim, diagonal.begin());
  const int64_t frames_weighted = anchors.terms == 2 ? sides.pairs : 0;
  GradientJob<T> job = {
      .sides = sides,
      .anchors = anchors,
      .table = table,
      .diagonal = all ? nullptr : diagonal.data(),
      .block = nullptr,
      .grad = {contiguous_like(text), contiguous_like(video)},
      .grad_weight = {zeros({sides.pairs, sides.length(kText)}, scalar_type<T>),
                      zeros({frames_weighted, sides.length(kVideo)}, scalar_type<T>)},
  };
  std::vector<PairRows<T>> rows = pair_rows(sides);
  if (!all) {
    pull_pairs(job, 0, sides.pairs, rows);
  } else {
    ProductRows<T> block(sides, anchors, table);
    job.block = &block;
    for (int64_t first = 0; first < sides.pairs; first += block.pairs()) {
      block.load(first, nullptr);
      block.multiply(dense);
      pull_pairs(job, first, std::min(first + block.pairs(), sides.pairs), rows);
    }
  }
  return {job.grad[0], job.grad[1], job.grad_weight[0], job.grad_weight[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cdcr_statistics(Tensor text, Tensor video, OptionalTensor text_mask,
                                                           OptionalTensor video_mask, bool normalize, bool both) {
  return (computes_in_double(text) ? statistics<double> : statistics<float>)(text, video, text_mask, video_mask,
                                                                             normalize, both);
}

std::tuple<Tensor, Tensor> cdcr_correlation(Tensor text, Tensor video, Tensor text_weight, OptionalTensor video_weight,
                                            Tensor video_index, Tensor text_index, Tensor channels, bool normalize,
                                            bool all) {
  return (computes_in_double(text) ? correlation<double> : correlation<float>)(text, video, text_weight, video_weight,
                                                                               video_index, text_index, channels,
                                                                               normalize, all);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cdcr_gradient(Tensor text, Tensor video, Tensor text_weight,
                                                         OptionalTensor video_weight, Tensor video_index,
                                                         Tensor text_index, Tensor channels, Tensor pull,
                                                         bool normalize) {
  return (computes_in_double(text) ? gradient<double> : gradient<float>)(text, video, text_weight, video_weight,
                                                                         video_index, text_index, channels, pull,
                                                                         normalize);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(drl_fast, CPU, m) {
  m.impl("cdcr_statistics", TORCH_BOX(&cdcr_statistics));
  m.impl("cdcr_correlation", TORCH_BOX(&cdcr_correlation));
  m.impl("cdcr_gradient", TORCH_BOX(&cdcr_gradient));
}

}  // namespace drl_fast
