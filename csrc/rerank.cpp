// Operators drl_fast::rerank and its backward on the CPU: each text against candidates of its own.
//
// A candidate meets one text only, so laying it out in lanes would cost more than the product. Instead the words are
// the columns of a panel, and the candidates' frames are its rows, read once:
//
//   S[f, w] = <frame f, word w>       chunks of whole candidates, about kChunkRows frames, so that they stay in L2
//   C[f, w] = d loss / d S[f, w]      the backward computes S again
//   grad of frames = C x words        grad of words = C^T x frames
//
// A task is one text with up to kTaskCandidates of its candidates. A text's gradient is the sum over its tasks, in
// order: bits depend on the shapes alone.
#include "rerank.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "capability.h"
#include "parallel.h"
#include "sides.h"
#include "tensors.h"
#include "token_interaction.h"

namespace drl_fast {
namespace {

constexpr int64_t kTaskCandidates = 32;
constexpr int64_t kChunkRows = 64;

// Candidates [first, last) of one text; `part` is the first row of the task's part of the texts' gradients.
struct Task {
  int64_t text, first, last, part;
};

struct Options {
  bool normalize, zero_competes;
  Pooling pooling;
  double temperature;
};

Pooling pooling_of(const std::string& name) {
  if (name == "max") return Pooling::max;
  if (name == "softmax") return Pooling::softmax;
  STD_TORCH_CHECK(name == "logsumexp", "drl_fast::rerank: pooling must be max, softmax or logsumexp; choose one");
  return Pooling::logsumexp;
}

// Both sides and the tasks.
template <class T>
struct Problem {
  Problem(const Tensor& text_features, const Tensor& candidate_features, const Tensor& text_weight,
          const OptionalTensor& candidate_weight, const OptionalTensor& text_mask, const OptionalTensor& candidate_mask,
          const Tensor& offsets, const Options& chosen)
      : text_side(text_features, text_weight, text_mask, chosen.normalize, chosen.zero_competes),
        candidate_side(candidate_features, candidate_weight, candidate_mask, chosen.normalize, chosen.zero_competes),
        text(text_side.tokens),
        candidates(candidate_side.tokens),
        pooling(chosen.pooling),
        temperature(static_cast<T>(chosen.temperature)),
        scale(candidate_weight ? T(0.5) : T(1)) {
    check_pair(text_features, candidate_features);
    STD_TORCH_CHECK(chosen.temperature > 0, "drl_fast::rerank: temperature must be positive; pass a number above 0");
    STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && has_sizes(offsets, {text.items + 1}),
                    "drl_fast::rerank: offsets must be int64 (A + 1,), one more than texts");
    const int64_t* offset = const_data_of<int64_t>(offsets);
    const auto at = [&](int64_t a) { return offset[a * offsets.stride(0)]; };
    bool whole = at(0) == 0 && at(text.items) == candidates.items;
    for (int64_t a = 0; a < text.items; a++) whole = whole && at(a) <= at(a + 1);
    STD_TORCH_CHECK(whole,
                    "drl_fast::rerank: offsets must start at 0, not decrease and end at the number of candidates");
    for (int64_t a = 0; a < text.items; a++) {
      most_words = std::max(most_words, text.start[a + 1] - text.start[a]);
      for (int64_t first = at(a); first < at(a + 1); first += kTaskCandidates) {
        tasks.push_back(
            {.text = a, .first = first, .last = std::min(first + kTaskCandidates, at(a + 1)), .part = parts});
        parts += text.start[a + 1] - text.start[a];
      }
    }
    for (int64_t c = 0; c < candidates.items; c++)
      most_rows = std::max(most_rows, candidates.start[c + 1] - candidates.start[c]);
  }
  Problem(const Problem&) = delete;

  int64_t threads() const {
    return threads_for(static_cast<int64_t>(tasks.size()), candidate_side.count() * most_words * padded(text.dim));
  }

