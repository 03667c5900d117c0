#include "emulator/copies.h"

#include <algorithm>
#include <cstring>

#include "emulator/machine.h"

namespace fused_attn::emulator {
namespace {

uint32_t box_bytes(const DecodedMap& map) {
  return static_cast<uint32_t>(map.box_rows) * kTileRowBytes;
}

}  // namespace

void Copies::check_box(const Copy& copy) {
  // A swizzle repeats every 8 rows of 128 bytes; a tile that does not start there is read askew.
  if (copy.shared % 1024 != 0) {
    machine_.fault("tile at shared offset %u is not 1024-byte aligned",
                   machine_.memory.offset(copy.shared));
  }
}

void Copies::issue_load(Copy copy) {
  machine_.memory.poison(copy.shared, copy.bytes);
  const int barrier = machine_.barriers.index_for_copy(copy.barrier);
  machine_.memory.expect(copy.shared, copy.bytes, barrier, machine_.barriers.phases(barrier) + 1);
  pending_.push_back(copy);
  machine_.maybe_yield();
}

void Copies::issue_store(Copy copy) {
  machine_.memory.check_source(copy.shared, copy.bytes);
  copy.issuer = &machine_.thread();
  ++copy.issuer->copies.uncommitted;
  pending_.push_back(copy);
  sources_.push_back({copy.issuer, copy.shared, copy.bytes});
  machine_.maybe_yield();
}

void Copies::load_tile(uint32_t shared, const TensorMap& map, uint32_t barrier,
                       const Coordinates& at) {
  const DecodedMap decoded = decode(map);
  Copy copy{Kind::kLoadTile, shared, box_bytes(decoded)};
  copy.barrier = barrier;
  copy.map = decoded;
  copy.at = at;
  check_box(copy);
  // It fails where the memory at the base is not mapped, wherever the copy itself goes.
  if (decoded.base != decoded.tensor) {
    machine_.fault("load through a map whose base is not its tensor's own pointer");
  }
  issue_load(copy);
}

void Copies::store_tile(const TensorMap& map, uint32_t shared, const Coordinates& at) {
  const DecodedMap decoded = decode(map);
  Copy copy{Kind::kStoreTile, shared, box_bytes(decoded)};
  copy.map = decoded;
  copy.at = at;
  check_box(copy);
  issue_store(copy);
}

void Copies::load_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  if (shared % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    machine_.fault("bulk load of %u bytes is not 16-byte aligned", bytes);
  }
  Copy copy{Kind::kLoadBulk, shared, bytes};
  copy.barrier = barrier;
  copy.global = const_cast<void*>(global);
  issue_load(copy);
}

void Copies::add_bulk(float* global, uint32_t shared, uint32_t bytes) {
  if (shared % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    machine_.fault("bulk reduction of %u bytes is not 16-byte aligned", bytes);
  }
  Copy copy{Kind::kAddBulk, shared, bytes};
  copy.global = global;
  issue_store(copy);
}

void Copies::commit() {
  Thread& thread = machine_.thread();
  for (Copy& copy : pending_) {
    if (copy.issuer == &thread) copy.committed = true;
  }
  thread.copies.committed += thread.copies.uncommitted;
  thread.copies.uncommitted = 0;
}

void Copies::wait_read() {
  CopyGroups& groups = machine_.thread().copies;
  bool forgotten = false;
  for (const Copy& copy : pending_) {
    forgotten = forgotten || (copy.issuer == &machine_.thread() && !copy.committed);
  }
  if (forgotten) machine_.fault("wait for bulk stores that were not committed");
  while (groups.committed > 0) machine_.wait(groups.waiting, {"bulk stores", groups.committed});
  const Thread* self = &machine_.thread();
  // From here on it is this thread that has read them.
  const auto waited = [&](const Source& source) {
    if (source.issuer == self) machine_.memory.note_load(source.shared, source.bytes);
    return source.issuer == self;
  };
  sources_.erase(std::remove_if(sources_.begin(), sources_.end(), waited), sources_.end());
}

bool Copies::reads(uint32_t address, uint32_t count) const {
  for (const Source& source : sources_) {
    if (address < source.shared + source.bytes && source.shared < address + count) return true;
  }
  return false;
}

