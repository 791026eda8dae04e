// What the token interaction's driver (token_interaction.cpp) and its kernels (one object file an instruction set) share.
//
// One side of the product is laid out in rows (one token a row), the other in lanes (one item, e.g. one video, a SIMD
// lane, its tokens one after the other). Only real tokens are laid out; `position` leads back to the padded row.
#pragma once

#include <cstdint>
#include <type_traits>

namespace drl_fast {

enum class Dtype { f32, f64, f16, bf16 };

// An integer as wide as T, so that one vector of it belongs to one vector of T.
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// The real tokens of one side, item after item. T is what arithmetic is done in: double for double, else float.
template <class T>
struct Tokens {
  Dtype dtype;
  int64_t items, length, dim;
  bool normalize;
  const int64_t* start;       // [items + 1] first token of each item
  const int32_t* position;    // [tokens] place in the padded row
  const char* const* row;     // [tokens] the token's features, contiguous
  const T* weight;            // [tokens], or null where this side's sum is not wanted
  const uint8_t* zero_competes;  // [items] a masked token's similarity of 0 is a candidate
  const int32_t* token_at;    // [items * length] the token at a padded position, -1 where masked (backward only)
};

// Where matches go and come from: element (item, position, other item) of a uint8 or int16 array.
struct Matches {
  void* data;  // null: not kept
  bool wide;   // int16
  int64_t stride_item, stride_position, stride_other;
};

// One vector-width or two of items, side by side in lanes. Missing tokens repeat the item's first one.
template <class T>
struct Group {
  int width, slots;
  T* panel;                 // [slots][dim][width]
  const T* weight;          // [slots][width]
  const IntOf<T>* count;    // [width] real tokens of the lane's item, 0 for an unused lane
  const IntOf<T>* zero_competes;  // [width]
  const int32_t* position;  // [slots][width]
  const int64_t* item;      // [width]
};

template <class T>
struct ForwardJob {
  Tokens<T> rows, lanes;
  const Group<T>* groups;
  int64_t group_count;
  const int64_t* block;  // [blocks + 1] first row item of each block of whole items
  T scale;               // 1/2 of two directions, 1 of one
  T* logits;
  int64_t logits_stride_row, logits_stride_lane;
  Matches row_matches, lane_matches;
};

// Scratch of one thread.
template <class T>
struct ForwardScratch {
  T* rows;        // [max_block_rows][padded dim], the block last loaded
  T* similarity;  // [max_block_rows][width]
  T* best;        // [max_block_rows][width]
  IntOf<T>* best_slot;
  T* lane_sum;    // [max_block_rows][width], one row an item
  int64_t loaded_block;
};

// Gradient of one side, the target, gathered from the other, the source.
template <class T>
struct BackwardJob {
  Tokens<T> target, source;
  const T* const* source_row;  // [source tokens] rows of whole vectors, as they are where that is possible ...
  const T* source_scale;       // [source tokens] ... and what they are still to be multiplied by; null: 1
  const int64_t* block;  // [blocks + 1] first target item
  const int64_t* chunk;  // [chunks + 1] first source item; a chunk's rows stay in cache
  int64_t chunk_count;
  T scale;
  const T* grad_logits;
  int64_t grad_stride_target, grad_stride_source;
  Matches target_matches, source_matches;
  char* grad_features;   // [items][length][dim] contiguous, of the features' dtype
  T* grad_weight;        // [items][length]
};

template <class T>
struct BackwardScratch {
  T* grad;            // [max_block_rows][padded dim]
  T* grad_weight;     // [max_block_rows]
  T* row;             // [max_block_rows][padded dim] the target's normalised tokens
  T* inverse_norm;    // [max_block_rows]
  T* grad_logit;          // [source items of a chunk] of one target item, scaled
  const T** own_row;      // [source items of a chunk] tokens that one target token chose ...
  T* own_coefficient;
  int32_t* begin;         // [target length + 1] ... and those that chose it, by target token
  const T** other_row;    // [source tokens of a chunk]
  T* other_coefficient;
  int32_t* chooser_of;    // [source tokens of a chunk] the target token each chose
};

// What one instruction set provides for one T.
template <class T>
struct Kernels {
  int vector;  // lanes of one vector
  void (*load_row)(const Tokens<T>&, int64_t token, T* out, T* inverse_norm);
  void (*pack_slot)(const Tokens<T>&, const Group<T>&, int slot, T* scratch);
  void (*forward)(const ForwardJob<T>&, int64_t task, ForwardScratch<T>&);
  void (*backward)(const BackwardJob<T>&, int64_t task, BackwardScratch<T>&);
  void (*store_gradient)(const Tokens<T>&, T* grad, const T* row, T inverse_norm, char* out);
};

// Rows of features are padded to this many elements, so that kernels work in whole vectors.
inline int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

}  // namespace drl_fast
