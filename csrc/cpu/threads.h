// How many threads a call may use, and what becomes of a task that fails.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace fused_attn {

// `wanted`, kept within reason; 1 in a forked child, whose copy of the parent's pool has no
// threads: OpenMP would wait for them for ever.
int usable_threads(int64_t wanted);

// What the first task of a loop that failed has thrown (std::bad_alloc, where memory is short): no
// exception may leave an OpenMP loop, it would end the process. All of it is compiled once, here:
// a kernel's source would leave a level's code behind for all (common/macros.h).
class TaskFailure {
 public:
  TaskFailure();
  ~TaskFailure();
  void keep() noexcept;  // the exception at hand, unless there is one before it
  void rethrow() const;  // does nothing where there is none

 private:
  std::atomic<bool> taken_;
  std::exception_ptr what_;
};

}  // namespace fused_attn
