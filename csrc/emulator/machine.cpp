#include "emulator/machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace fused_attn::emulator {

namespace {
constexpr std::size_t kMaxFaults = 8;  // the first ones tell
Machine* current = nullptr;
}  // namespace

Machine::Machine() = default;

Machine& Machine::instance() {
  static Machine machine;
  current = &machine;
  return machine;
}

void Machine::fault(const char* format, ...) {
  if (report_.faults.size() >= kMaxFaults) return;
  char text[400];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char line[480];
  std::snprintf(line, sizeof line, "block %d, thread %d, step %llu: %s", launch_.block,
                running_ == nullptr ? -1 : running_->index,
                static_cast<unsigned long long>(report_.steps), text);
  report_.faults.emplace_back(line);
}

void Machine::make_ready(Thread& thread) {
  warps_[thread.index / kWarp].ready.push_back(&thread);
  ++ready_;
}

void Machine::wake(WaitList& list) {
  for (Thread* thread : list) make_ready(*thread);
  list.clear();
}

void Machine::wait(WaitList& list, const Waiting& waiting) {
  Thread& self = *running_;
  self.waiting = waiting;
  list.push_back(&self);
  self.fiber.yield();
  self.waiting = {};
}

void Machine::maybe_yield() {
  if (!random.chance(yield_chance_)) return;
  Thread& self = *running_;
  make_ready(self);
  self.fiber.yield();
}

int Machine::meet(const char* kind, const std::function<void(Warp&, int)>& together) {
  Warp& warp = this->warp();
  const uint64_t meeting = warp.meetings;
  if (warp.arrived == 0) {
    warp.kind = kind;
  } else if (std::strcmp(warp.kind, kind) != 0) {
    fault("threads of warp %d diverged: %s against %s", running_->index / kWarp, kind, warp.kind);
  }
  const int parity = static_cast<int>(meeting & 1);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    if (together) together(warp, parity);
    ++warp.meetings;
    wake(warp.waiting);
  } else {
    while (warp.meetings == meeting) {
      wait(warp.waiting, {kind, running_->index / kWarp, warp.arrived});
    }
  }
  return parity;
}

// Orders the threads of the warp: what one did before it is known to all after it.
void Machine::sync_warp() {
  meet("syncwarp", [&](Warp&, int) {
    Clock together;
    each_of_warp([&](Thread& thread) { join(together, thread.clock); });
    each_of_warp([&](Thread& thread) {
      thread.clock = together;
      thread.next_step();
    });
  });
}

void Machine::write_global(const void* address, uint32_t bytes, bool atomically) {
  if (!global_writes.conflicts(address, bytes, launch_.block, atomically)) return;
  fault("block %d writes global memory that another block of the launch writes, too",
        launch_.block);
}

void Machine::set_registers(int count, bool increase) {
  const int before = running_->registers;
  if (count % 8 != 0 || count < 24 || count > 256) fault("setmaxnreg to %d", count);
  if (before != 0 && (increase ? count < before : count > before)) {
    fault("setmaxnreg.%s from %d to %d registers", increase ? "inc" : "dec", before, count);
  }
  running_->registers = count;
}

// setmaxnreg.inc waits until the block has the registers: too many would hang on hardware.
void Machine::check_registers() {
  if (launch_.registers_per_thread == 0) return;
  int total = 0;
  for (int i = 0; i < launch_.threads; ++i) total += threads_[i].registers;
  const int pool = kRegistersPerBlock < launch_.registers_per_thread * launch_.threads
                       ? kRegistersPerBlock
                       : launch_.registers_per_thread * launch_.threads;
  if (total > pool) fault("warps ask for %d registers, the block has %d", total, pool);
}

void Machine::entry() {
  Machine& machine = *current;
  (*machine.kernel_)();
  Thread& self = *machine.running_;
  machine.copies.check_thread_exit();
  machine.matrix[self.index / kWarpgroup].check_thread_exit(machine);
  self.done = true;
  --machine.alive_;
  self.fiber.yield();
  std::abort();
}

// A schedule is a mood: which engine is eager, whether a warp keeps running, how often threads
// give way. The extremes (an engine that moves only when all else stands) find the most.
void Machine::draw_schedule() {
  constexpr int kEagerness[] = {0, 2, 20, 200, 900};
  constexpr int kStickiness[] = {0, 500, 1024};
  constexpr int kYield[] = {0, 30, 300};
  copy_chance_ = kEagerness[random.below(5)];
  product_chance_ = kEagerness[random.below(5)];
  sticky_chance_ = kStickiness[random.below(3)];
  yield_chance_ = kYield[random.below(3)];
  products_first_ = random.chance(512);
  elected_lane_ = 1 + static_cast<int>(random.below(kWarp - 1));
  priority_.resize(launch_.threads / kWarp);
  for (std::size_t i = 0; i < priority_.size(); ++i) {
    priority_[i] = static_cast<int>(i);
    std::swap(priority_[i], priority_[random.below(i + 1)]);
  }
}

