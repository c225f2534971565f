// A whole LSTM layer, forward and backward.
//
// Multiply-adds: 4 T B H (I + H) forward, twice that backward, and 4 T B H I less where x needs no
// gradient. What does not depend on the previous step is one product over all T B rows; the rest
// runs per group of batch rows through all steps, W_hh staying in the L2 cache.
#include "cpu/lstm.h"

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {
namespace {

using namespace mann_ext::lstm;

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
struct LSTM {
  static constexpr int64_t kWidth = kPanelWidth<A>;

  static const A* in(const void* p) { return static_cast<const A*>(p); }
  static A* out(void* p) { return static_cast<A*>(p); }

  static void copy_or_zero(A* to, const A* from, int64_t count) {
    if (from != nullptr)
      std::copy(from, from + count, to);
    else
      std::fill(to, to + count, A(0));
  }

  // ---------------------------------------------------------------- forward

  // Panels of W_ih^T, then those of W_hh^T.
  static void pack(const Scan& s, int64_t first, int64_t end) {
    const int64_t H = s.hidden, count = panels(4 * H, kWidth);
    for (int64_t i = first; i < end; ++i) {
      if (i < count)
        pack_panel<A>(in(s.weight_ih), 1, s.inputs, s.inputs, 4 * H, i, out(s.input_panels));
      else
        pack_panel<A>(in(s.weight_hh), 1, H, H, 4 * H, i - count, out(s.state_panels));
    }
  }

  // gates = x W_ih^T, rows of T B.
  static void project(const Scan& s, int64_t first, int64_t end) {
    const Product<A> p = {4 * s.hidden,       s.inputs,     in(s.x),     s.inputs, 1,
                          in(s.input_panels), out(s.gates), 4 * s.hidden};
    multiply<A>(p, first, end, false);
  }

  // The rows [first, end) of the batch through all steps.
  static void scan(const Scan& s, void* room, int64_t first, int64_t end) {
    const int64_t H = s.hidden, rows = end - first;
    A* h = out(room);
    A* c = h + rows * H;
    copy_or_zero(h, in(s.h) + first * H, rows * H);
    copy_or_zero(c, in(s.c) + first * H, rows * H);
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t row = t * s.batch + first;
      A* gates = out(s.gates) + row * 4 * H;
      for (int64_t r = 0; s.reset != nullptr && r < rows; ++r)
        if (s.reset[row + r]) {
          copy_or_zero(h + r * H, nullptr, H);
          copy_or_zero(c + r * H, nullptr, H);
        }
      multiply<A>({4 * H, H, h, H, 1, in(s.state_panels), gates, 4 * H}, 0, rows, true);
      for (int64_t r = 0; r < rows; ++r)
        activate(s, gates + r * 4 * H, c + r * H, h + r * H,
                 s.cells == nullptr ? nullptr : out(s.cells) + (row + r) * H);
      std::copy(h, h + rows * H, out(s.hidden_out) + row * H);
    }
    std::copy(h, h + rows * H, out(s.h_out) + first * H);
    std::copy(c, c + rows * H, out(s.c_out) + first * H);
  }

  // One row and step: c and h from the gates; if saved, the activated gates and the cells.
  static void activate(const Scan& s, A* gates, A* c, A* h, A* cells) {
    const int64_t H = s.hidden;
    for (int64_t j = 0; j < H; j += kLanes<A>) {
      const int64_t count = H - j;
      const auto gate = [&](int64_t k) {
        return load_part<A>(gates + k * H + j, count) +
               (load_part<A>(in(s.bias_ih) + k * H + j, count) +
                load_part<A>(in(s.bias_hh) + k * H + j, count));
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
      store_part<A>(gates + H + j, f, count);
      store_part<A>(gates + 2 * H + j, g, count);
      store_part<A>(gates + 3 * H + j, o, count);
      store_part<A>(cells + j, cell, count);
    }
  }

  // ---------------------------------------------------------------- backward

  // Panels of x, of W_hh and, if wanted, of W_ih.
  static void pack_backward(const ScanBackward& s, int64_t first, int64_t end) {
    const int64_t H = s.hidden, I = s.inputs;
    const int64_t of_x = panels(I, kWidth), of_state = panels(H, kWidth);
    for (int64_t i = first; i < end; ++i) {
      if (i < of_x)
        pack_panel<A>(in(s.x), I, 1, s.steps * s.batch, I, i, out(s.x_panels));
      else if (i < of_x + of_state)
        pack_panel<A>(in(s.weight_hh), H, 1, 4 * H, H, i - of_x, out(s.state_panels));
      else
        pack_panel<A>(in(s.weight_ih), I, 1, 4 * H, I, i - of_x - of_state, out(s.input_panels));
    }
  }

  // The rows [first, end) of the batch through all steps, backwards: the gradients of the gates
  // before their activation, of h and of c. Also packs h_{t-1} for the gradient of W_hh.
  static void scan_backward(const ScanBackward& s, void* room, int64_t first, int64_t end) {
    const int64_t H = s.hidden, rows = end - first, all = s.steps * s.batch;
    A* grad_h = out(room);
    A* grad_c = grad_h + rows * H;
    copy_or_zero(grad_h, s.grad_h_out ? in(s.grad_h_out) + first * H : nullptr, rows * H);
    copy_or_zero(grad_c, s.grad_c_out ? in(s.grad_c_out) + first * H : nullptr, rows * H);
    for (int64_t t = s.steps - 1; t >= 0; --t) {
      const int64_t row = t * s.batch + first;
      A* grad_gates = out(s.grad_gates) + row * 4 * H;
      for (int64_t r = 0; r < rows; ++r) {
        const bool ended = s.reset != nullptr && s.reset[row + r];
        const auto previous = [&](const void* initial, const void* history) -> const A* {
          if (ended) return nullptr;
          return t == 0 ? in(initial) + (first + r) * H : in(history) + (row + r - s.batch) * H;
        };
        differentiate(s, row + r, previous(s.c, s.cells), grad_h + r * H, grad_c + r * H,
                      grad_gates + r * 4 * H);
        const A* h = previous(s.h, s.hidden_out);
        for (int64_t j = 0; j < H; j += kWidth)
          pack_row<A>(h == nullptr ? nullptr : h + j, H - j,
                      out(s.previous_panels) + j * all + (row + r) * kWidth);
      }
      multiply<A>({H, 4 * H, grad_gates, 4 * H, 1, in(s.state_panels), grad_h, H}, 0, rows, false);
      for (int64_t r = 0; s.reset != nullptr && r < rows; ++r)
        if (s.reset[row + r]) {
          copy_or_zero(grad_h + r * H, nullptr, H);
          copy_or_zero(grad_c + r * H, nullptr, H);
        }
    }
    std::copy(grad_h, grad_h + rows * H, out(s.grad_h) + first * H);
    std::copy(grad_c, grad_c + rows * H, out(s.grad_c) + first * H);
  }

  // One row and step, `row` of T B: grad_h without this step's own output in, grad_c in and out.
  static void differentiate(const ScanBackward& s, int64_t row, const A* previous_c,
                            const A* grad_h, A* grad_c, A* grad_gates) {
    const int64_t H = s.hidden;
    const A* gates = in(s.gates) + row * 4 * H;
    const A* cells = in(s.cells) + row * H;
    const A* grad_hidden = s.grad_hidden == nullptr ? nullptr : in(s.grad_hidden) + row * H;
    for (int64_t j = 0; j < H; j += kLanes<A>) {
      const int64_t count = H - j;
      const Vec<A> i = load_part<A>(gates + j, count);
      const Vec<A> f = load_part<A>(gates + H + j, count);
      const Vec<A> g = load_part<A>(gates + 2 * H + j, count);
      const Vec<A> o = load_part<A>(gates + 3 * H + j, count);
      const Vec<A> before = previous_c ? load_part<A>(previous_c + j, count) : Vec<A>{};
      const Vec<A> tanh_c = hyperbolic_tangent<A>(load_part<A>(cells + j, count));
      Vec<A> dh = load_part<A>(grad_h + j, count);
      if (grad_hidden != nullptr) dh += load_part<A>(grad_hidden + j, count);
      const Vec<A> dc = load_part<A>(grad_c + j, count) + dh * o * (A(1) - tanh_c * tanh_c);
      store_part<A>(grad_gates + j, dc * g * (i * (A(1) - i)), count);
      store_part<A>(grad_gates + H + j, dc * before * (f * (A(1) - f)), count);
      store_part<A>(grad_gates + 2 * H + j, dc * i * (A(1) - g * g), count);
      store_part<A>(grad_gates + 3 * H + j, dh * tanh_c * (o * (A(1) - o)), count);
      store_part<A>(grad_c + j, dc * f, count);
    }
  }

  // Rows of 4H: D^T x, D^T h_{t-1} and the sums of D, D the gradient of the gates.
  static void weight_gradients(const ScanBackward& s, int64_t first, int64_t end) {
    const int64_t H = s.hidden, I = s.inputs, all = s.steps * s.batch;
    const A* d = in(s.grad_gates);
    multiply<A>({I, all, d, 1, 4 * H, in(s.x_panels), out(s.grad_weight_ih), I}, first, end, false);
    multiply<A>({H, all, d, 1, 4 * H, in(s.previous_panels), out(s.grad_weight_hh), H}, first, end,
                false);
    // In blocks, as the products: one long sum would lose digits.
    constexpr int64_t kBlock = 32;
    for (int64_t j = first; j < end; j += kLanes<A>) {
      const int64_t count = end - j;
      Vec<A> total = {};
      for (int64_t block = 0; block < all; block += kBlock) {
        Vec<A> sum = {};
        for (int64_t k = block; k < std::min(all, block + kBlock); ++k)
          sum += load_part<A>(d + k * 4 * H + j, count);
        total += sum;
      }
      store_part<A>(out(s.grad_bias) + j, total, count);
    }
  }

  // Rows of T B: D W_ih.
  static void input_gradients(const ScanBackward& s, int64_t first, int64_t end) {
    const Product<A> p = {s.inputs, 4 * s.hidden,       in(s.grad_gates), 4 * s.hidden,
                          1,        in(s.input_panels), out(s.grad_x),    s.inputs};
    multiply<A>(p, first, end, false);
  }

  static const Kernels table;
};

template <class A>
const Kernels LSTM<A>::table = {kWidth,         sizeof(A),     pack,          project,
                                scan,           pack_backward, scan_backward, weight_gradients,
                                input_gradients};

}  // namespace

const Kernels& lstm_kernels(bool float64) {
  return float64 ? LSTM<double>::table : LSTM<float>::table;
}

}  // namespace MANN_EXT_ISA
