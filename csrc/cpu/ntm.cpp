// ntm_scan on the CPU: allocation, choice of instruction set, and threads.
#include "cpu/ntm.h"

#include <tuple>

#include "cpu/driver.h"
#include "cpu/isa.h"

namespace mann_ext::ntm {
namespace {

const Kernels& kernels(ScalarType dtype) {
  return MANN_EXT_CALL_BEST(ntm_kernels, dtype == ScalarType::Double);
}

Inputs make_inputs(const Given& in, double eps, double initial_value, int64_t snapshot_every) {
  return {in.memory.const_data_ptr(),
          in.memory.stride(0),
          in.memory.stride(1),
          in.memory.stride(2),
          in.weights.const_data_ptr(),
          in.keys.const_data_ptr(),
          in.strengths.const_data_ptr(),
          in.gates.const_data_ptr(),
          in.shifts.const_data_ptr(),
          in.sharpenings.const_data_ptr(),
          in.erases.const_data_ptr(),
          in.adds.const_data_ptr(),
          static_cast<const bool*>(data(in.reset)),
          eps,
          initial_value,
          snapshot_every};
}

// run(room, b) for every batch element, whole elements on each thread.
template <class Run>
void for_each_element(int64_t batch, int64_t bytes, const Run& run) {
  parallel(batch, [&](int64_t begin, int64_t end) {
    const lrua::Scratch room = lrua::allocate(bytes);
    for (int64_t b = begin; b < end; ++b) run(room.get(), b);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ntm_scan(
    Tensor memory, Tensor weights, Tensor keys, Tensor strengths, Tensor gates, Tensor shifts,
    Tensor sharpenings, Tensor erases, Tensor adds, std::optional<Tensor> reset, double eps,
    double initial_value, int64_t snapshot_every, bool save_for_backward) {
  constexpr const char* op = "ntm_scan";
  const Given in{memory, weights, keys, strengths, gates, shifts, sharpenings, erases, adds, reset};
  const Sizes s = check_arguments(op, in);
  check_options(op, snapshot_every);
  Outputs out = make_outputs(in, s, snapshot_every, save_for_backward);
  const Forward p{s,
                  make_inputs(in, eps, initial_value, snapshot_every),
                  out.reads.mutable_data_ptr(),
                  out.memory.mutable_data_ptr(),
                  out.weights.mutable_data_ptr(),
                  save_for_backward ? out.weight_history.mutable_data_ptr() : nullptr,
                  save_for_backward ? out.snapshots.mutable_data_ptr() : nullptr};
  if (s.steps == 0) {
    pass_through(out, in);
  } else if (s.batch > 0) {
    const Kernels& k = kernels(in.dtype());
    for_each_element(s.batch, k.forward_bytes(p),
                     [&](void* room, int64_t b) { k.forward(p, room, b); });
  }
  return {out.reads, out.memory, out.weights, out.weight_history, out.snapshots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
ntm_scan_backward(std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory,
                  std::optional<Tensor> grad_weights, Tensor memory, Tensor weights, Tensor keys,
                  Tensor strengths, Tensor gates, Tensor shifts, Tensor sharpenings, Tensor erases,
                  Tensor adds, std::optional<Tensor> reset, Tensor weight_history, Tensor snapshots,
                  double eps, double initial_value, int64_t snapshot_every, bool need_memory_grad) {
  constexpr const char* op = "ntm_scan_backward";
  const Given in{memory, weights, keys, strengths, gates, shifts, sharpenings, erases, adds, reset};
  const Saved saved{grad_reads, grad_memory, grad_weights, weight_history, snapshots};
  const Sizes s = check_arguments(op, in);
  check_options(op, snapshot_every);
  check_saved(op, in, s, saved, snapshot_every);
  Gradients out = make_gradients(in, s, need_memory_grad);
  const Backward p{s,
                   make_inputs(in, eps, initial_value, snapshot_every),
                   weight_history.const_data_ptr(),
                   snapshots.const_data_ptr(),
                   data(grad_reads),
                   data(grad_memory),
                   data(grad_weights),
                   need_memory_grad ? out.memory.mutable_data_ptr() : nullptr,
                   out.weights.mutable_data_ptr(),
                   out.keys.mutable_data_ptr(),
                   out.strengths.mutable_data_ptr(),
                   out.gates.mutable_data_ptr(),
                   out.shifts.mutable_data_ptr(),
                   out.sharpenings.mutable_data_ptr(),
                   out.erases.mutable_data_ptr(),
                   out.adds.mutable_data_ptr()};
  if (s.steps == 0) {
    pass_through(out, saved, need_memory_grad);
  } else if (s.batch > 0) {
    const Kernels& k = kernels(in.dtype());
    for_each_element(s.batch, k.backward_bytes(p),
                     [&](void* room, int64_t b) { k.backward(p, room, b); });
  }
  return {out.memory, out.weights,     out.keys,   out.strengths, out.gates,
          out.shifts, out.sharpenings, out.erases, out.adds};
}

}  // namespace
}  // namespace mann_ext::ntm

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("ntm_scan", TORCH_BOX(&mann_ext::ntm::ntm_scan));
  m.impl("ntm_scan_backward", TORCH_BOX(&mann_ext::ntm::ntm_scan_backward));
}
