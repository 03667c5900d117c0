#include "emulator/matrix.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "emulator/machine.h"

namespace fused_attn::emulator {
namespace {

constexpr uint32_t kAway = 0x7fc0dead;  // a NaN: the register's value is in the matrix unit

// PTX ISA, "Matrix descriptor format" of wgmma, for 128-byte swizzled tiles of 16-bit elements.
struct Descriptor {
  uint32_t address, leading, stride;

  Descriptor(Machine& machine, uint64_t bits)
      : address(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) machine.fault("descriptor without the 128-byte swizzle");
    if ((bits >> 49 & 7) != 0) machine.fault("descriptor with a base offset");
  }

  // Element `i` of M or N and `k` of K. A row of 128 bytes runs along K, or, transposed, along M
  // or N in panels of 64.
  uint32_t element(bool transposed, int i, int k) const {
    if (transposed) {
      return swizzle128(address + (i % 64) * 2 + (i / 64) * leading + (k % 8) * 128 +
                        (k / 8) * stride);
    }
    return swizzle128(address + (i / 8) * stride + (i % 8) * 128 + k * 2);
  }
};

// Where register `r` of `thread` lies in the 64 x N accumulator tile.
int tile_row(int thread, int r) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * (r >> 1 & 1);
}
int tile_column(int thread, int r) {
  return 8 * (r >> 2) + 2 * (thread & 3) + (r & 1);
}

}  // namespace

void MatrixUnit::reset(int first_thread) {
  first_thread_ = first_thread;
  for (auto& waits : waited_) waits.clear();
  products_.clear();
  accumulators_.clear();
  waiting_.clear();
  first_ = executed_ = 0;
}

void MatrixUnit::fence(Machine& machine) {
  machine.thread().products.fenced = true;
}

std::shared_ptr<MatrixUnit::Accumulator> MatrixUnit::find_accumulator(int thread, float* registers,
                                                                      int columns) {
  for (const auto& accumulator : accumulators_) {
    if (accumulator->registers[thread] == registers) return accumulator;
  }
  auto accumulator = std::make_shared<Accumulator>();
  accumulator->columns = columns;
  accumulator->tile.assign(kRows * kMaxColumns, 0.0f);
  accumulators_.push_back(accumulator);
  return accumulator;
}

void MatrixUnit::lend(Accumulator& accumulator, int thread, float* registers) {
  accumulator.registers[thread] = registers;
  ++accumulator.owners;
  for (int r = 0; r < accumulator.columns / 2; ++r) {
    accumulator.tile[tile_row(thread, r) * kMaxColumns + tile_column(thread, r)] = registers[r];
    std::memcpy(&registers[r], &kAway, 4);
  }
}

void MatrixUnit::give_back(Machine& machine, Accumulator& accumulator, int thread) {
  float* registers = accumulator.registers[thread];
  bool touched = false;
  for (int r = 0; r < accumulator.columns / 2; ++r) {
    uint32_t now;
    std::memcpy(&now, &registers[r], 4);
    touched = touched || now != kAway;
    registers[r] = accumulator.tile[tile_row(thread, r) * kMaxColumns + tile_column(thread, r)];
  }
  if (touched) machine.fault("an accumulator was written while its product was in flight");
  accumulator.registers[thread] = nullptr;
  --accumulator.owners;
}

// The chunks that a product reads, from its descriptors.
void MatrixUnit::note_chunks(Machine& machine, Product& product) {
  const auto note = [&](uint64_t bits, bool transposed, int count) {
    const Descriptor d(machine, bits);
    for (int i = 0; i < count; i += transposed ? 8 : 1) {
      for (int k = 0; k < kDepth; k += transposed ? 1 : 8) {
        product.chunks.push_back(machine.memory.offset(d.element(transposed, i, k)) /
                                 SharedMemory::kChunk);
      }
    }
  };
  if (!product.shape.a_in_registers) note(product.a_descriptor, product.shape.a_transposed, kRows);
  note(product.b_descriptor, product.shape.b_transposed, product.shape.columns);
  std::sort(product.chunks.begin(), product.chunks.end());
}

