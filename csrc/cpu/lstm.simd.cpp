// A whole LSTM layer, forward and backward.
//
// Multiply-adds: 4 T B H (I + H) forward, twice that backward, and 4 T B H I less where x needs no
// gradient. What does not depend on the previous step is one product over all T B rows; the rest
// runs per group of batch rows through all steps, W_hh staying in the L2 cache.
#include "cpu/lstm.h"

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/lstm_cell.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {
namespace {

using namespace mann_ext::lstm;

template <class A>
struct LSTM {
  static constexpr int64_t kWidth = kPanelWidth<A>;

  static const A* in(const void* p) { return static_cast<const A*>(p); }
  static A* out(void* p) { return static_cast<A*>(p); }

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
          std::fill_n(h + r * H, H, A(0));
          std::fill_n(c + r * H, H, A(0));
        }
      multiply<A>({4 * H, H, h, H, 1, in(s.state_panels), gates, 4 * H}, 0, rows, true);
      const A *bias_ih = in(s.bias_ih), *bias_hh = in(s.bias_hh);
      for (int64_t r = 0; r < rows; ++r)
        lstm_activate<A>(
            H,
            [=](int64_t i, int64_t count) {
              return load_part<A>(bias_ih + i, count) + load_part<A>(bias_hh + i, count);
            },
            gates + r * 4 * H, c + r * H, h + r * H,
            s.cells == nullptr ? nullptr : out(s.cells) + (row + r) * H);
      std::copy(h, h + rows * H, out(s.hidden_out) + row * H);
    }
    std::copy(h, h + rows * H, out(s.h_out) + first * H);
    std::copy(c, c + rows * H, out(s.c_out) + first * H);
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
        lstm_differentiate<A>(
            H, in(s.gates) + (row + r) * 4 * H, in(s.cells) + (row + r) * H, previous(s.c, s.cells),
            s.grad_hidden == nullptr ? nullptr : in(s.grad_hidden) + (row + r) * H, grad_h + r * H,
            grad_c + r * H, grad_gates + r * 4 * H);
        const A* h = previous(s.h, s.hidden_out);
        for (int64_t j = 0; j < H; j += kWidth)
          pack_row<A>(h == nullptr ? nullptr : h + j, H - j,
                      out(s.previous_panels) + j * all + (row + r) * kWidth);
      }
      multiply<A>({H, 4 * H, grad_gates, 4 * H, 1, in(s.state_panels), grad_h, H}, 0, rows, false);
      for (int64_t r = 0; s.reset != nullptr && r < rows; ++r)
        if (s.reset[row + r]) {
          std::fill_n(grad_h + r * H, H, A(0));
          std::fill_n(grad_c + r * H, H, A(0));
        }
    }
    std::copy(grad_h, grad_h + rows * H, out(s.grad_h) + first * H);
    std::copy(grad_c, grad_c + rows * H, out(s.grad_c) + first * H);
  }

  // Rows of 4H: D^T x, D^T h_{t-1} and the sums of D, D the gradient of the gates.
  static void weight_gradients(const ScanBackward& s, int64_t first, int64_t end) {
    const int64_t H = s.hidden, I = s.inputs, all = s.steps * s.batch;
    const A* d = in(s.grad_gates);
    multiply<A>({I, all, d, 1, 4 * H, in(s.x_panels), out(s.grad_weight_ih), I}, first, end, false);
    multiply<A>({H, all, d, 1, 4 * H, in(s.previous_panels), out(s.grad_weight_hh), H}, first, end,
                false);
    sum_rows<A>(d, all, 4 * H, first, end, out(s.grad_bias));
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
