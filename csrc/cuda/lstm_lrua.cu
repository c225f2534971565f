// lstm_lrua_scan on the GPU. A step is a few launches one after the other: the LSTM's cell, the
// interface, and lrua_scan's kernels for the memory, whose reads the next cell takes; backwards the
// same in turn (lstm_steps.h). Products over all steps are PyTorch's.
//
// Numbers a step, of B rows: 4H (H + R W) + P H multiply-adds a row each way, and the weights once
// for every kRows rows.
#include <tuple>

#include "cuda/lrua_arguments.h"
#include "cuda/lstm_steps.h"

namespace mann_ext::cuda::lstm_lrua {
namespace {

using tensors::Given;

__device__ __forceinline__ float log_plus_one(float x) { return log1pf(x); }
__device__ __forceinline__ double log_plus_one(double x) { return log1p(x); }
template <class A>
__device__ __forceinline__ A softplus(A x) {
  return x > A(kSoftplusThreshold) ? x : log_plus_one(lrua::exponential(x));
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
  const Tensor total_reads = new_tensor(h, {n.steps, n.batch, n.heads, n.width}, in.acc());
  copy_or_zero(total_reads, grad_reads);
  const lrua::tensors::Saved of_steps{total_reads,  grad_memory, grad_read_weights,
                                      all_reads,    memory_out,  weight_history,
                                      slot_history, erased_rows, snapshots};
  lrua::tensors::check_saved(op, given, sizes, of_steps, snapshot_every);
  tensors::Gradients out = make_gradients(in, n, need_x_grad);
  lrua::tensors::Gradients of_memory =
      lrua::tensors::make_gradients(given, sizes, need_memory_grad);
  torch::stable::zero_(out.h);
  copy_or_zero(out.c, grad_c_out);
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
