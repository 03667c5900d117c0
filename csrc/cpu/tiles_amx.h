// Products of whole tiles by AMX, the matrix instructions of Intel's processors (Intel 64 and
// IA-32 Architectures Software Developer's Manual, volume 1, chapter 18): 16 rows of up to 16 pairs
// of bfloat16 times as many pairs of 16 lanes, with sums in float32.
//
//   C[r][lane] += sum over u of A[r][u] . B[u][lane]   u: pairs
//
// Like the dot products of AVX-512, these round to nearest even and take subnormal numbers for 0.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fused_attn::FUSED_ATTN_LEVEL {

constexpr int kTileRows = 16;   // of A and C
constexpr int kTileUnits = 16;  // pairs of a row of A

// Shapes this thread's tile registers for as long as it lives. What was there before comes back:
// torch's own products keep their shapes from one call to the next.
class TileRegisters {
 public:
  TileRegisters() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Shapes whole = {};
    whole.palette = 1;
    for (int t = 0; t < kTiles; ++t) {
      whole.bytes_of_row[t] = kTileUnits * sizeof(uint32_t);
      whole.rows[t] = kTileRows;
    }
    load(whole);
  }
  ~TileRegisters() { load(before_); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  static constexpr int kTiles = 8;
  struct alignas(64) Shapes {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t bytes_of_row[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Shapes) == 64);

  // gcc's intrinsic does not say that all 64 bytes are read.
  static void load(const Shapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

  Shapes before_;
};

// What the compiler knows of memory is there before a tile is loaded: gcc's intrinsics do not say
// that they read it.
inline void order_memory() {
  asm volatile("" ::: "memory");
}

// Does nothing but multiply, `times` times four tiles; how many operations that were.
inline double multiply_tiles_only(int64_t times) {
  const TileRegisters registers;
  for (int64_t i = 0; i < times; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  return 4.0 * 2 * kTileRows * 16 * (2 * kTileUnits) * static_cast<double>(times);
}

// c[16][kGroups * 16] = A B, over `steps` times 16 pairs. Strides count pairs.
template <int kGroups>
inline void multiply_tiles(const uint32_t* a, int64_t stride_a, const uint32_t* b, int64_t stride_b,
                           int64_t steps, float* c) {
  static_assert(kGroups >= 1 && kGroups <= 4);
  const int64_t bytes_a = stride_a * int64_t{sizeof(uint32_t)};
  const int64_t bytes_b = stride_b * int64_t{sizeof(uint32_t)};
  order_memory();
  _tile_zero(0);
  if constexpr (kGroups > 1) _tile_zero(1);
  if constexpr (kGroups > 2) _tile_zero(2);
  if constexpr (kGroups > 3) _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a, bytes_a);
    _tile_loadd(5, b, bytes_b);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kGroups > 1) {
      _tile_loadd(6, b + 16, bytes_b);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kGroups > 2) {
      _tile_loadd(7, b + 32, bytes_b);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (kGroups > 3) {
      _tile_loadd(5, b + 48, bytes_b);
      _tile_dpbf16ps(3, 4, 5);
    }
    a += kTileUnits;
    b += kTileUnits * stride_b;
  }
  constexpr int64_t kBytes = kGroups * 16 * int64_t{sizeof(float)};
  _tile_stored(0, c, kBytes);
  if constexpr (kGroups > 1) _tile_stored(1, c + 16, kBytes);
  if constexpr (kGroups > 2) _tile_stored(2, c + 32, kBytes);
  if constexpr (kGroups > 3) _tile_stored(3, c + 48, kBytes);
  order_memory();
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
