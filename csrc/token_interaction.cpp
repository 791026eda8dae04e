// Operator drl_fast::token_interaction on the CPU: packs real tokens, plans blocks, hands tasks to threads.
// The mathematics and the tile picture are in token_interaction_kernel.h.
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "capability.h"
#include "sides.h"

namespace drl_fast {
namespace {

Tensor make(std::vector<int64_t> size, ScalarType dtype) { return torch::stable::empty(size, dtype); }

// Bytes of source rows and of target gradients that the backward works on at a time.
constexpr int64_t kChunkBytes = 512 << 10, kBlockBytes = 256 << 10;

// Matches of one side as the kernels see it: `other_last` when the tensor is (item, position, other).
Matches view(const Tensor& index, bool other_last) {
  if (index.numel() == 0) return {nullptr, false, 0, 0, 0};
  const bool wide = index.scalar_type() == ScalarType::Short;
  if (other_last) return {index.mutable_data_ptr(), wide, index.stride(0), index.stride(1), index.stride(2)};
  return {index.mutable_data_ptr(), wide, index.stride(2), index.stride(1), index.stride(0)};
}

template <class T>
void run_forward(const Side<T>& rows, const Side<T>& lanes_side, Lanes<T>& lanes, ForwardJob<T> job) {
  const Kernels<T>& k = chosen_kernels<T>();
  if (lanes.groups.empty() || rows.count() == 0) return;
  lanes.pack(k);
  // Enough tasks to keep every thread busy to the end, blocks long enough to reuse a panel from cache.
  const int64_t threads = torch::stable::get_num_threads(), groups = static_cast<int64_t>(lanes.groups.size());
  const int64_t rows_wanted = std::clamp<int64_t>(rows.count() * groups / (8 * threads), 64, 256);
  int64_t max_rows = 0, max_items = 1;
  const std::vector<int64_t> block = cut(rows.tokens, rows_wanted, &max_rows);
  for (size_t b = 0; b + 1 < block.size(); b++) max_items = std::max(max_items, block[b + 1] - block[b]);
  job.rows = rows.tokens;
  job.lanes = lanes_side.tokens;
  job.groups = lanes.groups.data();
  job.group_count = groups;
  job.block = block.data();
  const int64_t blocks = static_cast<int64_t>(block.size()) - 1;
  const int64_t width = 2 * k.vector, dim = padded(rows.tokens.dim);
  // With blocks to spare a thread takes one with all its groups, and loads its rows once.
  const int64_t at_once = blocks >= 8 * threads ? groups : 1, claims = blocks * groups / at_once;
  const int64_t workers = threads_for(claims, rows.count() * lanes.steps * dim);
  Buffer<T> rows_buffer(workers * max_rows * dim), similarity(workers * max_rows * width);
  Buffer<T> best(workers * max_rows * width), sum(workers * max_items * width);
  Buffer<IntOf<T>> slot(workers * max_rows * width);
  std::vector<ForwardScratch<T>> scratch;
  for (int64_t w = 0; w < workers; w++)
    scratch.push_back({rows_buffer.get() + w * max_rows * dim, similarity.get() + w * max_rows * width,
                       best.get() + w * max_rows * width, slot.get() + w * max_rows * width,
                       sum.get() + w * max_items * width, -1});
  parallel(claims, workers, [&](int64_t claim, int64_t worker) {
    for (int64_t task = claim * at_once; task < (claim + 1) * at_once; task++) k.forward(job, task, scratch[worker]);
  });
}

void check_pair(const Tensor& text, const Tensor& video) {
  STD_TORCH_CHECK(text.size(2) == video.size(2) && text.scalar_type() == video.scalar_type(),
                  "drl_fast::token_interaction: text and video must have one D and one dtype");
}

// Matches' dtype, by the length of the rows that they index.
ScalarType index_type(int64_t indexed) { return indexed <= 255 ? ScalarType::Byte : ScalarType::Short; }

void check_index(const Tensor& index, std::initializer_list<int64_t> sizes, int64_t indexed) {
  STD_TORCH_CHECK(has_sizes(index, sizes) && index.scalar_type() == index_type(indexed),
                  "drl_fast::token_interaction_backward: matches must be those that the forward kept; on the CPU it "
                  "finds none again, so call the forward with keep_matches=True");
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
  Tensor logits = make({a, b}, scalar_type<T>);
  auto matches = [](bool keep, int64_t items, int64_t length, int64_t others, int64_t indexed) {
    Tensor index =
        make(keep ? std::vector<int64_t>{items, length, others} : std::vector<int64_t>{0}, index_type(indexed));
    // All bits set is "none chosen" in uint8 and int16 alike.
    std::memset(index.mutable_data_ptr(), 0xff, index.numel() * (indexed <= 255 ? 1 : 2));
    return index;
  };
  Tensor video_index = matches(keep_matches, a, text.size(1), b, video.size(1));
  Tensor text_index = matches(keep_matches && both, a, video.size(1), b, text.size(1));
  T* scores = static_cast<T*>(logits.mutable_data_ptr());
  std::memset(scores, 0, logits.numel() * sizeof(T));

  ForwardJob<T> job = {};
  job.scale = both ? T(0.5) : T(1);
  job.logits = scores;
  const int vector = chosen_kernels<T>().vector;
  Lanes<T> video_lanes(v.tokens, vector), text_lanes(t.tokens, vector);
  // Few videos leave lanes empty, many lengths leave slots empty: put the side in lanes that wastes less.
  if (t.count() * video_lanes.steps <= v.count() * text_lanes.steps * 1.1) {
    job.logits_stride_row = b, job.logits_stride_lane = 1;
    job.row_matches = view(video_index, true), job.lane_matches = view(text_index, false);
    run_forward(t, v, video_lanes, job);
  } else {
    job.logits_stride_row = 1, job.logits_stride_lane = b;
    job.row_matches = view(text_index, false), job.lane_matches = view(video_index, true);
    run_forward(v, t, text_lanes, job);
  }
  return {logits, video_index, text_index};
}

// A source's rows for the gather: as they lie where they are whole vectors of T, with the normalisation left to the
// coefficients; else a normalised copy.
template <class T>
class SourceRows {
 public:
  explicit SourceRows(const Side<T>& side) : row_(side.count()), scale_(side.count()) {
    const Tokens<T>& tokens = side.tokens;
    const int64_t width = padded(tokens.dim), count = side.count();
    const bool in_place = size_of(tokens.dtype) == sizeof(T) && width == tokens.dim;
    if (!in_place) copy_ = std::make_unique<Buffer<T>>(count * width);
    constexpr int64_t kRowsAtOnce = 64;
    const int64_t tasks = (count + kRowsAtOnce - 1) / kRowsAtOnce, threads = threads_for(tasks, 4 * count * width);
    Buffer<T> unused(threads * width);
    parallel(tasks, threads, [&](int64_t task, int64_t thread) {
      for (int64_t r = task * kRowsAtOnce; r < std::min(count, (task + 1) * kRowsAtOnce); r++) {
        T* out = in_place ? unused.get() + thread * width : copy_->get() + r * width;
        // In place a row is loaded for its norm alone.
        if (!in_place || tokens.normalize) chosen_kernels<T>().load_row(tokens, r, out, &scale_[r]);
        row_[r] = in_place ? reinterpret_cast<const T*>(tokens.row[r]) : out;
      }
    });
    scale = in_place && tokens.normalize ? scale_.data() : nullptr;
  }
  const T* const* row() const { return row_.data(); }
  const T* scale;