  Side<T> text_side, candidate_side;
  const Tokens<T>& text;
  const Tokens<T>& candidates;
  Pooling pooling;
  T temperature, scale;
  std::vector<Task> tasks;
  int64_t most_words = 1, most_rows = kChunkRows, parts = 0;
};

int64_t whole_vectors(int64_t count, int64_t vector) { return (count + vector - 1) / vector * vector; }

// One thread's memory for a text and a chunk of its candidates, and what both passes compute there.
template <class T>
class Chunk {
 public:
  Chunk(const Problem<T>& problem, bool backward)
      : problem_(problem),
        vector_(chosen_kernels<T>().vector),
        width_(padded(problem.text.dim)),
        most_columns_(whole_vectors(problem.most_words, vector_)),
        stride_(whole_vectors(problem.most_rows, vector_)),
        word_(width_),
        panels_(most_columns_ * width_),
        matrix_(2 * most_columns_ * stride_),
        slopes_(backward ? 2 * most_columns_ * stride_ : 0),
        values_(most_columns_ + stride_ + vector_),
        rows(problem.most_rows * width_),
        inverse_norm(problem.most_rows),
        word_panels(backward ? problem.most_words * width_ : 0),
        row_panels(backward ? problem.most_rows * width_ : 0),
        coefficient(backward ? stride_ * most_columns_ : 0),
        grad(backward ? problem.most_rows * width_ : 0),
        backward_(backward) {}

  // Lay out a text's words: as columns of the product, and for the backward as rows of panels of D.
  void load_text(int64_t item) {
    if (loaded_ == item) return;
    loaded_ = item;
    const Tokens<T>& text = problem_.text;
    first_word = text.start[item];
    words = text.start[item + 1] - first_word;
    columns = whole_vectors(words, vector_);
    const int64_t two = 2 * vector_;
    for (int64_t column = 0; column < columns; column++) {
      // Columns beyond the words repeat the first.
      const bool real = column < words;
      chosen_kernels<T>().load_row(text, first_word + (real ? column : 0), word_.get(), nullptr);
      if (backward_ && real) put_in_panels(word_.get(), width_, column, words, word_panels.get());
      const int64_t first = column / two * two, wide = std::min(two, columns - first);
      T* to = panels_.get() + first * text.dim + column - first;
      for (int64_t k = 0; k < text.dim; k++) to[k * wide] = word_.get()[k];
    }
  }

  // Compute S of the candidates [first, last) and pool it over words.
  void load_candidates(int64_t first, int64_t last) {
    const Tokens<T>& side = problem_.candidates;
    first_row = side.start[first];
    count = side.start[last] - first_row;
    if (words == 0 || count == 0) return;
    for (int64_t r = 0; r < count; r++)
      chosen_kernels<T>().load_row(side, first_row + r, rows.get() + r * width_, inverse_norm.get() + r);
    T* by_frame = matrix_.get();
    std::fill_n(by_frame, count * columns, T(0));
    chosen_kernels<T>().add_product(rows.get(), width_, false, count, side.dim, panels_.get(), columns, by_frame);
    if (!side.weight) return;
    T* by_word = by_frame + most_columns_ * stride_;
    const int64_t wide = whole_vectors(count, vector_);
    for (int64_t w = 0; w < words; w++)
      for (int64_t r = 0; r < wide; r++) by_word[w * stride_ + r] = r < count ? by_frame[r * columns + w] : T(0);
    pool({.similarity = by_word,
          .rows = words,
          .columns = wide,
          .stride = stride_,
          .zeros = static_cast<T>(problem_.text.zeros[loaded_]),
          .value = values_.get() + most_columns_,
          .slope = backward_ ? slopes_.get() + most_columns_ * stride_ : nullptr});
  }

  // Pool S over the frames of one candidate of the chunk.
  void pool_frames(int64_t candidate) {
    const int64_t row = problem_.candidates.start[candidate] - first_row;
    pool({.similarity = matrix_.get() + row * columns,
          .rows = problem_.candidates.start[candidate + 1] - problem_.candidates.start[candidate],
          .columns = columns,
          .stride = columns,
          .zeros = static_cast<T>(problem_.candidates.zeros[candidate]),
          .value = values_.get(),
          .slope = backward_ ? slopes_.get() + row * columns : nullptr});
  }