bool Machine::advance_matrix(bool idle) {
  const std::size_t first = random.below(matrix.size());
  for (std::size_t i = 0; i < matrix.size(); ++i) {
    MatrixUnit& unit = matrix[(first + i) % matrix.size()];
    if (!unit.ready() || !(idle || random.chance(product_chance_))) continue;
    unit.run_one(*this);
    ++report_.products;
    return true;
  }
  return false;
}

// Lets copies and products happen; where all threads wait, one of them must.
bool Machine::advance_engines(bool idle) {
  running_ = nullptr;
  const auto copy = [&](bool must) {
    if (copies.idle() || !(must || random.chance(copy_chance_))) return false;
    copies.run_one();
    ++report_.copies;
    return true;
  };
  bool moved;
  if (products_first_) {
    moved = advance_matrix(idle);
    moved = copy(idle && !moved) || moved;
  } else {
    moved = copy(idle);
    moved = advance_matrix(idle && !moved) || moved;
  }
  return moved;
}

Thread* Machine::next_thread() {
  int chosen = -1;
  if (random.chance(sticky_chance_)) {
    for (const int warp : priority_) {
      if (warps_[warp].ready.empty()) continue;
      chosen = warp;
      break;
    }
  } else {
    const int warps = static_cast<int>(priority_.size());
    chosen = static_cast<int>(random.below(warps));
    while (warps_[chosen].ready.empty()) chosen = (chosen + 1) % warps;
  }
  std::vector<Thread*>& ready = warps_[chosen].ready;
  std::swap(ready[random.below(ready.size())], ready.back());
  Thread* thread = ready.back();
  ready.pop_back();
  --ready_;
  return thread;
}

Report Machine::run(const Launch& launch, const std::function<void()>& kernel) {
  current = this;
  launch_ = launch;
  kernel_ = &kernel;
  report_ = Report();
  running_ = nullptr;
  if (launch.threads % kWarp != 0 || launch.threads > kMaxThreads) {
    fault("a block of %d threads", launch.threads);
    return report_;
  }
  random.seed(launch.seed);
  draw_schedule();
  memory.reset(launch.shared_bytes, 1024 + 16 * static_cast<uint32_t>(random.below(64)),
               launch.threads);
  barriers.reset(launch.shared_bytes);
  copies.reset();
  for (std::size_t i = 0; i < matrix.size(); ++i) {
    matrix[i].reset(static_cast<int>(i) * kWarpgroup);
  }
  for (Warp& warp : warps_) {
    warp.arrived = 0;
    warp.meetings = 0;
    warp.waiting.clear();
    warp.ready.clear();
  }
  ready_ = 0;
  alive_ = launch.threads;
  for (int i = 0; i < launch.threads; ++i) {
    Thread& thread = threads_[i];
    thread.index = i;
    thread.done = false;
    thread.waiting = {};
    thread.registers = launch.registers_per_thread;
    thread.phases_seen.fill(0);
    thread.clock.assign(static_cast<std::size_t>(launch.threads), 0);
    thread.next_step();
    thread.unfenced.clear();
    thread.copies = CopyGroups();
    thread.products = MatrixQueue();
    thread.fiber.prepare(&Machine::entry);
    make_ready(thread);
  }
  while (alive_ > 0) {
    ++report_.steps;
    const bool moved = advance_engines(ready_ == 0);
    if (ready_ == 0) {
      if (moved) continue;
      report_deadlock();
      break;
    }
    running_ = next_thread();
    running_->fiber.resume();
  }
  running_ = nullptr;
  check_registers();
  if (!report_.deadlock) copies.check_block_exit();
  while (!copies.idle()) copies.run_one();
  return report_;
}

std::string Machine::describe(const Thread& thread) {
  const Waiting& w = thread.waiting;
  std::string text = "warp " + std::to_string(thread.index / kWarp) + " waits for ";
  if (w.what == nullptr) return text + "nothing";
  text += w.what;
  if (std::strcmp(w.what, "mbarrier") == 0) {
    return text + " " + barriers.describe(static_cast<uint32_t>(w.where)) + ", parity " +
           std::to_string(w.value);
  }
  if (std::strcmp(w.what, "named barrier") == 0) {
    return text + " " + barriers.describe_named(static_cast<int>(w.where));
  }
  return text;
}

void Machine::report_deadlock() {
  report_.deadlock = true;
  std::map<std::string, int> waiting;
  for (int i = 0; i < launch_.threads; ++i) {
    if (!threads_[i].done) ++waiting[describe(threads_[i])];
  }
  for (const auto& [text, count] : waiting) {
    fault("deadlock: %s (%d threads)", text.c_str(), count);
  }
}

}  // namespace fused_attn::emulator
