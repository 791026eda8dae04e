// Forward of the token interaction, compiled once per instruction set (simd_kernels.h).
//
//   S[r, l] = <row r, lane l's token in this slot>          r: a token of a text, l: a video, slot: one of its frames
//   m_r[l]  = max over slots of S                           the row token's best match, kept per row
//   m_l     = max over the rows of one item of S            the lane token's best match, kept per item
//   logit   = scale * (sum_r w_r m_r + sum_slot w_l m_l)
//
// The tile: DRL_FAST_TILE_ROWS rows x 2 vectors of lanes stay in registers over all of D. Rows are read in place, lanes
// from a panel [D][width]. A tile's S goes to a small buffer that stays in L1/L2, and both maxima read it once.
// FLOP: 2 * rows * lane tokens * D. Bytes from beyond L2: the panels, once per block of rows.
// Each S is one chain of multiply-adds over D in order, in every tile shape, so a score does not depend on the batch.
#pragma once

#include "simd.h"

namespace drl_fast::DRL_FAST_ISA {

// Lay out one slot of a group: row l of scratch is lane l's token, and the panel is the transpose of scratch.
template <class T>
void pack_slot(const Tokens<T>& lanes, const Group<T>& group, int slot, T* scratch) {
  const int64_t width = padded(lanes.dim), dim = lanes.dim;
  for (int l = 0; l < group.width; l++) {
    if (group.count[l] == 0) {
      for (int64_t k = 0; k < width; k++) scratch[l * width + k] = 0;
      continue;
    }
    const int64_t first = lanes.start[group.item[l]];
    load_row(lanes, first + (slot < group.count[l] ? slot : 0), scratch + l * width, static_cast<T*>(nullptr));
  }
  T* panel = group.panel + static_cast<int64_t>(slot) * dim * group.width;
  for (int64_t k = 0; k < dim; k++)
    for (int l = 0; l < group.width; l++) panel[k * group.width + l] = scratch[l * width + k];
}

// The lanes of a product: vector j at depth k is at data + k * step + j * apart.
template <class T>
struct Panel {
  const T* data;
  int64_t step, apart;
};

// out[M][stride_out] (+)= rows[M][depth] x panel[depth][NV vectors]. Element (i, k) of rows is at i * stride + k, or at
// k * stride + i if TRANSPOSED.
template <class T, int M, int NV, bool TRANSPOSED = false>
void tile(const T* rows, int64_t stride, const Panel<T>& panel, int64_t depth, bool accumulate, T* out,
          int64_t stride_out) {
  using S = Simd<T>;
  typename S::V acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = accumulate ? S::load(out + i * stride_out + j * S::N) : typename S::V{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    typename S::V lane[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) lane[j] = S::load(panel.data + k * panel.step + j * panel.apart);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const typename S::V x = S::broadcast(rows[TRANSPOSED ? k * stride + i : i * stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] += x * lane[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) S::store(out + i * stride_out + j * S::N, acc[i][j]);
}

// Depth of a panel's slice that fits L2 together with the rows.
constexpr int64_t kDepth = 1024;

// out[count][stride_out] = rows[count][dim] x panel[dim][NV vectors]
template <class T, int NV>
void product(const T* rows, int64_t count, int64_t stride, const Panel<T>& panel, int64_t dim, T* out,
             int64_t stride_out) {
  constexpr int M = DRL_FAST_TILE_ROWS;
  // Once even if D is 0, to set `out` to zeros.
  for (int64_t k = 0; k == 0 || k < dim; k += kDepth) {
    const int64_t depth = dim - k < kDepth ? dim - k : kDepth;
    const Panel<T> slice = {.data = panel.data + k * panel.step, .step = panel.step, .apart = panel.apart};
    int64_t r = 0;
    const auto at = [&](int64_t row) { return rows + row * stride + k; };
    for (; r + M <= count; r += M) tile<T, M, NV>(at(r), stride, slice, depth, k > 0, out + r * stride_out, stride_out);
    if (r + 4 <= count) {
      tile<T, 4, NV>(at(r), stride, slice, depth, k > 0, out + r * stride_out, stride_out);
      r += 4;
    }
    if (r + 2 <= count) {
      tile<T, 2, NV>(at(r), stride, slice, depth, k > 0, out + r * stride_out, stride_out);
      r += 2;
    }
    for (; r < count; r++) tile<T, 1, NV>(at(r), stride, slice, depth, k > 0, out + r * stride_out, stride_out);
  }
}

inline void put(const Matches& m, int64_t item, int64_t position, int64_t other, int64_t value) {
  const int64_t at = item * m.stride_item + position * m.stride_position + other * m.stride_other;
  if (m.wide)
    static_cast<int16_t*>(m.data)[at] = static_cast<int16_t>(value);
  else
    static_cast<uint8_t*>(m.data)[at] = static_cast<uint8_t>(value);
}

// Update both maxima from one slot's S, [rows][stride]. A NaN beats every number; of equal values the first wins.
// ROWS, LANES: which directions are wanted.
template <class T, int NV, bool ROWS, bool LANES>
void reduce_slot(const ForwardJob<T>& job, const Group<T>& group, int slot, const T* similarity, int64_t stride,
                 int64_t item0, int64_t item1, ForwardScratch<T>& scratch) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int W = NV * S::N;
  const int64_t row0 = job.rows.start[item0];
  for (int64_t item = item0; item < item1; item++) {
    const int64_t begin = job.rows.start[item] - row0, end = job.rows.start[item + 1] - row0;
    if (begin == end) continue;
    alignas(64) IntOf<T> chosen[W];
    for (int j = 0; j < W; j += S::N) {
      V top = {};
      I top_row = {};
      for (int64_t r = begin; r < end; r++) {
        const V s = S::load(similarity + r * stride + j);
        if constexpr (ROWS) {
          const V best = S::load(scratch.best + r * W + j);
          const I at = S::load(scratch.best_slot + r * W + j);
          const I better = slot == 0 ? I{} == I{} : (s > best) | ((s != s) & (best == best));
          S::store(scratch.best + r * W + j, better ? s : best);
          S::store(scratch.best_slot + r * W + j, better ? S::broadcast_int(slot) : at);
        }
        if constexpr (LANES) {
          const I better = r == begin ? I{} == I{} : (s > top) | ((s != s) & (top == top));
          top = better ? s : top;
          top_row = better ? S::broadcast_int(static_cast<IntOf<T>>(r - begin)) : top_row;
        }
      }
      if constexpr (LANES) {
        if (job.rows.zeros[item]) {
          const I lost = top < V{};
          top = lost ? V{} : top;
          top_row = lost ? S::broadcast_int(-1) : top_row;
        }
        const I present = S::load(group.count + j) > S::broadcast_int(slot);
        T* sum = scratch.lane_sum + (item - item0) * W + j;
        const V before = slot == 0 ? V{} : S::load(sum);
        const V after = before + S::load(group.weight + static_cast<int64_t>(slot) * W + j) * top;
        S::store(sum, present ? after : before);
        S::store(chosen + j, top_row);
      }
    }
    if (LANES && job.lane_matches.data) {
      const int32_t* position = job.rows.position + job.rows.start[item];
      for (int l = 0; l < W; l++)
        if (slot < group.count[l] && chosen[l] >= 0)
          put(job.lane_matches, group.item[l], group.position[static_cast<int64_t>(slot) * W + l], item,
              position[chosen[l]]);
    }
  }
}

// After the last slot: compute the row direction's sum, the logits and the rows' matches.
template <class T, int NV, bool ROWS, bool LANES>
void finish(const ForwardJob<T>& job, const Group<T>& group, int64_t item0, int64_t item1, ForwardScratch<T>& scratch) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  constexpr int W = NV * S::N;
  const int64_t row0 = job.rows.start[item0];
  for (int64_t item = item0; item < item1; item++) {
    const int64_t begin = job.rows.start[item], end = job.rows.start[item + 1];
    if (begin == end) continue;
    alignas(64) T logit[W];
    for (int j = 0; j < W; j += S::N) {
      V total = LANES ? S::load(scratch.lane_sum + (item - item0) * W + j) : V{};
      if constexpr (ROWS) {
        V sum = {};
        const I zero_competes = S::load(group.zeros + j) != I{};
        for (int64_t r = begin; r < end; r++) {
          V best = S::load(scratch.best + (r - row0) * W + j);
          const I lost = (best < V{}) & zero_competes;
          best = lost ? V{} : best;
          sum += S::broadcast(job.rows.weight[r]) * best;
          if (job.row_matches.data) {
            IntOf<T>* at = scratch.best_slot + (r - row0) * W + j;
            S::store(at, lost ? S::broadcast_int(-1) : S::load(at));
          }
        }
        total = total + sum;
      }
      S::store(logit + j, total * S::broadcast(job.scale));
    }
    for (int l = 0; l < W; l++)
      if (group.count[l] > 0)
        job.logits[item * job.logits_stride_row + group.item[l] * job.logits_stride_lane] = logit[l];
    if (!ROWS || !job.row_matches.data) continue;
    for (int64_t r = begin; r < end; r++) {
      const IntOf<T>* slot = scratch.best_slot + (r - row0) * W;
      for (int l = 0; l < W; l++)
        if (group.count[l] > 0 && slot[l] >= 0)
          put(job.row_matches, item, job.rows.position[r], group.item[l],
              group.position[static_cast<int64_t>(slot[l]) * W + l]);
    }
  }
}

template <class T, int NV, bool ROWS, bool LANES>
void forward_group(const ForwardJob<T>& job, const Group<T>& group, int64_t item0, int64_t item1,
                   ForwardScratch<T>& scratch) {
  constexpr int N = Simd<T>::N, W = NV * N;
  const int64_t count = job.rows.start[item1] - job.rows.start[item0], dim = job.rows.dim, width = padded(dim);
  int slot = 0;
  // A tile of one vector is bound by load latency, so a narrow group's slots go through the product in pairs.
  for (; NV == 1 && slot + 1 < group.slots; slot += 2) {
    const Panel<T> two = {.data = group.panel + slot * dim * N, .step = N, .apart = dim * N};
    product<T, 2>(scratch.rows, count, width, two, dim, scratch.similarity, 2 * N);
    for (int s = 0; s < 2; s++)
      reduce_slot<T, NV, ROWS, LANES>(job, group, slot + s, scratch.similarity + s * N, 2 * N, item0, item1, scratch);
  }
  for (; slot < group.slots; slot++) {
    const Panel<T> one = {.data = group.panel + slot * dim * W, .step = W, .apart = N};
    product<T, NV>(scratch.rows, count, width, one, dim, scratch.similarity, W);
    reduce_slot<T, NV, ROWS, LANES>(job, group, slot, scratch.similarity, W, item0, item1, scratch);
  }
  finish<T, NV, ROWS, LANES>(job, group, item0, item1, scratch);
}

// Run one task: one block of row items against one group of lane items.
template <class T>
void forward(const ForwardJob<T>& job, int64_t task, ForwardScratch<T>& scratch) {
  const int64_t block = task / job.group_count;
  const Group<T>& group = job.groups[task % job.group_count];
  const int64_t item0 = job.block[block], item1 = job.block[block + 1];
  if (scratch.loaded_block != block) {
    const int64_t row0 = job.rows.start[item0], row1 = job.rows.start[item1];
    for (int64_t r = row0; r < row1; r++)
      load_row(job.rows, r, scratch.rows + (r - row0) * padded(job.rows.dim), static_cast<T*>(nullptr));
    scratch.loaded_block = block;
  }
  const bool rows = job.rows.weight, lanes = job.lanes.weight, two = group.width > Simd<T>::N;
  auto run = two ? (rows && lanes ? forward_group<T, 2, true, true>
                    : rows        ? forward_group<T, 2, true, false>
                                  : forward_group<T, 2, false, true>)
                 : (rows && lanes ? forward_group<T, 1, true, true>
                    : rows        ? forward_group<T, 1, true, false>
                                  : forward_group<T, 1, false, true>);
  run(job, group, item0, item1, scratch);
}

}  // namespace drl_fast::DRL_FAST_ISA
