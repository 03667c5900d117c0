// Shared memory of the block, with what is known of every 16-byte chunk: was it written, by whom,
// may the async proxy read it, and for which phase of which mbarrier must a reader have waited.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "emulator/clocks.h"

namespace fused_attn::emulator {

class Machine;

class SharedMemory {
 public:
  static constexpr uint32_t kMaxBytes = 227 * 1024;
  static constexpr uint32_t kChunk = 16;

  explicit SharedMemory(Machine& machine) : machine_(machine) {}
  // The base is 1024-byte aligned or not, as on hardware, where only 16 bytes are promised.
  void reset(uint32_t bytes, uint32_t base, int threads);

  uint32_t base() const { return base_; }
  uint32_t offset(uint32_t address) const { return address - base_; }
  // `count` bytes at `address`; a fault (and a scratch area) if they leave the block's memory.
  uint8_t* bytes(uint32_t address, uint32_t count, const char* who);

  // Ordinary loads and stores of the running thread.
  template <typename T>
  T load(uint32_t address) {
    check_alignment(address, sizeof(T));
    check_load(address, sizeof(T));
    note_load(address, sizeof(T));
    T value;
    std::memcpy(&value, bytes(address, sizeof(T), "load"), sizeof(T));
    return value;
  }
  template <typename T>
  void store(uint32_t address, const T& value) {
    check_alignment(address, sizeof(T));
    std::memcpy(bytes(address, sizeof(T), "store"), &value, sizeof(T));
    written_by_thread(address, sizeof(T));
  }
  void written_by_thread(uint32_t address, uint32_t count);
  void fence_async();  // fence.proxy.async of the running thread

  void note_load(uint32_t address, uint32_t count);

  // The async proxy: copies and matrix products.
  void check_source(uint32_t address, uint32_t count);  // a copy out of it was issued
  // The `number`th product (from 1 on) of warpgroup `group` was issued, and reads these.
  void note_product(const std::vector<uint32_t>& chunks, int group, uint64_t number);
  Step last_write(uint32_t address) const;        // of the word there
  void poison(uint32_t address, uint32_t count);  // a copy into it was issued
  void expect(uint32_t address, uint32_t count, int barrier, uint64_t phase);
  void landed(uint32_t address, uint32_t count);
  // A reader that has waited for `seen` phases; `seen` null: not checked (bulk stores).
  void check_async_read(uint32_t address, const uint64_t* seen, const char* who);

  // Does anything that is not retired still read these bytes? (Matrix units and bulk stores.)
  void check_not_in_use(uint32_t address, uint32_t count, const char* who);

 private:
  struct Chunk {
    uint16_t written = 0;  // bit = byte
    int16_t unfenced = 0;  // writing thread + 1, until it fences
    int16_t barrier = -1;  // of the copy that wrote it
    uint64_t phase = 0;    // complete phases that a reader must have waited for
  };
  void check_alignment(uint32_t address, uint32_t count);
  void check_load(uint32_t address, uint32_t count);
  bool holds(uint32_t address, uint32_t count) const {
    return address >= base_ && address - base_ + count <= size_;
  }
  uint32_t word(uint32_t address) const { return offset(address) / 4; }
  Chunk& chunk(uint32_t address) { return chunks_[offset(address) / kChunk]; }

  Machine& machine_;
  uint32_t base_ = 0;
  uint32_t size_ = 0;
  std::vector<uint8_t> memory_;
  std::vector<Chunk> chunks_;
  // By warpgroup: the last product that reads a chunk, 0 = none since it was written.
  std::vector<std::vector<uint64_t>> products_;
  Accesses accesses_;
};

}  // namespace fused_attn::emulator
