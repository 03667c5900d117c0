// The activations and their derivatives, all of one form. With a = |x| and the tail
//
//   q(a) = 1 - CDF(a),  d(a) = -q'(a)     (d is even, q the share that is taken off)
//
//   act(x)  = x * CDF(x) = max(x, 0) - a * q(a)
//   act'(x) = CDF(x) + x * d(a),  CDF(x) = 1 - q(a) for x > 0, else q(a)
//
// which never cancels for negative x, as 1 + erf(x / sqrt 2) and 1 + tanh do.
//
//   GELU       CDF of the normal distribution (Hendrycks, Gimpel 2016, section 2)
//   tanh-GELU  CDF(x) = sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is their (1 + tanh) / 2
//   SiLU       CDF(x) = sigmoid(x) (Elfwing, Uchibe, Doya 2017)
#pragma once

#include "common/activation.h"
#include "cpu/vec.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

template <class T>
struct Tail {
  Vec<T> q, d;
};

// exp(a^2 / 2) * q(a) of the normal distribution, which is erfcx(a / sqrt 2) / 2, as t P(t) with
// t = 1 / (1 + 0.34 a). P is our own minimax polynomial (Remez) of the relative error on [0, 9]:
// 1.3e-5 (half), or 1.2e-8, and 2.5e-7 as float32 evaluates it. GELU made of the latter is off by
// at most 0.8 steps of float32 at max(1, |x|), its derivative by at most 1.8 at 1, on every level
// (torch's own: 3.1 and 2.5).
template <Precision kPrecision>
FUSED_ATTN_INLINE VecF scaled_normal_tail(VecF a) {
  constexpr float kHalf[] = {0.1348738670349121f,  0.14415380358695984f,  0.08536211401224136f,
                             0.14746057987213135f, 0.025145413354039192f, -0.037002284079790115f};
  constexpr float kFull[] = {0.13561291992664337f,  0.13624927401542664f,   0.1141645759344101f,
                             0.11960677057504654f,  -0.055167242884635925f, 0.21797606348991394f,
                             -0.28750061988830566f, 0.1467139571905136f,    -0.027655700221657753f};
  const VecF t = reciprocal<kPrecision>(fma(a, VecF::set1(0.34f), VecF::set1(1.0f)));
  if constexpr (kPrecision == Precision::kHalf) return t * polynomial(kHalf, t);
  return t * polynomial(kFull, t);
}

template <Precision>
FUSED_ATTN_INLINE Vec<double> normal_tail(Vec<double> a, Vec<double>) {
  return map_lanes(a, [](double x) { return 0.5 * std::erfc(x * 0.70710678118654752440); });
}
// e: exp(-a^2 / 2).
template <Precision kPrecision>
FUSED_ATTN_INLINE VecF normal_tail(VecF a, VecF e) {
  return e * scaled_normal_tail<kPrecision>(a);
}

// From here on e^-... is 0: nothing is lost, and an infinite x does not meet a q of 0.
template <class T>
constexpr T largest_argument(Activation activation) {
  const bool wide = sizeof(T) == 8;
  if (activation == Activation::kGelu) return wide ? T(39) : T(14);
  if (activation == Activation::kGeluTanh) return wide ? T(22) : T(11);
  return wide ? T(746) : T(104);
}

// q and d at a >= 0.
template <Activation kActivation, Precision kPrecision, class T>
FUSED_ATTN_INLINE Tail<T> tail(Vec<T> a) {
  using V = Vec<T>;
  const V one = V::set1(T(1));
  if constexpr (kActivation == Activation::kGelu) {
    const V e = exp<kPrecision>(a * a * V::set1(T(-0.5)));
    return {normal_tail<kPrecision>(a, e), e * V::set1(T(0.39894228040143267794))};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr double kLinear = 1.59576912160573071176, kCubic = kLinear * 0.044715;
    const V square = a * a;
    const V z = a * fma(square, V::set1(T(kCubic)), V::set1(T(kLinear)));
    const V slope = fma(square, V::set1(T(3 * kCubic)), V::set1(T(kLinear)));
    const V e = exp<kPrecision>(V::zero() - z), rest = reciprocal<kPrecision>(one + e),
            q = e * rest;
    return {q, q * rest * slope};
  } else {
    const V e = exp<kPrecision>(V::zero() - a), rest = reciprocal<kPrecision>(one + e),
            q = e * rest;
    return {q, q * rest};
  }
}

// act(x). NaN stays NaN: max and min give their second argument where either is.
template <Activation kActivation, Precision kPrecision, class T>
FUSED_ATTN_INLINE Vec<T> activate(Vec<T> x) {
  using V = Vec<T>;
  const V positive = max(V::zero(), x);
  if constexpr (kActivation == Activation::kRelu) {
    return positive;
  } else {
    const V a = min(V::set1(largest_argument<T>(kActivation)), abs(x));
    return positive - a * tail<kActivation, kPrecision>(a).q;
  }
}

// act(x) and act'(x).
template <class T>
struct Slope {
  Vec<T> value, slope;
};
template <Activation kActivation, Precision kPrecision, class T>
FUSED_ATTN_INLINE Slope<T> activate_with_slope(Vec<T> x) {
  using V = Vec<T>;
  const V one = V::set1(T(1));
  const V positive = max(V::zero(), x);
  const Mask above = greater(x, V::zero());
  if constexpr (kActivation == Activation::kRelu) {
    return {positive, select(above, one, V::zero())};
  } else {
    const V a = min(V::set1(largest_argument<T>(kActivation)), abs(x));
    const Tail<T> at = tail<kActivation, kPrecision>(a);
    const V moved = a * at.d;
    const V slope = select(above, (one - at.q) + moved, at.q - moved);
    return {positive - a * at.q, slope};
  }
}

// Calls function(constant) with the activation as a compile-time constant.
template <Activation kActivation>
struct Constant {
  static constexpr Activation value = kActivation;
};
template <class Function>
void with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kRelu:
      return function(Constant<Activation::kRelu>{});
    case Activation::kGelu:
      return function(Constant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return function(Constant<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return function(Constant<Activation::kSilu>{});
  }
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
