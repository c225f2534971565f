// lrua_scan on the CPU: allocation, choice of instruction set, and who computes what on which
// thread.
#include "cpu/lrua.h"

#include <algorithm>
#include <tuple>

#include "cpu/lrua_driver.h"

namespace mann_ext::lrua {
namespace {

template <class EachBlock>
void run_in_chunks(const Forward& p, const Kernels& k, void* room, int64_t b,
                   const EachBlock& each_block) {
  const Shape& s = p.shape;
  for (int64_t t = 0; t < s.steps;) {
    int64_t end = t + 1;
    while (end < std::min(t + p.options.chunk, s.steps) &&
           !(p.in.reset != nullptr && p.in.reset[end * s.batch + b]))
      ++end;
    each_block([&](int64_t i, int64_t last) { k.chunk_turn(p, room, b, t, end - t, i, last); });
    k.chunk_begin(p, room, b, t, end - t);
    for (; t < end; ++t) {
      k.chunk_step(p, room, b, t);
      each_block([&](int64_t i, int64_t last) { k.chunk_pass(p, room, b, t, i, last); });
      k.forward_combine(p, room, b, t);
      each_block([&](int64_t i, int64_t last) { k.forward_weights(p, room, b, t, i, last); });
      k.forward_select(p, room, b, t);
    }
  }
  each_block([&](int64_t i, int64_t last) { k.chunk_turn(p, room, b, s.steps, 0, i, last); });
  k.chunk_begin(p, room, b, s.steps, 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lrua_scan(
    Tensor memory, Tensor read_weights, Tensor usage, Tensor keys, Tensor gates,
    std::optional<Tensor> strengths, std::optional<Tensor> contents, std::optional<Tensor> reset,
    double usage_decay, bool shared, double eps, double initial_value, int64_t snapshot_every,
    int64_t chunk, bool save_for_backward) {
  constexpr const char* op = "lrua_scan";
  const Given in{memory, read_weights, keys, gates, strengths, contents, reset};
  const Shape s = make_shape(check_arguments(op, in), in.acc());
  check(op, in, "usage", usage, {s.batch, s.slots}, in.acc());
  check_options(snapshot_every, chunk);
  const bool snapshots = save_for_backward && snapshot_every > 0;
  const Options options{usage_decay,    eps,
                        initial_value,  shared,
                        snapshot_every, steps_a_chunk(s, in.dtype(), chunk, snapshots)};
  Outputs out = make_outputs(in, s, snapshot_every, save_for_backward);
  const Forward p = make_forward(in, s, options, usage, out, save_for_backward);

  if (s.steps == 0) {
    pass_through(out, in, usage);
  } else if (s.batch > 0) {
    const Kernels& k = kernels(storage_of(memory));
    const int64_t bytes = k.forward_scratch_bytes(p);
    for_each_element(s.batch, s.blocks, s.slots * s.width, [&](int64_t b, const auto& each_block) {
      const Scratch scratch = allocate(bytes);
      void* room = scratch.get();
      k.forward_begin(p, room, b);
      if (p.options.chunk > 1) {
        run_in_chunks(p, k, room, b, each_block);
        k.forward_end(p, room, b);
        return;
      }
      for (int64_t t = 0; t < s.steps; ++t) {
        each_block([&](int64_t i, int64_t end) { k.forward_pass(p, room, b, t, i, end); });
        k.forward_combine(p, room, b, t);
        each_block([&](int64_t i, int64_t end) { k.forward_weights(p, room, b, t, i, end); });
        k.forward_select(p, room, b, t);
      }
      k.forward_end(p, room, b);
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
  const Saved saved{grad_reads,     grad_memory,  grad_read_weights, reads,    memory_out,
                    weight_history, slot_history, erased_rows,       snapshots};
  const Shape s = make_shape(check_arguments(op, in), in.acc());
  check_saved(op, in, s, saved, snapshot_every);
  Gradients out = make_gradients(in, s, need_memory_grad);
  const Backward p =
      make_backward(in, s, {0, eps, initial_value, shared, snapshot_every, 1}, saved, out);

  if (s.steps == 0) {
    pass_through(out, saved, need_memory_grad);
  } else if (s.batch > 0) {
    const Kernels& k = kernels(storage_of(memory));
    const int64_t bytes = k.backward_scratch_bytes(p);
    for_each_element(s.batch, s.blocks, s.slots * s.width, [&](int64_t b, const auto& each_block) {
      const Scratch scratch = allocate(bytes);
      void* room = scratch.get();
      k.backward_begin(p, room, b);
      for (int64_t t = s.steps - 1; t >= 0; --t) {
        each_block([&](int64_t i, int64_t end) { k.backward_pass(p, room, b, t, i, end); });
        k.backward_combine(p, room, b, t);
      }
      k.backward_end(p, room, b);
    });
  }
  return {out.memory, out.read_weights, out.keys, out.gates, out.strengths, out.contents};
}

}  // namespace
}  // namespace mann_ext::lrua

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("lrua_scan", TORCH_BOX(&mann_ext::lrua::lrua_scan));
  m.impl("lrua_scan_backward", TORCH_BOX(&mann_ext::lrua::lrua_scan_backward));
}
