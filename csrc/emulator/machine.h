// Executes one CUDA thread block on the CPU, to prove kernels where there is no GPU.
//
// A kernel's own source runs here: it reaches the device only through the words of
// cuda/device.h, which have a PTX implementation and this one. Every CUDA thread is a
// fiber; copies and matrix products are asynchronous, and happen when a random schedule says so, or
// when nobody else can go on. The machine is stricter than hardware: whatever the programming model
// leaves undefined is reported as a fault, not computed.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "emulator/barriers.h"
#include "emulator/clocks.h"
#include "emulator/copies.h"
#include "emulator/fiber.h"
#include "emulator/global_writes.h"
#include "emulator/matrix.h"
#include "emulator/random.h"
#include "emulator/shared_memory.h"

namespace fused_attn::emulator {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kMaxThreads = 1024;
constexpr int kRegistersPerBlock = 64 * 1024;

// What a suspended thread waits for: the deadlock report names it.
struct Waiting {
  const char* what = nullptr;
  int64_t where = 0;
  int64_t value = 0;
};

struct Thread {
  Fiber fiber;
  int index = 0;
  bool done = false;
  Waiting waiting;
  int registers = 0;               // 0 = as launched
  PhasesSeen phases_seen;          // of mbarriers that it waited for
  Clock clock;                     // what it knows of the others' steps
  std::vector<uint32_t> unfenced;  // chunks written, but not yet visible to the async proxy
  CopyGroups copies;               // bulk stores that it issued
  MatrixQueue products;            // wgmma that it issued

  Step step() const { return {index, clock[static_cast<std::size_t>(index)]}; }
  void next_step() { ++clock[static_cast<std::size_t>(index)]; }
};

// The 32 threads of a warp meet for shuffles, votes and everything `.sync.aligned`.
struct Warp {
  int arrived = 0;
  uint64_t meetings = 0;
  const char* kind = nullptr;
  std::array<std::array<uint32_t, 8>, kWarp> given[2];  // by parity of the meeting
  WaitList waiting;
  std::vector<Thread*> ready;
};

struct Report {
  bool deadlock = false;
  std::vector<std::string> faults;
  uint64_t steps = 0;
  uint64_t products = 0;
  uint64_t copies = 0;
};

struct Launch {
  int block = 0;
  int blocks = 1;
  int threads = 128;
  uint32_t shared_bytes = 0;
  int registers_per_thread = 0;  // what ptxas gives at entry; 0 = not checked
  uint64_t seed = 0;             // of the schedule
};

class Machine {
 public:
  Machine();
  static Machine& instance();

  Report run(const Launch& launch, const std::function<void()>& kernel);

  // For the primitives, on behalf of the running thread.
  Thread& thread() { return *running_; }
  Warp& warp() { return warps_[running_->index / kWarp]; }
  template <class Function>
  void each_of_warp(const Function& function) {
    const int first = running_->index / kWarp * kWarp;
    for (int lane = 0; lane < kWarp; ++lane) function(threads_[first + lane]);
  }
  int lane() const { return running_->index % kWarp; }
  int elected_lane() const { return elected_lane_; }
  const Launch& launch() const { return launch_; }
  void fault(const char* format, ...) __attribute__((format(printf, 2, 3)));
  void wait(WaitList& list, const Waiting& waiting);
  void wake(WaitList& list);
  void maybe_yield();  // lets others go first, now and then
  // All 32 threads of the warp come here with the same `kind`; `together` runs once, for the last.
  // Returns the parity of the meeting, under which `given` stays readable until the next but one.
  int meet(const char* kind, const std::function<void(Warp&, int)>& together = {});
  void sync_warp();
  void set_registers(int count, bool increase);
  // The running block writes global memory; `atomically`: adds to it.
  void write_global(const void* address, uint32_t bytes, bool atomically);

  Random random;
  SharedMemory memory{*this};
  Barriers barriers{*this};
  Copies copies{*this};
  GlobalWrites global_writes;  // of the launch
  std::array<MatrixUnit, kMaxThreads / kWarpgroup> matrix;

 private:
  static void entry();
  void draw_schedule();
  void make_ready(Thread& thread);
  Thread* next_thread();
  bool advance_engines(bool idle);
  bool advance_matrix(bool idle);
  void check_registers();
  void report_deadlock();
  std::string describe(const Thread& thread);

  Launch launch_;
  const std::function<void()>* kernel_ = nullptr;
  std::array<Thread, kMaxThreads> threads_;
  std::array<Warp, kMaxThreads / kWarp> warps_;
  std::vector<int> priority_;  // of warps, for sticky schedules
  Thread* running_ = nullptr;
  int elected_lane_ = 0;  // by elect.sync, of every warp; not 0, which would be too easy
  int ready_ = 0;
  int alive_ = 0;
  Report report_;
  // Of the schedule, in parts of 1024.
  int copy_chance_ = 0, product_chance_ = 0, sticky_chance_ = 0, yield_chance_ = 0;
  bool products_first_ = false;
};

}  // namespace fused_attn::emulator
