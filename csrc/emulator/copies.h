// The copy engine: tensor-map loads and stores, bulk copies and bulk reductions.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cuda/tensor_map.h"
#include "emulator/encoder.h"

namespace fused_attn::emulator {

class Machine;
struct Thread;
using WaitList = std::vector<Thread*>;

// Bulk stores of one thread that still read shared memory.
struct CopyGroups {
  int uncommitted = 0;
  int committed = 0;
  WaitList waiting;
};

// The 128-byte swizzle: 16-byte columns of a row of 128 bytes are permuted by the row's low bits.
inline uint32_t swizzle128(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

class Copies {
 public:
  explicit Copies(Machine& machine) : machine_(machine) {}
  void reset() {
    pending_.clear();
    sources_.clear();
  }

  using Coordinates = std::array<int, kTensorMapRank>;
  void load_tile(uint32_t shared, const TensorMap& map, uint32_t barrier, const Coordinates& at);
  void store_tile(const TensorMap& map, uint32_t shared, const Coordinates& at);
  void load_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier);
  void add_bulk(float* global, uint32_t shared, uint32_t bytes);
  void commit();
  void wait_read();  // until this thread's committed stores no longer read shared memory

  bool idle() const { return pending_.empty(); }
  // Does a bulk store that its thread has not waited for read any of these bytes? It may be over,
  // but nobody can know.
  bool reads(uint32_t address, uint32_t count) const;
  void run_one();  // any of the pending ones
  void check_thread_exit();
  void check_block_exit();

 private:
  enum class Kind { kLoadTile, kStoreTile, kLoadBulk, kAddBulk };
  struct Copy {
    Kind kind;
    uint32_t shared;
    uint32_t bytes;
    uint32_t barrier = 0;
    Thread* issuer = nullptr;
    DecodedMap map = {};
    Coordinates at = {};
    void* global = nullptr;
    bool committed = false;
  };
  struct Source {
    const Thread* issuer;
    uint32_t shared, bytes;
  };
  void issue_load(Copy copy);
  void issue_store(Copy copy);
  void move_tile(const Copy& copy);
  void check_box(const Copy& copy);

  Machine& machine_;
  std::vector<Copy> pending_;
  std::vector<Source> sources_;
};

}  // namespace fused_attn::emulator
