#include "emulator/shared_memory.h"

#include <algorithm>

#include "emulator/machine.h"

namespace fused_attn::emulator {

void SharedMemory::reset(uint32_t bytes, uint32_t base) {
  base_ = base;
  size_ = bytes;
  memory_.assign(bytes + kChunk, 0xff);  // NaN in every floating type
  chunks_.assign(bytes / kChunk + 2, Chunk());
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

void SharedMemory::fence_async() {
  Thread& thread = machine_.thread();
  for (const uint32_t index : thread.unfenced) {
    if (chunks_[index].unfenced == thread.index + 1) chunks_[index].unfenced = 0;
  }
  thread.unfenced.clear();
}

void SharedMemory::poison(uint32_t address, uint32_t count) {
  check_not_in_use(address, count, "copy");
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
  const uint32_t last = (offset(address) + std::max(count, 1u) - 1) / kChunk;
  for (const MatrixUnit& unit : machine_.matrix) {
    if (!unit.reads(first, last)) continue;
    machine_.fault("%s into shared offset %u while a matrix product may still read it", who,
                   offset(address));
    return;
  }
  if (machine_.copies.reads(address, count)) {
    machine_.fault("%s into shared offset %u while a bulk store may still read it", who,
                   offset(address));
  }
}

}  // namespace fused_attn::emulator
