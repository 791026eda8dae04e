// Operators drl_fast::soft_token_interaction and its backward on the CPU. The mathematics is in
// soft_token_interaction.h.
//
// The backward works on superblocks of d loss / d S: rows x columns that fit the last-level cache. For each it computes
// S again, turns it into d loss / d S, and adds both products with it to the gradients. Superblocks depend on the
// shapes alone and are added in order, so bits do not depend on the threads.
#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "capability.h"
#include "parallel.h"
#include "prepared.h"
#include "sides.h"
#include "tensors.h"
#include "token_interaction.h"

namespace drl_fast {
namespace {

// Rows of one task, whose similarities with a group stay in L2.
constexpr int64_t kTaskRows = 64;
// Rows and columns of a superblock.
constexpr int64_t kSuperblock = 1024;

struct Options {
  bool normalize, zero_competes, logsumexp;
  double temperature;
};

// One side in blocks of rows, the other in groups of lanes that are laid out.
template <class T>
struct Plan {
  Plan(const Tokens<T>& rows, const Tokens<T>& lanes, std::vector<Group<T>> of_lanes, int64_t steps_of_lanes,
       bool both_directions, const Options& options)
      : groups(std::move(of_lanes)), steps(steps_of_lanes) {
    STD_TORCH_CHECK(options.temperature > 0,
                    "drl_fast::soft_token_interaction: temperature must be positive; divide by a number above 0");
    job.rows = rows;
    job.lanes = lanes;
    job.scale = both_directions ? T(0.5) : T(1);
    job.temperature = static_cast<T>(options.temperature);
    job.logsumexp = options.logsumexp;
    for (const Group<T>& group : groups) most_columns = std::max(most_columns, columns_of(group));
    block = cut(job.rows, kTaskRows, &most_rows);
  }

  static int64_t columns_of(const Group<T>& group) { return static_cast<int64_t>(group.slots) * group.width; }
  int64_t row_count() const { return job.rows.start[job.rows.items]; }
  bool empty() const { return groups.empty() || row_count() == 0; }

  std::vector<Group<T>> groups;
  int64_t steps;
  Dtype storage = dtype_of_arithmetic<T>;  // of the groups' panels
  SoftJob<T> job = {};
  std::vector<int64_t> block;  // [blocks + 1] first row item
  int64_t most_rows = 1, most_columns = 1;
};

// Both sides, the one in lanes laid out.
template <class T>
struct Layout {
  Layout(const Tensor& text, const Tensor& video, const Tensor& text_weight, const OptionalTensor& video_weight,
         const OptionalTensor& text_mask, const OptionalTensor& video_mask, const Options& options)
      : text_side(text, text_weight, text_mask, options.normalize, options.zero_competes),
        video_side(video, video_weight, video_mask, options.normalize, options.zero_competes) {
    check_pair(text, video);
    const int vector = chosen_kernels<T>().vector;
    auto video_lanes = std::make_unique<Lanes<T>>(video_side.tokens, vector);
    auto text_lanes = std::make_unique<Lanes<T>>(text_side.tokens, vector);
    text_in_rows = text_goes_in_rows(text_side, video_side, *text_lanes, *video_lanes);
    lanes = std::move(text_in_rows ? video_lanes : text_lanes);
    lanes->pack(chosen_kernels<T>());
    const Tokens<T>&t = text_side.tokens, &v = video_side.tokens;
    plan = std::make_unique<Plan<T>>(text_in_rows ? t : v, text_in_rows ? v : t, lanes->groups, lanes->steps,
                                     video_weight.has_value(), options);
  }
  Layout(const Layout&) = delete;

  Side<T> text_side, video_side;
  bool text_in_rows;
  std::unique_ptr<Lanes<T>> lanes;
  std::unique_ptr<Plan<T>> plan;
};

// The scratch memory of all threads.
template <class T>
class Scratch {
 public:
  Scratch(const Plan<T>& plan, int64_t threads, bool backward)
      : rows_(plan.most_rows),
        columns_(plan.most_columns),
        width_(2 * static_cast<int64_t>(chosen_kernels<T>().vector)),
        value_(threads * rows_ * width_),
        factor_(backward ? threads * rows_ * width_ : 0),
        matrix_(threads * rows_ * columns_),
        column_(backward ? threads * rows_ * width_ : 0) {}

