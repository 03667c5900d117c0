#include "emulator/barriers.h"

#include <algorithm>

#include "emulator/machine.h"

namespace fused_attn::emulator {

namespace {

void merge(PhasesSeen& into, const PhasesSeen& from) {
  for (int i = 0; i < kMaxMBarriers; ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

void Knowledge::add(Thread& thread) {
  merge(gathering_.seen, thread.phases_seen);
  join(gathering_.clock, thread.clock);
  thread.next_step();
}

void Knowledge::phase_complete() {
  std::swap(told_[complete_ & 1], gathering_);
  gathering_.seen = {};
  std::fill(gathering_.clock.begin(), gathering_.clock.end(), 0);
  ++complete_;
}

void Knowledge::tell(Thread& thread, uint64_t phase) const {
  const Known& known = told_[phase & 1];
  merge(thread.phases_seen, known.seen);
  join(thread.clock, known.clock);
}

void Barriers::reset(uint32_t shared_bytes) {
  index_.assign(shared_bytes / 8 + 1, -1);
  mbarriers_.clear();
  mbarriers_.reserve(kMaxMBarriers);  // references stay valid
  for (Named& barrier : named_) barrier = Named();
}

void Barriers::init(uint32_t address, int count, const char* name) {
  machine_.memory.bytes(address, 8, "mbarrier");
  if (address % 8 != 0) machine_.fault("mbarrier %s at %u is not 8-byte aligned", name, address);
  const uint32_t slot = machine_.memory.offset(address) / 8;
  if (slot >= index_.size() || mbarriers_.size() == kMaxMBarriers) return;
  if (index_[slot] >= 0) machine_.fault("mbarrier %s is initialised twice", name);
  index_[slot] = static_cast<int>(mbarriers_.size());
  MBarrier barrier;
  barrier.address = address;
  barrier.name = name;
  barrier.count = barrier.pending = count;
  barrier.made = machine_.thread().step();
  mbarriers_.push_back(barrier);
}

void Barriers::fence_init() {
  for (MBarrier& barrier : mbarriers_) {
    barrier.fenced = barrier.fenced || barrier.made.thread == machine_.thread().index;
  }
}

int Barriers::index_for_copy(uint32_t address) {
  MBarrier& barrier = use(address);
  if (!barrier.fenced) {
    machine_.fault("a copy completes mbarrier %s, initialised without a fence", barrier.name);
  }
  return index(address);
}

Barriers::MBarrier& Barriers::use(uint32_t address) {
  MBarrier& barrier = at(address);
  if (!knows(machine_.thread().clock, barrier.made)) {
    machine_.fault("nothing orders this use of mbarrier %s after its initialisation", barrier.name);
  }
  return barrier;
}

int Barriers::index(uint32_t address) {
  const uint32_t slot = machine_.memory.offset(address) / 8;
  const int found = slot < index_.size() && address % 8 == 0 ? index_[slot] : -1;
  if (found >= 0) return found;
  machine_.fault("no mbarrier was initialised at shared offset %u", slot * 8);
  if (mbarriers_.empty()) init(machine_.memory.base(), 1, "(invented)");
  return 0;
}

Barriers::MBarrier& Barriers::at(uint32_t address) {
  return mbarriers_[index(address)];
}

std::string Barriers::name(int index) const {
  return mbarriers_[index].name;
}

void Barriers::check(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phases;
  barrier.pending = barrier.count;
  barrier.knowledge.phase_complete();
  machine_.wake(barrier.waiting);
}

void Barriers::arrived(MBarrier& barrier) {
  if (barrier.pending == 0) {
    machine_.fault("mbarrier %s: more than %d arrivals in phase %llu", barrier.name, barrier.count,
                   static_cast<unsigned long long>(barrier.phases));
    return;
  }
  --barrier.pending;
  barrier.knowledge.add(machine_.thread());
  check(barrier);
}

void Barriers::expect(uint32_t address, uint32_t bytes) {
  MBarrier& barrier = use(address);
  barrier.bytes += bytes;
  arrived(barrier);
  machine_.maybe_yield();
}

void Barriers::arrive(uint32_t address) {
  machine_.maybe_yield();
  arrived(use(address));
  machine_.maybe_yield();
}

void Barriers::complete(uint32_t address, uint32_t bytes) {
  MBarrier& barrier = at(address);
  barrier.bytes -= bytes;
  check(barrier);
}

// Returns when the phase of `parity` is complete, as try_wait.parity does: the current phase then
// has the other parity.
void Barriers::wait(uint32_t address, uint32_t parity) {
  machine_.maybe_yield();
  MBarrier& barrier = use(address);
  while ((barrier.phases & 1) == parity) {
    machine_.wait(barrier.waiting, {"mbarrier", address, parity});
  }
  machine_.thread().phases_seen[index(address)] = barrier.phases;
  barrier.knowledge.tell(machine_.thread(), parity);
}

std::string Barriers::describe(uint32_t address) {
  const MBarrier& barrier = at(address);
  char text[160];
  std::snprintf(text, sizeof text, "%s (in phase %llu, %d of %d arrivals missing, %lld bytes due)",
                barrier.name, static_cast<unsigned long long>(barrier.phases), barrier.pending,
                barrier.count, static_cast<long long>(barrier.bytes));
  return text;
}

void Barriers::named(int id, int threads, bool blocking) {
  machine_.maybe_yield();
  Named& barrier = named_[id];
  const int parity = machine_.meet(blocking ? "bar.sync" : "bar.arrive", [&](Warp& warp,
                                                                             int meeting) {
    if (barrier.arrived != 0 && barrier.threads != threads) {
      machine_.fault("barrier %d is used for %d and for %d threads", id, barrier.threads, threads);
    }
    barrier.threads = threads;
    warp.given[meeting][0][7] = static_cast<uint32_t>(barrier.generation);
    machine_.each_of_warp([&](Thread& thread) { barrier.knowledge.add(thread); });
    barrier.arrived += kWarp;
    if (barrier.arrived > threads) {
      machine_.fault("barrier %d: %d threads arrived, it takes %d", id, barrier.arrived, threads);
    }
    if (barrier.arrived >= threads) {
      barrier.arrived = 0;
      ++barrier.generation;
      barrier.knowledge.phase_complete();
      machine_.wake(barrier.waiting);
    }
  });
  if (!blocking) return;
  const uint32_t generation = machine_.warp().given[parity][0][7];
  while (static_cast<uint32_t>(barrier.generation) == generation) {
    machine_.wait(barrier.waiting, {"named barrier", id, threads});
  }
  barrier.knowledge.tell(machine_.thread(), generation);
}

std::string Barriers::describe_named(int id) const {
  const Named& barrier = named_[id];
  return std::to_string(id) + " (" + std::to_string(barrier.arrived) + " of " +
         std::to_string(barrier.threads) + " threads arrived)";
}

}  // namespace fused_attn::emulator
