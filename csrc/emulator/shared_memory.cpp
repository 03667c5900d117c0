#include "emulator/shared_memory.h"

#include <algorithm>
#include <utility>

#include "emulator/machine.h"

namespace fused_attn::emulator {

void SharedMemory::reset(uint32_t bytes, uint32_t base, int threads) {
  base_ = base;
  size_ = bytes;
  memory_.assign(bytes + kChunk, 0xff);  // NaN in every floating type
  chunks_.assign(bytes / kChunk + 2, Chunk());
  accesses_.reset(bytes / 4 + 1, threads);
  products_.assign(static_cast<std::size_t>(threads / kWarpgroup),
                   std::vector<uint64_t>(chunks_.size(), 0));
}

uint8_t* SharedMemory::bytes(uint32_t address, uint32_t count, const char* who) {
  static uint8_t scratch[64 * 1024];
  if (address < base_ || address - base_ + count > size_) {
    machine_.fault("%s of %u bytes at shared offset %d leaves the %u bytes of the block", who,
                   count, static_cast<int>(address - base_), size_);
    return scratch;
  }
  return memory_.data() + offset(address);
}

void SharedMemory::check_alignment(uint32_t address, uint32_t count) {
  if (address % count != 0) {
    machine_.fault("access of %u bytes at shared offset %u is not aligned", count, offset(address));
  }
}

void SharedMemory::check_load(uint32_t address, uint32_t count) {
  if (address < base_ || address - base_ + count > size_) return;  // bytes() reports it
  const Chunk& c = chunk(address);
  const auto wanted = static_cast<uint16_t>(((1u << count) - 1) << offset(address) % kChunk);
  if ((c.written & wanted) != wanted) {
    machine_.fault("load of shared offset %u, which nobody has written yet", offset(address));
  }
  if (c.barrier >= 0 && machine_.thread().phases_seen[c.barrier] < c.phase) {
    machine_.fault("load of shared offset %u, a copy's destination, without a wait for %s",
                   offset(address), machine_.barriers.name(c.barrier).c_str());
  }
}

void SharedMemory::written_by_thread(uint32_t address, uint32_t count) {
  if (address < base_ || address - base_ + count > size_) return;
  check_not_in_use(address, count, "store");
  Thread& thread = machine_.thread();
  int other = -1;
  for (uint32_t a = address; a < address + count; a += 4) {
    other = std::max(other, accesses_.write(word(a), thread.step(), thread.clock));
  }
  if (other >= 0) {
    machine_.fault("store to shared offset %u: nothing orders it after thread %d's access",
                   offset(address), other);
  }
  for (uint32_t a = address; a < address + count; ++a) {
    Chunk& c = chunk(a);
    c.written = static_cast<uint16_t>(c.written | 1u << offset(a) % kChunk);
    c.barrier = -1;
    if (c.unfenced != thread.index + 1) {
      c.unfenced = static_cast<int16_t>(thread.index + 1);
      thread.unfenced.push_back(offset(a) / kChunk);
    }
  }
}

void SharedMemory::note_load(uint32_t address, uint32_t count) {
  if (!holds(address, count)) return;
  const Thread& thread = machine_.thread();
  int other = -1;
  for (uint32_t a = address; a < address + count; a += 4) {
    other = std::max(other, accesses_.read(word(a), thread.step(), thread.clock));
  }
  if (other >= 0) {
    machine_.fault("load of shared offset %u: nothing orders it after thread %d's store",
                   offset(address), other);
  }
}

void SharedMemory::note_product(const std::vector<uint32_t>& chunks, int group, uint64_t number) {
  std::vector<uint64_t>& products = products_[static_cast<std::size_t>(group)];
  for (const uint32_t chunk : chunks) {
    if (chunk < products.size()) products[chunk] = number;
  }
}

Step SharedMemory::last_write(uint32_t address) const {
  return holds(address, 4) ? accesses_.last_write(word(address)) : Step();
}

void SharedMemory::check_source(uint32_t address, uint32_t count) {
  for (uint32_t a = address; a < address + count; a += 4) {
    const Step write = last_write(a);
    if (knows(machine_.thread().clock, write)) continue;
    machine_.fault("copy from shared offset %u: nothing orders it after thread %d's store",
                   offset(a), write.thread);
    return;
  }
}

void SharedMemory::fence_async() {
  Thread& thread = machine_.thread();
  for (const uint32_t index : thread.unfenced) {
    if (chunks_[index].unfenced == thread.index + 1) chunks_[index].unfenced = 0;
  }
  thread.unfenced.clear();
}

void SharedMemory::poison(uint32_t address, uint32_t count) {
  check_not_in_use(address, count, "copy");
  int other = -1;
  for (uint32_t a = address; holds(a, 4) && a < address + count; a += 4) {
    other = std::max(other, accesses_.overwrite(word(a), machine_.thread().clock));
  }
  if (other >= 0) {
    machine_.fault("copy into shared offset %u: nothing orders it after thread %d's access",
                   offset(address), other);
  }
  std::memset(bytes(address, count, "copy"), 0xff, count);
}

void SharedMemory::expect(uint32_t address, uint32_t count, int barrier, uint64_t phase) {
  for (uint32_t a = address; a < address + count; a += kChunk) {
    if (a < base_ || a - base_ + kChunk > size_) return;
    Chunk& c = chunk(a);
    if (c.unfenced != 0) {
      machine_.fault("copy over shared offset %u, written by thread %d without a proxy fence",
                     offset(a), c.unfenced - 1);
    }
    c = Chunk();
    c.barrier = static_cast<int16_t>(barrier);
    c.phase = phase;
  }
}

void SharedMemory::landed(uint32_t address, uint32_t count) {
  for (uint32_t a = address; a < address + count; a += kChunk) {
    if (a >= base_ && a - base_ + kChunk <= size_) chunk(a).written = 0xffff;
  }
}

void SharedMemory::check_async_read(uint32_t address, const uint64_t* seen, const char* who) {
  if (address < base_ || address - base_ >= size_) return;
  Chunk& c = chunk(address);
  if (c.written == 0) {
    machine_.fault("%s reads shared offset %u, which nobody has written yet", who, offset(address));
    c.written = 0xffff;  // one report is enough
  }
  if (c.unfenced != 0) {
    machine_.fault("%s reads shared offset %u, written by thread %d without a proxy fence", who,
                   offset(address), c.unfenced - 1);
    c.unfenced = 0;
  }
  if (seen != nullptr && c.barrier >= 0 && seen[c.barrier] < c.phase) {
    machine_.fault("%s reads shared offset %u, a copy's destination, without a wait for %s", who,
                   offset(address), machine_.barriers.name(c.barrier).c_str());
  }
}

void SharedMemory::check_not_in_use(uint32_t address, uint32_t count, const char* who) {
  const uint32_t first = offset(address) / kChunk;
  const uint32_t last_chunk = (offset(address) + std::max(count, 1u) - 1) / kChunk;
  if (!holds(address, count)) return;
  for (std::size_t group = 0; group < products_.size(); ++group) {
    uint64_t last = 0;
    for (uint32_t chunk = first; chunk <= last_chunk; ++chunk) {
      last = std::max(last, std::exchange(products_[group][chunk], 0));
    }
    if (last == 0 || last <= machine_.matrix[group].known_over(machine_.thread().clock)) continue;
    machine_.fault("%s into shared offset %u while a matrix product may still read it", who,
                   offset(address));
  }
  if (machine_.copies.reads(address, count)) {
    machine_.fault("%s into shared offset %u while a bulk store may still read it", who,
                   offset(address));
  }
}

}  // namespace fused_attn::emulator