  SoftBlock<T> block(int64_t thread) const {
    return {
        .row_value = value_.get() + thread * rows_ * width_,
        .row_factor = factor_.get() + thread * rows_ * width_,
        .exponential = matrix_.get() + thread * rows_ * columns_,
        .column = column_.get() + thread * rows_ * width_,
    };
  }
  // The forward keeps S where the backward keeps exponentials.
  T* similarity(int64_t thread) const { return matrix_.get() + thread * rows_ * columns_; }

 private:
  int64_t rows_, columns_, width_;
  Buffer<T> value_, factor_, matrix_, column_;
};

template <class T>
Tensor run_forward(Plan<T>& plan, int64_t a, int64_t b, bool text_in_rows) {
  SoftJob<T>& job = plan.job;
  const int64_t width = padded(job.rows.dim);
  Tensor logits = zeros({a, b}, scalar_type<T>);
  if (plan.empty()) return logits;
  job.logits = data_of<T>(logits);
  job.logits_stride_row = text_in_rows ? b : 1;
  job.logits_stride_lane = text_in_rows ? 1 : b;
  const int64_t blocks = static_cast<int64_t>(plan.block.size()) - 1;
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  const int64_t threads = torch::stable::get_num_threads();
  // If there are blocks enough, a thread takes one block with all groups, and so loads its rows only once.
  const int64_t at_once = blocks >= 8 * threads ? groups : 1;
  const int64_t claims = blocks * groups / at_once;
  const int64_t workers = threads_for(claims, plan.row_count() * plan.steps * width);
  Scratch<T> scratch(plan, workers, false);
  Buffer<T> rows(workers * plan.most_rows * width);
  // The kernels read panels of T.
  const bool widen = plan.storage != dtype_of_arithmetic<T>;
  const int64_t panel_size = widen ? plan.most_columns * job.rows.dim : 0;
  Buffer<T> panels(workers * panel_size);
  std::vector<int64_t> loaded(workers, -1);
  parallel(claims, workers, [&](int64_t claim, int64_t worker) {
    for (int64_t task = claim * at_once; task < (claim + 1) * at_once; task++) {
      Group<T> group = plan.groups[task % groups];
      if (widen) {
        T* panel = panels.get() + worker * panel_size;
        chosen_kernels<T>().widen(group.panel, plan.storage, plan.columns_of(group) * job.rows.dim, panel);
        group.panel = panel;
      }
      const int64_t index = task / groups;
      SoftBlock<T> block = scratch.block(worker);
      block.first_item = plan.block[index];
      block.last_item = plan.block[index + 1];
      block.rows = rows.get() + worker * plan.most_rows * width;
      block.similarity = scratch.similarity(worker);
      block.stride = plan.columns_of(group);
      if (loaded[worker] != index) {
        T* out = rows.get() + worker * plan.most_rows * width;
        for (int64_t r = job.rows.start[block.first_item]; r < job.rows.start[block.last_item]; r++, out += width)
          chosen_kernels<T>().load_row(job.rows, r, out, nullptr);
        loaded[worker] = index;
      }
      chosen_kernels<T>().soft_forward(job, group, block);
    }
  });
  return logits;
}

template <class T>
Tensor forward(const Tensor& text, const Tensor& video, const Tensor& text_weight, const OptionalTensor& video_weight,
               const OptionalTensor& text_mask, const OptionalTensor& video_mask, const Options& options) {
  Layout<T> layout(text, video, text_weight, video_weight, text_mask, video_mask, options);
  return run_forward(*layout.plan, text.size(0), video.size(0), layout.text_in_rows);
}

// The forward against prepared videos first..last - 1. The text is always in rows.
template <class T>
Tensor prepared_forward(const Tensor& text, const Tensor& text_weight, const OptionalTensor& text_mask,
                        const std::vector<Tensor>& parts, int64_t first, int64_t last, bool both,
                        const Options& options) {
  const Side<T> t(text, text_weight, text_mask, options.normalize, options.zero_competes);
  PreparedLanes<T> v(parts, text.size(2), first, last, options.zero_competes, chosen_kernels<T>().vector);
  if (both) v.sum_lanes(parts);
  Plan<T> plan(t.tokens, v.tokens, v.groups, v.steps, both, options);
  plan.storage = v.storage;
  return run_forward(plan, text.size(0), last - first, true);
}

// The gradients of one side, item by item as the caller sees them.
template <class T>
class Gradient {
 public:
  Gradient(const Tensor& like, const Tokens<T>& tokens, bool wants_features, bool wants_weight)
      : tokens_(tokens),
        features(zeros(
            wants_features ? std::vector<int64_t>{like.size(0), like.size(1), like.size(2)} : std::vector<int64_t>{0},
            like.scalar_type())),
        weight(zeros(wants_weight ? std::vector<int64_t>{like.size(0), like.size(1)} : std::vector<int64_t>{0},
                     scalar_type<T>)),
        wants_features_(wants_features),
        wants_weight_(wants_weight),
        features_data_(data_of<char>(features)),
        weight_data_(data_of<T>(weight)),
        offset_(tokens.start[tokens.items]) {
    for (int64_t item = 0; item < tokens.items; item++)
      for (int64_t token = tokens.start[item]; token < tokens.start[item + 1]; token++)
        offset_[token] = item * tokens.length + tokens.position[token];
  }

