// Operator drl_fast::prepare_videos: normalize videos and lay them out in lanes, to be scored by many calls.
#include "prepared.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "capability.h"
#include "sides.h"
#include "tensors.h"

namespace drl_fast {
namespace {

// Lengths are sorted among this many videos. More would waste fewer lanes, and a slice would touch more groups.
constexpr int64_t kSortedVideos = 1024;

template <class X>
Tensor copy_of(const X* data, int64_t count, ScalarType dtype) {
  Tensor copy = empty({count}, dtype);
  if (count > 0) std::memcpy(copy.mutable_data_ptr(), data, static_cast<size_t>(count) * sizeof(X));
  return copy;
}

template <class T>
std::vector<Tensor> prepare(const Tensor& video, const Tensor& weight, const OptionalTensor& mask, bool normalize,
                            ScalarType storage) {
  const Kernels<T>& k = chosen_kernels<T>();
  // Masked tokens are counted; each call decides whether they compete.
  const Side<T> side(video, weight, mask, normalize, true);
  Lanes<T> lanes(side.tokens, k.vector, kSortedVideos);
  Tensor panel = empty({lanes.steps * side.tokens.dim}, storage);
  lanes.pack(k, panel.mutable_data_ptr(), dtype_of(panel));
  const auto group_count = static_cast<int64_t>(lanes.groups.size());
  const int64_t columns = group_count * 2 * k.vector;
  // All groups' entries lie one after the other.
  const Group<T> all = group_count > 0 ? lanes.groups[0] : Group<T>{};
  std::vector<int64_t> shape;
  for (const Group<T>& group : lanes.groups) {
    shape.push_back(group.width);
    shape.push_back(group.slots);
  }
  Tensor shapes = empty({group_count, 2}, ScalarType::Long);
  std::ranges::copy(shape, data_of<int64_t>(shapes));
  constexpr ScalarType kInt = std::is_same_v<T, double> ? ScalarType::Long : ScalarType::Int;
  return {
      panel,
      copy_of(all.weight, lanes.steps, scalar_type<T>),
      copy_of(all.position, lanes.steps, ScalarType::Int),
      copy_of(all.item, columns, ScalarType::Long),
      copy_of(all.count, columns, kInt),
      copy_of(all.zeros, columns, kInt),
      shapes,
  };
}

std::vector<Tensor> prepare_videos(Tensor video, Tensor weight, OptionalTensor mask, bool normalize,
                                   ScalarType storage) {
  const auto run = storage == ScalarType::Double ? prepare<double> : prepare<float>;
  return run(video, weight, mask, normalize, storage);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(drl_fast, CPU, m) { m.impl("prepare_videos", TORCH_BOX(&prepare_videos)); }

}  // namespace drl_fast
