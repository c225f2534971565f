// The LSTM's part of a scan, a step in one launch or two: lstm_lrua_scan's, and with no reads (R =
// 0) that of lstm_scan for what does not fit in a cluster. Products over all steps are PyTorch's.
//
// In the products of a step each block forms those of a few rows of the batch and a few rows of a
// weight matrix, all its threads along the rows: few numbers a thread, for a step is over when the
// longest wait for memory is.
#pragma once

#include "cuda/lrua.h"
#include "lstm_lrua_tensors.h"

namespace mann_ext::cuda::lstm_lrua {
namespace {

namespace tensors = mann_ext::lstm_lrua;
using cuda::lrua::hyperbolic_tangent;
using cuda::lrua::sigmoid;
using mann_ext::lstm_lrua::kSoftplusThreshold;
using tensors::Sizes;

constexpr int kRows = 8;     // of the batch, for each block
constexpr int kOutputs = 4;  // rows of a weight matrix, for each block
static_assert(kRows * kOutputs == kWarp);
constexpr int kWarps = 4;  // that share the columns
constexpr int kThreads = kWarps * kWarp;

// The LSTM's half of a scan; the memory's kernels write all_reads.
template <class A>
struct Forward {
  Sizes sizes;
  const A *h, *c, *reads, *weight_ih, *weight_hh, *bias_ih, *bias_hh;
  const A *interface_weight, *interface_bias;
  const bool* reset;                                  // [T][B] or null
  const A* all_reads;                                 // [T][B][R W]
  A* hidden;                                          // [T][B][H]
  A* c_now;                                           // [B][H]
  A* gates;                                           // [T][B][4H]: the share of x, then activated
  A* cells;                                           // [T][B][H] or null
  A *keys, *contents, *write_gates, *step_strengths;  // contents and strengths may be null
};

template <class A>
struct Backward {
  Sizes sizes;
  const A *c, *interface_columns, *state_columns;  // transposed weights: [H][P], [H + R W][4H]
  const bool* reset;
  const A* grad_hidden;  // [T][B][H] or null
  const A *gates, *cells, *keys, *contents, *write_gates, *step_strengths;
  const A *grad_keys, *grad_contents, *grad_write_gates, *grad_step_strengths;
  A* total_reads;      // [T][B][R W]: dL/dr_t
  A* grad_interface;   // [T][B][P]
  A* grad_gates;       // [T][B][4H]
  A *grad_h, *grad_c;  // [B][H]: of the state before the step that was last worked on
  A* grad_reads_in;    // [B][R W]
};

__device__ __forceinline__ float less_one(float x) { return expm1f(x); }
__device__ __forceinline__ double less_one(double x) { return expm1(x); }

// What a block works on: the rows b0 .. b0 + kRows of the batch and the outputs first .. first +
// kOutputs of `count`. Each lane of the first warp ends up with one number of each.
struct Part {
  int64_t b0, first, count;
  int row, output;  // of this lane

  __device__ Part(int64_t outputs) : count(outputs) {
    const int lane = threadIdx.x % kWarp;
    b0 = blockIdx.x / groups(outputs) * kRows;
    first = blockIdx.x % groups(outputs) * kOutputs;
    row = lane / kOutputs;
    output = lane % kOutputs;
  }
  static __host__ __device__ int64_t groups(int64_t outputs) {
    return (outputs + kOutputs - 1) / kOutputs;
  }
  __device__ int outputs() const { return static_cast<int>(min(int64_t{kOutputs}, count - first)); }
  __device__ int64_t b() const { return b0 + row; }
};

// Bit r: row b0 + r exists and has a step before.
__device__ __forceinline__ unsigned rows_with_past(const bool* reset, int64_t t, int64_t b0,
                                                   int64_t batch) {
  unsigned rows = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (b0 + r < batch && !(reset != nullptr && reset[t * batch + b0 + r])) rows |= 1u << r;
  return rows;
}

// Adds each thread's share of the products of rows of a weight matrix, `stride` apart, with the
// inputs that input(row, k) gives.
template <class A, class Input>
__device__ __forceinline__ void add_products(A (&sums)[kWarp], const A* weights, int64_t stride,
                                             int outputs, int64_t depth, Input&& input) {
#pragma unroll 2
  for (int64_t k = threadIdx.x; k < depth; k += kThreads) {
    A weight[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) weight[o] = weights[min(o, outputs - 1) * stride + k];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const A x = input(row, k);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) sums[row * kOutputs + o] += x * weight[o];
    }
  }
}

