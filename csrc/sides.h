// The two sides of an interaction, packed for the kernels: their real tokens only, in rows or in lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "capability.h"
#include "parallel.h"
#include "tensors.h"
#include "token_interaction.h"

namespace drl_fast {

// Features (rows, tokens, D), copied only if a token's channels are not contiguous. The Python functions give better
// errors, but a traced graph calls the operator directly.
inline Tensor with_contiguous_tokens(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 3, "drl_fast::token_interaction: features must be (rows, tokens, D)");
  if (features.stride(2) == 1 || features.size(2) == 1) return features;
  return torch::stable::contiguous(features);
}

inline void check_pair(const Tensor& text, const Tensor& video) {
  STD_TORCH_CHECK(text.size(2) == video.size(2) && text.scalar_type() == video.scalar_type(),
                  "drl_fast::token_interaction: text and video must have one D and one dtype; cast one of them");
}

// One side's real tokens, and the memory that Tokens<T> points into.
template <class T>
class Side {
 public:
  Side(const Tensor& features, const OptionalTensor& weight, const OptionalTensor& mask, bool normalize,
       bool zero_competes)
      : features_(with_contiguous_tokens(features)),
        start_(features.size(0) + 1),
        zeros_(features.size(0)),
        token_at_(features.size(0) * features.size(1), -1) {
    const int64_t items = features.size(0), length = features.size(1);
    const Dtype dtype = dtype_of(features);
    STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && has_sizes(*mask, {items, length})),
                    "drl_fast::token_interaction: masks must be bool (rows, tokens)");
    STD_TORCH_CHECK(!weight || (weight->scalar_type() == scalar_type<T> && has_sizes(*weight, {items, length})),
                    "drl_fast::token_interaction: weights must be (rows, tokens), float32 (float64 with float64)");
    const char* data = const_data_of<char>(features_);
    // As bytes: memory that is shared with others may hold more than 0 and 1.
    const uint8_t* real = mask ? const_data_of<uint8_t>(*mask) : nullptr;
    const T* given = weight ? const_data_of<T>(*weight) : nullptr;
    position_.reserve(items * length);
    row_.reserve(items * length);
    if (weight) weight_.reserve(items * length);
    for (int64_t item = 0; item < items; item++) {
      start_[item] = static_cast<int64_t>(row_.size());
      for (int64_t p = 0; p < length; p++) {
        if (real && real[item * mask->stride(0) + p * mask->stride(1)] == 0) {
          zeros_[item] += zero_competes;
          continue;
        }
        token_at_[item * length + p] = static_cast<int32_t>(row_.size());
        position_.push_back(static_cast<int32_t>(p));
        row_.push_back(data + (item * features_.stride(0) + p * features_.stride(1)) * size_of(dtype));
        if (given) weight_.push_back(given[item * weight->stride(0) + p * weight->stride(1)]);
      }
    }
    start_[items] = static_cast<int64_t>(row_.size());
    STD_TORCH_CHECK(row_.size() < kMostTokens, "drl_fast::token_interaction: at most 2^31 tokens per side; split it");
    // A side whose sum is wanted must have a weight pointer, even if it has no token.
    if (weight && weight_.empty()) weight_.push_back(0);
    tokens = {
        .dtype = dtype,
        .items = items,
        .length = length,
        .dim = features.size(2),
        .normalize = normalize,
        .start = start_.data(),
        .position = position_.data(),
        .row = row_.data(),
        .weight = weight ? weight_.data() : nullptr,
        .zeros = zeros_.data(),
        .token_at = token_at_.data(),
    };
  }
  Side(const Side&) = delete;

  int64_t count() const { return start_.back(); }

  Tokens<T> tokens;

 private:
  // Positions and tokens are kept as int32.
  static constexpr size_t kMostTokens = size_t{1} << 31;

  Tensor features_;
  std::vector<int64_t> start_;
  std::vector<int32_t> zeros_;
  std::vector<int32_t> token_at_;
  std::vector<int32_t> position_;
  std::vector<const char*> row_;
  std::vector<T> weight_;
};

// Cut a side between items into blocks of about `rows` tokens; an item is never split. Returns each block's first item,
// then the number of items; writes the largest block's number of tokens.
template <class T>
std::vector<int64_t> cut(const Tokens<T>& side, int64_t rows, int64_t* max_rows) {
  std::vector<int64_t> block = {0};
  *max_rows = 1;
  for (int64_t item = 0; item < side.items; item++) {
    const int64_t first = side.start[block.back()];
    if (item > block.back() && side.start[item + 1] - first > rows) block.push_back(item);
    *max_rows = std::max(*max_rows, side.start[item + 1] - side.start[block.back()]);
  }
  if (side.items > 0) block.push_back(side.items);
  return block;
}

// Cost of laying out one element of a panel, in multiply-adds.
constexpr int64_t kPackWork = 32;

