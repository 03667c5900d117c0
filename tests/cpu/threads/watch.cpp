// Preloaded before fused_attn._C, in the place of OpenMP's loops: the tasks of a loop run one after
// the other in one thread, and after each it is looked which elements of the watched memory it has
// changed. An element that two tasks of one loop change is one that two threads might write at
// once.
//
// These are the calls that gcc makes of `#pragma omp parallel for schedule(dynamic, 1)`.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Region {
  const unsigned char* memory;
  int64_t count;  // of elements
  int64_t size;   // of one, in bytes
  std::vector<unsigned char> before;
  std::vector<int64_t> owner;  // the task that has changed it; -1
};

std::vector<Region> regions;
int64_t next_task, end_task, running = -1;
int64_t loops, most_tasks, written, shared;

void look() {
  for (Region& r : regions) {
    for (int64_t i = 0; i < r.count; ++i) {
      if (std::memcmp(r.memory + i * r.size, r.before.data() + i * r.size,
                      static_cast<size_t>(r.size)) == 0) {
        continue;
      }
      std::memcpy(r.before.data() + i * r.size, r.memory + i * r.size, static_cast<size_t>(r.size));
      written += r.owner[i] != running;
      shared += r.owner[i] >= 0 && r.owner[i] != running;
      r.owner[i] = running;
    }
  }
}

bool hand_out(long* begin, long* end) {
  if (running >= 0) look();
  running = next_task < end_task ? next_task : -1;
  if (running < 0) return false;
  *begin = static_cast<long>(next_task++);
  *end = *begin + 1;
  return true;
}

void begin_loop(long start, long end) {
  ++loops;
  next_task = start;
  end_task = end;
  running = -1;
  if (end - start > most_tasks) most_tasks = end - start;
  for (Region& r : regions) {
    std::memcpy(r.before.data(), r.memory, r.before.size());
    r.owner.assign(static_cast<size_t>(r.count), -1);
  }
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*function)(void*), void* data, unsigned, unsigned) {
  function(data);
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long, long, long* begin,
                                          long* stop) {
  begin_loop(start, end);
  return hand_out(begin, stop);
}

void GOMP_parallel_loop_nonmonotonic_dynamic(void (*function)(void*), void* data, unsigned,
                                             long start, long end, long, long, unsigned) {
  begin_loop(start, end);
  function(data);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  return hand_out(begin, end);
}

void GOMP_loop_end_nowait() {}

// From here on, `count` elements of `size` bytes are watched too.
void watch(const void* memory, int64_t count, int64_t size) {
  regions.push_back({static_cast<const unsigned char*>(memory), count, size,
                     std::vector<unsigned char>(static_cast<size_t>(count * size)),
                     std::vector<int64_t>(static_cast<size_t>(count), -1)});
}

// Loops, tasks of the longest one, elements written, elements that two tasks wrote; starts anew.
void report(int64_t* numbers) {
  const int64_t found[] = {loops, most_tasks, written, shared};
  std::memcpy(numbers, found, sizeof(found));
  loops = most_tasks = written = shared = 0;
  regions.clear();
}

// Tasks that add to one place, two each: the mistake that must be found.
void planted(float* sums) {
#pragma omp parallel for num_threads(2) schedule(dynamic, 1)
  for (int64_t i = 0; i < 4; ++i) sums[i / 2] += 1.0f;
}
}
