// The vocabulary of device.h on the emulated machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/float16.h"
#include "cuda/words.h"
#include "emulator/machine.h"

namespace fused_attn::device {

inline emulator::Machine& machine() {
  return emulator::Machine::instance();
}

// ---- Threads ----

inline int thread_index() {
  return machine().thread().index;
}
inline int block_index() {
  return machine().launch().block;
}
inline int block_count() {
  return machine().launch().blocks;
}
inline void sync_block() {
  machine().barriers.named(0, machine().launch().threads, true);
}
inline void sync_warp() {
  machine().sync_warp();
}
template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  emulator::Machine& m = machine();
  emulator::Warp& warp = m.warp();
  std::memcpy(&warp.given[warp.meetings & 1][m.lane()][0], &value, 4);
  const int parity = m.meet("shuffle");
  std::memcpy(&value, &warp.given[parity][lane & 31][0], 4);
  return value;
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, machine().lane() ^ mask);
}
inline uint32_t ballot(bool vote) {
  emulator::Machine& m = machine();
  emulator::Warp& warp = m.warp();
  warp.given[warp.meetings & 1][m.lane()][0] = vote ? 1 : 0;
  const int parity = m.meet("ballot");
  uint32_t bits = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) bits |= warp.given[parity][lane][0] << lane;
  return bits;
}
inline void named_sync(int id, int threads) {
  machine().barriers.named(id, threads, true);
}
inline void named_arrive(int id, int threads) {
  machine().barriers.named(id, threads, false);
}
template <int kCount>
void raise_registers() {
  machine().set_registers(kCount, true);
}
template <int kCount>
void lower_registers() {
  machine().set_registers(kCount, false);
}

// ---- Shared memory ----

inline SharedAddress shared_base() {
  return machine().memory.base();
}
inline float shared_load_float(SharedAddress address) {
  return machine().memory.load<float>(address);
}
inline uint32_t shared_load_word(SharedAddress address) {
  return machine().memory.load<uint32_t>(address);
}
inline void shared_store(SharedAddress address, float value) {
  machine().memory.store(address, value);
}
inline void shared_store(SharedAddress address, uint32_t value) {
  machine().memory.store(address, value);
}
inline void shared_store4(SharedAddress address, float a, float b, float c, float d) {
  struct Four {
    float value[4];
  };
  machine().memory.store(address, Four{{a, b, c, d}});
}
inline void store_matrices(SharedAddress row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  emulator::Machine& m = machine();
  emulator::Warp& warp = m.warp();
  auto& given = warp.given[warp.meetings & 1][m.lane()];
  given = {a, b, c, d, row, 0, 0, given[7]};
  if (row % 16 != 0) m.fault("stmatrix row at shared offset %u", m.memory.offset(row));
  m.memory.written_by_thread(row, 16);
  m.meet("stmatrix", [&](emulator::Warp& w, int parity) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int lane = 0; lane < emulator::kWarp; ++lane) {
        const uint32_t to = w.given[parity][8 * matrix + lane / 4][4] + lane % 4 * 4;
        std::memcpy(m.memory.bytes(to, 4, "stmatrix"), &w.given[parity][lane][matrix], 4);
      }
    }
  });
}
inline void fence_async() {
  machine().memory.fence_async();
}

// ---- Global memory ----

template <class T>
void global_store(T* to, const T& value) {
  machine().write_global(to, sizeof(T), false);
  *to = value;
}
inline void atomic_add(float* to, float value) {
  machine().write_global(to, sizeof(float), true);
  *to += value;
}

// ---- mbarriers ----

inline void barrier_init(SharedAddress barrier, int arrivals, const char* name) {
  machine().barriers.init(barrier, arrivals, name);
}
inline void fence_barrier_init() {
  machine().barriers.fence_init();
}
inline void barrier_expect(SharedAddress barrier, uint32_t bytes) {
  machine().barriers.expect(barrier, bytes);
}
inline void barrier_arrive(SharedAddress barrier) {
  machine().barriers.arrive(barrier);
}
inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
  machine().barriers.wait(barrier, parity);
}