  // The words' values for the candidate that pool_frames saw last, and the values of all the chunk's frames.
  const T* of_words() const { return values_.get(); }
  const T* of_frames() const { return values_.get() + most_columns_; }
  // d value / d S for frame r and word w: of the word's value, and of the frame's.
  T slope_of_word(int64_t r, int64_t w) const { return slopes_.get()[r * columns + w]; }
  T slope_of_frame(int64_t r, int64_t w) const { return slopes_.get()[(most_columns_ + w) * stride_ + r]; }

 private:
  void pool(const Columns<T>& matrix) const {
    chosen_rerank_kernels<T>().pool(matrix, problem_.pooling, problem_.temperature);
  }

  const Problem<T>& problem_;
  int64_t vector_, width_, most_columns_, stride_, loaded_ = -1;
  Buffer<T> word_, panels_, matrix_, slopes_, values_;

 public:
  int64_t first_word = 0, words = 0, columns = 0, first_row = 0, count = 0;
  Buffer<T> rows, inverse_norm;       // [count][width] normalized frames
  Buffer<T> word_panels, row_panels;  // words and frames as add_product wants them
  Buffer<T> coefficient, grad;        // C [count][columns], and the frames' gradients

 private:
  bool backward_;
};

// Call body(task, chunk memory) for every task and its text, on threads.
template <class T, class Body>
void for_tasks(const Problem<T>& problem, bool backward, const Body& body) {
  const int64_t threads = problem.threads();
  std::vector<std::unique_ptr<Chunk<T>>> memory;
  memory.reserve(threads);
  for (int64_t t = 0; t < threads; t++) memory.push_back(std::make_unique<Chunk<T>>(problem, backward));
  parallel(static_cast<int64_t>(problem.tasks.size()), threads, [&](int64_t task, int64_t thread) {
    memory[thread]->load_text(problem.tasks[task].text);
    body(problem.tasks[task], *memory[thread]);
  });
}

// Call body(first, last) for consecutive candidates of a task that have about kChunkRows real frames.
template <class T, class Body>
void for_chunks(const Tokens<T>& candidates, const Task& task, const Body& body) {
  for (int64_t first = task.first; first < task.last;) {
    int64_t last = first + 1;
    while (last < task.last && candidates.start[last + 1] - candidates.start[first] <= kChunkRows) last++;
    body(first, last);
    first = last;
  }
}

template <class T>
Tensor forward(const Problem<T>& problem) {
  const Tokens<T>& side = problem.candidates;
  Tensor scores = zeros({side.items}, scalar_type<T>);
  T* out = data_of<T>(scores);
  const auto sum = chosen_rerank_kernels<T>().weighted_sum;
  for_tasks(problem, false, [&](const Task& task, Chunk<T>& chunk) {
    for_chunks(side, task, [&](int64_t first, int64_t last) {
      chunk.load_candidates(first, last);
      for (int64_t c = first; c < last; c++) {
        const int64_t begin = side.start[c], frames = side.start[c + 1] - begin;
        if (chunk.words == 0 || frames == 0) continue;
        chunk.pool_frames(c);
        T total = sum(problem.text.weight + chunk.first_word, chunk.of_words(), chunk.words);
        if (side.weight) total += sum(side.weight + begin, chunk.of_frames() + begin - chunk.first_row, frames);
        out[c] = total * problem.scale;
      }
    });
  });
  return scores;
}

// The gradients of one side, as the caller sees them.
template <class T>
struct Gradients {
  Gradients(const Tensor& like, bool wants_features, bool wants_weight)
      : features(empty(
            wants_features ? std::vector<int64_t>{like.size(0), like.size(1), like.size(2)} : std::vector<int64_t>{0},
            like.scalar_type())),
        weight(zeros(wants_weight ? std::vector<int64_t>{like.size(0), like.size(1)} : std::vector<int64_t>{0},
                     scalar_type<T>)),
        wants_features(wants_features),
        wants_weight(wants_weight),
        feature_data(data_of<char>(features)),
        weight_data(data_of<T>(weight)) {}

  char* at(const Tokens<T>& side, int64_t item, int64_t position) const {
    return feature_data + (item * side.length + position) * side.dim * size_of(side.dtype);
  }
  // Write zeros for an item's masked tokens, or for all if the item has no gradient.
  void clear(const Tokens<T>& side, int64_t item, bool all) const {
    if (!wants_features) return;
    for (int64_t p = 0; p < side.length; p++)
      if (all || side.token_at[item * side.length + p] < 0)
        std::fill_n(at(side, item, p), side.dim * size_of(side.dtype), char{0});
  }

