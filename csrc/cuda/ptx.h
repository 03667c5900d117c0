// The vocabulary of device.h in PTX, for sm_90a. Each word is one instruction or two; the PTX ISA
// manual says what they do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/words.h"

namespace fused_attn::device {

// ---- Threads ----

FUSED_ATTN_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
FUSED_ATTN_DEVICE int block_index() {
  return static_cast<int>(blockIdx.x);
}
FUSED_ATTN_DEVICE int block_count() {
  return static_cast<int>(gridDim.x);
}
FUSED_ATTN_DEVICE void sync_block() {
  __syncthreads();
}
FUSED_ATTN_DEVICE void sync_warp() {
  __syncwarp();
}
template <class T>
FUSED_ATTN_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <class T>
FUSED_ATTN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
FUSED_ATTN_DEVICE uint32_t ballot(bool vote) {
  return __ballot_sync(~0u, vote);
}
// Barriers 1 to 15, by whole warps: `sync` waits, `arrive` does not.
FUSED_ATTN_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FUSED_ATTN_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kCount>
FUSED_ATTN_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
FUSED_ATTN_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Shared memory ----

FUSED_ATTN_DEVICE SharedAddress shared_base() {
  extern __shared__ uint8_t memory[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(memory));
}
FUSED_ATTN_DEVICE float shared_load_float(SharedAddress address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
FUSED_ATTN_DEVICE uint32_t shared_load_word(SharedAddress address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
FUSED_ATTN_DEVICE void shared_store(SharedAddress address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
FUSED_ATTN_DEVICE void shared_store(SharedAddress address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
FUSED_ATTN_DEVICE void shared_store4(SharedAddress address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}
// Four 8 x 8 matrices of 16-bit elements from fragments; lane l gives the address of row l % 8 of
// matrix l / 8.
FUSED_ATTN_DEVICE void store_matrices(SharedAddress row, uint32_t a, uint32_t b, uint32_t c,
                                      uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
// Makes this thread's stores visible to copies and matrix products.
FUSED_ATTN_DEVICE void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Global memory ----

// Every plain store of a kernel: no other block of the launch may write there.
template <class T>
FUSED_ATTN_DEVICE void global_store(T* to, const T& value) {
  *to = value;
}
FUSED_ATTN_DEVICE void atomic_add(float* to, float value) {
  atomicAdd(to, value);
}

// ---- mbarriers ----

FUSED_ATTN_DEVICE void barrier_init(SharedAddress barrier, int arrivals, const char* /*name*/) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
FUSED_ATTN_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_async();
}
// Arrives and announces bytes that copies will bring.
FUSED_ATTN_DEVICE void barrier_expect(SharedAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
FUSED_ATTN_DEVICE void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Returns when the phase of this parity is complete. A debug build gives up after a second: nothing
// that goes well takes as long, and a hang would have no end.
#if defined(FUSED_ATTN_TRAP)
FUSED_ATTN_DEVICE void barrier_wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done, late;\n.reg .u32 start, now;\n"
      "mov.u32 start, %%globaltimer_lo;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "mov.u32 now, %%globaltimer_lo;\n"
      "sub.u32 now, now, start;\n"
      "setp.gt.u32 late, now, 1000000000;\n"
      "@late trap;\n"
      "bra WAIT;\n"
      "DONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#else
FUSED_ATTN_DEVICE void barrier_wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#endif

// ---- Copies ----

template <Keep kKeep>
FUSED_ATTN_DEVICE uint64_t cache_policy() {
  // What createpolicy.fractional gives for evict_first and evict_last of everything.
  return kKeep == Keep::kBriefly ? 0x12F0000000000000ull : 0x14F0000000000000ull;
}
template <Keep kKeep>
FUSED_ATTN_DEVICE void load_tile(SharedAddress to, const TensorMap& map, SharedAddress barrier,
                                 const TileAt& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(at.column), "r"(at.row), "r"(at.third), "r"(at.fourth),
      "r"(at.fifth), "l"(cache_policy<kKeep>())
      : "memory");
}
FUSED_ATTN_DEVICE void store_tile(const TensorMap& map, SharedAddress from, const TileAt& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
          "l"(&map),
      "r"(from), "r"(at.column), "r"(at.row), "r"(at.third), "r"(at.fourth), "r"(at.fifth)
      : "memory");
}
FUSED_ATTN_DEVICE void load_bulk(SharedAddress to, const void* from, uint32_t bytes,
                                 SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
FUSED_ATTN_DEVICE void add_bulk(float* to, SharedAddress from, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}
// By a whole warp: one of its lanes adds and commits.
FUSED_ATTN_DEVICE void add_bulk_by_warp(float* to, SharedAddress from, uint32_t bytes) {
  asm volatile(
      "{\n.reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "@one cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "@one cp.async.bulk.commit_group;\n}" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}
FUSED_ATTN_DEVICE void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until the committed stores of this thread have read their shared memory.
FUSED_ATTN_DEVICE void wait_stores() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// ---- 16-bit elements ----

struct BFloat16 {
  using Storage = __nv_bfloat16;
  static constexpr uint32_t kExponent = 0x7f80;  // its bits
  static FUSED_ATTN_DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static FUSED_ATTN_DEVICE float widen(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};
struct Float16 {
  using Storage = __half;
  static constexpr uint32_t kExponent = 0x7c00;  // its bits
  static FUSED_ATTN_DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static FUSED_ATTN_DEVICE float widen(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }
};

// ---- Matrix products of a warpgroup ----

FUSED_ATTN_DEVICE void mma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
FUSED_ATTN_DEVICE void mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kLeft groups are in flight.
template <int kLeft>
FUSED_ATTN_DEVICE void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Reads and writes every register as far as the compiler knows: results are not read before the
// wait that precedes it, and operands live until then.
template <int kCount>
FUSED_ATTN_DEVICE void keep_in_registers(float (&registers)[kCount]) {
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
FUSED_ATTN_DEVICE void keep_in_registers(uint32_t (&registers)[kCount]) {
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// The same number, of which the compiler knows nothing: what is worked out from it in a loop is not
// kept in registers from step to step.
FUSED_ATTN_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class Element, int kColumns, bool kTransposeA, bool kTransposeB>
struct Mma;
#include "wgmma_wrappers.h"

// ---- Arithmetic ----

FUSED_ATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUSED_ATTN_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUSED_ATTN_DEVICE float reciprocal_root(float x) {
  return __frsqrt_rn(x);
}
FUSED_ATTN_DEVICE float square_root(float x) {
  return __fsqrt_rn(x);
}
FUSED_ATTN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}
FUSED_ATTN_DEVICE float infinity() {
  return __int_as_float(0x7f800000);
}
FUSED_ATTN_DEVICE uint32_t bits_of(float x) {
  return __float_as_uint(x);
}
FUSED_ATTN_DEVICE float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}
FUSED_ATTN_DEVICE float magnitude(float x) {
  return fabsf(x);
}
FUSED_ATTN_DEVICE float largest(float a, float b) {
  return fmaxf(a, b);
}
template <class T>
FUSED_ATTN_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FUSED_ATTN_DEVICE T larger(T a, T b) {
  return a < b ? b : a;
}
FUSED_ATTN_DEVICE float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}

}  // namespace fused_attn::device
