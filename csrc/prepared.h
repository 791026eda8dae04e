// Videos in lanes that are laid out once and scored by many calls.
//
// Operator drl_fast::prepare_videos makes them (prepared.cpp), as seven tensors:
//   panel     [steps * D] the groups' panels one after the other, in the storage dtype
//   weight    [steps] of T, position [steps] of int32: one entry per token of a lane, padding included
//   item      [columns] of int64; count and masked [columns] of IntOf<T>: one entry per lane, 2 vectors of them a group
//   shape     [groups][2] of int64: width and slots
#pragma once

#include <cstdint>
#include <vector>

#include "tensors.h"
#include "token_interaction.h"

namespace drl_fast {

// The groups that hold items first..last - 1, numbered from 0, as one call's kernels read them.
template <class T>
class PreparedLanes {
 public:
  PreparedLanes(const std::vector<Tensor>& parts, int64_t dim, int64_t first, int64_t last, bool zero_competes,
                int vector) {
    const char* stale =
        "drl_fast::prepared_token_interaction: videos must be prepared by this version of drl-fast, "
        "for this CPU's instruction set and for the text's dtype; prepare them again";
    STD_TORCH_CHECK(parts.size() == kParts, stale);
    const Tensor &panel = parts[0], &weight = parts[1], &position = parts[2], &item = parts[3], &count = parts[4],
                 &masked = parts[5], &shape = parts[6];
    storage = dtype_of(panel);
    const bool fits = std::is_same_v<T, double> == (storage == Dtype::f64);
    const int64_t group_count = shape.size(0), lanes = 2 * static_cast<int64_t>(vector), columns = group_count * lanes;
    constexpr ScalarType kInt = std::is_same_v<T, double> ? ScalarType::Long : ScalarType::Int;
    STD_TORCH_CHECK(fits && weight.scalar_type() == scalar_type<T> && position.scalar_type() == ScalarType::Int &&
                        item.scalar_type() == ScalarType::Long && count.scalar_type() == kInt &&
                        masked.scalar_type() == kInt && shape.scalar_type() == ScalarType::Long &&
                        has_sizes(shape, {group_count, 2}) && has_sizes(item, {columns}) &&
                        has_sizes(count, {columns}) && has_sizes(masked, {columns}),
                    stale);
    for (const Tensor& part : parts) STD_TORCH_CHECK(part.is_contiguous(), stale);
    item_.resize(columns);
    count_.resize(columns);
    zeros_.resize(columns);
    const int64_t* width_and_slots = const_data_of<int64_t>(shape);
    int64_t step = 0;
    for (int64_t g = 0; g < group_count; g++) {
      const int64_t width = width_and_slots[2 * g], slots = width_and_slots[2 * g + 1];
      STD_TORCH_CHECK((width == vector || width == lanes) && slots > 0 && slots <= weight.numel(), stale);
      const int64_t begin = step, column = g * lanes;
      step += width * slots;
      STD_TORCH_CHECK(step <= weight.numel() && step <= position.numel() && step * dim <= panel.numel(), stale);
      bool wanted = false;
      for (int64_t c = column; c < column + width; c++) {
        const int64_t at = const_data_of<int64_t>(item)[c];
        const IntOf<T> tokens = const_data_of<IntOf<T>>(count)[c];
        STD_TORCH_CHECK(tokens >= 0 && tokens <= slots, stale);
        // A lane outside of the range looks unused.
        if (tokens == 0 || at < first || at >= last) continue;
        item_[c] = at - first;
        count_[c] = tokens;
        zeros_[c] = zero_competes ? const_data_of<IntOf<T>>(masked)[c] : 0;
        wanted = true;
      }
      if (!wanted) continue;
      groups.push_back({
          .width = static_cast<int>(width),
          .slots = static_cast<int>(slots),
          // The kernels only read it.
          .panel = const_cast<char*>(const_data_of<char>(panel)) + begin * dim * size_of(storage),
          .weight = const_data_of<T>(weight) + begin,
          .count = count_.data() + column,
          .zeros = zeros_.data() + column,
          .position = const_data_of<int32_t>(position) + begin,
          .token = nullptr,
          .item = item_.data() + column,
      });
      steps += width * slots;
    }
    STD_TORCH_CHECK(step == weight.numel() && step == position.numel() && step * dim == panel.numel(), stale);
    tokens.dim = dim;
    tokens.items = last - first;
  }
  PreparedLanes(const PreparedLanes&) = delete;

  // Refuse positions beyond a video's `frames` padded tokens: the kernels store matches there.
  void check_positions(int64_t frames) const {
    for (const Group<T>& group : groups)
      for (int64_t i = 0; i < static_cast<int64_t>(group.slots) * group.width; i++)
        STD_TORCH_CHECK(group.position[i] >= 0 && group.position[i] < frames,
                        "drl_fast::prepared_token_interaction: frames must be the padded length of the prepared "
                        "videos; pass that, or prepare them again");
  }

  // Ask for the videos' own sum.
  void sum_lanes(const std::vector<Tensor>& parts) { tokens.weight = const_data_of<T>(parts[1]); }

  static constexpr size_t kParts = 7;

  std::vector<Group<T>> groups;
  Tokens<T> tokens = {};  // what the kernels ask of the lanes' side as a whole
  Dtype storage;
  int64_t steps = 0;

 private:
  std::vector<int64_t> item_;
  std::vector<IntOf<T>> count_, zeros_;
};

}  // namespace drl_fast