// Of each two lanes that are Half apart, one keeps the lower Half of what both had and one the
// upper, added up; so on with half of that. Recursive, for only then does the array stay in
// registers.
template <int Half, class A>
__device__ __forceinline__ void halve(A (&x)[kWarp]) {
  const bool upper = threadIdx.x & Half;
#pragma unroll
  for (int i = 0; i < Half; ++i) {
    const A kept = upper ? x[i + Half] : x[i], given = upper ? x[i] : x[i + Half];
    x[i] = kept + __shfl_xor_sync(kAllLanes, given, Half);
  }
  if constexpr (Half > 1) halve<Half / 2>(x);
}
// Lane i of the first warp gets the sum over the block's threads of their numbers i.
template <class A>
__device__ __forceinline__ A sum_scattered(A (&x)[kWarp]) {
  __shared__ A of_warps[kWarps][kWarp];
  halve<kWarp / 2>(x);
  const int lane = threadIdx.x % kWarp;
  of_warps[threadIdx.x / kWarp][lane] = x[0];
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp][lane];
  return sum;
}

// ---------------------------------------------------------------- forward

// h_t and c_t: a block has one hidden unit, whose four gates are the outputs.
template <class A>
__global__ __launch_bounds__(kThreads) void lstm_step(const Forward<A> p, const int64_t t) {
  const Sizes& n = p.sizes;
  const int64_t H = n.hidden, R = n.reads(), B = n.batch;
  const Part part(kOutputs * H);
  const int64_t unit = part.first / kOutputs;
  const unsigned past = rows_with_past(p.reset, t, part.b0, B);
  const A* h = t == 0 ? p.h : p.hidden + (t - 1) * B * H;
  const A* reads = t == 0 ? p.reads : p.all_reads + (t - 1) * B * R;
  A sums[kWarp] = {};
  add_products(sums, p.weight_hh + unit * H, H * H, kOutputs, H, [&](int row, int64_t k) {
    return past >> row & 1 ? h[(part.b0 + row) * H + k] : A(0);
  });
  add_products(
      sums, p.weight_ih + unit * n.columns() + n.inputs, H * n.columns(), kOutputs, R,
      [&](int row, int64_t k) { return past >> row & 1 ? reads[(part.b0 + row) * R + k] : A(0); });
  A gate = sum_scattered(sums);
  if (threadIdx.x >= kWarp) return;
  const bool present = part.b() < B;
  const int64_t at = t * B + part.b(), column = part.output * H + unit;
  if (present) {
    gate += p.gates[at * 4 * H + column] + (p.bias_ih[column] + p.bias_hh[column]);
    gate = part.output == 2 ? hyperbolic_tangent(gate) : sigmoid(gate);
    if (p.cells != nullptr) p.gates[at * 4 * H + column] = gate;
  }
  const A i = __shfl_sync(kAllLanes, gate, 0, kOutputs),
          f = __shfl_sync(kAllLanes, gate, 1, kOutputs);
  const A g = __shfl_sync(kAllLanes, gate, 2, kOutputs),
          o = __shfl_sync(kAllLanes, gate, 3, kOutputs);
  if (!present || part.output != 0) return;
  A& c = p.c_now[part.b() * H + unit];
  c = f * (past >> part.row & 1 ? c : A(0)) + i * g;
  p.hidden[at * H + unit] = o * hyperbolic_tangent(c);
  if (p.cells != nullptr) p.cells[at * H + unit] = c;
}

// ---------------------------------------------------------------- backward

// The gradient of number k of the interface at row `at` of T B, before its activation.
template <class A>
__device__ __forceinline__ A interface_gradient(const Backward<A>& p, int64_t at, int64_t k) {
  const Sizes& n = p.sizes;
  if (k < n.vectors()) {
    const bool is_content = k >= n.reads();
    const int64_t i = at * n.reads() + (is_content ? k - n.reads() : k);
    const A d = is_content ? p.grad_contents[i] : p.grad_keys[i];
    if (!n.tanh_keys) return d;
    const A x = is_content ? p.contents[i] : p.keys[i];
    return d * (A(1) - x * x);
  }
  k -= n.vectors();
  if (k < n.heads) {
    const A gate = p.write_gates[at * n.heads + k];
    return p.grad_write_gates[at * n.heads + k] * (gate * (A(1) - gate));
  }
  k -= n.heads;
  const A strength = p.step_strengths[at * n.heads + k];
  const A d = p.grad_step_strengths[at * n.heads + k];
  // 1 - exp(-softplus(x)) = sigmoid(x)
  return strength > A(kSoftplusThreshold) ? d : -d * less_one(-strength);
}