// The last store of each thread into them: all that issue the product must know of it.
void MatrixUnit::note_stores(Machine& machine, Product& product) {
  std::map<int32_t, int32_t> last;
  for (const uint32_t chunk : product.chunks) {
    for (uint32_t byte = 0; byte < SharedMemory::kChunk; byte += 4) {
      const uint32_t address = machine.memory.base() + chunk * SharedMemory::kChunk + byte;
      const Step store = machine.memory.last_write(address);
      if (store.thread >= 0) last[store.thread] = std::max(last[store.thread], store.at);
    }
  }
  for (const auto& [thread, at] : last) product.stores.push_back({thread, at});
}

void MatrixUnit::issue(Machine& machine, const ProductShape& shape, float* registers,
                       uint64_t a_descriptor, const uint32_t* const* a, uint64_t b_descriptor,
                       bool accumulate) {
  Thread& thread = machine.thread();
  MatrixQueue& queue = thread.products;
  const int t = thread.index % kThreads;
  if (!queue.fenced) {
    machine.fault("wgmma without wgmma.fence after registers were touched");
    queue.fenced = true;
  }
  const uint64_t index = queue.issued++;
  const bool first = index - first_ >= products_.size();
  if (first) {
    auto made = std::make_unique<Product>();
    made->shape = shape;
    made->a_descriptor = a_descriptor;
    made->b_descriptor = b_descriptor;
    made->accumulate = accumulate;
    made->accumulator = find_accumulator(t, registers, shape.columns);
    made->seen = thread.phases_seen;
    note_chunks(machine, *made);
    note_stores(machine, *made);
    machine.memory.note_product(made->chunks, thread.index / kThreads, index + 1);
    products_.push_back(std::move(made));
  }
  Product& p = product(index);
  if (!(p.shape == shape) || p.a_descriptor != a_descriptor || p.b_descriptor != b_descriptor ||
      p.accumulate != accumulate) {
    machine.fault("threads of a warpgroup issue different products");
  }
  for (const Step& store : p.stores) {
    if (knows(thread.clock, store)) continue;
    machine.fault("wgmma: nothing orders it after thread %d's store", store.thread);
    break;
  }
  for (int i = 0; i < kMaxMBarriers; ++i) p.seen[i] = std::min(p.seen[i], thread.phases_seen[i]);
  if (shape.a_in_registers) {
    for (int r = 0; r < 4; ++r) {
      p.a[t][r] = a[r];
      p.a_value[t][r] = *a[r];
    }
  }
  Accumulator& accumulator = *p.accumulator;
  if (accumulator.registers[t] == nullptr) {
    lend(accumulator, t, registers);
  } else if (accumulator.registers[t] != registers) {
    machine.fault("the accumulator of a product in flight was exchanged");
  }
  accumulator.last[t] = index;
  ++p.arrived;
  machine.maybe_yield();
}

void MatrixUnit::commit(Machine& machine) {
  MatrixQueue& queue = machine.thread().products;
  queue.groups.push_back(queue.issued);
  machine.maybe_yield();
}

void MatrixUnit::wait(Machine& machine, int groups_left) {
  machine.maybe_yield();
  MatrixQueue& queue = machine.thread().products;
  const int t = machine.thread().index % kThreads;
  queue.fenced = false;
  const int finished = static_cast<int>(queue.groups.size()) - groups_left;
  if (finished <= 0) return;
  const uint64_t target = queue.groups[finished - 1];
  while (executed_ < target) {
    machine.wait(waiting_, {"matrix products", static_cast<int64_t>(target)});
  }
  queue.groups.erase(queue.groups.begin(), queue.groups.begin() + finished);
  waited_[t].push_back({machine.thread().step().at, target});
  for (uint64_t index = first_; index < target; ++index) {
    Product& p = product(index);
    p.retired = true;
    for (int r = 0; r < 4 && p.a[t][r] != nullptr; ++r) {
      if (*p.a[t][r] != p.a_value[t][r]) {
        machine.fault("a register operand changed while its product was in flight");
      }
      p.a[t][r] = nullptr;
    }
  }
  for (std::size_t i = 0; i < accumulators_.size(); ++i) {
    const std::shared_ptr<Accumulator> accumulator = accumulators_[i];
    if (accumulator->registers[t] == nullptr || accumulator->last[t] >= target) continue;
    give_back(machine, *accumulator, t);
    if (accumulator->owners == 0) accumulators_.erase(accumulators_.begin() + i--);
  }
  drop_retired();
}