 private:
  std::vector<const T*> row_;
  std::vector<T> scale_;
  std::unique_ptr<Buffer<T>> copy_;
};

// Gradients of one side's features and weights.
template <class T>
std::tuple<Tensor, Tensor> gradient(const Tensor& features, const Side<T>& target, const Side<T>& source,
                                    const Tensor& grad_logits, const Matches& target_matches,
                                    const Matches& source_matches, bool text_side) {
  const int64_t items = features.size(0), length = features.size(1), width = padded(target.tokens.dim);
  Tensor grad = make({items, length, features.size(2)}, features.scalar_type());
  Tensor grad_weight = make({items, length}, scalar_type<T>);
  const SourceRows<T> source_rows(source);

  // A chunk of source rows and a block of target gradients share a core's L2.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunk_rows = std::max<int64_t>(1, kChunkBytes / (width * sizeof(T)));
  const int64_t block_limit = std::max<int64_t>(17, kBlockBytes / (width * sizeof(T)));
  const int64_t block_rows = std::clamp<int64_t>(target.count() / (4 * threads), 16, block_limit);
  int64_t max_rows = 0, max_chunk = 0;
  const std::vector<int64_t> block = cut(target.tokens, block_rows, &max_rows);
  const std::vector<int64_t> chunk = cut(source.tokens, chunk_rows, &max_chunk);
  int64_t max_items = 1;
  for (size_t c = 0; c + 1 < chunk.size(); c++) max_items = std::max(max_items, chunk[c + 1] - chunk[c]);

  BackwardJob<T> job = {};
  job.target = target.tokens, job.source = source.tokens;
  job.source_row = source_rows.row(), job.source_scale = source_rows.scale;
  job.block = block.data(), job.chunk = chunk.data();
  job.chunk_count = static_cast<int64_t>(chunk.size()) - 1;
  job.scale = target.tokens.weight && source.tokens.weight ? T(0.5) : T(1);
  job.grad_logits = static_cast<const T*>(grad_logits.const_data_ptr());
  job.grad_stride_target = grad_logits.stride(text_side ? 0 : 1);
  job.grad_stride_source = grad_logits.stride(text_side ? 1 : 0);
  job.target_matches = target_matches, job.source_matches = source_matches;
  job.grad_features = static_cast<char*>(grad.mutable_data_ptr());
  job.grad_weight = static_cast<T*>(grad_weight.mutable_data_ptr());

  const int64_t tasks = static_cast<int64_t>(block.size()) - 1;
  const int64_t pairs = target.count() * source.tokens.items + source.count() * target.tokens.items;
  const int64_t workers = threads_for(tasks, pairs * width);
  Buffer<T> gradients(workers * max_rows * width), rows(workers * max_rows * width);
  Buffer<T> weights(workers * max_rows), norms(workers * max_rows), logits(workers * max_items);
  Buffer<const T*> own_row(workers * max_items), other_row(workers * max_chunk);
  Buffer<T> own(workers * max_items), other(workers * max_chunk);
  Buffer<int32_t> begin(workers * (length + 1)), chooser_of(workers * max_chunk);
  std::vector<BackwardScratch<T>> scratch;
  for (int64_t w = 0; w < workers; w++)
    scratch.push_back({gradients.get() + w * max_rows * width, weights.get() + w * max_rows,
                       rows.get() + w * max_rows * width, norms.get() + w * max_rows, logits.get() + w * max_items,
                       own_row.get() + w * max_items, own.get() + w * max_items, begin.get() + w * (length + 1),
                       other_row.get() + w * max_chunk, other.get() + w * max_chunk,
                       chooser_of.get() + w * max_chunk});
  parallel(tasks, workers, [&](int64_t task, int64_t worker) {
    chosen_kernels<T>().backward(job, task, scratch[worker]);
  });
  return {grad, grad_weight};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_logits, const Tensor& text, const Tensor& video, const Tensor& text_weight,
    const OptionalTensor& video_weight, const OptionalTensor& text_mask, const OptionalTensor& video_mask,
    const Tensor& video_index, const Tensor& text_index, bool normalize, const std::vector<bool>& output_mask) {
  Side<T> t(text, text_weight, text_mask, normalize, false);
  Side<T> v(video, video_weight, video_mask, normalize, false);
  check_pair(text, video);
  const int64_t a = text.size(0), b = video.size(0);
  STD_TORCH_CHECK(grad_logits.scalar_type() == scalar_type<T> && has_sizes(grad_logits, {a, b}),
                  "drl_fast::token_interaction_backward: grad_logits must be (A, B), of the logits' dtype");
  check_index(video_index, {a, text.size(1), b}, video.size(1));
  if (video_weight) check_index(text_index, {a, video.size(1), b}, text.size(1));
  STD_TORCH_CHECK(output_mask.size() == 4, "drl_fast::token_interaction_backward: output_mask must be four bools");
  std::vector<Tensor> grads;
  for (int i = 0; i < 4; i++) grads.push_back(make({0}, i < 2 ? text.scalar_type() : scalar_type<T>));
  const Matches chosen_frames = view(video_index, true), chosen_words = view(text_index, false);
  // One gather gives both gradients of a side: it is saved where neither is wanted.
  for (int side : {0, 1}) {
    if (!output_mask[side] && !output_mask[side + 2]) continue;
    auto [grad, grad_weight] = side == 0
                                   ? gradient(text, t, v, grad_logits, chosen_frames, chosen_words, true)
                                   : gradient(video, v, t, grad_logits, chosen_words, chosen_frames, false);
    if (output_mask[side]) grads[side] = grad;
    if (output_mask[side + 2] && (side == 0 || video_weight)) grads[side + 2] = grad_weight;
  }
  return {grads[0], grads[1], grads[2], grads[3]};
}

std::tuple<Tensor, Tensor, Tensor> token_interaction(Tensor text, Tensor video, Tensor text_weight,
                                                     OptionalTensor video_weight, OptionalTensor text_mask,
                                                     OptionalTensor video_mask, bool normalize, bool zero_competes,
                                                     bool keep_matches) {
  auto run = text.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return run(text, video, text_weight, video_weight, text_mask, video_mask, normalize, zero_competes, keep_matches);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_interaction_backward(
    Tensor grad_logits, Tensor text, Tensor video, Tensor text_weight, OptionalTensor video_weight,
    OptionalTensor text_mask, OptionalTensor video_mask, Tensor video_index, Tensor text_index, bool normalize,
    bool, std::vector<bool> output_mask) {
  auto run = text.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad_logits, text, video, text_weight, video_weight, text_mask, video_mask, video_index, text_index,
             normalize, output_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(drl_fast, CPU, m) {
  m.impl("token_interaction", TORCH_BOX(&token_interaction));
  m.impl("token_interaction_backward", TORCH_BOX(&token_interaction_backward));
}

}  // namespace drl_fast
