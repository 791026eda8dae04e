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

// Aligned memory that is not filled first.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Below this many multiply-adds a thread is not worth waking.
constexpr int64_t kWorkPerThread = 1 << 20;

inline int64_t threads_for(int64_t tasks, int64_t work) {
  return std::max<int64_t>(1, std::min({int64_t(torch::stable::get_num_threads()), tasks, work / kWorkPerThread}));
}

// Run body(task, thread) for every task, thread < threads; which thread gets which task does not change a result.
template <class Body>
void parallel(int64_t tasks, int64_t threads, const Body& body) {
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; task++) body(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, thread);
  });
}

}  // namespace drl_fast
