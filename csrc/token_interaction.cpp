// Operators drl_fast::token_interaction and its backward on the CPU: pack real tokens, plan blocks, run tasks on
// threads. The mathematics is in token_interaction_forward.h and token_interaction_backward.h.
#include "token_interaction.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "capability.h"
#include "parallel.h"
#include "prepared.h"
#include "sides.h"
#include "tensors.h"

namespace drl_fast {
namespace {

// Bytes of source rows and of target gradients that the backward works on at a time; both together fit L2.
constexpr int64_t kChunkBytes = 512 << 10;
constexpr int64_t kBlockBytes = 256 << 10;

// One side's matches as the kernels see them. `items_first`: the tensor is (item, position, other item), otherwise
// (other item, position, item).
Matches view(const Tensor& index, bool items_first) {
  if (index.numel() == 0) return {};
  return {
      .data = index.mutable_data_ptr(),
      .wide = index.scalar_type() == ScalarType::Short,
      .stride_item = index.stride(items_first ? 0 : 2),
      .stride_position = index.stride(1),
      .stride_other = index.stride(items_first ? 2 : 0),
  };
}

// Run one side's rows against the other side's groups of `steps` tokens, whose panels are laid out.
template <class T>
void run_forward(const Side<T>& rows, const std::vector<Group<T>>& lanes, int64_t steps, ForwardJob<T> job) {
  const Kernels<T>& k = chosen_kernels<T>();
  if (lanes.empty() || rows.count() == 0) return;
  // Small blocks give enough tasks to keep every thread busy; large ones reuse a panel from cache.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t groups = static_cast<int64_t>(lanes.size());
  const int64_t rows_wanted = std::clamp<int64_t>(rows.count() * groups / (8 * threads), 64, 256);
  int64_t max_rows = 0, max_items = 1;
  const std::vector<int64_t> block = cut(rows.tokens, rows_wanted, &max_rows);
  for (size_t b = 0; b + 1 < block.size(); b++) max_items = std::max(max_items, block[b + 1] - block[b]);
  job.rows = rows.tokens;
  job.groups = lanes.data();
  job.group_count = groups;
  job.block = block.data();
  const int64_t blocks = static_cast<int64_t>(block.size()) - 1;
  const int64_t width = 2 * static_cast<int64_t>(k.vector), dim = padded(rows.tokens.dim);
  // If there are blocks enough, a thread takes one block with all groups, and so loads its rows only once.
  const int64_t at_once = blocks >= 8 * threads ? groups : 1;
  const int64_t claims = blocks * groups / at_once;
  const int64_t workers = threads_for(claims, rows.count() * steps * dim);
  // A tile of few rows needs one row more, to load the tokens.
  const int64_t held_rows = std::max<int64_t>(max_rows, kFewRows + 1);
  Buffer<T> rows_buffer(workers * held_rows * dim), similarity(workers * held_rows * width);
  Buffer<T> best(workers * max_rows * width), lane_sum(workers * max_items * width);
  Buffer<IntOf<T>> best_slot(workers * max_rows * width);
  std::vector<ForwardScratch<T>> scratch;
  scratch.reserve(workers);
  for (int64_t w = 0; w < workers; w++)
    scratch.push_back({
        .rows = rows_buffer.get() + w * held_rows * dim,
        .similarity = similarity.get() + w * held_rows * width,
        .best = best.get() + w * max_rows * width,
        .best_slot = best_slot.get() + w * max_rows * width,
        .lane_sum = lane_sum.get() + w * max_items * width,
        .loaded_block = -1,
    });
  parallel(claims, workers, [&](int64_t claim, int64_t worker) {
    for (int64_t task = claim * at_once; task < (claim + 1) * at_once; task++) k.forward(job, task, scratch[worker]);
  });
}

// Dtype of matches, by the length of the rows that they index into.
ScalarType index_type(int64_t indexed) { return indexed <= 255 ? ScalarType::Byte : ScalarType::Short; }

void check_index(const Tensor& index, std::initializer_list<int64_t> sizes, int64_t indexed) {
  STD_TORCH_CHECK(
      has_sizes(index, sizes) && index.scalar_type() == index_type(indexed),
      "drl_fast::token_interaction_backward: matches must be those that the forward kept; the CPU kernel does "
      "not recompute them, so call the forward with keep_matches=True");
}

// Matches in which no token has chosen one yet; without elements if they are not kept.
Tensor no_matches(bool keep, const std::vector<int64_t>& sizes, int64_t indexed) {
  // All bits set means "none chosen" in both dtypes: 255 in uint8, -1 in int16.
  return filled(keep ? sizes : std::vector<int64_t>{0}, index_type(indexed), 0xff);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& text, const Tensor& video, const Tensor& text_weight,
                                           const OptionalTensor& video_weight, const OptionalTensor& text_mask,
                                           const OptionalTensor& video_mask, bool normalize, bool zero_competes,
                                           bool keep_matches) {
  const bool both = video_weight.has_value();
  const int64_t a = text.size(0), b = video.size(0);
  Side<T> t(text, text_weight, text_mask, normalize, zero_competes);
  Side<T> v(video, video_weight, video_mask, normalize, zero_competes);
  check_pair(text, video);
  Tensor logits = zeros({a, b}, scalar_type<T>);
  Tensor video_index = no_matches(keep_matches, {a, text.size(1), b}, video.size(1));
  Tensor text_index = no_matches(keep_matches && both, {a, video.size(1), b}, text.size(1));

  ForwardJob<T> job = {};
  job.scale = both ? T(0.5) : T(1);
  job.logits = data_of<T>(logits);
  job.storage = dtype_of_arithmetic<T>;
  const Kernels<T>& k = chosen_kernels<T>();
  const int vector = k.vector;
  Lanes<T> video_lanes(v.tokens, vector), text_lanes(t.tokens, vector);
  if (text_goes_in_rows(t, v, text_lanes, video_lanes)) {
    job.logits_stride_row = b;
    job.logits_stride_lane = 1;
    job.row_matches = view(video_index, true);
    job.lane_matches = view(text_index, false);
    job.lanes = v.tokens;
    if (t.count() > 0) video_lanes.pack(k);
    run_forward(t, video_lanes.groups, video_lanes.steps, job);
  } else {
    job.logits_stride_row = 1;
    job.logits_stride_lane = b;
    job.row_matches = view(text_index, false);
    job.lane_matches = view(video_index, true);
    job.lanes = t.tokens;
    if (v.count() > 0) text_lanes.pack(k);
    run_forward(v, text_lanes.groups, text_lanes.steps, job);
  }
  return {logits, video_index, text_index};
}

// The forward against prepared videos first..last - 1 of `frames` padded tokens. The text is always in rows.
template <class T>
std::tuple<Tensor, Tensor, Tensor> prepared_forward(const Tensor& text, const Tensor& text_weight,
                                                    const OptionalTensor& text_mask, const std::vector<Tensor>& parts,
                                                    int64_t first, int64_t last, int64_t frames, bool normalize,
                                                    bool zero_competes, bool both, bool keep_matches) {
  const int64_t a = text.size(0), b = last - first;
  Side<T> t(text, text_weight, text_mask, normalize, zero_competes);
  PreparedLanes<T> v(parts, text.size(2), first, last, zero_competes, chosen_kernels<T>().vector);
  if (keep_matches) v.check_positions(frames);
  if (both) v.sum_lanes(parts);
  Tensor logits = zeros({a, b}, scalar_type<T>);
  Tensor video_index = no_matches(keep_matches, {a, text.size(1), b}, frames);
  Tensor text_index = no_matches(keep_matches && both, {a, frames, b}, text.size(1));
  ForwardJob<T> job = {};
  job.lanes = v.tokens;
  job.storage = v.storage;
  job.scale = both ? T(0.5) : T(1);
  job.logits = data_of<T>(logits);
  job.logits_stride_row = b;
  job.logits_stride_lane = 1;
  job.row_matches = view(video_index, true);
  job.lane_matches = view(text_index, false);
  run_forward(t, v.groups, v.steps, job);
  return {logits, video_index, text_index};
}

// A source's rows for the gather. Features that are already whole vectors of T are read in place, and the gather's
// coefficients apply the normalization; others are copied and normalized.
template <class T>
class SourceRows {
 public:
  explicit SourceRows(const Side<T>& side) : row_(side.count()), scale_(side.count()) {
    const Tokens<T>& tokens = side.tokens;
    const int64_t width = padded(tokens.dim), count = side.count();
    const bool in_place = tokens.dtype == dtype_of_arithmetic<T> && width == tokens.dim;
    if (!in_place) copy_ = std::make_unique<Buffer<T>>(count * width);
    constexpr int64_t kRowsAtOnce = 64;
    const int64_t tasks = (count + kRowsAtOnce - 1) / kRowsAtOnce, threads = threads_for(tasks, 4 * count * width);
    Buffer<T> unused(threads * width);
    parallel(tasks, threads, [&](int64_t task, int64_t thread) {
      for (int64_t r = task * kRowsAtOnce; r < std::min(count, (task + 1) * kRowsAtOnce); r++) {
        T* out = in_place ? unused.get() + thread * width : copy_->get() + r * width;
        // A row that is read in place is loaded for its norm only.
        if (!in_place || tokens.normalize) chosen_kernels<T>().load_row(tokens, r, out, &scale_[r]);
        row_[r] = in_place ? reinterpret_cast<const T*>(tokens.row[r]) : out;
      }
    });
    if (!in_place || !tokens.normalize) scale_.clear();
  }
  const T* const* row() const { return row_.data(); }
  // Factors that are still to be applied to the rows; null: 1.
  const T* scale() const { return scale_.empty() ? nullptr : scale_.data(); }