// Products that every thread has waited for are forgotten, but the last few: a thread that has
// not come to its wait yet still compares its registers with them.
void MatrixUnit::drop_retired() {
  constexpr std::size_t kKept = 512;
  while (products_.size() > kKept && products_.front()->retired) {
    products_.pop_front();
    ++first_;
  }
}

void MatrixUnit::check_thread_exit(Machine& machine) {
  const MatrixQueue& queue = machine.thread().products;
  if (!queue.groups.empty()) machine.fault("thread ends without waiting for its matrix products");
}

bool MatrixUnit::ready() const {
  const uint64_t next = executed_ - first_;
  return next < products_.size() && products_[next]->arrived == kThreads;
}

uint64_t MatrixUnit::known_over(const Clock& clock) const {
  uint64_t over = 0;
  for (int t = 0; t < kThreads && first_thread_ + t < static_cast<int>(clock.size()); ++t) {
    const int32_t known = clock[static_cast<std::size_t>(first_thread_ + t)];
    const auto& waits = waited_[static_cast<std::size_t>(t)];
    for (auto wait = waits.rbegin(); wait != waits.rend(); ++wait) {
      if (wait->step > known) continue;
      over = std::max(over, wait->products);
      break;
    }
  }
  return over;
}

void MatrixUnit::run_one(Machine& machine) {
  Product& p = product(executed_);
  const ProductShape& shape = p.shape;
  static float a[kRows][kDepth], b[kDepth][kMaxColumns];
  const auto read = [&](uint32_t address) {
    uint16_t bits;
    std::memcpy(&bits, machine.memory.bytes(address, 2, "wgmma"), 2);
    return shape.to_float(bits);
  };
  const uint32_t base = machine.memory.base();
  for (const uint32_t chunk : p.chunks) {
    machine.memory.check_async_read(base + chunk * SharedMemory::kChunk, p.seen.data(), "wgmma");
  }
  if (shape.a_in_registers) {
    // The fragment of A: as an accumulator's, with two 16-bit elements a register.
    for (int t = 0; t < kThreads; ++t) {
      for (int r = 0; r < 8; ++r) {
        const uint32_t pair = *p.a[t][r / 2];
        a[tile_row(t, r)][tile_column(t, r)] =
            shape.to_float(static_cast<uint16_t>(pair >> 16 * (r & 1)));
      }
    }
  } else {
    const Descriptor d(machine, p.a_descriptor);
    for (int m = 0; m < kRows; ++m) {
      for (int k = 0; k < kDepth; ++k) a[m][k] = read(d.element(shape.a_transposed, m, k));
    }
  }
  const Descriptor d(machine, p.b_descriptor);
  for (int k = 0; k < kDepth; ++k) {
    for (int n = 0; n < shape.columns; ++n) b[k][n] = read(d.element(shape.b_transposed, n, k));
  }
  std::vector<float>& tile = p.accumulator->tile;
  for (int m = 0; m < kRows; ++m) {
    float* row = &tile[m * kMaxColumns];
    if (!p.accumulate) std::fill_n(row, shape.columns, 0.0f);
    for (int k = 0; k < kDepth; ++k) {
      const float x = a[m][k];
      for (int n = 0; n < shape.columns; ++n) row[n] += x * b[k][n];
    }
  }
  p.executed = true;
  ++executed_;
  machine.wake(waiting_);
}

}  // namespace fused_attn::emulator
