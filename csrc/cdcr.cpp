// Operators of CDCR on the CPU: partners and channel statistics, the correlation's diagonal, the full form's rows, the
// gradient. The mathematics is in cdcr_kernel.h, the walk over pairs in cdcr_pairs.h.
#include "cdcr_pairs.h"

namespace drl_fast {
namespace {

// The best partner of every real token of one pair, lowest index first; -1 for all of them where a side is empty.
template <class T>
void find_partners(const Sides<T>& sides, PairRows<T>& rows, int64_t pair, std::vector<T>& best, int16_t* frame_of,
                   int16_t* word_of) {
  const Tokens<T>&text = sides.side[kText].tokens, &video = sides.side[kVideo].tokens;
  std::fill(frame_of, frame_of + text.length, -1);
  std::fill(word_of, word_of + video.length, -1);
  rows.start(pair);
  for (int64_t i = 0; i < text.length; i++) {
    if (text.token_at[pair * text.length + i] < 0) continue;
    T of_word = 0;
    for (int64_t j = 0; j < video.length; j++) {
      if (video.token_at[pair * video.length + j] < 0) continue;
      const T s = cdcr_kernels<T>().dot(rows.row(kText, i), rows.row(kVideo, j), sides.width);
      auto beats = [s](int16_t index, T top) { return index < 0 || s > top || (s != s && top == top); };
      if (beats(frame_of[i], of_word)) of_word = s, frame_of[i] = static_cast<int16_t>(j);
      if (beats(word_of[j], best[j])) best[j] = s, word_of[j] = static_cast<int16_t>(i);
    }
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(const Tensor& text, const Tensor& video,
                                                      const OptionalTensor& text_mask, const OptionalTensor& video_mask,
                                                      bool normalize, bool both) {
  const Sides<T> sides(text, video, text_mask, video_mask, normalize);
  const int64_t terms = both ? 2 : 1, roles = 2 * terms, nt = sides.length(kText), nv = sides.length(kVideo);
  Tensor video_index = torch::stable::empty({sides.pairs, nt}, ScalarType::Short);
  Tensor text_index = torch::stable::empty({sides.pairs, nv}, ScalarType::Short);
  int16_t* index[2] = {static_cast<int16_t*>(video_index.mutable_data_ptr()),
                       static_cast<int16_t*>(text_index.mutable_data_ptr())};
  std::vector<std::unique_ptr<PairRows<T>>> rows;
  std::vector<std::vector<T>> best(kRuns, std::vector<T>(nv));
  for (int64_t run = 0; run < kRuns; run++) rows.push_back(std::make_unique<PairRows<T>>(sides));
  over_pairs(sides.pairs, work_of(sides) * 4, [&](int64_t run, int64_t pair) {
    find_partners(sides, *rows[run], pair, best[run], index[kText] + pair * nt, index[kVideo] + pair * nv);
  });

  // Relative to the first anchor's tokens: of a constant channel nothing is left then, not even rounding.
  ChannelTable<T> table(roles, sides.dim);
  std::vector<int64_t> count(2, 0);
  auto over_index = [&](int64_t run, int64_t pair, auto&& body) {
    rows[run]->start(pair);
    for (int term = 0; term < terms; term++)
      for (int64_t i = 0; i < sides.length(term); i++) {
        const int64_t partner = index[term][pair * sides.length(term) + i];
        if (partner >= 0) body(term, rows[run]->row(term, i), rows[run]->row(1 - term, partner));
      }
  };
  std::vector<std::vector<double>> shift(roles);
  for (int64_t pair = 0; pair < sides.pairs; pair++)
    for (int term = 0; term < terms; term++)
      for (int64_t i = 0; i < sides.length(term); i++) {
        const int64_t partner = index[term][pair * sides.length(term) + i];
        if (partner < 0) continue;
        if (count[term]++ > 0) continue;
        rows[0]->start(pair);
        const T* x = rows[0]->row(term, i);
        const T* y = rows[0]->row(1 - term, partner);
        shift[role_of(term, false)].assign(x, x + sides.dim);
        shift[role_of(term, true)].assign(y, y + sides.dim);
      }
  for (int64_t r = 0; r < roles; r++) {
    if (shift[r].empty()) shift[r].assign(sides.dim, 0.0);
    table.set_mean(r, shift[r].data());
  }
  auto sum_over = [&](auto kernel) {
    std::vector<Sums<T>> runs(kRuns, Sums<T>(roles, sides.width));
    over_pairs(sides.pairs, work_of(sides), [&](int64_t run, int64_t pair) {
      over_index(run, pair, [&](int term, const T* x, const T* y) {
        kernel(x, role_of(term, false), runs[run].row(role_of(term, false)));
        kernel(y, role_of(term, true), runs[run].row(role_of(term, true)));
        runs[run].added();
      });
    });
    return collect(runs, roles, sides.dim);
  };
  Tensor mean = sum_over([&](const T* x, int role, T* to) {
    cdcr_kernels<T>().sum(x, table[role].mean, sides.width, to);
  });
  double* means = static_cast<double*>(mean.mutable_data_ptr());
  for (int64_t r = 0; r < roles; r++) {
    const double anchors = static_cast<double>(std::max<int64_t>(1, count[r / 2]));
    for (int64_t k = 0; k < sides.dim; k++) means[r * sides.dim + k] = shift[r][k] + means[r * sides.dim + k] / anchors;
    table.set_mean(r, means + r * sides.dim);
  }
  Tensor scatter = sum_over([&](const T* x, int role, T* to) {
    cdcr_kernels<T>().scatter(x, table[role], sides.width, to);
  });
  return {video_index, text_index, mean, scatter};
}

template <class T>
std::tuple<Tensor, Tensor> diagonal(const Tensor& text, const Tensor& video, const Tensor& text_weight,
                                    const OptionalTensor& video_weight, const Tensor& video_index,
                                    const Tensor& text_index, const Tensor& channels, bool normalize) {
  const Sides<T> sides(text, video, std::nullopt, std::nullopt, normalize);
  const Anchors<T> anchors(sides, text_weight, video_weight, video_index, text_index);
  const ChannelTable<T> table(channels, 2, 2 * anchors.terms, sides.dim);
  std::vector<Sums<T>> runs(kRuns, Sums<T>(3 * anchors.terms, sides.width));
  std::vector<std::unique_ptr<PairRows<T>>> rows;
  for (int64_t run = 0; run < kRuns; run++) rows.push_back(std::make_unique<PairRows<T>>(sides));
  over_pairs(sides.pairs, work_of(sides), [&](int64_t run, int64_t pair) {
    over_anchors(sides, anchors, *rows[run], pair, [&](int term, int64_t, int64_t, const T* x, const T* y, T weight) {
      cdcr_kernels<T>().correlate(x, y, weight, table[role_of(term, false)], table[role_of(term, true)], sides.width,
                                  runs[run].row(term), runs[run].row(anchors.terms + role_of(term, false)),
                                  runs[run].row(anchors.terms + role_of(term, true)));
      runs[run].added();
    });
  });
  const Tensor all = collect(runs, 3 * anchors.terms, sides.dim);
  auto part = [&](int64_t first, int64_t count) {
    Tensor out = zeros({count, sides.dim}, ScalarType::Double, 8);
    std::memcpy(out.mutable_data_ptr(), static_cast<const double*>(all.const_data_ptr()) + first * sides.dim,
                count * sides.dim * sizeof(double));
    return out;
  };
  return {part(0, anchors.terms), part(anchors.terms, 2 * anchors.terms)};
}

// A product's row for each token of the shorter side: what chose it there, or what it chose, is added up before the
// product, which so has min(Nt, Nv) rows a pair and term instead of Nt and Nv.
template <class T>
int64_t slot_of(const Sides<T>& sides, int term, int64_t anchor, int64_t partner) {
  const bool by_video = sides.length(kVideo) <= sides.length(kText);
  return (term == kVideo) == by_video ? anchor : partner;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> product_rows(const Tensor& text, const Tensor& video, const Tensor& text_weight,
                                                const OptionalTensor& video_weight, const Tensor& video_index,
                                                const Tensor& text_index, const Tensor& channels, bool normalize) {
  const Sides<T> sides(text, video, std::nullopt, std::nullopt, normalize);
  const Anchors<T> anchors(sides, text_weight, video_weight, video_index, text_index);
  const ChannelTable<T> table(channels, 2, 2 * anchors.terms, sides.dim);
  const int64_t slots = std::min(sides.length(kText), sides.length(kVideo));
  Tensor weighted = zeros({anchors.terms, sides.pairs, slots, sides.dim}, scalar_type<T>, sizeof(T));
  Tensor partners = zeros({anchors.terms, sides.pairs, slots, sides.dim}, scalar_type<T>, sizeof(T));
  T* out[2] = {static_cast<T*>(weighted.mutable_data_ptr()), static_cast<T*>(partners.mutable_data_ptr())};
  std::vector<Sums<T>> runs(kRuns, Sums<T>(2 * anchors.terms, sides.width));
  std::vector<std::unique_ptr<PairRows<T>>> rows;
  for (int64_t run = 0; run < kRuns; run++) rows.push_back(std::make_unique<PairRows<T>>(sides));
  std::vector<std::vector<T>> scratch(kRuns, std::vector<T>(2 * sides.width));
  over_pairs(sides.pairs, work_of(sides), [&](int64_t run, int64_t pair) {
    T* const x_row = scratch[run].data();
    T* const y_row = x_row + sides.width;
    over_anchors(sides, anchors, *rows[run], pair, [&](int term, int64_t i, int64_t j, const T* x, const T* y, T weight) {
      const CdcrKernels<T>& k = cdcr_kernels<T>();
      const int64_t row = ((term * sides.pairs + pair) * slots + slot_of(sides, term, i, j)) * sides.dim;
      k.standardize(x, weight, table[role_of(term, false)], sides.width, false, x_row);
      k.standardize(y, T(1), table[role_of(term, true)], sides.width, false, y_row);
      T* sum_x = runs[run].row(role_of(term, false));
      T* sum_y = runs[run].row(role_of(term, true));
      for (int64_t d = 0; d < sides.dim; d++) {
        out[0][row + d] += x_row[d];
        out[1][row + d] = y_row[d];
        sum_x[d] += x_row[d];
        sum_y[d] += weight * y_row[d];
      }
      runs[run].added();
    });
  });
  return {weighted, partners, collect(runs, 2 * anchors.terms, sides.dim)};
}

// Gradients of one pair's tokens, and which of them have one.
template <class T>
class PairGradients {
 public:
  explicit PairGradients(const Sides<T>& sides)
      : sides_(sides), grad_((sides.length(kText) + sides.length(kVideo)) * sides.width) {}
  void start() { std::fill(grad_.begin(), grad_.end(), T(0)); }
  T* row(int s, int64_t position) { return grad_.data() + (s * sides_.length(kText) + position) * sides_.width; }

 private:
  const Sides<T>& sides_;
  std::vector<T> grad_;
};

// d loss / d C as the gradient reads it: the diagonal, or rows of C's full gradient times the product's rows.
template <class T>
class Pulls {
 public:
  Pulls(const Sides<T>& sides, int terms, const Tensor& anchors, const Tensor& partners)
      : sides_(sides), slots_(std::min(sides.length(kText), sides.length(kVideo))), full_(anchors.dim() == 4) {
    STD_TORCH_CHECK(anchors.scalar_type() == scalar_type<T> &&
                        (full_ ? has_sizes(anchors, {terms, sides.pairs, slots_, sides.dim}) &&
                                     has_sizes(partners, {terms, sides.pairs, slots_, sides.dim}) &&
                                     partners.scalar_type() == scalar_type<T>
                               : has_sizes(anchors, {sides.dim})),
                    "drl_fast::cdcr_gradient: pulls must be (D,), or twice (terms, B, min(Nt, Nv), D)");
    held_[0] = torch::stable::contiguous(anchors);
    held_[1] = torch::stable::contiguous(partners);
    for (int part = 0; part < 2; part++) data_[part] = static_cast<const T*>(held_[part].const_data_ptr());
    diagonal_.resize(sides.width);
    if (!full_) std::copy(data_[0], data_[0] + sides.dim, diagonal_.begin());
  }
  // Scratch: two rows. `fresh`: no anchor of this slot was here yet.
  Pull<T> of(int term, int64_t pair, int64_t slot, bool fresh, T* scratch) const {
    if (!full_) return {diagonal_.data(), nullptr, nullptr};
    const int64_t row = ((term * sides_.pairs + pair) * slots_ + slot) * sides_.dim;
    return {nullptr, whole(data_[0] + row, scratch), fresh ? whole(data_[1] + row, scratch + sides_.width) : nullptr};
  }

 private:
  // Kernels read whole vectors.
  const T* whole(const T* row, T* scratch) const {
    if (sides_.width == sides_.dim) return row;
    std::copy(row, row + sides_.dim, scratch);
    return scratch;
  }
  const Sides<T>& sides_;
  int64_t slots_;
  bool full_;
  Tensor held_[2];
  const T* data_[2];
  std::vector<T> diagonal_;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> gradient(const Tensor& text, const Tensor& video, const Tensor& text_weight,
                                                    const OptionalTensor& video_weight, const Tensor& video_index,
                                                    const Tensor& text_index, const Tensor& channels,
                                                    const Tensor& pull_anchors, const Tensor& pull_partners,
                                                    bool normalize) {
  const Sides<T> sides(text, video, std::nullopt, std::nullopt, normalize);
  const Anchors<T> anchors(sides, text_weight, video_weight, video_index, text_index);
  const ChannelTable<T> table(channels, 4, 2 * anchors.terms, sides.dim);
  const Pulls<T> pulls(sides, anchors.terms, pull_anchors, pull_partners);
  const int64_t size = size_of(sides.side[kText].tokens.dtype), lengths[2] = {sides.length(kText), sides.length(kVideo)};
  Tensor grad[2] = {zeros({sides.pairs, lengths[0], sides.dim}, text.scalar_type(), size),
                    zeros({sides.pairs, lengths[1], sides.dim}, text.scalar_type(), size)};
  Tensor grad_weight[2] = {zeros({sides.pairs, lengths[0]}, scalar_type<T>, sizeof(T)),
                           zeros({anchors.terms == 2 ? sides.pairs : 0, lengths[1]}, scalar_type<T>, sizeof(T))};
  std::vector<std::unique_ptr<PairRows<T>>> rows;
  std::vector<PairGradients<T>> gradients;
  for (int64_t run = 0; run < kRuns; run++) {
    rows.push_back(std::make_unique<PairRows<T>>(sides));
    gradients.emplace_back(sides);
  }
  std::vector<std::vector<T>> scratch(kRuns, std::vector<T>(2 * sides.width));
  std::vector<std::vector<uint8_t>> seen(kRuns, std::vector<uint8_t>(2 * std::min(lengths[0], lengths[1])));
  over_pairs(sides.pairs, 2 * work_of(sides), [&](int64_t run, int64_t pair) {
    gradients[run].start();
    std::fill(seen[run].begin(), seen[run].end(), 0);
    over_anchors(sides, anchors, *rows[run], pair, [&](int term, int64_t i, int64_t j, const T* x, const T* y, T weight) {
      const int64_t slot = slot_of(sides, term, i, j);
      uint8_t& was_here = seen[run][term * std::min(lengths[0], lengths[1]) + slot];
      const Pull<T> pull = pulls.of(term, pair, slot, !was_here, scratch[run].data());
      was_here = 1;
      static_cast<T*>(grad_weight[term].mutable_data_ptr())[pair * lengths[term] + i] =
          cdcr_kernels<T>().pull(x, y, weight, table[role_of(term, false)], table[role_of(term, true)], pull,
                                 sides.width, gradients[run].row(term, i), gradients[run].row(1 - term, j));
    });
    for (int s = 0; s < 2; s++)
      for (int64_t p = 0; p < lengths[s]; p++)
        if (rows[run]->loaded(s, p))
          row_kernels<T>().store_gradient(sides.side[s].tokens, gradients[run].row(s, p), rows[run]->row(s, p),
                                          rows[run]->inverse(s, p),
                                          static_cast<char*>(grad[s].mutable_data_ptr()) +
                                              (pair * lengths[s] + p) * sides.dim * size);
  });
  return {grad[0], grad[1], grad_weight[0], grad_weight[1]};
}

bool wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

std::tuple<Tensor, Tensor, Tensor, Tensor> cdcr_statistics(Tensor text, Tensor video, OptionalTensor text_mask,
                                                           OptionalTensor video_mask, bool normalize, bool both) {
  return (wide(text) ? statistics<double> : statistics<float>)(text, video, text_mask, video_mask, normalize, both);
}

std::tuple<Tensor, Tensor> cdcr_diagonal(Tensor text, Tensor video, Tensor text_weight, OptionalTensor video_weight,
                                         Tensor video_index, Tensor text_index, Tensor channels, bool normalize) {
  return (wide(text) ? diagonal<double> : diagonal<float>)(text, video, text_weight, video_weight, video_index,
                                                           text_index, channels, normalize);
}

std::tuple<Tensor, Tensor, Tensor> cdcr_rows(Tensor text, Tensor video, Tensor text_weight, OptionalTensor video_weight,
                                             Tensor video_index, Tensor text_index, Tensor channels, bool normalize) {
  return (wide(text) ? product_rows<double> : product_rows<float>)(text, video, text_weight, video_weight, video_index,
                                                                   text_index, channels, normalize);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cdcr_gradient(Tensor text, Tensor video, Tensor text_weight,
                                                         OptionalTensor video_weight, Tensor video_index,
                                                         Tensor text_index, Tensor channels, Tensor pull_anchors,
                                                         Tensor pull_partners, bool normalize) {
  return (wide(text) ? gradient<double> : gradient<float>)(text, video, text_weight, video_weight, video_index,
                                                           text_index, channels, pull_anchors, pull_partners, normalize);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(drl_fast, CPU, m) {
  m.impl("cdcr_statistics", TORCH_BOX(&cdcr_statistics));
  m.impl("cdcr_diagonal", TORCH_BOX(&cdcr_diagonal));
  m.impl("cdcr_rows", TORCH_BOX(&cdcr_rows));
  m.impl("cdcr_gradient", TORCH_BOX(&cdcr_gradient));
}

}  // namespace drl_fast
