// The LSTM's half of lstm_lrua_scan, forward and backward, and what goes to and from the memory.
//
// Multiply-adds: T B (4 H (H + R W) + P H) forward and twice that backward. A step is done for all
// rows of a group before the next, so that each pass over the weights serves them all; the weights'
// gradients are products over all T B rows at the end.
#include "cpu/lstm_lrua.h"

#include <algorithm>
#include <cmath>

#include "cpu/gemm.h"
#include "cpu/lstm_cell.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {
namespace {

using namespace mann_ext::lstm_lrua;

template <class A>
struct Cell {
  static constexpr int64_t kWidth = kPanelWidth<A>;

  static const A* in(const void* p) { return static_cast<const A*>(p); }
  static A* out(void* p) { return static_cast<A*>(p); }

  // What a group of rows has from step to step; backward the gradients of the same.
  struct Room {
    A* state;      // [rows][H + R W]: h and r
    A* c;          // [rows][H]
    A* gates;      // [rows][4H]
    A* interface;  // [rows][P]
    int64_t numbers;

    Room(const Sizes& n, int64_t rows, void* base) {
      state = out(base);
      c = state + rows * n.inner();
      gates = c + rows * n.hidden;
      interface = gates + rows * 4 * n.hidden;
      numbers = rows * (n.inner() + 5 * n.hidden + n.numbers());
    }
  };
  static int64_t room_bytes(const Sizes& n, int64_t rows) {
    return Room(n, rows, nullptr).numbers * static_cast<int64_t>(sizeof(A));
  }

  template <class Scan>
  static bool resets(const Scan& p, int64_t row) {
    return p.reset != nullptr && p.reset[row];
  }

  // ---------------------------------------------------------------- forward

  // Panels of W^T, then those of W_interface^T.
  static void pack(const Forward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, count = panels(4 * H, kWidth);
    for (int64_t i = first; i < end; ++i) {
      if (i < count)
        pack_panel<A>(in(p.weight), 1, n.inner(), n.inner(), 4 * H, i, out(p.state_panels));
      else
        pack_panel<A>(in(p.interface_weight), 1, H, H, n.numbers(), i - count,
                      out(p.interface_panels));
    }
  }

  static void begin(const Forward& p, void* base, int64_t first, int64_t end) {
    const int64_t H = p.sizes.hidden;
    const Room room(p.sizes, end - first, base);
    for (int64_t b = first; b < end; ++b)
      std::copy_n(in(p.h) + b * H, H, room.state + (b - first) * p.sizes.inner());
    std::copy(in(p.c) + first * H, in(p.c) + end * H, room.c);
  }

  static void step(const Forward& p, void* base, int64_t t, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, inner = n.inner(), rows = end - first, row = t * n.batch + first;
    const Room room(n, rows, base);
    for (int64_t r = 0; r < rows; ++r) {
      A* state = room.state + r * inner;
      if (resets(p, row + r)) {
        std::fill_n(state, inner, A(0));
        std::fill_n(room.c + r * H, H, A(0));
      } else {
        const A* reads = t == 0 ? in(p.reads) + (first + r) * n.reads()
                                : in(p.all_reads) + (row + r - n.batch) * n.reads();
        std::copy_n(reads, n.reads(), state + H);
      }
    }
    A* gates = p.gates == nullptr ? room.gates : out(p.gates) + row * 4 * H;
    std::copy_n(in(p.projected) + row * 4 * H, rows * 4 * H, gates);
    multiply<A>({4 * H, inner, room.state, inner, 1, in(p.state_panels), gates, 4 * H}, 0, rows,
                true);
    for (int64_t r = 0; r < rows; ++r) {
      A* h = room.state + r * inner;
      lstm_activate<A>(
          H, [](int64_t, int64_t) { return Vec<A>{}; }, gates + r * 4 * H, room.c + r * H, h,
          p.cells == nullptr ? nullptr : out(p.cells) + (row + r) * H);
      std::copy_n(h, H, out(p.hidden) + (row + r) * H);
    }
    const int64_t P = n.numbers();
    multiply<A>({P, H, room.state, inner, 1, in(p.interface_panels), room.interface, P}, 0, rows,
                false);
    for (int64_t r = 0; r < rows; ++r) activate_interface(p, room.interface + r * P, row + r);
  }

  // to = f(from + bias)
  template <class F>
  static void map(const A* from, const A* bias, int64_t count, A* to, const F& f) {
    for (int64_t j = 0; j < count; j += kLanes<A>)
      store_part<A>(to + j,
                    f(load_part<A>(from + j, count - j) + load_part<A>(bias + j, count - j)),
                    count - j);
  }

