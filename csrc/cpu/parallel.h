// Loops over independent tasks, and scratch memory that lives as long as its thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/macros.h"
#include "cpu/threads.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

// Calls task(i) for i in [0, count), on up to `threads` threads, each taking the next i when it is
// free. One thread never touches OpenMP, which keeps a forked child safe. What a task throws comes
// out of the loop once the other tasks are done.
template <class Task>
inline void parallel_for(int threads, int64_t count, const Task& task) {
  if (count < threads) threads = static_cast<int>(count);
#if defined(_OPENMP)
  if (threads > 1) {
    TaskFailure failure;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      try {
        task(i);
      } catch (...) {
        failure.keep();
      }
    }
    return failure.rethrow();
  }
#endif
  for (int64_t i = 0; i < count; ++i) task(i);
}

// A block of memory that only grows, aligned to cache lines. Its content is undefined after get().
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(block_); }

  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
    if (bytes > size_) {
      std::free(block_);
      block_ = std::malloc(bytes + 64);
      size_ = block_ == nullptr ? 0 : bytes;
      if (block_ == nullptr) throw std::bad_alloc();
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(block_);
    return reinterpret_cast<T*>((address + 63) & ~uintptr_t{63});
  }

 private:
  void* block_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fused_attn::FUSED_ATTN_LEVEL