// The lane side, sorted by length so that the lanes of a group need about the same number of slots.
template <class T>
class Lanes {
 public:
  // `sorted_items`: lengths are sorted among this many items, so that a range of items is in few groups.
  Lanes(const Tokens<T>& side, int vector, int64_t sorted_items = INT64_MAX) : side_(side), vector_(vector) {
    for (int64_t item = 0; item < side.items; item++)
      if (length(item) > 0) order_.push_back(item);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
      return a / sorted_items == b / sorted_items ? length(a) > length(b) : a < b;
    });
    for (size_t first = 0; first < order_.size(); first += size_t{2} * vector) {
      const int64_t left = static_cast<int64_t>(order_.size() - first);
      Group<T> group = {};
      group.width = left > vector ? 2 * vector : vector;
      for (size_t i = first; i < std::min(order_.size(), first + group.width); i++)
        group.slots = std::max(group.slots, static_cast<int>(length(order_[i])));
      groups.push_back(group);
      steps += tokens_of(group);
    }
  }

  // Lay out the panels in memory of T.
  void pack(const Kernels<T>& kernels) {
    panel_ = std::make_unique<Buffer<T>>(steps * side_.dim);
    pack(kernels, panel_->get(), dtype_of_arithmetic<T>);
  }

  // Lay out the panels in `memory`, which holds `steps` tokens. Every (group, slot) is a task.
  void pack(const Kernels<T>& kernels, void* memory, Dtype storage) {
    const int64_t dim = side_.dim;
    weight_.resize(steps);
    position_.resize(steps);
    const int64_t columns = static_cast<int64_t>(groups.size()) * 2 * vector_;
    count_.resize(columns);
    zeros_.resize(columns);
    token_.assign(steps, -1);
    item_.resize(columns);
    int64_t step = 0;
    for (size_t g = 0; g < groups.size(); g++) {
      groups[g].panel = static_cast<char*>(memory) + step * dim * size_of(storage);
      describe(g, step);
      step += tokens_of(groups[g]);
    }
    std::vector<std::pair<size_t, int>> slots;
    for (size_t g = 0; g < groups.size(); g++)
      for (int s = 0; s < groups[g].slots; s++) slots.emplace_back(g, s);
    const int64_t scratch_size = 2 * static_cast<int64_t>(vector_) * padded(dim);
    const int64_t tasks = static_cast<int64_t>(slots.size()), threads = threads_for(tasks, kPackWork * steps * dim);
    Buffer<T> scratch(scratch_size * threads);
    parallel(tasks, threads, [&](int64_t t, int64_t thread) {
      kernels.pack_slot(side_, groups[slots[t].first], slots[t].second, storage, scratch.get() + thread * scratch_size);
    });
  }

  std::vector<Group<T>> groups;
  int64_t steps = 0;  // lane tokens, padding included

 private:
  static int64_t tokens_of(const Group<T>& group) { return static_cast<int64_t>(group.slots) * group.width; }
  int64_t length(int64_t item) const { return side_.start[item + 1] - side_.start[item]; }

  void describe(size_t g, int64_t step) {
    Group<T>& group = groups[g];
    const size_t column = g * 2 * vector_;
    group.weight = weight_.data() + step;
    group.position = position_.data() + step;
    group.count = count_.data() + column;
    group.zeros = zeros_.data() + column;
    group.token = token_.data() + step;
    group.item = item_.data() + column;
    for (int l = 0; l < group.width && column + l < order_.size(); l++) {
      const int64_t item = order_[column + l], first = side_.start[item];
      item_[column + l] = item;
      count_[column + l] = static_cast<IntOf<T>>(length(item));
      zeros_[column + l] = side_.zeros[item];
      for (int slot = 0; slot < group.slots; slot++) {
        const int64_t token = slot < length(item) ? first + slot : first;
        if (slot < length(item)) token_[step + slot * group.width + l] = token;
        position_[step + slot * group.width + l] = side_.position[token];
        weight_[step + slot * group.width + l] = side_.weight ? side_.weight[token] : T(0);
      }
    }
  }

  const Tokens<T>& side_;
  int vector_;
  std::vector<int64_t> order_, item_, token_;
  std::vector<T> weight_;
  std::vector<int32_t> position_;
  std::vector<IntOf<T>> count_, zeros_;
  std::unique_ptr<Buffer<T>> panel_;
};

// Few items leave lanes empty and unequal lengths leave slots empty: put the side in lanes that wastes less.
template <class T>
bool text_goes_in_rows(const Side<T>& text, const Side<T>& video, const Lanes<T>& text_lanes,
                       const Lanes<T>& video_lanes) {
  return text.count() * video_lanes.steps <= video.count() * text_lanes.steps * 1.1;
}

// Copy one token's row into column `at` of the panels of `count` tokens; see add_product.
template <class T>
void put_in_panels(const T* row, int64_t width, int64_t at, int64_t count, T* panels) {
  const int64_t two = 2 * static_cast<int64_t>(chosen_kernels<T>().vector);
  for (int64_t d = 0; d < width; d += two) {
    const int64_t wide = std::min(two, width - d);
    std::copy_n(row + d, wide, panels + d * count + at * wide);
  }
}

}  // namespace drl_fast
