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

// panel[k][l] = rows[l][k] for k < dim.
template <class T, class P>
void transpose(const T* rows, int64_t stride, int64_t dim, int width, P* panel) {
  for (int64_t k = 0; k < dim; k++)
    for (int l = 0; l < width; l++) panel[k * width + l] = static_cast<P>(rows[l * stride + k]);
}

// Lay out one slot of a group: row l of scratch is lane l's token, and the panel is the transpose of scratch.
template <class T>
void pack_slot(const Tokens<T>& lanes, const Group<T>& group, int slot, Dtype storage, T* scratch) {
  const int64_t width = padded(lanes.dim), dim = lanes.dim;
  for (int l = 0; l < group.width; l++) {
    if (group.count[l] == 0) {
      for (int64_t k = 0; k < width; k++) scratch[l * width + k] = 0;
      continue;
    }
    const int64_t first = lanes.start[group.item[l]];
    load_row(lanes, first + (slot < group.count[l] ? slot : 0), scratch + l * width, static_cast<T*>(nullptr));
  }
  const int64_t offset = static_cast<int64_t>(slot) * dim * group.width;
  if (storage == Dtype::f16)
    transpose(scratch, width, dim, group.width, static_cast<Half*>(group.panel) + offset);
  else if (storage == Dtype::bf16)
    transpose(scratch, width, dim, group.width, static_cast<BFloat16*>(group.panel) + offset);
  else
    transpose(scratch, width, dim, group.width, static_cast<T*>(group.panel) + offset);
}

// The lanes of a product: vector j at depth k is at data + k * step + j * apart. P is T or a 16-bit type.
template <class P>
struct Panel {
  const P* data;
  int64_t step, apart;
};

// Bytes of a cache line, and how far ahead of the product a panel that comes from memory is fetched.
constexpr int kLine = 64, kPrefetch = 8192;

