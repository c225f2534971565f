// The LSTM's half of lstm_lrua_scan, forward and backward, and what goes to and from the memory.
//
// Multiply-adds: T B (4 H (I + H + R W) + P H) forward, twice that backward, and 4 T B H I less
// where x needs no gradient. A step is done for all rows of a group before the next, so that each
// pass over the weights serves them all; the weights' gradients are products over all T B rows at
// the end.
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
    A* h;          // [rows][H]
    A* c;          // [rows][H]
    A* reads;      // [rows][R W]
    A* interface;  // [rows][P]
    int64_t numbers;

    Room(const Sizes& n, int64_t rows, void* base) {
      h = out(base);
      c = h + rows * n.hidden;
      reads = c + rows * n.hidden;
      interface = reads + rows * n.reads();
      numbers = rows * (2 * n.hidden + n.reads() + n.numbers());
    }
    void forget(const Sizes& n, int64_t r) const {
      std::fill_n(h + r * n.hidden, n.hidden, A(0));
      std::fill_n(c + r * n.hidden, n.hidden, A(0));
      std::fill_n(reads + r * n.reads(), n.reads(), A(0));
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

  // Panels of the weights of x_t, h_{t-1} and r_{t-1}, then those of the interface.
  static void pack(const Forward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, count = panels(4 * H, kWidth);
    const A* weight_ih = in(p.weight_ih);
    for (int64_t i = first; i < end; ++i) {
      if (i < count)
        pack_panel<A>(weight_ih, 1, n.columns(), n.inputs, 4 * H, i, out(p.input_panels));
      else if (i < 2 * count)
        pack_panel<A>(in(p.weight_hh), 1, H, H, 4 * H, i - count, out(p.state_panels));
      else if (i < 3 * count)
        pack_panel<A>(weight_ih + n.inputs, 1, n.columns(), n.reads(), 4 * H, i - 2 * count,
                      out(p.read_panels));
      else
        pack_panel<A>(in(p.interface_weight), 1, H, H, n.numbers(), i - 3 * count,
                      out(p.interface_panels));
    }
  }

  // Rows of T B: the share of x in the gates.
  static void project(const Forward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    multiply<A>({4 * n.hidden, n.inputs, in(p.x), n.inputs, 1, in(p.input_panels), out(p.gates),
                 4 * n.hidden},
                first, end, false);
  }

  static void begin(const Forward& p, void* base, int64_t first, int64_t end) {
    const int64_t H = p.sizes.hidden;
    const Room room(p.sizes, end - first, base);
    std::copy(in(p.h) + first * H, in(p.h) + end * H, room.h);
    std::copy(in(p.c) + first * H, in(p.c) + end * H, room.c);
  }

  static void step(const Forward& p, void* base, int64_t t, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, P = n.numbers(), rows = end - first, row = t * n.batch + first;
    const Room room(n, rows, base);
    const A* reads =
        t == 0 ? in(p.reads) + first * n.reads() : in(p.all_reads) + (row - n.batch) * n.reads();
    std::copy_n(reads, rows * n.reads(), room.reads);
    for (int64_t r = 0; r < rows; ++r)
      if (resets(p, row + r)) room.forget(n, r);
    A* gates = out(p.gates) + row * 4 * H;
    multiply<A>({4 * H, H, room.h, H, 1, in(p.state_panels), gates, 4 * H}, 0, rows, true);
    multiply<A>({4 * H, n.reads(), room.reads, n.reads(), 1, in(p.read_panels), gates, 4 * H}, 0,
                rows, true);
    const A *bias_ih = in(p.bias_ih), *bias_hh = in(p.bias_hh);
    for (int64_t r = 0; r < rows; ++r)
      lstm_activate<A>(
          H,
          [=](int64_t i, int64_t count) {
            return load_part<A>(bias_ih + i, count) + load_part<A>(bias_hh + i, count);
          },
          gates + r * 4 * H, room.c + r * H, room.h + r * H,
          p.cells == nullptr ? nullptr : out(p.cells) + (row + r) * H);
    std::copy_n(room.h, rows * H, out(p.hidden_out) + row * H);
    multiply<A>({P, H, room.h, H, 1, in(p.interface_panels), room.interface, P}, 0, rows, false);
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

  static void finish(const Forward& p, void* base, int64_t first, int64_t end) {
    const int64_t H = p.sizes.hidden;
    const Room room(p.sizes, end - first, base);
    std::copy_n(room.c, (end - first) * H, out(p.c_out) + first * H);
  }

  // ---------------------------------------------------------------- backward

  // Panels of all h_t, of x and of the weights of h_{t-1}, r_{t-1}, the interface and, if wanted,
  // x.
  static void pack_backward(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, I = n.inputs, R = n.reads(), all = n.steps * n.batch;
    const A* weight_ih = in(p.weight_ih);
    const int64_t of_h = panels(H, kWidth), of_x = panels(I, kWidth), of_reads = panels(R, kWidth);
    for (int64_t index = first; index < end; ++index) {
      int64_t i = index;
      const auto part = [&](const A* b, int64_t row, int64_t depth, int64_t columns, int64_t count,
                            void* to) {
        if (i >= 0 && i < count) pack_panel<A>(b, row, 1, depth, columns, i, out(to));
        i -= count;
      };
      part(in(p.hidden_out), H, all, H, of_h, p.hidden_panels);
      part(in(p.x), I, all, I, of_x, p.x_panels);
      part(in(p.weight_hh), H, 4 * H, H, of_h, p.state_panels);
      part(weight_ih + I, n.columns(), 4 * H, R, of_reads, p.read_panels);
      part(in(p.interface_weight), H, n.numbers(), H, of_h, p.interface_panels);
      part(weight_ih, n.columns(), 4 * H, I, of_x, p.input_panels);
    }
  }

  // Rows of T B: h_{t-1} and r_{t-1} into their panels.
  static void pack_previous(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t all = n.steps * n.batch;
    for (int64_t row = first; row < end; ++row) {
      const auto pack = [&](const void* initial, const void* history, int64_t columns, void* to) {
        const A* from =
            row < n.batch ? in(initial) + row * columns : in(history) + (row - n.batch) * columns;
        for (int64_t j = 0; j < columns; j += kWidth)
          pack_row<A>(resets(p, row) ? nullptr : from + j, columns - j,
                      out(to) + j * all + row * kWidth);
      };
      pack(p.h, p.hidden_out, n.hidden, p.previous_h_panels);
      pack(p.reads, p.all_reads, n.reads(), p.previous_reads_panels);
    }
  }

  static void begin_backward(const Backward& p, void* base, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, rows = end - first;
    const Room room(n, rows, base);
    for (int64_t r = 0; r < rows; ++r) room.forget(n, r);
    if (p.grad_c_out != nullptr) std::copy_n(in(p.grad_c_out) + first * H, rows * H, room.c);
  }

  // dL/dr_t, all of it: from outside and from the step after.
  static void reads_gradient(const Backward& p, void* base, int64_t t, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t count = (end - first) * n.reads(), from = (t * n.batch + first) * n.reads();
    const Room room(n, end - first, base);
    A* total = out(p.total_reads) + from;
    std::copy_n(room.reads, count, total);
    if (p.grad_reads == nullptr) return;
    const A* given = in(p.grad_reads) + from;
    for (int64_t i = 0; i < count; ++i) total[i] += given[i];
  }

  static void step_backward(const Backward& p, void* base, int64_t t, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, P = n.numbers(), rows = end - first, row = t * n.batch + first;
    const Room room(n, rows, base);
    A* grad_interface = out(p.grad_interface) + row * P;
    for (int64_t r = 0; r < rows; ++r) differentiate_interface(p, row + r, grad_interface + r * P);
    multiply<A>({H, P, grad_interface, P, 1, in(p.interface_panels), room.h, H}, 0, rows, true);
    A* grad_gates = out(p.grad_gates) + row * 4 * H;
    for (int64_t r = 0; r < rows; ++r) {
      const A* previous_c = resets(p, row + r) ? nullptr
                            : t == 0           ? in(p.c) + (first + r) * H
                                               : in(p.cells) + (row + r - n.batch) * H;
      lstm_differentiate<A>(H, in(p.gates) + (row + r) * 4 * H, in(p.cells) + (row + r) * H,
                            previous_c,
                            p.grad_hidden == nullptr ? nullptr : in(p.grad_hidden) + (row + r) * H,
                            room.h + r * H, room.c + r * H, grad_gates + r * 4 * H);
    }
    multiply<A>({H, 4 * H, grad_gates, 4 * H, 1, in(p.state_panels), room.h, H}, 0, rows, false);
    multiply<A>({n.reads(), 4 * H, grad_gates, 4 * H, 1, in(p.read_panels), room.reads, n.reads()},
                0, rows, false);
    for (int64_t r = 0; r < rows; ++r)
      if (resets(p, row + r)) room.forget(n, r);
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
    const int64_t H = n.hidden, rows = end - first;
    const Room room(n, rows, base);
    std::copy_n(room.h, rows * H, out(p.grad_h) + first * H);
    std::copy_n(room.c, rows * H, out(p.grad_c) + first * H);
    std::copy_n(room.reads, rows * n.reads(), out(p.grad_reads_in) + first * n.reads());
  }

  // Rows of 4H: D^T x, D^T r_{t-1}, D^T h_{t-1} and the sums of D, the gradient of the gates.
  static void weight_gradients(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t H = n.hidden, I = n.inputs, all = n.steps * n.batch;
    const A* d = in(p.grad_gates);
    A* grad_weight_ih = out(p.grad_weight_ih);
    multiply<A>({I, all, d, 1, 4 * H, in(p.x_panels), grad_weight_ih, n.columns()}, first, end,
                false);
    multiply<A>(
        {n.reads(), all, d, 1, 4 * H, in(p.previous_reads_panels), grad_weight_ih + I, n.columns()},
        first, end, false);
    multiply<A>({H, all, d, 1, 4 * H, in(p.previous_h_panels), out(p.grad_weight_hh), H}, first,
                end, false);
    sum_rows<A>(d, all, 4 * H, first, end, out(p.grad_bias));
  }

  // Rows of P: the same of the interface, with h_t; with the first of them also the strengths.
  static void interface_gradients(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    const int64_t P = n.numbers(), all = n.steps * n.batch;
    const A* d = in(p.grad_interface);
    multiply<A>(
        {n.hidden, all, d, 1, P, in(p.hidden_panels), out(p.grad_interface_weight), n.hidden},
        first, end, false);
    sum_rows<A>(d, all, P, first, end, out(p.grad_interface_bias));
    if (first == 0 && p.grad_strengths != nullptr)
      sum_rows<A>(in(p.grad_step_strengths), all, n.heads, 0, n.heads, out(p.grad_strengths));
  }

  // Rows of T B: D W_x.
  static void input_gradients(const Backward& p, int64_t first, int64_t end) {
    const Sizes& n = p.sizes;
    multiply<A>({n.inputs, 4 * n.hidden, in(p.grad_gates), 4 * n.hidden, 1, in(p.input_panels),
                 out(p.grad_x), n.inputs},
                first, end, false);
  }

  static const Kernels table;
};

template <class A>
const Kernels Cell<A>::table = {kWidth,
                                sizeof(A),
                                pack,
                                project,
                                room_bytes,
                                begin,
                                step,
                                finish,
                                pack_backward,
                                pack_previous,
                                begin_backward,
                                reads_gradient,
                                step_backward,
                                end_backward,
                                weight_gradients,
                                interface_gradients,
                                input_gradients};

}  // namespace

const Kernels& lstm_lrua_kernels(bool float64) {
  return float64 ? Cell<double>::table : Cell<float>::table;
}

}  // namespace MANN_EXT_ISA