 private:
  std::vector<const T*> row_;
  std::vector<T> scale_;
  std::unique_ptr<Buffer<T>> copy_;
};

// Gradients of one side's features, empty if they are not wanted, and weights.
template <class T>
std::tuple<Tensor, Tensor> gradient(const Tensor& features, const Side<T>& target, const Side<T>& source,
                                    const Tensor& grad_logits, const Matches& target_matches,
                                    const Matches& source_matches, bool text_side, bool wants_features) {
  const int64_t items = features.size(0), length = features.size(1), width = padded(target.tokens.dim);
  const std::vector<int64_t> sizes = {items, length, features.size(2)};
  Tensor grad = empty(wants_features ? sizes : std::vector<int64_t>{0}, features.scalar_type());
  Tensor grad_weight = empty({items, length}, scalar_type<T>);
  const SourceRows<T> source_rows(source);

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t row_bytes = std::max<int64_t>(1, width) * static_cast<int64_t>(sizeof(T));
  const int64_t chunk_rows = std::max<int64_t>(1, kChunkBytes / row_bytes);
  const int64_t block_limit = std::max<int64_t>(17, kBlockBytes / row_bytes);
  const int64_t block_rows = std::clamp<int64_t>(target.count() / (4 * threads), 16, block_limit);
  int64_t max_rows = 0, max_chunk = 0;
  const std::vector<int64_t> block = cut(target.tokens, block_rows, &max_rows);
  const std::vector<int64_t> chunk = cut(source.tokens, chunk_rows, &max_chunk);
  int64_t max_items = 1;
  for (size_t c = 0; c + 1 < chunk.size(); c++) max_items = std::max(max_items, chunk[c + 1] - chunk[c]);

  BackwardJob<T> job = {};
  job.target = target.tokens;
  job.source = source.tokens;
  job.source_row = source_rows.row();
  job.source_scale = source_rows.scale();
  job.block = block.data();
  job.chunk = chunk.data();
  job.chunk_count = static_cast<int64_t>(chunk.size()) - 1;
  job.scale = target.tokens.weight && source.tokens.weight ? T(0.5) : T(1);
  job.grad_logits = const_data_of<T>(grad_logits);
  job.grad_stride_target = grad_logits.stride(text_side ? 0 : 1);
  job.grad_stride_source = grad_logits.stride(text_side ? 1 : 0);
  job.target_matches = target_matches;
  job.source_matches = source_matches;
  job.grad_features = wants_features ? data_of<char>(grad) : nullptr;
  job.grad_weight = data_of<T>(grad_weight);

  const int64_t tasks = static_cast<int64_t>(block.size()) - 1;
  const int64_t pairs = target.count() * source.tokens.items + source.count() * target.tokens.items;
  const int64_t workers = threads_for(tasks, pairs * width);
  Buffer<T> gradients(workers * max_rows * width), rows(workers * max_rows * width);
  Buffer<T> weights(workers * max_rows), norms(workers * max_rows), logits(workers * max_items);
  Buffer<const T*> own_row(workers * max_items), other_row(workers * max_chunk);
  Buffer<T> own(workers * max_items), other(workers * max_chunk);
  Buffer<int32_t> begin(workers * (length + 1)), chooser_of(workers * max_chunk);
  std::vector<BackwardScratch<T>> scratch;
  scratch.reserve(workers);
  for (int64_t w = 0; w < workers; w++)
    scratch.push_back({
        .grad = gradients.get() + w * max_rows * width,
        .grad_weight = weights.get() + w * max_rows,
        .row = rows.get() + w * max_rows * width,
        .inverse_norm = norms.get() + w * max_rows,
        .grad_logit = logits.get() + w * max_items,
        .own_row = own_row.get() + w * max_items,
        .own_coefficient = own.get() + w * max_items,
        .begin = begin.get() + w * (length + 1),
        .other_row = other_row.get() + w * max_chunk,
        .other_coefficient = other.get() + w * max_chunk,
        .chooser_of = chooser_of.get() + w * max_chunk,
        .stale_match = false,
    });
  parallel(tasks, workers,
           [&](int64_t task, int64_t worker) { chosen_kernels<T>().backward(job, task, scratch[worker]); });
  const bool stale = std::ranges::any_of(scratch, &BackwardScratch<T>::stale_match);
  STD_TORCH_CHECK(!stale,
                  "drl_fast::token_interaction_backward: a match names a token that is masked or beyond its row: the "
                  "masks or matches have changed since the forward; pass copies of them, such as mask.clone()");
  return {grad, grad_weight};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_logits, const Tensor& text, const Tensor& video,
                                                    const Tensor& text_weight, const OptionalTensor& video_weight,
                                                    const OptionalTensor& text_mask, const OptionalTensor& video_mask,
                                                    const Tensor& video_index, const Tensor& text_index, bool normalize,
                                                    const std::vector<bool>& output_mask) {
  Side<T> t(text, text_weight, text_mask, normalize, false);
  Side<T> v(video, video_weight, video_mask, normalize, false);
  check_pair(text, video);
  const int64_t a = text.size(0), b = video.size(0);
  STD_TORCH_CHECK(grad_logits.scalar_type() == scalar_type<T> && has_sizes(grad_logits, {a, b}),
                  "drl_fast::token_interaction_backward: grad_logits must be (A, B), in the logits' dtype");
  check_index(video_index, {a, text.size(1), b}, video.size(1));
  if (video_weight) check_index(text_index, {a, video.size(1), b}, text.size(1));
  STD_TORCH_CHECK(output_mask.size() == 4, "drl_fast::token_interaction_backward: output_mask must be four bools");
  std::vector<Tensor> grads;
  grads.reserve(4);
  for (int i = 0; i < 4; i++) grads.push_back(empty({0}, i < 2 ? text.scalar_type() : scalar_type<T>));
  const Matches chosen_frames = view(video_index, true), chosen_words = view(text_index, false);
  // The gather of features' gradients gives those of the weights as well. Skip a side if neither is wanted.
  for (int side : {0, 1}) {
    const bool wants_features = output_mask[side], wants_weight = output_mask[side + 2] && (side == 0 || video_weight);
    if (!wants_features && !wants_weight) continue;
    auto [grad, grad_weight] =
        side == 0 ? gradient(text, t, v, grad_logits, chosen_frames, chosen_words, true, wants_features)
                  : gradient(video, v, t, grad_logits, chosen_words, chosen_frames, false, wants_features);
    if (wants_features) grads[side] = grad;
    if (wants_weight) grads[side + 2] = grad_weight;
  }
  return {grads[0], grads[1], grads[2], grads[3]};
}

// Maxima and packed form are empty: the backward finds the weights' gradients while it gathers the features'.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_interaction(Tensor text, Tensor video, Tensor text_weight,
                                                                     OptionalTensor video_weight,
                                                                     OptionalTensor text_mask,
                                                                     OptionalTensor video_mask, bool normalize,
                                                                     bool zero_competes, bool keep_matches, bool) {
  const auto run = computes_in_double(text) ? forward<double> : forward<float>;
  auto [logits, video_index, text_index] =
      run(text, video, text_weight, video_weight, text_mask, video_mask, normalize, zero_competes, keep_matches);
  return {logits, video_index, text_index, empty({0}, ScalarType::Float), empty({0}, text.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> prepared_token_interaction(Tensor text, Tensor text_weight, OptionalTensor text_mask,
                                                              std::vector<Tensor> parts, int64_t first, int64_t last,
                                                              int64_t frames, bool normalize, bool zero_competes,
                                                              bool both, bool keep_matches) {
  const auto run = computes_in_double(text) ? prepared_forward<double> : prepared_forward<float>;
  return run(text, text_weight, text_mask, parts, first, last, frames, normalize, zero_competes, both, keep_matches);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_interaction_backward(Tensor grad_logits, Tensor text, Tensor video,
                                                                      Tensor text_weight, OptionalTensor video_weight,
                                                                      OptionalTensor text_mask,
                                                                      OptionalTensor video_mask, Tensor video_index,
                                                                      Tensor text_index, Tensor, Tensor, bool normalize,
                                                                      bool, std::vector<bool> output_mask) {
  const auto run = computes_in_double(text) ? backward<double> : backward<float>;
  return run(grad_logits, text, video, text_weight, video_weight, text_mask, video_mask, video_index, text_index,
             normalize, output_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(drl_fast, CPU, m) {
  m.impl("token_interaction", TORCH_BOX(&token_interaction));
  m.impl("token_interaction_backward", TORCH_BOX(&token_interaction_backward));
  m.impl("prepared_token_interaction", TORCH_BOX(&prepared_token_interaction));
}

}  // namespace drl_fast
