// Memory and threads for the CPU operators.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace drl_fast {

// Uninitialized memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(allocate(std::max<int64_t>(count, 1))) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static T* allocate(int64_t count) {
    constexpr size_t kLine = 64;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    // aligned_alloc wants a multiple of the alignment.
    return static_cast<T*>(std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine));
  }

  std::unique_ptr<T, Free> data_;
};

// With fewer multiply-adds than this, waking another thread costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 20;

inline int64_t threads_for(int64_t tasks, int64_t work) {
  const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), tasks, work / kWorkPerThread});
  return std::max<int64_t>(1, threads);
}

// Run body(task, thread) for every task, with thread < threads. Results must not depend on which thread runs a task.
template <class Body>
void parallel(int64_t tasks, int64_t threads, const Body& body) {
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; task++) body(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) body(task, thread);
  });
}

}  // namespace drl_fast