  Tensor features, weight;
  bool wants_features, wants_weight;
  char* feature_data;
  T* weight_data;
};

// Write C and the candidates' weights' gradients for a chunk, and add the text's to `text_weight`.
template <class T>
void coefficients(const Problem<T>& problem, Chunk<T>& chunk, int64_t first, int64_t last, const T* grad_scores,
                  int64_t stride, const Gradients<T>& of_candidates, T* text_weight) {
  const Tokens<T>& side = problem.candidates;
  for (int64_t c = first; c < last; c++) {
    if (side.start[c] == side.start[c + 1]) continue;
    chunk.pool_frames(c);
    const T g = problem.scale * grad_scores[c * stride];
    for (int64_t w = 0; w < chunk.words; w++) text_weight[w] += g * chunk.of_words()[w];
    for (int64_t token = side.start[c]; token < side.start[c + 1]; token++) {
      const int64_t r = token - chunk.first_row;
      if (side.weight && of_candidates.wants_weight)
        of_candidates.weight_data[c * side.length + side.position[token]] = g * chunk.of_frames()[r];
      for (int64_t w = 0; w < chunk.words; w++) {
        const T by_word = chunk.slope_of_word(r, w), by_frame = side.weight ? chunk.slope_of_frame(r, w) : T(0);
        // An infinite weight or gradient must not turn a slope of 0 into NaN.
        T sum = by_word == 0 ? T(0) : problem.text.weight[chunk.first_word + w] * by_word;
        if (by_frame != 0) sum += side.weight[token] * by_frame;
        chunk.coefficient.get()[r * chunk.columns + w] = sum == 0 ? T(0) : g * sum;
      }
    }
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Problem<T>& problem, const Tensor& grad_scores,
                                                    const Gradients<T>& of_text, const Gradients<T>& of_candidates) {
  const Kernels<T>& k = chosen_kernels<T>();
  const Tokens<T>& text = problem.text;
  const Tokens<T>& side = problem.candidates;
  STD_TORCH_CHECK(grad_scores.scalar_type() == scalar_type<T> && has_sizes(grad_scores, {side.items}),
                  "drl_fast::rerank_backward: grad_scores must be (candidates,), in the scores' dtype");
  const T* grad = const_data_of<T>(grad_scores);
  const int64_t width = padded(text.dim), stride = grad_scores.stride(0);
  Buffer<T> parts(of_text.wants_features ? problem.parts * width : 0);
  std::vector<T> part_weights(problem.parts);
  if (of_text.wants_features) std::fill_n(parts.get(), problem.parts * width, T(0));
  for_tasks(problem, true, [&](const Task& task, Chunk<T>& chunk) {
    for (int64_t c = task.first; c < task.last; c++) of_candidates.clear(side, c, chunk.words == 0);
    for_chunks(side, task, [&](int64_t first, int64_t last) {
      chunk.load_candidates(first, last);
      if (chunk.words == 0 || chunk.count == 0) return;
      coefficients(problem, chunk, first, last, grad, stride, of_candidates, part_weights.data() + task.part);
      if (of_candidates.wants_features) {
        std::fill_n(chunk.grad.get(), chunk.count * width, T(0));
        k.add_product(chunk.coefficient.get(), chunk.columns, false, chunk.count, chunk.words, chunk.word_panels.get(),
                      width, chunk.grad.get());
        for (int64_t c = first; c < last; c++)
          for (int64_t token = side.start[c]; token < side.start[c + 1]; token++) {
            const int64_t r = token - chunk.first_row;
            k.store_gradient(side, chunk.grad.get() + r * width, chunk.rows.get() + r * width,
                             chunk.inverse_norm.get()[r], of_candidates.at(side, c, side.position[token]));
          }
      }
      if (of_text.wants_features) {
        for (int64_t r = 0; r < chunk.count; r++)
          put_in_panels(chunk.rows.get() + r * width, width, r, chunk.count, chunk.row_panels.get());
        k.add_product(chunk.coefficient.get(), chunk.columns, true, chunk.words, chunk.count, chunk.row_panels.get(),
                      width, parts.get() + task.part * width);
      }
    });
  });

  Buffer<T> row(width), sum(width);
  size_t next = 0;
  for (int64_t a = 0; a < text.items; a++) {
    const size_t begin = next;
    while (next < problem.tasks.size() && problem.tasks[next].text == a) next++;
    of_text.clear(text, a, false);
    for (int64_t token = text.start[a]; token < text.start[a + 1]; token++) {
      const int64_t word = token - text.start[a], position = text.position[token];
      for (size_t t = begin; t < next && of_text.wants_weight; t++)
        of_text.weight_data[a * text.length + position] += part_weights[problem.tasks[t].part + word];
      if (!of_text.wants_features) continue;
      std::fill_n(sum.get(), width, T(0));
      for (size_t t = begin; t < next; t++) {
        const T* part = parts.get() + (problem.tasks[t].part + word) * width;
        for (int64_t d = 0; d < width; d++) sum.get()[d] += part[d];
      }
      T inverse_norm = 0;
      k.load_row(text, token, row.get(), &inverse_norm);
      k.store_gradient(text, sum.get(), row.get(), inverse_norm, of_text.at(text, a, position));
    }
  }
  return {of_text.features, of_candidates.features, of_text.weight, of_candidates.weight};
}

template <class T>
Tensor forward_of(const Tensor& text, const Tensor& candidates, const Tensor& text_weight,
                  const OptionalTensor& candidate_weight, const OptionalTensor& text_mask,
                  const OptionalTensor& candidate_mask, const Tensor& offsets, const Options& options) {
  return forward(
      Problem<T>(text, candidates, text_weight, candidate_weight, text_mask, candidate_mask, offsets, options));
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(const Tensor& grad_scores, const Tensor& text,
                                                       const Tensor& candidates, const Tensor& text_weight,
                                                       const OptionalTensor& candidate_weight,
                                                       const OptionalTensor& text_mask,
                                                       const OptionalTensor& candidate_mask, const Tensor& offsets,
                                                       const Options& options, const std::vector<bool>& wanted) {
  STD_TORCH_CHECK(wanted.size() == 4, "drl_fast::rerank_backward: output_mask must be four bools");
  return backward(
      Problem<T>(text, candidates, text_weight, candidate_weight, text_mask, candidate_mask, offsets, options),
      grad_scores, Gradients<T>(text, wanted[0], wanted[2]),
      Gradients<T>(candidates, wanted[1], wanted[3] && candidate_weight));
}

Tensor rerank(Tensor text, Tensor candidates, Tensor text_weight, OptionalTensor candidate_weight,
              OptionalTensor text_mask, OptionalTensor candidate_mask, Tensor offsets, bool normalize,
              bool zero_competes, std::string pooling, double temperature) {
  const auto run = computes_in_double(text) ? forward_of<double> : forward_of<float>;
  return run(text, candidates, text_weight, candidate_weight, text_mask, candidate_mask, offsets,
             {.normalize = normalize,
              .zero_competes = zero_competes,
              .pooling = pooling_of(pooling),
              .temperature = temperature});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rerank_backward(Tensor grad_scores, Tensor text, Tensor candidates,
                                                           Tensor text_weight, OptionalTensor candidate_weight,
                                                           OptionalTensor text_mask, OptionalTensor candidate_mask,
                                                           Tensor offsets, bool normalize, bool zero_competes,
                                                           std::string pooling, double temperature,
                                                           std::vector<bool> output_mask) {
  const auto run = computes_in_double(text) ? backward_of<double> : backward_of<float>;
  return run(grad_scores, text, candidates, text_weight, candidate_weight, text_mask, candidate_mask, offsets,
             {.normalize = normalize,
              .zero_competes = zero_competes,
              .pooling = pooling_of(pooling),
              .temperature = temperature},
             output_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(drl_fast, CPU, m) {
  m.impl("rerank", TORCH_BOX(&rerank));
  m.impl("rerank_backward", TORCH_BOX(&rerank_backward));
}

}  // namespace drl_fast
