// Rows of the full form's matrix products, for one block of pairs at a time, in buffers that all blocks share.
//
//   forward   C = sum over rows of (weighted anchor) (partner)^T
//   backward  the anchors get A y~, the partners A^T x~, with A = d loss / d C
//
// aten::mm computes the products.
#pragma once

#include "cdcr_pairs.h"

namespace drl_fast {

// Bytes of each of the four buffers. Together they fit the last-level cache.
constexpr int64_t kProductBytes = 1 << 20;

inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
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
    const int64_t fit = kProductBytes / std::max<int64_t>(1, slots_ * sides.dim * static_cast<int64_t>(sizeof(T)));
    pairs_ = std::clamp<int64_t>(fit, 1, std::max<int64_t>(sides.pairs, 1));
    for (Tensor& buffer : buffer_) buffer = empty({anchors.terms, pairs_ * slots_, sides.dim}, scalar_type<T>);
  }
  int64_t pairs() const { return pairs_; }
  Tensor weighted(int term) const { return part(0, term); }
  Tensor partners(int term) const { return part(1, term); }

  // Standardize the anchors and partners of the pairs starting at `first`. Adds weighted anchors and partners to `sums`
  // unless it is null.
  void load(int64_t first, std::vector<Sums<T>>* sums) {
    first_ = first;
    loaded_ = std::min(pairs_, sides_.pairs - first);
    std::vector<std::vector<T>> scratch(workers(), std::vector<T>(4 * sides_.width));
    std::vector<std::vector<uint8_t>> seen(workers(), std::vector<uint8_t>(2 * slots_));
    for_each_pair(first, first + loaded_, work_of(sides_), [&](int64_t run, int64_t worker, int64_t pair) {
      std::fill(seen[worker].begin(), seen[worker].end(), 0);
      T* beside = scratch[worker].data();
      for_each_anchor(sides_, anchors_, rows_[worker], pair,
                      [&](int term, int64_t i, int64_t j, const T* x, const T* y, T weight) {
                        const int64_t slot = sides_.slot_of(term, i, j);
                        uint8_t& add = seen[worker][term * slots_ + slot];
                        T* to = row(0, term, pair, slot);
                        T* partner = row(1, term, pair, slot);
                        // Kernels write whole vectors. A row that is not a multiple of them is built in scratch and
                        // copied.
                        const bool whole = sides_.width == sides_.dim;
                        if (!whole && add) std::copy_n(to, sides_.dim, beside);
                        chosen_cdcr_kernels<T>().standardize(
                            x, y, weight, table_[role_of(term, false)], table_[role_of(term, true)], sides_.width, add,
                            whole ? to : beside, whole ? partner : beside + sides_.width,
                            sums ? (*sums)[run].row(role_of(term, false)) : beside + 2 * sides_.width,
                            sums ? (*sums)[run].row(role_of(term, true)) : beside + 3 * sides_.width);
                        if (!whole) {
                          std::copy_n(beside, sides_.dim, to);
                          std::copy_n(beside + sides_.width, sides_.dim, partner);
                        }
                        if (sums) (*sums)[run].added();
                        add = 1;
                      });
      for (int term = 0; term < anchors_.terms; term++)
        for (int64_t slot = 0; slot < slots_; slot++)
          if (!seen[worker][term * slots_ + slot])
            for (int part = 0; part < 2; part++) std::fill_n(row(part, term, pair, slot), sides_.dim, T(0));
    });
  }

  // Compute the loaded rows' gradient from d loss / d C (D, D).
  void multiply(const Tensor& pull) {
    for (int term = 0; term < anchors_.terms; term++) {
      mm_out(partners(term), torch::stable::transpose(pull, 0, 1), part(2, term));
      mm_out(weighted(term), pull, part(3, term));
    }
  }
  // The gradient of one loaded row. `fresh`: this is the slot's first anchor. `scratch` holds two rows.
  Pull<T> pull(int term, int64_t pair, int64_t slot, bool fresh, T* scratch) const {
    const T* partner = fresh ? whole(row(3, term, pair, slot), scratch + sides_.width) : nullptr;
    return {.diagonal = nullptr, .anchor = whole(row(2, term, pair, slot), scratch), .partner = partner};
  }

 private:
  Tensor part(int which, int term) const {
    Tensor rows = torch::stable::select(buffer_[which], 0, term);
    return torch::stable::narrow(rows, 0, 0, loaded_ * slots_);
  }
  T* row(int which, int term, int64_t pair, int64_t slot) const {
    return data_of<T>(buffer_[which]) + ((term * pairs_ + pair - first_) * slots_ + slot) * sides_.dim;
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

}  // namespace drl_fast
