// Every word of cpu/vec.h that a level has of its own, lane by lane against plain numbers.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>

#include "cpu/vec.h"

namespace fused_attn {
namespace FUSED_ATTN_LEVEL {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int checked = 0, wrong = 0;

void check(const char* word, int lane, double got, double expected, double tolerance = 0) {
  ++checked;
  const bool both_nan = std::isnan(got) && std::isnan(expected);
  const bool equal = got == expected && std::signbit(got) == std::signbit(expected);
  if (both_nan || equal || std::fabs(got - expected) <= tolerance * std::fabs(expected)) return;
  ++wrong;
  std::printf("%s: lane %d is %.9g, expected %.9g\n", word, lane, got, expected);
}

// Lane i of a vector against expected(i).
template <class Expected>
void check(const char* word, const VecF& got, const Expected& expected, double tolerance = 0) {
  float lanes[16];
  got.store(lanes);
  for (int i = 0; i < 16; ++i) check(word, i, lanes[i], expected(i), tolerance);
}
template <class Expected>
void check(const char* word, const VecU& got, const Expected& expected) {
  uint32_t lanes[16];
  got.store(lanes);
  for (int i = 0; i < 16; ++i) check(word, i, lanes[i], expected(i));
}
template <class Expected>
void check_mask(const char* word, Mask got, const Expected& expected) {
  for (int i = 0; i < 16; ++i) check(word, i, got >> i & 1, expected(i) ? 1 : 0);
}

// No two lanes are alike, and no two vectors.
const float kA[16] = {1.5f,    -2.25f, 3e-3f, -7.0f, 11.0f,  0.5f,  -0.0f,  1e20f,
                      -1e-20f, 2.5f,   -3.5f, 96.0f, -130.f, 1e-3f, 127.5f, -0.75f};
const float kB[16] = {-4.0f, 0.125f, 9.0f, -7.0f, 2.0f,   -33.0f, 5.0f,  1e18f,
                      3.0f,  -2.5f,  1.0f, 0.3f,  128.5f, -1e-3f, 1e-5f, 6.0f};
const float kC[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

void arithmetic() {
  const VecF a = load(kA), b = load(kB), c = load(kC);
  check("+", a + b, [](int i) { return kA[i] + kB[i]; });
  check("-", a - b, [](int i) { return kA[i] - kB[i]; });
  check("*", a * b, [](int i) { return kA[i] * kB[i]; });
  check("/", a / b, [](int i) { return kA[i] / kB[i]; });
  check("fma", fma(a, b, c), [](int i) { return std::fma(kA[i], kB[i], kC[i]); });
  check("max", max(a, b), [](int i) { return kA[i] > kB[i] ? kA[i] : kB[i]; });
  check("min", min(a, b), [](int i) { return kA[i] < kB[i] ? kA[i] : kB[i]; });
  check("abs", abs(a), [](int i) { return std::fabs(kA[i]); });
  check("sqrt", sqrt(abs(a)), [](int i) { return std::sqrt(std::fabs(kA[i])); });
  check("round", round(a), [](int i) { return std::nearbyint(kA[i]); });
  check("reciprocal_estimate", reciprocal_estimate(b), [](int i) { return 1 / kB[i]; }, 0x1p-14);
  check("scale2", scale2(c, round(b)), [](int i) {
    const float n = std::nearbyint(kB[i]);
    return n > 127 ? kInfinity : n < -126 ? 0 : std::ldexp(kC[i], static_cast<int>(n));
  });
  check("set1", VecF::set1(-0.0f), [](int) { return -0.0f; });
  check("zero", VecF::zero(), [](int) { return 0.0f; });
  check("sum", 0, sum(c), 136);
  check("largest", 0, largest(a), 1e20f);
  for (int i = 0; i < 16; ++i) {
    float lanes[16];
    for (int j = 0; j < 16; ++j) lanes[j] = j == i ? 2.0f : -1.0f - j;
    check("largest", i, largest(load(lanes)), 2);
    for (float& x : lanes) x = x == 2.0f ? 1024.0f : 1.0f;
    check("sum", i, sum(load(lanes)), 1039);
  }
  const VecF nan = VecF::set1(kNaN);
  check("max of NaN", max(nan, c), [](int i) { return kC[i]; });
  check("max with NaN", max(c, nan), [](int) { return kNaN; });
  check("min of NaN", min(nan, c), [](int i) { return kC[i]; });
  check("min with NaN", min(c, nan), [](int) { return kNaN; });
  check("exp", exp(load(kB)), [](int i) { return std::exp(kB[i]); }, 1e-6);
  check("tanh", tanh(a), [](int i) { return std::tanh(kA[i]); }, 1e-6);
}

void masks() {
  const VecF a = load(kA), b = load(kB);
  check_mask("greater", greater(a, b), [](int i) { return kA[i] > kB[i]; });
  check_mask("greater of NaN", greater(VecF::set1(kNaN), b), [](int) { return false; });
  for (unsigned mask : {0u, 0xffffu, 0xa5c3u, 0x0001u, 0x8000u, 0x1234u}) {
    check("select", select(static_cast<Mask>(mask), a, b),
          [=](int i) { return mask >> i & 1 ? kA[i] : kB[i]; });
  }
  uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = i * i % 7 % 3 == 0 ? 0 : static_cast<uint8_t>(1 << i % 8);
  for (int n : {0, 1, 7, 16, 33, 63, 64}) {
    const uint64_t bits = nonzero_bytes(bytes, n);
    for (int i = 0; i < 64; ++i) {
      check("nonzero_bytes", i, bits >> i & 1, i < n && bytes[i] != 0 ? 1 : 0);
    }
  }
}

void integers() {
  uint32_t x[16], y[16];
  for (uint32_t i = 0; i < 16; ++i) {
    x[i] = 0x9e3779b9u * (i + 1);
    y[i] = i % 3 == 0 ? x[i] : 0x85ebca6bu * (i + 3);
  }
  const VecU a = VecU::load(x), b = VecU::load(y);
  check("+", a + b, [&](int i) { return x[i] + y[i]; });
  check("^", a ^ b, [&](int i) { return x[i] ^ y[i]; });
  check("set1", VecU::set1(0xffffffffu), [](int) { return 0xffffffffu; });
  check_mask("not_below", not_below(a, b), [&](int i) { return x[i] >= y[i]; });
  VecU low, high;
  multiply_wide(a, 0xd2511f53u, low, high);
  const auto product = [&](int i) { return uint64_t{x[i]} * 0xd2511f53u; };
  check("multiply_wide low", low, [&](int i) { return static_cast<uint32_t>(product(i)); });
  check("multiply_wide high", high, [&](int i) { return static_cast<uint32_t>(product(i) >> 32); });
  uint32_t bits[16];
  std::memcpy(bits, kA, sizeof(bits));
  check("from_int_bits", from_int_bits(VecU::load(bits)), [](int i) { return kA[i]; });
}

void blocks() {
  float numbers[16][16];
  VecF rows[16];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) numbers[i][j] = static_cast<float>(16 * i + j * j);
    rows[i] = load(numbers[i]);
  }
  check("sum_each", sum_each(rows), [&](int i) { return 256 * i + 1240; });
  transpose(rows);
  for (int i = 0; i < 16; ++i) check("transpose", rows[i], [&](int j) { return numbers[j][i]; });
}

template <class T>
void partial(const char* word, const T* from) {
  for (int n = 0; n <= 16; ++n) {
    check(word, load(from, n), [=](int i) { return i < n ? to_float(from[i]) : 0.0f; });
    T to[16];
    for (T& x : to) from_float(77.0f, &x);
    store(to, load(from), n);
    for (int i = 0; i < 16; ++i) check(word, i, to_float(to[i]), i < n ? to_float(from[i]) : 77);
  }
}

// All 65536 numbers come in as they do one by one, and go out again as they were.
template <class S>
void sixteen_bits(const char* word) {
  for (uint32_t first = 0; first < 0x10000; first += 16) {
    S from[16], to[16];
    for (uint32_t i = 0; i < 16; ++i) from[i].bits = static_cast<uint16_t>(first + i);
    const VecF wide = load(from);
    check(word, wide, [&](int i) { return to_float(from[i]); });
    store(to, wide);
    for (int i = 0; i < 16; ++i) {
      check(word, i, to_float(to[i]), to_float(from[i]));
    }
  }
  // What lies between them, ties above all, is rounded as one by one.
  for (uint32_t first = 0; first < 0x80000000u; first += 0x4123) {
    float numbers[16];
    for (uint32_t i = 0; i < 16; ++i) {
      const uint32_t bits = (i % 4 == 0   ? (first & 0xffff0000u) | 0x8000u
                             : i % 4 == 1 ? (first & 0xffffe000u) | 0x1000u
                                          : first + 0x321u * i) |
                            i % 2 << 31;
      std::memcpy(&numbers[i], &bits, 4);
    }
    S to[16];
    const VecF back = store_rounded(to, load(numbers), false);
    for (int i = 0; i < 16; ++i) {
      S expected;
      from_float(numbers[i], &expected);
      check(word, i, to_float(to[i]), to_float(expected));
    }
    check(word, back, [&](int i) { return to_float(to[i]); });
  }
}

}  // namespace

int wrong_words() {
  arithmetic();
  masks();
  integers();
  blocks();
  BFloat16 brains[16];
  Float16 halves[16];
  for (int i = 0; i < 16; ++i) {
    from_float(kB[i], &brains[i]);
    from_float(kB[i], &halves[i]);
  }
  partial("float32, a part", kB);
  partial("bfloat16, a part", brains);
  partial("float16, a part", halves);
  sixteen_bits<BFloat16>("bfloat16");
  sixteen_bits<Float16>("float16");
  std::printf("%d lanes checked, %d wrong\n", checked, wrong);
  return wrong;
}

}  // namespace FUSED_ATTN_LEVEL

int wrong_words() {
  return FUSED_ATTN_LEVEL::wrong_words();
}

}  // namespace fused_attn