  // Store one token's gradients; `grad` is overwritten and `row` is scratch memory, a padded row each.
  void store(int64_t token, T* grad, T weight_grad, T* row) const {
    if (wants_weight_) weight_data_[offset_[token]] = weight_grad;
    if (!wants_features_) return;
    T inverse_norm = 0;
    chosen_kernels<T>().load_row(tokens_, token, row, &inverse_norm);
    char* out = features_data_ + offset_[token] * tokens_.dim * size_of(tokens_.dtype);
    chosen_kernels<T>().store_gradient(tokens_, grad, row, inverse_norm, out);
  }

 private:
  const Tokens<T>& tokens_;

 public:
  Tensor features, weight;

 private:
  bool wants_features_, wants_weight_;
  char* features_data_;
  T* weight_data_;
  std::vector<int64_t> offset_;
};

// Consecutive pieces [first, last) and where their rows or columns begin and end.
struct Span {
  int64_t first, last, begin, end;
  int64_t size() const { return end - begin; }
};

// Join pieces of the given sizes to spans of about kSuperblock.
std::vector<Span> join(const std::vector<int64_t>& sizes) {
  std::vector<Span> spans;
  int64_t at = 0;
  int64_t piece = 0;
  for (const int64_t size : sizes) {
    if (spans.empty() || spans.back().size() + size > kSuperblock)
      spans.push_back({.first = piece, .last = piece, .begin = at, .end = at});
    at += size;
    spans.back().last = ++piece;
    spans.back().end = at;
  }
  return spans;
}

template <class T>
std::vector<Tensor> backward(const Tensor& grad_logits, const Tensor& text, const Tensor& video,
                             const Tensor& text_weight, const OptionalTensor& video_weight,
                             const OptionalTensor& text_mask, const OptionalTensor& video_mask, const Options& options,
                             const std::vector<bool>& wanted) {
  Layout<T> layout(text, video, text_weight, video_weight, text_mask, video_mask, options);
  STD_TORCH_CHECK(grad_logits.scalar_type() == scalar_type<T> && has_sizes(grad_logits, {text.size(0), video.size(0)}),
                  "drl_fast::soft_token_interaction_backward: grad_logits must be (A, B), in the logits' dtype");
  STD_TORCH_CHECK(wanted.size() == 4, "drl_fast::soft_token_interaction_backward: output_mask must be four bools");
  const Kernels<T>& k = chosen_kernels<T>();
  Plan<T>& plan = *layout.plan;
  SoftJob<T>& job = plan.job;
  const bool flip = !layout.text_in_rows;
  Gradient<T> of_text(text, layout.text_side.tokens, wanted[0], wanted[2]);
  Gradient<T> of_video(video, layout.video_side.tokens, wanted[1], wanted[3] && video_weight);
  const Gradient<T>& of_rows = flip ? of_video : of_text;
  const Gradient<T>& of_lanes = flip ? of_text : of_video;
  const bool rows_wanted = wanted[flip ? 1 : 0], lanes_wanted = wanted[flip ? 0 : 1];
  std::vector<Tensor> grads = {of_text.features, of_video.features, of_text.weight, of_video.weight};
  if (plan.empty()) return grads;
  job.grad_logits = const_data_of<T>(grad_logits);
  job.logits_stride_row = grad_logits.stride(flip ? 1 : 0);
  job.logits_stride_lane = grad_logits.stride(flip ? 0 : 1);

  const std::vector<Group<T>>& groups = plan.groups;
  const int64_t width = padded(job.rows.dim), steps = plan.steps;
  std::vector<int64_t> block_rows, group_columns, group_start = {0};
  for (size_t b = 0; b + 1 < plan.block.size(); b++)
    block_rows.push_back(job.rows.start[plan.block[b + 1]] - job.rows.start[plan.block[b]]);
  for (const Group<T>& group : groups) {
    group_columns.push_back(plan.columns_of(group));
    group_start.push_back(group_start.back() + group_columns.back());
  }
  const std::vector<Span> row_spans = join(block_rows), column_spans = join(group_columns);
  int64_t most_rows = 0, most_columns = 0, most_blocks = 0, most_groups = 0;
  for (const Span& span : row_spans) {
    most_rows = std::max(most_rows, span.size());
    most_blocks = std::max(most_blocks, span.last - span.first);
  }
  for (const Span& span : column_spans) {
    most_columns = std::max(most_columns, span.size());
    most_groups = std::max(most_groups, span.last - span.first);
  }
  // A line more, so that the rows of a column do not all fall into one set of the cache.
  const int64_t stride = (most_columns + 15) / 16 * 16 + 16;
  const int64_t threads = threads_for(torch::stable::get_num_threads(), plan.row_count() * steps * width);
  Scratch<T> scratch(plan, threads, true);
  Buffer<T> matrix(most_rows * stride), rows(most_rows * width), row_panels(most_rows * width);
  Buffer<T> column_panels(rows_wanted ? steps * width : 0), spare(threads * width);
  Buffer<T> grad_rows(most_rows * width), grad_columns(lanes_wanted ? steps * width : width);
  Buffer<T> row_parts(most_groups * most_rows), column_parts(most_blocks * most_columns);
  std::vector<T> row_weights(most_rows), column_weights(steps);
  if (lanes_wanted) std::fill_n(grad_columns.get(), steps * width, T(0));

  const auto for_tokens = [&](int64_t begin, int64_t end, auto&& body) {
    const int64_t tasks = (end - begin + kTaskRows - 1) / kTaskRows;
    parallel(tasks, std::min(threads, tasks), [&](int64_t task, int64_t thread) {
      const int64_t last = std::min(end, begin + (task + 1) * kTaskRows);
      for (int64_t t = begin + task * kTaskRows; t < last; t++) body(t, spare.get() + thread * width);
    });
  };
  if (rows_wanted)
    for (const Span& span : column_spans)
      for_tokens(span.begin, span.end, [&](int64_t column, T* row) {
        // Columns of all groups lie one after the other.
        const int64_t token = groups[0].token[column];
        if (token < 0)
          std::fill_n(row, width, T(0));
        else
          k.load_row(job.lanes, token, row, nullptr);
        put_in_panels(row, width, column - span.begin, span.size(), column_panels.get() + span.begin * width);
      });

  for (const Span& in_rows : row_spans) {
    std::fill_n(grad_rows.get(), in_rows.size() * width, T(0));
    std::fill(row_weights.begin(), row_weights.end(), T(0));
    for_tokens(in_rows.begin, in_rows.end, [&](int64_t token, T*) {
      T* row = rows.get() + (token - in_rows.begin) * width;
      k.load_row(job.rows, token, row, nullptr);
      put_in_panels(row, width, token - in_rows.begin, in_rows.size(), row_panels.get());
    });
    for (const Span& in_columns : column_spans) {
      const int64_t across = in_columns.last - in_columns.first, blocks = in_rows.last - in_rows.first;
      parallel(blocks * across, std::min(threads, blocks * across), [&](int64_t task, int64_t thread) {
        const int64_t b = task / across, g = task % across;
        SoftBlock<T> block = scratch.block(thread);
        block.first_item = plan.block[in_rows.first + b];
        block.last_item = plan.block[in_rows.first + b + 1];
        const int64_t row = job.rows.start[block.first_item] - in_rows.begin;
        const int64_t column = group_start[in_columns.first + g] - in_columns.begin;
        block.rows = rows.get() + row * width;
        block.similarity = matrix.get() + row * stride + column;
        block.stride = stride;
        block.grad_row_weight = row_parts.get() + g * most_rows + row;
        block.grad_lane_weight = column_parts.get() + b * most_columns + column;
        k.soft_backward(job, groups[in_columns.first + g], block);
      });
      // Both products: tasks of rows first, then tasks of columns.
      const int64_t row_tasks = (in_rows.size() + kTaskRows - 1) / kTaskRows;
      const int64_t tasks = row_tasks + (in_columns.size() + kTaskRows - 1) / kTaskRows;
      parallel(tasks, std::min(threads, tasks), [&](int64_t task, int64_t) {
        const bool of_row = task < row_tasks;
        const int64_t first = (of_row ? task : task - row_tasks) * kTaskRows;
        const int64_t count = std::min(kTaskRows, (of_row ? in_rows : in_columns).size() - first);
        const int64_t parts = of_row ? across : blocks, part_size = of_row ? most_rows : most_columns;
        const T* from = (of_row ? row_parts : column_parts).get() + first;
        T* to = of_row ? row_weights.data() + first : column_weights.data() + in_columns.begin + first;
        for (int64_t p = 0; p < parts; p++)
          for (int64_t i = 0; i < count; i++) to[i] += from[p * part_size + i];
        if (of_row && rows_wanted)
          k.add_product(matrix.get() + first * stride, stride, false, count, in_columns.size(),
                        column_panels.get() + in_columns.begin * width, width, grad_rows.get() + first * width);
        if (!of_row && lanes_wanted)
          k.add_product(matrix.get() + first, stride, true, count, in_rows.size(), row_panels.get(), width,
                        grad_columns.get() + (in_columns.begin + first) * width);
      });
    }
    for_tokens(in_rows.begin, in_rows.end, [&](int64_t token, T* row) {
      const int64_t at = token - in_rows.begin;
      of_rows.store(token, grad_rows.get() + at * width, row_weights[at], row);
    });
  }
  for_tokens(0, steps, [&](int64_t column, T* row) {
    const int64_t token = groups[0].token[column];
    if (token >= 0)
      of_lanes.store(token, grad_columns.get() + (lanes_wanted ? column * width : 0), column_weights[column], row);
  });
  return grads;
}

Tensor soft_token_interaction(Tensor text, Tensor video, Tensor text_weight, OptionalTensor video_weight,
                              OptionalTensor text_mask, OptionalTensor video_mask, bool normalize, bool zero_competes,
                              bool logsumexp, double temperature) {
  const auto run = computes_in_double(text) ? forward<double> : forward<float>;
  return run(
      text, video, text_weight, video_weight, text_mask, video_mask,
      {.normalize = normalize, .zero_competes = zero_competes, .logsumexp = logsumexp, .temperature = temperature});
}

Tensor prepared_soft_token_interaction(Tensor text, Tensor text_weight, OptionalTensor text_mask,
                                       std::vector<Tensor> parts, int64_t first, int64_t last, int64_t, bool normalize,
                                       bool zero_competes, bool both, bool logsumexp, double temperature) {
  const auto run = computes_in_double(text) ? prepared_forward<double> : prepared_forward<float>;
  return run(
      text, text_weight, text_mask, parts, first, last, both,
      {.normalize = normalize, .zero_competes = zero_competes, .logsumexp = logsumexp, .temperature = temperature});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_token_interaction_backward(
    Tensor grad_logits, Tensor text, Tensor video, Tensor text_weight, OptionalTensor video_weight,
    OptionalTensor text_mask, OptionalTensor video_mask, bool normalize, bool zero_competes, bool logsumexp,
    double temperature, std::vector<bool> output_mask) {
  const auto run = computes_in_double(text) ? backward<double> : backward<float>;
  const std::vector<Tensor> grads =
      run(grad_logits, text, video, text_weight, video_weight, text_mask, video_mask,
          {.normalize = normalize, .zero_competes = zero_competes, .logsumexp = logsumexp, .temperature = temperature},
          output_mask);
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(drl_fast, CPU, m) {
  m.impl("soft_token_interaction", TORCH_BOX(&soft_token_interaction));
  m.impl("soft_token_interaction_backward", TORCH_BOX(&soft_token_interaction_backward));
  m.impl("prepared_soft_token_interaction", TORCH_BOX(&prepared_soft_token_interaction));
}

}  // namespace drl_fast
