// lrua_scan on the GPU: checks, allocation, and which kernels compute it.
#include "cuda/lrua.h"

#include <cstdlib>
#include <string_view>
#include <tuple>

namespace mann_ext::cuda::lrua {
namespace {

Sizes make_sizes(const char* op, const Tensor& memory, const Tensor& keys) {
  require(memory.dim() == 3,
          std::string(op) + ": expected memory of shape (B, N, W), got " + shape_text(memory));
  require(keys.dim() == 4,
          std::string(op) + ": expected keys of shape (T, B, R, W), got " + shape_text(keys));
  Sizes s{};
  s.steps = keys.size(0);
  s.batch = memory.size(0);
  s.slots = memory.size(1);
  require(memory.size(2) < int64_t{1} << 30, std::string(op) + ": rows of 2^30 columns or more");
  s.width = static_cast<int>(memory.size(2));
  require(keys.size(2) <= kMaxHeads,
          std::string(op) + ": at most 64 heads, got " + std::to_string(keys.size(2)));
  s.heads = static_cast<int>(keys.size(2));
  require(s.slots > 0 && s.width > 0 && s.heads > 0,
          std::string(op) + ": slots, width and heads must be at least 1, got memory " +
              shape_text(memory) + " and keys " + shape_text(keys));
  s.chosen = static_cast<int>(min(int64_t{s.heads}, s.slots));
  s.padded = (s.slots + kPadding - 1) / kPadding * kPadding;
  return s;
}

struct Options {
  bool shared;
  double eps, initial_value;
  int64_t snapshot_every;
};

struct Given {
  const Tensor &memory, &read_weights, &keys, &gates;
  const std::optional<Tensor>&strengths, &contents, &reset;
};

Sizes check_arguments(const char* op, const Given& in) {
  const Sizes s = make_sizes(op, in.memory, in.keys);
  const ScalarType acc = accumulation_dtype(in.memory.scalar_type());
  check_tensor(op, "read_weights", in.read_weights, {s.batch, s.heads, s.slots}, acc);
  check_tensor(op, "keys", in.keys, {s.steps, s.batch, s.heads, s.width}, acc);
  check_tensor(op, "gates", in.gates, {s.steps, s.batch, s.heads}, acc);
  check_tensor(op, "strengths", in.strengths, {s.steps, s.batch, s.heads}, acc);
  check_tensor(op, "contents", in.contents, {s.steps, s.batch, s.heads, s.width}, acc);
  check_tensor(op, "reset", in.reset, {s.steps, s.batch}, ScalarType::Bool);
  check_device(op, "read_weights", in.read_weights, in.memory);
  check_device(op, "keys", in.keys, in.memory);
  check_device(op, "gates", in.gates, in.memory);
  check_device(op, "strengths", in.strengths, in.memory);
  check_device(op, "contents", in.contents, in.memory);
  check_device(op, "reset", in.reset, in.memory);
  return s;
}

__nv_bfloat16 to_storage(double x, __nv_bfloat16) {
  return __float2bfloat16(static_cast<float>(x));
}
__half to_storage(double x, __half) { return __float2half(static_cast<float>(x)); }
float to_storage(double x, float) { return static_cast<float>(x); }
double to_storage(double x, double) { return x; }

template <class A, class S>
Scan<A, S> make_scan(const Sizes& s, const Given& in, const Options& options) {
  Scan<A, S> scan{};
  scan.sizes = s;
  scan.shared = options.shared;
  scan.eps = static_cast<A>(options.eps);
  scan.initial = to_storage(options.initial_value, S{});
  scan.snapshot_every = options.snapshot_every;
  scan.memory = static_cast<const S*>(in.memory.const_data_ptr());
  scan.batch_stride = in.memory.stride(0);
  scan.slot_stride = in.memory.stride(1);
  scan.width_stride = in.memory.stride(2);
  scan.packed = scan.width_stride == 1 && scan.slot_stride == s.width && aligned(scan.memory) &&
                scan.batch_stride % kVector<S> == 0;
  scan.read_weights = static_cast<const A*>(in.read_weights.const_data_ptr());
  scan.keys = static_cast<const A*>(in.keys.const_data_ptr());
  scan.gates = static_cast<const A*>(in.gates.const_data_ptr());
  scan.strengths = static_cast<const A*>(data(in.strengths));
  scan.contents =
      in.contents.has_value() ? static_cast<const A*>(in.contents->const_data_ptr()) : scan.keys;
  scan.reset = static_cast<const bool*>(data(in.reset));
  return scan;
}

// Whether every row that is loaded or stored is a whole number of aligned 16-byte pieces.
template <class A, class S>
bool aligned_rows(const Scan<A, S>& scan) {
  return scan.sizes.width % max(kRun<true>, kVector<S>) == 0 && aligned(scan.keys) &&
         aligned(scan.contents);
}

// How a scan is computed. Resident: one launch for all steps, the memory of a batch element in the
// shared memory of one multiprocessor. That is where memory, weights, usage and room for sums fit
// there, as 1,000 slots of 40 float32 numbers do forward: such steps take less time than a launch.
// Streaming: everything else. Both save the same for the backward pass, which chooses for itself.
// MANN_EXT_CUDA_REGIME=streaming has all of it stream.
template <class Bytes>
bool is_resident(const Sizes& s, Bytes&& bytes) {
  const char* regime = std::getenv("MANN_EXT_CUDA_REGIME");
  if (regime != nullptr && std::string_view(regime) == "streaming") return false;
  const auto most = static_cast<int64_t>(max_shared_bytes());
  return s.heads <= kGroup && s.width <= kMaxResidentWidth && s.slots <= most && bytes() <= most;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_scan(
    Tensor memory, Tensor read_weights, Tensor usage, Tensor keys, Tensor gates,
    std::optional<Tensor> strengths, std::optional<Tensor> contents, std::optional<Tensor> reset,
    double usage_decay, bool shared, double eps, double initial_value, int64_t snapshot_every,
    int64_t chunk, bool save_for_backward) {
  constexpr const char* op = "lrua_scan";
  const Given in{memory, read_weights, keys, gates, strengths, contents, reset};
  const Sizes s = check_arguments(op, in);
  const ScalarType dtype = memory.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  check_tensor(op, "usage", usage, {s.batch, s.slots}, acc);
  check_device(op, "usage", usage, memory);
  require(snapshot_every >= 0, "lrua_scan: snapshot_every must be 0 or more");
  require(chunk >= 0 && chunk <= 32, "lrua_scan: chunk must be 0 (chosen here) to 32");
  const OnDevice device(memory);

  Tensor reads = new_tensor(memory, {s.steps, s.batch, s.heads, s.width}, acc);
  Tensor memory_out = new_tensor(memory, {s.batch, s.slots, s.width}, dtype);
  Tensor weights_out = new_tensor(memory, {s.batch, s.heads, s.slots}, acc);
  Tensor usage_out = new_tensor(memory, {s.batch, s.slots}, acc);
  Tensor weight_history = new_tensor(memory, {0}, acc);
  Tensor slot_history = new_tensor(memory, {0}, ScalarType::Long);
  Tensor erased_rows = new_tensor(memory, {0}, dtype);
  Tensor snapshots = new_tensor(memory, {0}, dtype);
  if (save_for_backward) {
    weight_history = new_tensor(memory, {s.steps, s.batch, s.heads, s.padded}, acc);
    slot_history = new_tensor(memory, {s.steps, s.batch, s.chosen}, ScalarType::Long);
    if (snapshot_every != 1)
      erased_rows = new_tensor(memory, {s.steps, s.batch, s.chosen, s.width}, dtype);
    const int64_t count = snapshot_every > 0 ? s.steps / snapshot_every : 0;
    snapshots = new_tensor(memory, {count, s.batch, s.padded * s.width}, dtype);
  }
  if (s.steps == 0) {
    torch::stable::copy_(memory_out, memory);
    torch::stable::copy_(weights_out, read_weights);
    torch::stable::copy_(usage_out, usage);
  } else if (s.batch > 0) {
    for_storage(dtype, [&](auto a, auto number) {
      using A = decltype(a);
      using S = decltype(number);
      Forward<A, S> p{};
      p.scan = make_scan<A, S>(s, in, {shared, eps, initial_value, snapshot_every});
      p.usage_decay = static_cast<A>(usage_decay);
      p.usage = static_cast<const A*>(usage.const_data_ptr());
      p.weights_out = pointer<A>(weights_out);
      p.usage_out = pointer<A>(usage_out);
      p.history.reads = pointer<A>(reads);
      p.history.memory_out = pointer<S>(memory_out);
      if (save_for_backward) {
        p.history.weights = pointer<A>(weight_history);
        p.history.slots = pointer<int64_t>(slot_history);
        if (snapshot_every != 1) p.history.erased_rows = pointer<S>(erased_rows);
        if (snapshot_every > 0) p.history.snapshots = pointer<S>(snapshots);
      }
      const bool vectors = aligned_rows(p.scan) && aligned(p.history.memory_out);
      if (is_resident(s, [&] { return forward_resident_bytes(p, vectors); }))
        forward_resident(p, memory, vectors);
      else
        forward_streaming(p, memory, vectors);
    });
  }
  return {reads,          memory_out,   weights_out, usage_out,
          weight_history, slot_history, erased_rows, snapshots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_scan_backward(
    Tensor grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_read_weights,
    Tensor memory, Tensor read_weights, Tensor keys, Tensor gates, std::optional<Tensor> strengths,
    std::optional<Tensor> contents, std::optional<Tensor> reset, Tensor reads, Tensor memory_out,
    Tensor weight_history, Tensor slot_history, Tensor erased_rows, Tensor snapshots, bool shared,
    double eps, double initial_value, int64_t snapshot_every, bool need_memory_grad) {
  constexpr const char* op = "lrua_scan_backward";
  const Given in{memory, read_weights, keys, gates, strengths, contents, reset};
  const Sizes s = check_arguments(op, in);
  const ScalarType dtype = memory.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  const auto check = [&](const char* name, const auto& tensor, std::initializer_list<int64_t> shape,
                         ScalarType of) {
    check_tensor(op, name, tensor, shape, of);
    check_device(op, name, tensor, memory);
  };
  check("grad_reads", grad_reads, {s.steps, s.batch, s.heads, s.width}, acc);
  check("grad_memory", grad_memory, {s.batch, s.slots, s.width}, dtype);
  check("grad_read_weights", grad_read_weights, {s.batch, s.heads, s.slots}, acc);
  check("reads", reads, {s.steps, s.batch, s.heads, s.width}, acc);
  check("memory_out", memory_out, {s.batch, s.slots, s.width}, dtype);
  check("weight_history", weight_history, {s.steps, s.batch, s.heads, s.padded}, acc);
  check("slot_history", slot_history, {s.steps, s.batch, s.chosen}, ScalarType::Long);
  if (snapshot_every != 1)
    check("erased_rows", erased_rows, {s.steps, s.batch, s.chosen, s.width}, dtype);
  check("snapshots", snapshots,
        {snapshot_every > 0 ? s.steps / snapshot_every : 0, s.batch, s.padded * s.width}, dtype);
  const OnDevice device(memory);

  Tensor grad_memory_in = need_memory_grad ? new_tensor(memory, {s.batch, s.slots, s.width}, dtype)
                                           : new_tensor(memory, {0}, dtype);
  Tensor grad_weights_in = new_tensor(memory, {s.batch, s.heads, s.slots}, acc);
  Tensor grad_keys = new_tensor(memory, {s.steps, s.batch, s.heads, s.width}, acc);
  Tensor grad_gates = new_tensor(memory, {s.steps, s.batch, s.heads}, acc);
  Tensor grad_strengths = strengths.has_value()
                              ? new_tensor(memory, {s.steps, s.batch, s.heads}, acc)
                              : new_tensor(memory, {0}, acc);
  Tensor grad_contents = contents.has_value()
                             ? new_tensor(memory, {s.steps, s.batch, s.heads, s.width}, acc)
                             : new_tensor(memory, {0}, acc);
  if (s.steps == 0) {
    const auto pass_on = [](Tensor& to, const std::optional<Tensor>& from) {
      if (from.has_value())
        torch::stable::copy_(to, *from);
      else
        torch::stable::zero_(to);
    };
    if (need_memory_grad) pass_on(grad_memory_in, grad_memory);
    pass_on(grad_weights_in, grad_read_weights);
  } else if (s.batch > 0) {
    for_storage(dtype, [&](auto a, auto number) {
      using A = decltype(a);
      using S = decltype(number);
      Backward<A, S> p{};
      p.scan = make_scan<A, S>(s, in, {shared, eps, initial_value, snapshot_every});
      p.history = {pointer<A>(reads),          pointer<S>(memory_out),
                   pointer<A>(weight_history), pointer<int64_t>(slot_history),
                   pointer<S>(erased_rows),    pointer<S>(snapshots)};
      p.grad_reads = pointer<const A>(grad_reads);
      p.grad_memory = static_cast<const S*>(data(grad_memory));
      p.grad_weights = static_cast<const A*>(data(grad_read_weights));
      p.grad_memory_in = need_memory_grad ? pointer<S>(grad_memory_in) : nullptr;
      p.grad_weights_in = pointer<A>(grad_weights_in);
      p.grad_keys = pointer<A>(grad_keys);
      p.grad_gates = pointer<A>(grad_gates);
      p.grad_strengths = strengths.has_value() ? pointer<A>(grad_strengths) : nullptr;
      p.grad_contents = contents.has_value() ? pointer<A>(grad_contents) : nullptr;
      const bool vectors = aligned_rows(p.scan) && aligned(p.history.memory_out) &&
                           aligned(p.history.erased_rows) && aligned(p.history.snapshots) &&
                           aligned(p.grad_reads) && aligned(p.grad_memory) &&
                           aligned(p.history.reads) && aligned(p.history.weights);
      if (aligned(p.history.weights) &&
          is_resident(s, [&] { return backward_resident_bytes(p, vectors); }))
        backward_resident(p, memory, vectors);
      else
        backward_streaming(p, memory, vectors);
    });
  }
  return {grad_memory_in, grad_weights_in, grad_keys, grad_gates, grad_strengths, grad_contents};
}

}  // namespace
}  // namespace mann_ext::cuda::lrua

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("lrua_scan", TORCH_BOX(&mann_ext::cuda::lrua::lrua_scan));
  m.impl("lrua_scan_backward", TORCH_BOX(&mann_ext::cuda::lrua::lrua_scan_backward));
}