// out[M][stride_out] (+)= rows[M][depth] x panel[depth][NV vectors]. Element (i, k) of rows is at i * stride + k, or at
// k * stride + i if TRANSPOSED. STREAMED: the panel comes from memory.
template <class T, int M, int NV, bool TRANSPOSED = false, class P = T, bool STREAMED = false>
void tile(const T* rows, int64_t stride, const Panel<P>& panel, int64_t depth, bool accumulate, T* out,
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
    for (int j = 0; j < NV; j++) lane[j] = load_as<T>(panel.data + k * panel.step + j * panel.apart);
    if constexpr (STREAMED)
#pragma GCC unroll 4
      for (int j = 0; j < NV * S::N * static_cast<int>(sizeof(P)); j += kLine)
        __builtin_prefetch(reinterpret_cast<const char*>(panel.data + k * panel.step) + kPrefetch + j, 0, 2);
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
template <class T, int NV, class P>
void product(const T* rows, int64_t count, int64_t stride, const Panel<P>& panel, int64_t dim, T* out,
             int64_t stride_out) {
  constexpr int M = DRL_FAST_TILE_ROWS;
  // Once even if D is 0, to set `out` to zeros.
  for (int64_t k = 0; k == 0 || k < dim; k += kDepth) {
    const int64_t depth = dim - k < kDepth ? dim - k : kDepth;
    const Panel<P> slice = {.data = panel.data + k * panel.step, .step = panel.step, .apart = panel.apart};
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

// Whether a block's rows are kept as one tile. Fewer rows are one tile of the product as they are, and vectors shorter
// than 64 bytes come in too few registers.
inline bool is_one_tile(int64_t rows) {
  return DRL_FAST_VECTOR_BYTES == 64 && rows > DRL_FAST_TILE_ROWS && rows <= kFewRows;
}

// out[count][stride_out] = a block's rows x panel[dim][NV vectors]
template <class T, int NV, class P>
void block_product(const T* rows, int64_t count, const Panel<P>& panel, int64_t dim, T* out, int64_t stride_out) {
  if constexpr (DRL_FAST_VECTOR_BYTES == 64)
    if (is_one_tile(count))
      return tile<T, kFewRows, NV, true, P, true>(rows, kFewRows, panel, dim, false, out, stride_out);
  product<T, NV>(rows, count, padded(dim), panel, dim, out, stride_out);
}

// Load the tokens row0..row1 - 1 for block_product. `scratch` holds as many padded rows, or kFewRows + 1.
template <class T>
void load_block(const Tokens<T>& side, int64_t row0, int64_t row1, T* scratch) {
  const int64_t width = padded(side.dim);
  if (!is_one_tile(row1 - row0)) {
    for (int64_t r = row0; r < row1; r++) load_row(side, r, scratch + (r - row0) * width, static_cast<T*>(nullptr));
    return;
  }
  T* row = scratch + kFewRows * width;
  for (int64_t r = 0; r < kFewRows; r++) {
    if (row0 + r < row1) load_row(side, row0 + r, row, static_cast<T*>(nullptr));
    for (int64_t k = 0; k < width; k++) scratch[k * kFewRows + r] = row0 + r < row1 ? row[k] : T(0);
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

template <class T, class P, int NV, bool ROWS, bool LANES>
void forward_group(const ForwardJob<T>& job, const Group<T>& group, int64_t item0, int64_t item1,
                   ForwardScratch<T>& scratch) {
  constexpr int N = Simd<T>::N, W = NV * N;
  const int64_t count = job.rows.start[item1] - job.rows.start[item0], dim = job.rows.dim;
  const P* panel = static_cast<const P*>(group.panel);
  int slot = 0;
  // A tile of one vector is bound by load latency, so a narrow group's slots go through the product in pairs.
  for (; NV == 1 && slot + 1 < group.slots; slot += 2) {
    const Panel<P> two = {.data = panel + slot * dim * N, .step = N, .apart = dim * N};
    block_product<T, 2>(scratch.rows, count, two, dim, scratch.similarity, 2 * N);
    for (int s = 0; s < 2; s++)
      reduce_slot<T, NV, ROWS, LANES>(job, group, slot + s, scratch.similarity + s * N, 2 * N, item0, item1, scratch);
  }
  for (; slot < group.slots; slot++) {
    const Panel<P> one = {.data = panel + slot * dim * W, .step = W, .apart = N};
    block_product<T, NV>(scratch.rows, count, one, dim, scratch.similarity, W);
    reduce_slot<T, NV, ROWS, LANES>(job, group, slot, scratch.similarity, W, item0, item1, scratch);
  }
  finish<T, NV, ROWS, LANES>(job, group, item0, item1, scratch);
}

template <class T, class P>
void forward_directions(const ForwardJob<T>& job, const Group<T>& group, int64_t item0, int64_t item1,
                        ForwardScratch<T>& scratch) {
  const bool rows = job.rows.weight, lanes = job.lanes.weight, two = group.width > Simd<T>::N;
  auto run = two ? (rows && lanes ? forward_group<T, P, 2, true, true>
                    : rows        ? forward_group<T, P, 2, true, false>
                                  : forward_group<T, P, 2, false, true>)
                 : (rows && lanes ? forward_group<T, P, 1, true, true>
                    : rows        ? forward_group<T, P, 1, true, false>
                                  : forward_group<T, P, 1, false, true>);
  run(job, group, item0, item1, scratch);
}

// Run one task: one block of row items against one group of lane items.
template <class T>
void forward(const ForwardJob<T>& job, int64_t task, ForwardScratch<T>& scratch) {
  const int64_t block = task / job.group_count;
  const Group<T>& group = job.groups[task % job.group_count];
  const int64_t item0 = job.block[block], item1 = job.block[block + 1];
  if (scratch.loaded_block != block) {
    load_block(job.rows, job.rows.start[item0], job.rows.start[item1], scratch.rows);
    scratch.loaded_block = block;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (job.storage == Dtype::f16) return forward_directions<T, Half>(job, group, item0, item1, scratch);
    if (job.storage == Dtype::bf16) return forward_directions<T, BFloat16>(job, group, item0, item1, scratch);
  }
  forward_directions<T, T>(job, group, item0, item1, scratch);
}

}  // namespace drl_fast::DRL_FAST_ISA