// dL/dh_t, and from it the gradients of the gates and of c_{t-1}. Each block makes the interface's
// gradient for itself; the first of its rows keeps it.
template <class A>
__global__ __launch_bounds__(kThreads) void lstm_step_backward(const Backward<A> p,
                                                               const int64_t t) {
  __shared__ A grads[kRows][kThreads];  // every thread has a column, which it alone uses
  const Sizes& n = p.sizes;
  const int64_t H = n.hidden, B = n.batch, P = n.numbers();
  const int thread = static_cast<int>(threadIdx.x);
  const Part part(H);
  A sums[kWarp] = {};
#pragma unroll 1
  for (int64_t first = 0; first + thread < P; first += kThreads) {
#pragma unroll 1
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = t * B + part.b0 + row;
      A grad = 0;
      if (part.b0 + row < B) {
        grad = interface_gradient(p, at, first + thread);
        if (part.first == 0) p.grad_interface[at * P + first + thread] = grad;
      }
      grads[row][thread] = grad;
    }
    add_products(sums, p.interface_columns + part.first * P + first, P, part.outputs(),
                 min(int64_t{kThreads}, P - first),
                 [&](int row, int64_t k) { return grads[row][k]; });
  }
  A dh = sum_scattered(sums);
  const int64_t unit = part.first + part.output, b = part.b(), at = t * B + b;
  if (threadIdx.x >= kWarp || unit >= H || b >= B) return;
  dh += p.grad_h[b * H + unit];
  if (p.grad_hidden != nullptr) dh += p.grad_hidden[at * H + unit];
  const A* gates = p.gates + at * 4 * H + unit;
  const A i = gates[0], f = gates[H], g = gates[2 * H], o = gates[3 * H];
  const bool reset = p.reset != nullptr && p.reset[at];
  A before = 0;
  if (!reset) before = t == 0 ? p.c[b * H + unit] : p.cells[(at - B) * H + unit];
  const A tanh_c = hyperbolic_tangent(p.cells[at * H + unit]);
  const A dc = p.grad_c[b * H + unit] + dh * o * (A(1) - tanh_c * tanh_c);
  A* grad = p.grad_gates + at * 4 * H + unit;
  grad[0] = dc * g * (i * (A(1) - i));
  grad[H] = dc * before * (f * (A(1) - f));
  grad[2 * H] = dc * i * (A(1) - g * g);
  grad[3 * H] = dh * tanh_c * (o * (A(1) - o));
  p.grad_c[b * H + unit] = reset ? A(0) : dc * f;
}

// dL/dh_{t-1} by way of step t, and what that adds to dL/dr_{t-1}.
template <class A>
__global__ __launch_bounds__(kThreads) void state_backward(const Backward<A> p, const int64_t t) {
  const Sizes& n = p.sizes;
  const int64_t H = n.hidden, R = n.reads(), B = n.batch, depth = 4 * H;
  const Part part(H + R);
  const A* d = p.grad_gates + t * B * depth;
  A sums[kWarp] = {};
  add_products(sums, p.state_columns + part.first * depth, depth, part.outputs(), depth,
               [&](int row, int64_t k) {
                 return part.b0 + row < B ? d[(part.b0 + row) * depth + k] : A(0);
               });
  A grad = sum_scattered(sums);
  const int64_t column = part.first + part.output, b = part.b();
  if (threadIdx.x >= kWarp || column >= part.count || b >= B) return;
  if (p.reset != nullptr && p.reset[t * B + b]) grad = 0;
  if (column < H)
    p.grad_h[b * H + column] = grad;
  else if (t > 0)
    p.total_reads[((t - 1) * B + b) * R + column - H] += grad;
  else
    p.grad_reads_in[b * R + column - H] = grad;
}

// [h_{t-1}, r_{t-1}] of every step, rows of T B.
template <class A>
__global__ __launch_bounds__(kThreads) void gather_state(const Sizes n, const A* h, const A* reads,
                                                         const A* hidden, const A* all_reads,
                                                         const bool* reset, A* state) {
  const int64_t row = blockIdx.x, H = n.hidden, R = n.reads();
  const bool ended = reset != nullptr && reset[row], first = row < n.batch;
  for (int64_t k = threadIdx.x; k < H + R; k += kThreads) {
    A x = 0;
    if (!ended && k < H)
      x = first ? h[row * H + k] : hidden[(row - n.batch) * H + k];
    else if (!ended)
      x = first ? reads[row * R + k - H] : all_reads[(row - n.batch) * R + k - H];
    state[row * (H + R) + k] = x;
  }
}

// ---------------------------------------------------------------- host

template <class A>
A* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? lrua::pointer<A>(*tensor) : nullptr;
}
using lrua::pointer;

// Launches Kernel(p, t) with a block for every kRows rows of the batch and kOutputs outputs.
template <auto Kernel, class Arguments>
void launch_products(const OnDevice& device, int64_t outputs, const Arguments& p, int64_t t) {
  const int64_t row_groups = (p.sizes.batch + kRows - 1) / kRows;
  launch<Kernel>({.grid = lrua::grid_size(row_groups * Part::groups(outputs)),
                  .block = kThreads,
                  .stream = device.stream()},
                 p, t);
}

// Columns [first, first + count) of a matrix.
Tensor columns(Tensor matrix, int64_t first, int64_t count) {
  return torch::stable::narrow(matrix, 1, first, count);
}
Tensor rows_of(const Tensor& tensor, int64_t rows, int64_t count) {
  return torch::stable::view(tensor, {rows, count});
}
Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }
void copy_or_zero(Tensor to, const std::optional<Tensor>& from) {
  from.has_value() ? torch::stable::copy_(to, *from) : torch::stable::zero_(to);
}
Tensor column_sums(const Tensor& matrix) {
  const int64_t dims[] = {0};
  return torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(dims, 1));
}

}  // namespace
}  // namespace mann_ext::cuda::lstm_lrua
