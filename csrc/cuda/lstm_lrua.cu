// lstm_lrua_scan on the GPU. A step is a few launches one after the other: the LSTM's cell, the
// interface, and lrua_scan's kernels for the memory, whose reads the next cell takes; backwards the
// same in turn. Products over all steps are PyTorch's.
//
// In the products of a step each block forms those of a few rows of the batch and a few rows of a
// weight matrix, all its threads along the rows: few numbers a thread, for a step is over when the
// longest wait for memory is.
// Numbers a step, of B rows: 4H (H + R W) + P H multiply-adds a row each way, and the weights once
// for every kRows rows.
#include <tuple>

#include "cuda/lrua_arguments.h"
#include "lstm_lrua_tensors.h"

namespace mann_ext::cuda::lstm_lrua {
namespace {

namespace tensors = mann_ext::lstm_lrua;
using cuda::lrua::hyperbolic_tangent;
using cuda::lrua::sigmoid;
using mann_ext::lstm_lrua::kSoftplusThreshold;
using tensors::Given;
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
__device__ __forceinline__ float log_plus_one(float x) { return log1pf(x); }
__device__ __forceinline__ double log_plus_one(double x) { return log1p(x); }
template <class A>
__device__ __forceinline__ A softplus(A x) {
  return x > A(kSoftplusThreshold) ? x : log_plus_one(lrua::exponential(x));
}

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

// Keys, contents, gates and strengths from h_t.
template <class A>
__global__ __launch_bounds__(kThreads) void interface_step(const Forward<A> p, const int64_t t) {
  const Sizes& n = p.sizes;
  const int64_t H = n.hidden, B = n.batch, reads = n.reads();
  const Part part(n.numbers());
  const A* h = p.hidden + t * B * H;
  A sums[kWarp] = {};
  add_products(
      sums, p.interface_weight + part.first * H, H, part.outputs(), H,
      [&](int row, int64_t k) { return part.b0 + row < B ? h[(part.b0 + row) * H + k] : A(0); });
  A x = sum_scattered(sums);
  int64_t number = part.first + part.output;
  if (threadIdx.x >= kWarp || number >= part.count || part.b() >= B) return;
  const int64_t at = t * B + part.b();
  x += p.interface_bias[number];
  if (number < n.vectors()) {
    if (n.tanh_keys) x = hyperbolic_tangent(x);
    if (number < reads)
      p.keys[at * reads + number] = x;
    else
      p.contents[at * reads + number - reads] = x;
    return;
  }
  number -= n.vectors();
  if (number < n.heads)
    p.write_gates[at * n.heads + number] = sigmoid(x);
  else
    p.step_strengths[at * n.heads + number - n.heads] = softplus(x);
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
Tensor column_sums(const Tensor& matrix) {
  const int64_t dims[] = {0};
  return torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(dims, 1));
}

// The memory's part of a scan as one step from where the last one left it.
template <class A, class S>
lrua::Forward<A, S> one_step(const lrua::Forward<A, S>& scan, int64_t t) {
  lrua::Forward<A, S> p = scan;
  lrua::Sizes& s = p.scan.sizes;
  const int64_t at = t * s.batch, heads = at * s.heads, vectors = heads * s.width;
  s.steps = 1;
  p.scan.keys += vectors;
  p.scan.contents += vectors;
  p.scan.gates += heads;
  if (p.scan.strengths != nullptr) p.scan.strengths += heads;
  if (p.scan.reset != nullptr) p.scan.reset += at;
  if (t > 0) {
    p.scan.memory = p.history.memory_out;
    p.scan.batch_stride = s.slots * s.width;
    p.scan.slot_stride = s.width;
    p.scan.width_stride = 1;
    p.scan.packed = lrua::aligned(p.scan.memory) && s.slots * s.width % kVector<S> == 0;
    p.scan.read_weights = p.weights_out;
    p.usage = p.usage_out;
  }
  p.history.reads += vectors;
  if (p.history.weights != nullptr) p.history.weights += heads * s.padded;
  if (p.history.slots != nullptr) p.history.slots += at * s.chosen;
  if (p.history.erased_rows != nullptr) p.history.erased_rows += at * s.chosen * s.width;
  const int64_t every = p.scan.snapshot_every;
  if (p.history.snapshots != nullptr && every > 0 && (t + 1) % every == 0)
    p.history.snapshots += t / every * s.batch * s.padded * s.width;
  else
    p.history.snapshots = nullptr;
  p.scan.snapshot_every = p.history.snapshots != nullptr;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor, Tensor>
lstm_lrua_scan(Tensor x, Tensor h, Tensor c, Tensor reads, Tensor memory, Tensor read_weights,
               Tensor usage, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh,
               Tensor interface_weight, Tensor interface_bias, std::optional<Tensor> strengths,
               std::optional<Tensor> reset, bool tanh_keys, bool write_content,
               bool strength_per_step, double usage_decay, bool shared, double eps,
               double initial_value, int64_t snapshot_every, bool save_for_backward) {
  constexpr const char* op = "lstm_lrua_scan";
  const Given in{x,
                 h,
                 c,
                 reads,
                 memory,
                 read_weights,
                 weight_ih,
                 weight_hh,
                 interface_weight,
                 strengths,
                 reset,
                 tanh_keys,
                 write_content,
                 strength_per_step};
  const Sizes n = check_forward(op, in, usage, bias_ih, bias_hh, interface_bias);
  const OnDevice device(memory);
  tensors::Interface made = make_interface(in, n);
  const lrua::Given given = for_memory(in, made);
  const lrua::tensors::Sizes sizes = check_memory(op, in, n, given);
  const lrua::Sizes s = lrua::narrowed(op, sizes);
  lrua::tensors::check_options(snapshot_every, 1);
  tensors::Outputs out = make_outputs(in, n, save_for_backward);
  lrua::tensors::Outputs of_memory =
      lrua::tensors::make_outputs(given, sizes, snapshot_every, save_for_backward);
  torch::stable::copy_(out.c, c);
  if (n.steps == 0) {
    lrua::tensors::pass_through(of_memory, given, usage);
  } else if (n.batch > 0) {
    const int64_t H = n.hidden, all = n.steps * n.batch;
    Tensor projected = rows_of(out.gates, all, 4 * H);
    torch::stable::copy_(projected,
                         torch::stable::matmul(rows_of(x, all, n.inputs),
                                               transposed(columns(weight_ih, 0, n.inputs))));
    if (strengths.has_value()) torch::stable::copy_(*made.strengths, *strengths);
    for_storage(given.dtype(), [&](auto a, auto number) {
      using A = decltype(a);
      using S = decltype(number);
      Forward<A> p{};
      p.sizes = n;
      p.h = pointer<A>(h);
      p.c = pointer<A>(c);
      p.reads = pointer<A>(reads);
      p.weight_ih = pointer<A>(weight_ih);
      p.weight_hh = pointer<A>(weight_hh);
      p.bias_ih = pointer<A>(bias_ih);
      p.bias_hh = pointer<A>(bias_hh);
      p.interface_weight = pointer<A>(interface_weight);
      p.interface_bias = pointer<A>(interface_bias);
      p.reset = static_cast<const bool*>(data(reset));
      p.all_reads = pointer<A>(of_memory.reads);
      p.hidden = pointer<A>(out.hidden);
      p.c_now = pointer<A>(out.c);
      p.gates = pointer<A>(out.gates);
      p.cells = save_for_backward ? pointer<A>(out.cells) : nullptr;
      p.keys = pointer<A>(made.keys);
      p.contents = pointer<A>(made.contents);
      p.write_gates = pointer<A>(made.gates);
      p.step_strengths = pointer<A>(made.strengths);
      const auto cell = [&](int64_t t) {
        launch_products<lstm_step<A>>(device, kOutputs * H, p, t);
        launch_products<interface_step<A>>(device, n.numbers(), p, t);
      };
      const lrua::Options options{usage_decay, shared, eps, initial_value, snapshot_every};
      const lrua::Forward<A, S> scan =
          lrua::make_forward<A, S>(s, given, options, usage, of_memory, save_for_backward);
      const bool vectors = lrua::aligned_rows(scan);
      const int blocks = lrua::resident_blocks(
          s, [&](int count) { return lrua::forward_resident_bytes(scan, vectors, count); });
      if (blocks == 1) {
        for (int64_t t = 0; t < n.steps; ++t) {
          cell(t);
          lrua::forward_resident(one_step(scan, t), memory, vectors, blocks);
        }
      } else {
        lrua::forward_streaming(scan, memory, vectors, cell);
      }
    });
  }
  return all_outputs(in, out, made, of_memory, save_for_backward);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor>
lstm_lrua_scan_backward(std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_reads,
                        std::optional<Tensor> grad_c_out, std::optional<Tensor> grad_memory,
                        std::optional<Tensor> grad_read_weights, Tensor x, Tensor h, Tensor c,
                        Tensor reads, Tensor memory, Tensor read_weights, Tensor weight_ih,
                        Tensor weight_hh, Tensor interface_weight, std::optional<Tensor> strengths,
                        std::optional<Tensor> reset, Tensor hidden, Tensor all_reads,
                        Tensor memory_out, Tensor gates, Tensor cells, Tensor keys,
                        Tensor write_gates, Tensor step_strengths, Tensor contents,
                        Tensor weight_history, Tensor slot_history, Tensor erased_rows,
                        Tensor snapshots, bool tanh_keys, bool write_content,
                        bool strength_per_step, bool shared, double eps, double initial_value,
                        int64_t snapshot_every, bool need_x_grad, bool need_memory_grad) {
  constexpr const char* op = "lstm_lrua_scan_backward";
  const Given in{x,
                 h,
                 c,
                 reads,
                 memory,
                 read_weights,
                 weight_ih,
                 weight_hh,
                 interface_weight,
                 strengths,
                 reset,
                 tanh_keys,
                 write_content,
                 strength_per_step};
  const tensors::Saved saved{grad_hidden, grad_reads, grad_c_out, hidden, gates, cells};
  const Sizes n = check_backward(op, in, saved);
  const OnDevice device(memory);
  const tensors::Interface made =
      saved_interface(in, n, keys, write_gates, step_strengths, contents);
  const lrua::Given given = for_memory(in, made);
  const lrua::tensors::Sizes sizes = check_memory(op, in, n, given);
  const lrua::Sizes s = lrua::narrowed(op, sizes);
  const int64_t I = n.inputs, H = n.hidden, R = n.reads(), P = n.numbers();
  const int64_t all = n.steps * n.batch;
  const auto copied_or_zero = [](Tensor to, const std::optional<Tensor>& from) {
    from.has_value() ? torch::stable::copy_(to, *from) : torch::stable::zero_(to);
    return to;
  };
  const Tensor total_reads =
      copied_or_zero(new_tensor(h, {n.steps, n.batch, n.heads, n.width}, in.acc()), grad_reads);
  const lrua::tensors::Saved of_steps{total_reads,  grad_memory, grad_read_weights,
                                      all_reads,    memory_out,  weight_history,
                                      slot_history, erased_rows, snapshots};
  lrua::tensors::check_saved(op, given, sizes, of_steps, snapshot_every);
  tensors::Gradients out = make_gradients(in, n, need_x_grad);
  lrua::tensors::Gradients of_memory =
      lrua::tensors::make_gradients(given, sizes, need_memory_grad);
  torch::stable::zero_(out.h);
  copied_or_zero(out.c, grad_c_out);
  torch::stable::zero_(out.reads);
  const Tensor grad_gates = new_tensor(h, {all, 4 * H}, in.acc());
  const Tensor grad_interface = new_tensor(h, {all, P}, in.acc());
  Tensor state = new_tensor(h, {all, H + R}, in.acc());
  if (n.steps == 0) {
    lrua::tensors::pass_through(of_memory, of_steps, need_memory_grad);
  } else if (n.batch > 0) {
    Tensor state_columns = new_tensor(h, {H + R, 4 * H}, in.acc());
    Tensor of_h = torch::stable::narrow(state_columns, 0, 0, H);
    Tensor of_reads = torch::stable::narrow(state_columns, 0, H, R);
    torch::stable::copy_(of_h, transposed(weight_hh));
    torch::stable::copy_(of_reads, transposed(columns(weight_ih, I, R)));
    const Tensor interface_columns = torch::stable::contiguous(transposed(interface_weight));
    for_storage(given.dtype(), [&](auto a, auto number) {
      using A = decltype(a);
      using S = decltype(number);
      Backward<A> p{};
      p.sizes = n;
      p.c = pointer<A>(c);
      p.interface_columns = pointer<A>(interface_columns);
      p.state_columns = pointer<A>(state_columns);
      p.reset = static_cast<const bool*>(data(reset));
      p.grad_hidden = pointer<A>(grad_hidden);
      p.gates = pointer<A>(gates);
      p.cells = pointer<A>(cells);
      p.keys = pointer<A>(keys);
      p.contents = pointer<A>(made.contents);
      p.write_gates = pointer<A>(write_gates);
      p.step_strengths = pointer<A>(made.strengths);
      p.grad_keys = pointer<A>(of_memory.keys);
      p.grad_contents = pointer<A>(of_memory.contents);
      p.grad_write_gates = pointer<A>(of_memory.gates);
      p.grad_step_strengths = pointer<A>(of_memory.strengths);
      p.total_reads = pointer<A>(total_reads);
      p.grad_interface = pointer<A>(grad_interface);
      p.grad_gates = pointer<A>(grad_gates);
      p.grad_h = pointer<A>(out.h);
      p.grad_c = pointer<A>(out.c);
      p.grad_reads_in = pointer<A>(out.reads);
      const lrua::Options options{0, shared, eps, initial_value, snapshot_every};
      const lrua::Backward<A, S> scan =
          lrua::make_backward<A, S>(s, given, options, of_steps, of_memory);
      lrua::backward_streaming(scan, memory, lrua::aligned_rows(scan), [&](int64_t t) {
        launch_products<lstm_step_backward<A>>(device, H, p, t);
        launch_products<state_backward<A>>(device, H + R, p, t);
      });
      launch<gather_state<A>>(
          {.grid = lrua::grid_size(all), .block = kThreads, .stream = device.stream()}, n,
          pointer<const A>(h), pointer<const A>(reads), pointer<const A>(hidden),
          pointer<const A>(all_reads), p.reset, pointer<A>(state));
    });
  }
  // The weights' gradients: one product for all steps.
  const auto product = [](const Tensor& left, const Tensor& right) {
    return torch::stable::matmul(transposed(left), right);
  };
  Tensor of_x = columns(out.weight_ih, 0, I), of_reads = columns(out.weight_ih, I, R);
  torch::stable::copy_(of_x, product(grad_gates, rows_of(x, all, I)));
  torch::stable::copy_(of_reads, product(grad_gates, columns(state, H, R)));
  out.weight_hh = product(grad_gates, columns(state, 0, H));
  out.bias = column_sums(grad_gates);
  out.interface_weight = product(grad_interface, rows_of(hidden, all, H));
  out.interface_bias = column_sums(grad_interface);
  if (strengths.has_value())
    out.strengths = column_sums(rows_of(of_memory.strengths, all, n.heads));
  if (need_x_grad) {
    Tensor rows = rows_of(out.x, all, I);
    torch::stable::copy_(rows, torch::stable::matmul(grad_gates, columns(weight_ih, 0, I)));
  }
  return all_gradients(out, of_memory);
}

}  // namespace
}  // namespace mann_ext::cuda::lstm_lrua

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("lstm_lrua_scan", TORCH_BOX(&mann_ext::cuda::lstm_lrua::lstm_lrua_scan));
  m.impl("lstm_lrua_scan_backward", TORCH_BOX(&mann_ext::cuda::lstm_lrua::lstm_lrua_scan_backward));
}
