// The rows of the full form's products, a block of pairs at a time, in buffers that are used again.
//
//   C = sum over rows of (weighted anchors) (partner)^T      back: to the anchors A y~, to the partners A^T x~
//
// The products themselves are aten::mm's, whose library knows the processor better than we do.
#pragma once

#include "cdcr_pairs.h"

namespace drl_fast {
namespace {

// Bytes of one of the four buffers: together they stay in the last cache, and their pages are touched once.
constexpr int64_t kBlockBytes = 1 << 20;

void mm_out(const Tensor& a, const Tensor& b, Tensor out) {
  using torch::stable::detail::from;
  StableIValue stack[3] = {from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
class ProductRows {
 public:
  ProductRows(const Sides<T>& sides, const Anchors<T>& anchors, const ChannelTable<T>& table)
      : sides_(sides), anchors_(anchors), table_(table), slots_(sides.slots()), rows_(pair_rows(sides)) {
    const int64_t fit = kBlockBytes / std::max<int64_t>(1, slots_ * sides.dim * static_cast<int64_t>(sizeof(T)));
    pairs_ = std::clamp<int64_t>(fit, 1, std::max<int64_t>(sides.pairs, 1));
    for (int part = 0; part < 4; part++)
      buffer_[part] = torch::stable::empty({anchors.terms, pairs_ * slots_, sides.dim}, scalar_type<T>);
  }
  int64_t pairs() const { return pairs_; }
  Tensor weighted(int term) const { return part(0, term); }
  Tensor partners(int term) const { return part(1, term); }

  // Standardise the anchors and partners of the pairs from `first` on; `sums`, where wanted, of both, weighted.
  void load(int64_t first, std::vector<Sums<T>>* sums) {
    first_ = first;
    loaded_ = std::min(pairs_, sides_.pairs - first);
    std::vector<std::vector<T>> scratch(workers(), std::vector<T>(4 * sides_.width));
    std::vector<std::vector<uint8_t>> seen(workers(), std::vector<uint8_t>(2 * slots_));
    over_pairs(first, first + loaded_, work_of(sides_), [&](int64_t run, int64_t worker, int64_t pair) {
      std::fill(seen[worker].begin(), seen[worker].end(), 0);
      T* beside = scratch[worker].data();
      over_anchors(sides_, anchors_, rows_[worker], pair, [&](int term, int64_t i, int64_t j, const T* x, const T* y,
                                                              T weight) {
        const int64_t slot = sides_.slot_of(term, i, j);
        uint8_t& add = seen[worker][term * slots_ + slot];
        T *to = row(0, term, pair, slot), *partner = row(1, term, pair, slot);
        // Kernels write whole vectors: rows of another width are built beside the buffer.
        const bool whole = sides_.width == sides_.dim;
        if (!whole && add) std::copy_n(to, sides_.dim, beside);
        chosen_cdcr_kernels<T>().standardize(
            x, y, weight, table_[role_of(term, false)], table_[role_of(term, true)], sides_.width, add,
            whole ? to : beside, whole ? partner : beside + sides_.width,
            sums ? (*sums)[run].row(role_of(term, false)) : beside + 2 * sides_.width,
            sums ? (*sums)[run].row(role_of(term, true)) : beside + 3 * sides_.width);
        if (!whole) std::copy_n(beside, sides_.dim, to), std::copy_n(beside + sides_.width, sides_.dim, partner);
        if (sums) (*sums)[run].added();
        add = 1;
      });
      for (int term = 0; term < anchors_.terms; term++)
        for (int64_t slot = 0; slot < slots_; slot++)
          if (!seen[worker][term * slots_ + slot])
            for (int part = 0; part < 2; part++) std::memset(row(part, term, pair, slot), 0, sides_.dim * sizeof(T));
    });
  }

  // What comes back to the loaded rows through C, for d loss / d C (D, D).
  void multiply(const Tensor& pull) {
    for (int term = 0; term < anchors_.terms; term++) {
      mm_out(partners(term), torch::stable::transpose(pull, 0, 1), part(2, term));
      mm_out(weighted(term), pull, part(3, term));
    }
  }
  // Scratch: two rows. `fresh`: no anchor of this slot was here yet.
  Pull<T> pull(int term, int64_t pair, int64_t slot, bool fresh, T* scratch) const {
    const T* partner = fresh ? whole(row(3, term, pair, slot), scratch + sides_.width) : nullptr;
    return {nullptr, whole(row(2, term, pair, slot), scratch), partner};
  }

 private:
  Tensor part(int which, int term) const {
    Tensor rows = torch::stable::select(buffer_[which], 0, term);
    return torch::stable::narrow(rows, 0, 0, loaded_ * slots_);
  }
  T* row(int which, int term, int64_t pair, int64_t slot) const {
    return static_cast<T*>(buffer_[which].mutable_data_ptr()) +
           ((term * pairs_ + pair - first_) * slots_ + slot) * sides_.dim;
  }
  const T* whole(const T* row, T* scratch) const {
    if (sides_.width == sides_.dim) return row;
    std::copy_n(row, sides_.dim, scratch);
    return scratch;
  }
  const Sides<T>& sides_;
  const Anchors<T>& anchors_;
  const ChannelTable<T>& table_;
  int64_t slots_, pairs_, first_ = 0, loaded_ = 0;
  std::vector<PairRows<T>> rows_;
  Tensor buffer_[4];
};

}  // namespace
}  // namespace drl_fast