  // One row: keys, contents, gates and strengths, from the interface without its bias.
  static void activate_interface(const Forward& p, const A* numbers, int64_t row) {
    const Sizes& n = p.sizes;
    const int64_t reads = n.reads(), R = n.heads;
    const A* bias = in(p.interface_bias);
    const auto vector = [&](int64_t offset, void* to) {
      if (n.tanh_keys)
        map(numbers + offset, bias + offset, reads, out(to) + row * reads, hyperbolic_tangent<A>);
      else
        map(numbers + offset, bias + offset, reads, out(to) + row * reads,
            [](Vec<A> x) { return x; });
    };
    vector(0, p.keys);
    if (n.write_content) vector(reads, p.contents);
    numbers += n.vectors();
    bias += n.vectors();
    map(numbers, bias, R, out(p.write_gates) + row * R, sigmoid<A>);
    if (p.step_strengths == nullptr) return;
    A* strengths = out(p.step_strengths) + row * R;
    for (int64_t r = 0; r < R; ++r) {
      const A x = numbers[R + r] + bias[R + r];
      strengths[r] = !n.strength_per_step        ? in(p.strengths)[r]
                     : x > A(kSoftplusThreshold) ? x
                                                 : std::log1p(std::exp(x));
    }
  }

  static void end(const Forward& p, void* base, int64_t first, int64_t end) {
    const int64_t H = p.sizes.hidden;
    const Room room(p.sizes, end - first, base);
    std::copy_n(room.c, (end - first) * H, out(p.c_out) + first * H);
  }

  // ---------------------------------------------------------------- backward

  // Panels of W, of W_interface and of all h_t.
  static void pack_backward(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, of_state = panels(n.inner(), kWidth), of_h = panels(H, kWidth);
    for (int64_t i = first; i < end; ++i) {
      if (i < of_state)
        pack_panel<A>(in(p.weight), n.inner(), 1, 4 * H, n.inner(), i, out(p.state_panels));
      else if (i < of_state + of_h)
        pack_panel<A>(in(p.interface_weight), H, 1, n.numbers(), H, i - of_state,
                      out(p.interface_panels));
      else
        pack_panel<A>(in(p.hidden), H, 1, n.steps * n.batch, H, i - of_state - of_h,
                      out(p.hidden_panels));
    }
  }

  // Rows of T B: [h_{t-1}, r_{t-1}] into its panels. The room of a row of them lies behind.
  static void pack_previous(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, all = n.steps * n.batch;
    for (int64_t row = first; row < end; ++row) {
      const bool starts = row < n.batch, reset = resets(p, row);
      const A* h = starts ? in(p.h) + row * H : in(p.hidden) + (row - n.batch) * H;
      const A* reads =
          starts ? in(p.reads) + row * n.reads() : in(p.all_reads) + (row - n.batch) * n.reads();
      for (int64_t j = 0; j < n.inner(); j += kWidth) {
        A* packed = out(p.previous_panels) + j * all + row * kWidth;
        for (int64_t i = 0; i < kWidth; ++i) {
          const int64_t column = j + i;
          packed[i] = reset || column >= n.inner() ? A(0)
                      : column < H                 ? h[column]
                                                   : reads[column - H];
        }
      }
    }
  }

  static void begin_backward(const Backward& p, void* base, int64_t first, int64_t end) {
    const int64_t H = p.sizes.hidden, rows = end - first;
    const Room room(p.sizes, rows, base);
    std::fill_n(room.state, rows * p.sizes.inner(), A(0));
    copy_or_zero(room.c, p.grad_c ? in(p.grad_c) + first * H : nullptr, rows * H);
  }

  // dL/dr_t, all of it: from outside and from the step after.
  static void reads_gradient(const Backward& p, void* base, int64_t t, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t rows = end - first, row = t * n.batch + first, reads = n.reads();
    const Room room(n, rows, base);
    for (int64_t r = 0; r < rows; ++r) {
      const A* fed_back = room.state + r * n.inner() + n.hidden;
      const A* given = p.grad_reads == nullptr ? nullptr : in(p.grad_reads) + (row + r) * reads;
      A* total = out(p.total_reads) + (row + r) * reads;
      for (int64_t j = 0; j < reads; ++j)
        total[j] = given == nullptr ? fed_back[j] : given[j] + fed_back[j];
    }
  }

