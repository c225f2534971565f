// One step of an LSTM for one row of the batch, and back; gates in the order i, f, g, o.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {

template <class A>
MANN_EXT_INLINE Vec<A> sigmoid(Vec<A> x) {
  return A(1) / (A(1) + exponential<A>(-x));
}

// exp(x) - 1 for x <= 0, with a small relative error also near 0, where exponential(x) - 1 has
// none of its digits left: the 1 of e^r is never added.
template <class A>
MANN_EXT_INLINE Vec<A> exponential_less_one(Vec<A> x) {
  using Mask = typename Lanes<A>::mask;
  using Int = typename Lanes<A>::Int;
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr A kMagic = kSingle ? A(12582912.0) : A(6755399441055744.0);
  constexpr A kLn2High = kSingle ? A(0.693145751953125) : A(6.93147180369123816490e-01);
  constexpr A kLn2Low = kSingle ? A(1.42860682030941723212e-6) : A(1.90821492927058770002e-10);
  constexpr int kTerms = kSingle ? 7 : 13;
  x = x < A(-50) ? broadcast<A>(A(-50)) : x;  // -1 in both types
  const Vec<A> shifted = x * A(1.44269504088896340736) + kMagic;
  const Vec<A> n = shifted - kMagic;
  const Vec<A> r = (x - n * kLn2High) - n * kLn2Low;
  double factorial = 1;
  for (int i = 2; i <= kTerms; ++i) factorial *= i;
  Vec<A> p = broadcast<A>(static_cast<A>(1 / factorial));
#pragma GCC unroll 16
  for (int i = kTerms; i > 1; --i) {
    factorial /= i;
    p = p * r + static_cast<A>(1 / factorial);
  }
  constexpr int kMantissa = kSingle ? 23 : 52;
  constexpr Int kBias = kSingle ? 127 : 1023;
  const Mask exponent = (reinterpret_cast<Mask>(shifted) + kBias) << kMantissa;
  const Vec<A> scale = reinterpret_cast<Vec<A>>(exponent);
  return scale * (p * r) + (scale - A(1));
}

template <class A>
MANN_EXT_INLINE Vec<A> hyperbolic_tangent(Vec<A> x) {
  using Mask = typename Lanes<A>::mask;
  using Int = typename Lanes<A>::Int;
  const Mask sign_bit = Mask{} + static_cast<Int>(Int{1} << (8 * sizeof(A) - 1));
  const Mask sign = reinterpret_cast<Mask>(x) & sign_bit;
  const Vec<A> magnitude = reinterpret_cast<Vec<A>>(reinterpret_cast<Mask>(x) & ~sign_bit);
  const Vec<A> e = exponential_less_one<A>(A(-2) * magnitude);
  const Vec<A> result = e / (e + A(2));
  return reinterpret_cast<Vec<A>>((reinterpret_cast<Mask>(result) & ~sign_bit) | sign);
}

template <class A>
void copy_or_zero(A* to, const A* from, int64_t count) {
  if (from != nullptr)
    std::copy(from, from + count, to);
  else
    std::fill(to, to + count, A(0));
}

// c and h from the gates, to which bias(index, count) is added; with `cells`, the activated gates
// and c are kept.
template <class A, class Bias>
void lstm_activate(int64_t hidden, const Bias& bias, A* gates, A* c, A* h, A* cells) {
  for (int64_t j = 0; j < hidden; j += kLanes<A>) {
    const int64_t count = hidden - j;
    const auto gate = [&](int64_t k) {
      return load_part<A>(gates + k * hidden + j, count) + bias(k * hidden + j, count);
    };
    const Vec<A> i = sigmoid<A>(gate(0));
    const Vec<A> f = sigmoid<A>(gate(1));
    const Vec<A> g = hyperbolic_tangent<A>(gate(2));
    const Vec<A> o = sigmoid<A>(gate(3));
    const Vec<A> cell = f * load_part<A>(c + j, count) + i * g;
    store_part<A>(c + j, cell, count);
    store_part<A>(h + j, o * hyperbolic_tangent<A>(cell), count);
    if (cells == nullptr) continue;
    store_part<A>(gates + j, i, count);
    store_part<A>(gates + hidden + j, f, count);
    store_part<A>(gates + 2 * hidden + j, g, count);
    store_part<A>(gates + 3 * hidden + j, o, count);
    store_part<A>(cells + j, cell, count);
  }
}

// The gradients of the gates before their activation, and dL/dc_{t-1} in place of dL/dc_t. dL/dh_t
// is grad_h and, if it is not null, grad_hidden; a null previous_c is zero.
template <class A>
void lstm_differentiate(int64_t hidden, const A* gates, const A* cells, const A* previous_c,
                        const A* grad_hidden, const A* grad_h, A* grad_c, A* grad_gates) {
  for (int64_t j = 0; j < hidden; j += kLanes<A>) {
    const int64_t count = hidden - j;
    const Vec<A> i = load_part<A>(gates + j, count);
    const Vec<A> f = load_part<A>(gates + hidden + j, count);
    const Vec<A> g = load_part<A>(gates + 2 * hidden + j, count);
    const Vec<A> o = load_part<A>(gates + 3 * hidden + j, count);
    const Vec<A> before = previous_c ? load_part<A>(previous_c + j, count) : Vec<A>{};
    const Vec<A> tanh_c = hyperbolic_tangent<A>(load_part<A>(cells + j, count));
    Vec<A> dh = load_part<A>(grad_h + j, count);
    if (grad_hidden != nullptr) dh += load_part<A>(grad_hidden + j, count);
    const Vec<A> dc = load_part<A>(grad_c + j, count) + dh * o * (A(1) - tanh_c * tanh_c);
    store_part<A>(grad_gates + j, dc * g * (i * (A(1) - i)), count);
    store_part<A>(grad_gates + hidden + j, dc * before * (f * (A(1) - f)), count);
    store_part<A>(grad_gates + 2 * hidden + j, dc * i * (A(1) - g * g), count);
    store_part<A>(grad_gates + 3 * hidden + j, dh * tanh_c * (o * (A(1) - o)), count);
    store_part<A>(grad_c + j, dc * f, count);
  }
}

// Sums over all rows of the columns [first, end) of d, in blocks, as the products: one long sum
// would lose digits.
template <class A>
void sum_rows(const A* d, int64_t rows, int64_t columns, int64_t first, int64_t end, A* sums) {
  constexpr int64_t kBlock = 32;
  for (int64_t j = first; j < end; j += kLanes<A>) {
    const int64_t count = end - j;
    Vec<A> total = {};
    for (int64_t block = 0; block < rows; block += kBlock) {
      Vec<A> sum = {};
      for (int64_t k = block; k < std::min(rows, block + kBlock); ++k)
        sum += load_part<A>(d + k * columns + j, count);
      total += sum;
    }
    store_part<A>(sums + j, total, count);
  }
}

}  // namespace MANN_EXT_ISA
