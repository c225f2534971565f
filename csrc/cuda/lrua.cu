// lrua_scan on the GPU: checks, allocation, and which kernels compute it.
#include <tuple>

#include "cuda/lrua_arguments.h"

namespace mann_ext::cuda::lrua {
namespace {

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
      const Options options{usage_decay, shared, eps, initial_value, snapshot_every};
      const Forward<A, S> p = make_forward<A, S>(s, in, options, usage, out, save_for_backward);
      const bool vectors = aligned_rows(p);
      const int blocks =
          resident_blocks(s, [&](int n) { return forward_resident_bytes(p, vectors, n); });
      if (blocks > 0)
        forward_resident(p, memory, vectors, blocks);
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
      const Options options{0, shared, eps, initial_value, snapshot_every};
      const Backward<A, S> p = make_backward<A, S>(s, in, options, saved, out);
      const bool vectors = aligned_rows(p);
      const int blocks =
          resident_blocks(s, [&](int n) { return backward_resident_bytes(p, vectors, n); });
      if (blocks > 0 && aligned(p.history.weights))
        backward_resident(p, memory, vectors, blocks);
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
