// Types shared by the token interaction's operators (token_interaction.cpp) and its kernels
// (token_interaction_forward.h and token_interaction_backward.h, compiled once per instruction set).
//
// The product has one side in rows (one token per row) and the other in lanes (one item, for example one video, per
// SIMD lane, its tokens one after the other). Only real tokens are laid out; `position` maps them back to padded rows.
#pragma once

#include <cstdint>
#include <type_traits>

namespace drl_fast {

enum class Dtype : uint8_t { f32, f64, f16, bf16 };

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return 8;
    case Dtype::f32:
      return 4;
    default:
      return 2;
  }
}

// An integer as wide as T, so that a vector of integers has as many elements as a vector of T.
template <class T>
using IntOf = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

// The real tokens of one side, item after item. T is the type of the arithmetic: double for float64, otherwise float.
template <class T>
struct Tokens {
  Dtype dtype;
  int64_t items, length, dim;
  bool normalize;
  const int64_t* start;     // [items + 1] first token of each item
  const int32_t* position;  // [tokens] place in the padded row
  const char* const* row;   // [tokens] the token's features, contiguous
  const T* weight;          // [tokens], or null if this side's sum is not wanted
  const int32_t* zeros;     // [items] masked tokens whose similarity of 0 is a candidate
  const int32_t* token_at;  // [items * length] the token at a padded position, -1 if masked (backward only)
};

// One side's matches: element (item, position, other item) of a uint8 or int16 array.
struct Matches {
  void* data;  // null: not kept
  bool wide;   // int16
  int64_t stride_item, stride_position, stride_other;
};

// Items side by side in the lanes of one or two vectors. Shorter items repeat their first token.
template <class T>
struct Group {
  int width, slots;
  void* panel;              // [slots][dim][width], in the dtype that the lanes are stored in
  const T* weight;          // [slots][width]
  const IntOf<T>* count;    // [width] real tokens of the lane's item, 0 for an unused lane
  const IntOf<T>* zeros;    // [width]
  const int32_t* position;  // [slots][width]
  const int64_t* token;     // [slots][width], -1 for an unused lane or slot
  const int64_t* item;      // [width]
};

template <class T>
struct ForwardJob {
  Tokens<T> rows, lanes;
  Dtype storage;  // of the panels
  const Group<T>* groups;
  int64_t group_count;
  const int64_t* block;  // [blocks + 1] first row item of each block of whole items
  T scale;               // 1/2 for two directions, 1 for one
  T* logits;
  int64_t logits_stride_row, logits_stride_lane;
  Matches row_matches, lane_matches;
};

// Scratch memory of one thread.
template <class T>
struct ForwardScratch {
  T* rows;        // [max_block_rows][padded dim] tokens of the block that was loaded last, or one tile and a row
  T* similarity;  // [max_block_rows, at least kFewRows][width]
  T* best;        // [max_block_rows][width]
  IntOf<T>* best_slot;
  T* lane_sum;  // [max_block_items][width]
  int64_t loaded_block;
};

// Gradient of one side (the target), gathered from the tokens of the other (the source).
template <class T>
struct BackwardJob {
  Tokens<T> target, source;
  const T* const* source_row;  // [source tokens] rows of whole vectors, either in the caller's tensor or a copy
  const T* source_scale;       // [source tokens] factor that is still to be applied to each row; null: 1
  const int64_t* block;        // [blocks + 1] first target item
  const int64_t* chunk;        // [chunks + 1] first source item; a chunk's rows stay in cache
  int64_t chunk_count;
  T scale;
  const T* grad_logits;
  int64_t grad_stride_target, grad_stride_source;
  Matches target_matches, source_matches;
  char* grad_features;  // [items][length][dim] contiguous, in the features' dtype; null: not wanted
  T* grad_weight;       // [items][length]
};

// Scratch memory of one thread.
template <class T>
struct BackwardScratch {
  T* grad;               // [max_block_rows][padded dim]
  T* grad_weight;        // [max_block_rows]
  T* row;                // [max_block_rows][padded dim] the target's normalized tokens
  T* inverse_norm;       // [max_block_rows]
  T* grad_logit;         // [source items of a chunk] scaled gradients of one target item's logits
  const T** own_row;     // [source items of a chunk] source tokens that one target token chose
  T* own_coefficient;    // [source items of a chunk]
  int32_t* begin;        // [target length + 1] start of each target token's entries in other_row
  const T** other_row;   // [source tokens of a chunk] source tokens that chose a target token, sorted by that token
  T* other_coefficient;  // [source tokens of a chunk]
  int32_t* chooser_of;   // [source tokens of a chunk] the target token that each one chose
  bool stale_match;      // whether a match named a token that is masked or beyond its row
};

// The interaction with softmax or logsumexp in place of the maximum, in both passes.
template <class T>
struct SoftJob {
  Tokens<T> rows, lanes;
  T scale;  // 1/2 for two directions, 1 for one
  T temperature;
  bool logsumexp;
  T* logits;             // forward only
  const T* grad_logits;  // backward only
  int64_t logits_stride_row, logits_stride_lane;
};

// One block of whole row items against one group, and one thread's scratch memory for it.
template <class T>
struct SoftBlock {
  int64_t first_item, last_item;
  const T* rows;  // [rows][padded dim] the block's normalized tokens
  T* similarity;  // [rows][stride] S in columns (slot, lane); the backward turns it into d loss / d S
  int64_t stride;
  T* row_value;         // [rows][width]
  T* row_factor;        // [rows][width] 1 / sum of exponentials
  T* exponential;       // [rows][slots * width], backward only
  T* column;            // [rows][vector], backward only
  T* grad_row_weight;   // [rows], backward only
  T* grad_lane_weight;  // [slots * width], backward only
};

// A block of at most this many rows may be kept as one tile, [dim][kFewRows], so that each panel is read once. With
// videos that fit no cache this hides the time that reading takes.
constexpr int kFewRows = 12;

// Kernels of one instruction set for one T.
template <class T>
struct Kernels {
  int vector;  // lanes of one vector
  void (*load_row)(const Tokens<T>&, int64_t token, T* out, T* inverse_norm);
  void (*pack_slot)(const Tokens<T>&, const Group<T>&, int slot, Dtype storage, T* scratch);
  void (*forward)(const ForwardJob<T>&, int64_t task, ForwardScratch<T>&);
  void (*widen)(const void* from, Dtype, int64_t count, T* out);  // count is a multiple of vector
  void (*backward)(const BackwardJob<T>&, int64_t task, BackwardScratch<T>&);
  void (*soft_forward)(const SoftJob<T>&, const Group<T>&, const SoftBlock<T>&);
  void (*soft_backward)(const SoftJob<T>&, const Group<T>&, const SoftBlock<T>&);
  // out[count][width] += a[count][depth] x panels, where a[i][k] is at i * stride + k, or k * stride + i if transposed
  void (*add_product)(const T* a, int64_t stride, bool transposed, int64_t count, int64_t depth, const T* panels,
                      int64_t width, T* out);
  void (*store_gradient)(const Tokens<T>&, T* grad, const T* row, T inverse_norm, char* out);
};

// Rows of features are padded to a multiple of this many elements: the widest vector of float.
constexpr int64_t kRowMultiple = 16;

inline int64_t padded(int64_t dim) { return (dim + kRowMultiple - 1) / kRowMultiple * kRowMultiple; }

}  // namespace drl_fast