void Copies::check_thread_exit() {
  int open = 0;
  for (const Source& source : sources_) open += source.issuer == &machine_.thread() ? 1 : 0;
  if (open != 0) machine_.fault("thread ends while %d bulk stores may read shared memory", open);
}

// A load that nobody waited for may write into the shared memory of the next block.
void Copies::check_block_exit() {
  const auto load = [](const Copy& copy) {
    return copy.kind == Kind::kLoadTile || copy.kind == Kind::kLoadBulk;
  };
  const auto open = std::count_if(pending_.begin(), pending_.end(), load);
  if (open != 0) machine_.fault("the block ends while %d loads are on their way", int(open));
}

void Copies::run_one() {
  const std::size_t which = machine_.random.below(pending_.size());
  const Copy copy = pending_[which];
  pending_[which] = pending_.back();
  pending_.pop_back();
  SharedMemory& memory = machine_.memory;
  switch (copy.kind) {
    case Kind::kLoadTile:
    case Kind::kStoreTile:
      move_tile(copy);
      break;
    case Kind::kLoadBulk:
      std::memcpy(memory.bytes(copy.shared, copy.bytes, "bulk load"), copy.global, copy.bytes);
      break;
    case Kind::kAddBulk: {
      const uint8_t* from = memory.bytes(copy.shared, copy.bytes, "bulk reduction");
      float* to = static_cast<float*>(copy.global);
      machine_.write_global(to, copy.bytes, true);
      for (uint32_t i = 0; i < copy.bytes; i += 4) {
        if (i % 16 == 0) memory.check_async_read(copy.shared + i, nullptr, "bulk reduction");
        float value;
        std::memcpy(&value, from + i, 4);
        to[i / 4] += value;
      }
      break;
    }
  }
  if (copy.issuer == nullptr) {
    memory.landed(copy.shared, copy.bytes);
    machine_.barriers.complete(copy.barrier, copy.bytes);
  } else {
    CopyGroups& groups = copy.issuer->copies;
    --(copy.committed ? groups.committed : groups.uncommitted);
    machine_.wake(groups.waiting);
  }
}

// Rows of 128 bytes, swizzled; what lies outside the map is zero when read, dropped when written. A
// piece of 16 bytes that a map's last column cuts is written as a whole.
void Copies::move_tile(const Copy& copy) {
  const DecodedMap& map = copy.map;
  const bool store = copy.kind == Kind::kStoreTile;
  const auto columns = static_cast<int64_t>(map.size[0]);
  constexpr uint32_t kPiece = SharedMemory::kChunk;
  SharedMemory& memory = machine_.memory;
  for (int r = 0; r < map.box_rows; ++r) {
    Coordinates at = copy.at;
    at[1] += r;
    bool inside = true;
    uint64_t offset = 0;  // addresses wrap around
    for (int d = 1; d < map.rank; ++d) {
      const int64_t i = at[d];
      inside = inside && i >= 0 && i < static_cast<int64_t>(map.size[d]);
      offset += static_cast<uint64_t>(i) * map.stride[d];
    }
    for (uint32_t chunk = 0; chunk < kTileRowBytes; chunk += kPiece) {
      const uint32_t address = swizzle128(copy.shared + r * kTileRowBytes + chunk);
      uint8_t* shared = memory.bytes(address, kPiece, "tile copy");
      if (store) memory.check_async_read(address, nullptr, "tile store");
      const int64_t column = at[0] + static_cast<int64_t>(chunk / 2);
      const int64_t left = inside && column >= 0 ? columns - column : 0;
      const auto bytes = static_cast<uint32_t>(std::clamp<int64_t>(2 * left, 0, kPiece));
      uint8_t* global = static_cast<uint8_t*>(map.base) + offset + 2 * column;
      if (!store) {
        std::memcpy(shared, global, bytes);
        std::memset(shared + bytes, 0, kPiece - bytes);
      } else if (bytes > 0) {
        machine_.write_global(global, kPiece, false);
        std::memcpy(global, shared, kPiece);
        if (bytes < kPiece) {
          machine_.fault("tile store writes past the %d columns of its map", int(columns));
        }
      }
    }
  }
}

}  // namespace fused_attn::emulator
