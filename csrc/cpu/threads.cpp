#include "cpu/threads.h"

#include <algorithm>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace fused_attn {
namespace {

bool in_forked_child = false;

#if !defined(_WIN32)
// Registered when the module is loaded: no pool of ours can be older.
const int kRegistered = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

}  // namespace

int usable_threads(int64_t wanted) {
  return in_forked_child ? 1 : static_cast<int>(std::clamp<int64_t>(wanted, 1, 1024));
}

TaskFailure::TaskFailure() : taken_(false) {}
TaskFailure::~TaskFailure() = default;

void TaskFailure::keep() noexcept {
  if (!taken_.exchange(true)) what_ = std::current_exception();
}

void TaskFailure::rethrow() const {
  if (what_ != nullptr) std::rethrow_exception(what_);
}

}  // namespace fused_attn
