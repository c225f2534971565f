// lrua_scan on the GPU: checks, allocation, and which kernels compute it.
#include "cuda/lrua.h"

#include <cstdlib>
#include <string_view>
#include <tuple>

#include "lrua_tensors.h"

namespace mann_ext::cuda::lrua {
namespace {

namespace tensors = mann_ext::lrua;
using tensors::Given;

// The kernels count columns and heads in 32 bits.
Sizes narrowed(const char* op, const tensors::Sizes& s) {
  require(s.width < int64_t{1} << 30, std::string(op) + ": rows of 2^30 columns or more");
  return {s.steps,
          s.batch,
          s.slots,
          s.padded,
          static_cast<int>(s.width),
          static_cast<int>(s.heads),
          static_cast<int>(s.chosen)};
}

struct Options {
  bool shared;
  double eps, initial_value;
  int64_t snapshot_every;
};

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
// shared memory of one multiprocessor. That is wherever memory, weights, usage and room for sums
// fit there, as 1,000 slots of 40 float32 numbers do forward and 350 backward. Streaming:
// everything else, and there writes may be deferred. All save the same for the backward pass, which
// chooses for itself. MANN_EXT_CUDA_REGIME=streaming, which is read at each call, streams all.
template <class Bytes>
bool is_resident(const Sizes& s, Bytes&& bytes) {
  const char* regime = std::getenv("MANN_EXT_CUDA_REGIME");
  if (regime != nullptr && std::string_view(regime) == "streaming") return false;
  const auto most = static_cast<int64_t>(max_shared_bytes());
  return s.heads <= kGroup && s.width <= kMaxResidentWidth && s.slots <= most && bytes() <= most;
}

// With the writes of `chunk` steps deferred together, if more than one and there is room for that.
template <class A, class S>
void stream_forward(const Forward<A, S>& p, const Tensor& like, bool vectors, int64_t chunk) {
  if constexpr (std::is_same_v<A, S>) {
    const auto most = static_cast<int64_t>(max_shared_bytes());
    if (chunk > 1 && forward_chunked_bytes(p, vectors, chunk) <= most) {
      forward_chunked(p, like, vectors, chunk);
      return;
    }
  }
  forward_streaming(p, like, vectors);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_scan(
    Tensor memory, Tensor read_weights, Tensor usage, Tensor keys, Tensor gates,
    std::optional<Tensor> strengths, std::optional<Tensor> contents, std::optional<Tensor> reset,
    double usage_decay, bool shared, double eps, double initial_value, int64_t snapshot_every,
    int64_t chunk, bool save_for_backward) {
  constexpr const char* op = "lrua_scan";
  const Given in{memory, read_weights, keys, gates, strengths, contents, reset};
  const tensors::Sizes sizes = tensors::check_arguments(op, in);
  const Sizes s = narrowed(op, sizes);
  tensors::check(op, in, "usage", usage, {s.batch, s.slots}, in.acc());
  tensors::check_options(snapshot_every, chunk);
  const OnDevice device(memory);
  tensors::Outputs out = tensors::make_outputs(in, sizes, snapshot_every, save_for_backward);
  const bool snapshots = save_for_backward && snapshot_every > 0;
  const int64_t steps = tensors::steps_a_chunk(sizes, in.dtype(), chunk, snapshots);
  if (s.steps == 0) {
    tensors::pass_through(out, in, usage);
  } else if (s.batch > 0) {
    for_storage(in.dtype(), [&](auto a, auto number) {
      using A = decltype(a);
      using S = decltype(number);
      Forward<A, S> p{};
      p.scan = make_scan<A, S>(s, in, {shared, eps, initial_value, snapshot_every});
      p.usage_decay = static_cast<A>(usage_decay);
      p.usage = static_cast<const A*>(usage.const_data_ptr());
      p.weights_out = pointer<A>(out.weights);
      p.usage_out = pointer<A>(out.usage);
      p.history.reads = pointer<A>(out.reads);
      p.history.memory_out = pointer<S>(out.memory);
      if (save_for_backward) {
        p.history.weights = pointer<A>(out.weight_history);
        p.history.slots = pointer<int64_t>(out.slot_history);
        if (snapshot_every != 1) p.history.erased_rows = pointer<S>(out.erased_rows);
        if (snapshots) p.history.snapshots = pointer<S>(out.snapshots);
      }
      const bool vectors = aligned_rows(p.scan) && aligned(p.history.memory_out);
      if (is_resident(s, [&] { return forward_resident_bytes(p, vectors); }))
        forward_resident(p, memory, vectors);
      else
        stream_forward(p, memory, vectors, steps);
    });
  }
  return {out.reads,          out.memory,       out.weights,     out.usage,
          out.weight_history, out.slot_history, out.erased_rows, out.snapshots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_scan_backward(
    Tensor grad_reads, std::optional<Tensor> grad_memory, std::optional<Tensor> grad_read_weights,
    Tensor memory, Tensor read_weights, Tensor keys, Tensor gates, std::optional<Tensor> strengths,
    std::optional<Tensor> contents, std::optional<Tensor> reset, Tensor reads, Tensor memory_out,
    Tensor weight_history, Tensor slot_history, Tensor erased_rows, Tensor snapshots, bool shared,
    double eps, double initial_value, int64_t snapshot_every, bool need_memory_grad) {
  constexpr const char* op = "lrua_scan_backward";
  const Given in{memory, read_weights, keys, gates, strengths, contents, reset};
  const tensors::Saved saved{grad_reads,     grad_memory,  grad_read_weights, reads,    memory_out,
                             weight_history, slot_history, erased_rows,       snapshots};
  const tensors::Sizes sizes = tensors::check_arguments(op, in);
  const Sizes s = narrowed(op, sizes);
  tensors::check_saved(op, in, sizes, saved, snapshot_every);
  const OnDevice device(memory);
  tensors::Gradients out = tensors::make_gradients(in, sizes, need_memory_grad);
  if (s.steps == 0) {
    tensors::pass_through(out, saved, need_memory_grad);
  } else if (s.batch > 0) {
    for_storage(in.dtype(), [&](auto a, auto number) {
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
      p.grad_memory_in = need_memory_grad ? pointer<S>(out.memory) : nullptr;
      p.grad_weights_in = pointer<A>(out.read_weights);
      p.grad_keys = pointer<A>(out.keys);
      p.grad_gates = pointer<A>(out.gates);
      p.grad_strengths = strengths.has_value() ? pointer<A>(out.strengths) : nullptr;
      p.grad_contents = contents.has_value() ? pointer<A>(out.contents) : nullptr;
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
  return {out.memory, out.read_weights, out.keys, out.gates, out.strengths, out.contents};
}

}  // namespace
}  // namespace mann_ext::cuda::lrua

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("lrua_scan", TORCH_BOX(&mann_ext::cuda::lrua::lrua_scan));
  m.impl("lrua_scan_backward", TORCH_BOX(&mann_ext::cuda::lrua::lrua_scan_backward));
}