// ---- Copies ----

inline emulator::Copies::Coordinates coordinates(const TileAt& at) {
  return {at.column, at.row, at.third, at.fourth, at.fifth};
}
template <Keep kKeep>
void load_tile(SharedAddress to, const TensorMap& map, SharedAddress barrier, const TileAt& at) {
  machine().copies.load_tile(to, map, barrier, coordinates(at));
}
inline void store_tile(const TensorMap& map, SharedAddress from, const TileAt& at) {
  machine().copies.store_tile(map, from, coordinates(at));
}
inline void load_bulk(SharedAddress to, const void* from, uint32_t bytes, SharedAddress barrier) {
  machine().copies.load_bulk(to, from, bytes, barrier);
}
inline void add_bulk(float* to, SharedAddress from, uint32_t bytes) {
  machine().copies.add_bulk(to, from, bytes);
}
// Which lane it is nobody promises, but it is always the same.
inline void add_bulk_by_warp(float* to, SharedAddress from, uint32_t bytes) {
  emulator::Machine& m = machine();
  m.meet("elect");
  if (m.lane() != m.elected_lane()) return;
  m.copies.add_bulk(to, from, bytes);
  m.copies.commit();
}
inline void commit_stores() {
  machine().copies.commit();
}
inline void wait_stores() {
  machine().copies.wait_read();
}

// ---- 16-bit elements ----

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr uint32_t kExponent = 0x7f80;  // its bits
  static uint32_t pack(float low, float high) {
    return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
  }
  static float widen(uint16_t bits) { return to_float(fused_attn::BFloat16{bits}); }
};
struct Float16 {
  using Storage = uint16_t;
  static constexpr uint32_t kExponent = 0x7c00;  // its bits
  static uint32_t pack(float low, float high) {
    return to_float16(low).bits | static_cast<uint32_t>(to_float16(high).bits) << 16;
  }
  static float widen(uint16_t bits) { return to_float(fused_attn::Float16{bits}); }
};

// ---- Matrix products of a warpgroup ----

inline emulator::MatrixUnit& matrix_unit() {
  return machine().matrix[machine().thread().index / kWarpgroupThreads];
}
inline void mma_fence() {
  matrix_unit().fence(machine());
}
inline void mma_commit() {
  matrix_unit().commit(machine());
}
template <int kLeft>
void mma_wait() {
  matrix_unit().wait(machine(), kLeft);
}
template <int kCount>
void keep_in_registers(float (&)[kCount]) {}
template <int kCount>
void keep_in_registers(uint32_t (&)[kCount]) {}

inline int opaque(int x) {
  return x;
}

template <class Element, int kColumns, bool kTransposeA, bool kTransposeB>
struct Mma {
  static void from_shared(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
    matrix_unit().issue(machine(), {kColumns, false, kTransposeA, kTransposeB, &Element::widen}, d,
                        a, nullptr, b, accumulate);
  }
  static void from_registers(float (&d)[kColumns / 2], const uint32_t& a0, const uint32_t& a1,
                             const uint32_t& a2, const uint32_t& a3, uint64_t b, bool accumulate) {
    const uint32_t* const a[4] = {&a0, &a1, &a2, &a3};
    matrix_unit().issue(machine(), {kColumns, true, false, kTransposeB, &Element::widen}, d, 0, a,
                        b, accumulate);
  }
};

// ---- Arithmetic ----

// Flushes subnormal numbers, as ex2.approx.ftz and lg2.approx.ftz do.
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
inline float log2_fast(float x) {
  return std::log2(std::fabs(x) < std::numeric_limits<float>::min() ? 0.0f : x);
}
inline float square_root(float x) {
  return std::sqrt(x);
}
inline float reciprocal_root(float x) {
  return 1.0f / std::sqrt(x);
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline float infinity() {
  return std::numeric_limits<float>::infinity();
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float magnitude(float x) {
  return std::fabs(x);
}
inline float largest(float a, float b) {
  return std::fmax(a, b);
}
template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a < b ? b : a;
}
inline float multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}

}  // namespace fused_attn::device
