// mbarriers in shared memory (phases, arrivals, transaction bytes) and the 16 named barriers.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/clocks.h"

namespace fused_attn::emulator {

class Machine;
struct Thread;
using WaitList = std::vector<Thread*>;

constexpr int kMaxMBarriers = 64;

// By mbarrier: how many of its phases a thread knows to be complete, because it waited for them or
// was told, through another barrier, by a thread that had.
using PhasesSeen = std::array<uint64_t, kMaxMBarriers>;

// What the threads that arrive know, for those that wait. Phases have numbers from 0 on; a phase
// can be told of until the next but one is complete.
class Knowledge {
 public:
  void add(Thread& thread);  // it arrives
  void phase_complete();
  void tell(Thread& thread, uint64_t phase) const;

 private:
  struct Known {
    PhasesSeen seen = {};
    Clock clock;
  };
  Known gathering_, told_[2];
  uint64_t complete_ = 0;
};

class Barriers {
 public:
  explicit Barriers(Machine& machine) : machine_(machine) {}
  void reset(uint32_t shared_bytes);

  void init(uint32_t address, int count, const char* name);
  void fence_init();  // of those that the running thread has initialised
  void expect(uint32_t address, uint32_t bytes);  // one arrival that announces bytes
  void arrive(uint32_t address);
  void wait(uint32_t address, uint32_t parity);
  void complete(uint32_t address, uint32_t bytes);  // bytes have landed

  // The mbarrier at `address`, as an index into PhasesSeen, and its completed phases.
  int index(uint32_t address);
  // The same for a copy, which the running thread issues.
  int index_for_copy(uint32_t address);
  uint64_t phases(int index) const { return mbarriers_[index].phases; }
  std::string name(int index) const;
  std::string describe(uint32_t address);

  // `bar.sync` (blocking) and `bar.arrive` of one warp.
  void named(int id, int threads, bool blocking);
  std::string describe_named(int id) const;

 private:
  struct MBarrier {
    uint32_t address = 0;
    const char* name = "";
    int count = 0;
    int pending = 0;
    int64_t bytes = 0;  // announced and not yet landed
    uint64_t phases = 0;
    Step made;            // its initialisation
    bool fenced = false;  // which copies may know of
    Knowledge knowledge;
    WaitList waiting;
  };
  struct Named {
    int threads = 0;
    int arrived = 0;
    uint64_t generation = 0;
    Knowledge knowledge;
    WaitList waiting;
  };
  MBarrier& at(uint32_t address);
  MBarrier& use(uint32_t address);  // by the running thread
  void arrived(MBarrier& barrier);
  void check(MBarrier& barrier);

  Machine& machine_;
  std::vector<int> index_;  // by address / 8; -1 = none
  std::vector<MBarrier> mbarriers_;
  std::array<Named, 16> named_;
};

}  // namespace fused_attn::emulator
