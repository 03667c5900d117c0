// OpenMP's loops by threads that ThreadSanitizer understands: those of libgomp wait for each other
// in ways that it cannot see, and would be reported. The calls are those that gcc makes of
// `#pragma omp parallel for schedule(dynamic, 1)`.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  std::mutex mutex;
  bool started = false;
  long next = 0, end = 0;

  bool take(long* begin, long* stop) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (next >= end) return false;
    *begin = next++;
    *stop = *begin + 1;
    return true;
  }
};

thread_local Team* team = nullptr;

void run(Team& mine, void (*function)(void*), void* data, unsigned count) {
  std::vector<std::thread> threads;
  const auto one = [&] {
    team = &mine;
    function(data);
  };
  for (unsigned i = 1; i < std::max(count, 1u); ++i) threads.emplace_back(one);
  one();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*function)(void*), void* data, unsigned count, unsigned) {
  Team mine;
  run(mine, function, data, count);
}

void GOMP_parallel_loop_nonmonotonic_dynamic(void (*function)(void*), void* data, unsigned count,
                                             long start, long end, long, long, unsigned) {
  Team mine;
  mine.started = true;
  mine.next = start;
  mine.end = end;
  run(mine, function, data, count);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long, long, long* begin,
                                          long* stop) {
  {
    const std::lock_guard<std::mutex> lock(team->mutex);
    if (!team->started) {
      team->started = true;
      team->next = start;
      team->end = end;
    }
  }
  return team->take(begin, stop);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* stop) {
  return team->take(begin, stop);
}

void GOMP_loop_end_nowait() {}
}