  static void step_backward(const Backward& p, void* base, int64_t t, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, inner = n.inner(), P = n.numbers();
    const int64_t rows = end - first, row = t * n.batch + first;
    const Room room(n, rows, base);
    A* grad_interface = out(p.grad_interface) + row * P;
    for (int64_t r = 0; r < rows; ++r) differentiate_interface(p, row + r, grad_interface + r * P);
    multiply<A>({H, P, grad_interface, P, 1, in(p.interface_panels), room.state, inner}, 0, rows,
                true);
    A* grad_gates = out(p.grad_projected) + row * 4 * H;
    for (int64_t r = 0; r < rows; ++r) {
      const A* previous_c = resets(p, row + r) ? nullptr
                            : t == 0           ? in(p.c) + (first + r) * H
                                               : in(p.cells) + (row + r - n.batch) * H;
      lstm_differentiate<A>(H, in(p.gates) + (row + r) * 4 * H, in(p.cells) + (row + r) * H,
                            previous_c,
                            p.grad_hidden == nullptr ? nullptr : in(p.grad_hidden) + (row + r) * H,
                            room.state + r * inner, room.c + r * H, grad_gates + r * 4 * H);
    }
    multiply<A>({inner, 4 * H, grad_gates, 4 * H, 1, in(p.state_panels), room.state, inner}, 0,
                rows, false);
    for (int64_t r = 0; r < rows; ++r)
      if (resets(p, row + r)) {
        std::fill_n(room.state + r * inner, inner, A(0));
        std::fill_n(room.c + r * H, H, A(0));
      }
  }

  // One row: the gradient of the interface, before its activation.
  static void differentiate_interface(const Backward& p, int64_t row, A* grad) {
    const Sizes& n = p.sizes;
    const int64_t reads = n.reads(), R = n.heads;
    const auto vector = [&](const void* values, const void* grads, A* to) {
      const A *x = in(values) + row * reads, *d = in(grads) + row * reads;
      for (int64_t j = 0; j < reads; ++j) to[j] = n.tanh_keys ? d[j] * (A(1) - x[j] * x[j]) : d[j];
    };
    vector(p.keys, p.grad_keys, grad);
    if (n.write_content) vector(p.contents, p.grad_contents, grad + reads);
    grad += n.vectors();
    const A *gate = in(p.write_gates) + row * R, *d = in(p.grad_write_gates) + row * R;
    for (int64_t r = 0; r < R; ++r) grad[r] = d[r] * (gate[r] * (A(1) - gate[r]));
    if (!n.strength_per_step) return;
    const A* strength = in(p.step_strengths) + row * R;
    d = in(p.grad_step_strengths) + row * R;
    for (int64_t r = 0; r < R; ++r)  // 1 - exp(-softplus(x)) = sigmoid(x)
      grad[R + r] = strength[r] > A(kSoftplusThreshold) ? d[r] : -d[r] * std::expm1(-strength[r]);
  }

  static void end_backward(const Backward& p, void* base, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden;
    const Room room(n, end - first, base);
    for (int64_t b = first; b < end; ++b) {
      const A* state = room.state + (b - first) * n.inner();
      std::copy_n(state, H, out(p.grad_h) + b * H);
      std::copy_n(state + H, n.reads(), out(p.grad_reads_in) + b * n.reads());
    }
    std::copy_n(room.c, (end - first) * H, out(p.grad_c_in) + first * H);
  }

  // Rows of 4H: D^T [h_{t-1}, r_{t-1}], D the gradient of the gates.
  static void weight_gradients(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    multiply<A>({n.inner(), n.steps * n.batch, in(p.grad_projected), 1, 4 * n.hidden,
                 in(p.previous_panels), out(p.grad_weight), n.inner()},
                first, end, false);
  }

  // Rows of P: the same of the interface, with h_t, and the bias; in front of them, the strengths.
  static void interface_gradients(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t P = n.numbers(), all = n.steps * n.batch;
    const A* grad = in(p.grad_interface);
    multiply<A>(
        {n.hidden, all, grad, 1, P, in(p.hidden_panels), out(p.grad_interface_weight), n.hidden},
        first, end, false);
    sum_rows<A>(grad, all, P, first, end, out(p.grad_interface_bias));
    if (first == 0 && p.grad_strengths != nullptr)
      sum_rows<A>(in(p.grad_step_strengths), all, n.heads, 0, n.heads, out(p.grad_strengths));
  }

  static const Kernels table;
};

template <class A>
const Kernels Cell<A>::table = {
    kWidth,         sizeof(A),     pack,          room_bytes,       begin,
    step,           end,           pack_backward, pack_previous,    begin_backward,
    reads_gradient, step_backward, end_backward,  weight_gradients, interface_gradients};

}  // namespace

const Kernels& lstm_lrua_kernels(bool float64) {
  return float64 ? Cell<double>::table : Cell<float>::table;
}

}  // namespace MANN_EXT_ISA
