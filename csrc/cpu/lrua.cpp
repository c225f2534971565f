// lrua_scan on the CPU: allocation, choice of instruction set, and who computes what on which
// thread.
#include "cpu/lrua.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/driver.h"
#include "cpu/isa.h"
#include "ops.h"

namespace mann_ext::lrua {
namespace {

const Kernels& kernels(Storage storage) {
#if defined(__x86_64__)
  if (current_isa() == Isa::avx512) return avx512::lrua_kernels(storage);
  if (current_isa() == Isa::avx2) return avx2::lrua_kernels(storage);
#endif
  return baseline::lrua_kernels(storage);
}

// From this many numbers a batch element on, the writes of several steps are deferred together.
constexpr int64_t kDeferNumbers = int64_t{1} << 22;

// As many tiles as keep the memory and its gradient within a 1 MB second-level cache.
int64_t tiles_a_block(int64_t width, int64_t acc_bytes) {
  const int64_t bytes = std::max<int64_t>(1, width) * kTile * acc_bytes;
  return std::clamp<int64_t>((320 << 10) / bytes, 1, 32);
}

Shape make_shape(const Tensor& memory, const Tensor& keys) {
  require(memory.dim() == 3,
          "lrua_scan: expected memory of shape (B, N, W), got " + shape_text(memory));
  require(keys.dim() == 4,
          "lrua_scan: expected keys of shape (T, B, R, W), got " + shape_text(keys));
  Shape s{};
  s.steps = keys.size(0);
  s.batch = memory.size(0);
  s.slots = memory.size(1);
  s.width = memory.size(2);
  s.heads = keys.size(2);
  require(s.slots > 0 && s.width > 0 && s.heads > 0,
          "lrua_scan: slots, width and heads must be at least 1, got memory " + shape_text(memory) +
              " and keys " + shape_text(keys));
  require(s.heads <= kMaxHeads, "lrua_scan: at most 64 heads, got " + std::to_string(s.heads));
  s.chosen = std::min(s.heads, s.slots);
  s.tiles = (s.slots + kTile - 1) / kTile;
  s.padded = s.tiles * kTile;
  s.block_tiles = tiles_a_block(
      s.width, accumulation_dtype(memory.scalar_type()) == ScalarType::Double ? 8 : 4);
  s.blocks = (s.tiles + s.block_tiles - 1) / s.block_tiles;
  return s;
}

Inputs make_inputs(const char* op, const Shape& s, const Tensor& memory, const Tensor& read_weights,
                   const Tensor& keys, const Tensor& gates, const std::optional<Tensor>& strengths,
                   const std::optional<Tensor>& contents, const std::optional<Tensor>& reset) {
  const ScalarType acc = accumulation_dtype(memory.scalar_type());
  check_tensor(op, "read_weights", read_weights, {s.batch, s.heads, s.slots}, acc);
  check_tensor(op, "keys", keys, {s.steps, s.batch, s.heads, s.width}, acc);
  check_tensor(op, "gates", gates, {s.steps, s.batch, s.heads}, acc);
  check_tensor(op, "strengths", strengths, {s.steps, s.batch, s.heads}, acc);
  check_tensor(op, "contents", contents, {s.steps, s.batch, s.heads, s.width}, acc);
  check_tensor(op, "reset", reset, {s.steps, s.batch}, ScalarType::Bool);
  return Inputs{memory.const_data_ptr(),
                memory.stride(0),
                memory.stride(1),
                memory.stride(2),
                read_weights.const_data_ptr(),
                keys.const_data_ptr(),
                gates.const_data_ptr(),
                data(strengths),
                contents.has_value() ? contents->const_data_ptr() : keys.const_data_ptr(),
                static_cast<const bool*>(data(reset))};
}

// Steps whose writes are deferred together: what was asked for, or by size.
int64_t steps_a_chunk(const Shape& s, ScalarType dtype, int64_t asked, bool snapshots) {
  if (dtype != accumulation_dtype(dtype) || snapshots) return 1;
  // A row of one to three numbers is easily all but cancelled by a write, and then its norm, kept
  // up to date by differences, is lost.
  if (s.width < 4) return 1;
  if (asked == 0) {
    // The fewest bytes. It pays where the memory does not stay in cache and rows are long.
    if (s.slots * s.width < kDeferNumbers || s.width < 32 * s.heads) return 1;
    asked = std::llround(2 * std::sqrt(static_cast<double>(s.width) / s.heads));
  }
  return std::clamp<int64_t>(std::min(asked, s.steps), 1, kMaxChunk);
}

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
  Forward p{};
  const Shape s = p.shape = make_shape(memory, keys);
  require(snapshot_every >= 0, "lrua_scan: snapshot_every must be 0 or more");
  require(chunk >= 0 && chunk <= kMaxChunk, "lrua_scan: chunk must be 0 (chosen here) to 32");
  const bool saves = save_for_backward && snapshot_every > 0;
  p.options = {usage_decay,    eps,
               initial_value,  shared,
               snapshot_every, steps_a_chunk(s, memory.scalar_type(), chunk, saves)};
  p.in = make_inputs("lrua_scan", s, memory, read_weights, keys, gates, strengths, contents, reset);
  const ScalarType dtype = memory.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  check_tensor("lrua_scan", "usage", usage, {s.batch, s.slots}, acc);
  p.usage = usage.const_data_ptr();

  Tensor reads = new_tensor(memory, {s.steps, s.batch, s.heads, s.width}, acc);
  Tensor memory_out = new_tensor(memory, {s.batch, s.slots, s.width}, dtype);
  Tensor weights_out = new_tensor(memory, {s.batch, s.heads, s.slots}, acc);
  Tensor usage_out = new_tensor(memory, {s.batch, s.slots}, acc);
  Tensor weight_history = new_tensor(memory, {0}, acc);
  Tensor slot_history = new_tensor(memory, {0}, ScalarType::Long);
  Tensor erased_rows = new_tensor(memory, {0}, dtype);
  Tensor snapshots = new_tensor(memory, {0}, dtype);
  p.reads = reads.mutable_data_ptr();
  p.memory_out = memory_out.mutable_data_ptr();
  p.weights_out = weights_out.mutable_data_ptr();
  p.usage_out = usage_out.mutable_data_ptr();
  if (save_for_backward) {
    weight_history = new_tensor(memory, {s.steps, s.batch, s.heads, s.padded}, acc);
    p.weight_history = weight_history.mutable_data_ptr();
    slot_history = new_tensor(memory, {s.steps, s.batch, s.chosen}, ScalarType::Long);
    p.slot_history = slot_history.mutable_data_ptr<int64_t>();
    if (snapshot_every != 1) {
      erased_rows = new_tensor(memory, {s.steps, s.batch, s.chosen, s.width}, dtype);
      p.erased_rows = erased_rows.mutable_data_ptr();
    }
    const int64_t count = snapshot_every > 0 ? s.steps / snapshot_every : 0;
    snapshots = new_tensor(memory, {count, s.batch, s.padded * s.width}, dtype);
    if (snapshot_every > 0) p.snapshots = snapshots.mutable_data_ptr();
  }
  for (const Tensor& large : {memory_out, weights_out, weight_history, snapshots})
    prefer_huge_pages(large);

  if (s.steps == 0) {
    torch::stable::copy_(memory_out, memory);
    torch::stable::copy_(weights_out, read_weights);
    torch::stable::copy_(usage_out, usage);
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
  Backward p{};
  const Shape s = p.shape = make_shape(memory, keys);
  p.options = {0, eps, initial_value, shared, snapshot_every, 1};
  p.in = make_inputs(op, s, memory, read_weights, keys, gates, strengths, contents, reset);
  const ScalarType dtype = memory.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  check_tensor(op, "grad_reads", grad_reads, {s.steps, s.batch, s.heads, s.width}, acc);
  check_tensor(op, "grad_memory", grad_memory, {s.batch, s.slots, s.width}, dtype);
  check_tensor(op, "grad_read_weights", grad_read_weights, {s.batch, s.heads, s.slots}, acc);
  check_tensor(op, "reads", reads, {s.steps, s.batch, s.heads, s.width}, acc);
  check_tensor(op, "memory_out", memory_out, {s.batch, s.slots, s.width}, dtype);
  check_tensor(op, "weight_history", weight_history, {s.steps, s.batch, s.heads, s.padded}, acc);
  check_tensor(op, "slot_history", slot_history, {s.steps, s.batch, s.chosen}, ScalarType::Long);
  if (snapshot_every != 1)
    check_tensor(op, "erased_rows", erased_rows, {s.steps, s.batch, s.chosen, s.width}, dtype);
  check_tensor(op, "snapshots", snapshots,
               {snapshot_every > 0 ? s.steps / snapshot_every : 0, s.batch, s.padded * s.width},
               dtype);

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
  for (const Tensor& large : {grad_memory_in, grad_weights_in}) prefer_huge_pages(large);
  p.reads = reads.const_data_ptr();
  p.memory_out = memory_out.const_data_ptr();
  p.weight_history = weight_history.const_data_ptr();
  p.slot_history = slot_history.const_data_ptr<int64_t>();
  p.erased_rows = erased_rows.const_data_ptr();
  p.snapshots = snapshots.const_data_ptr();
  p.grad_reads = grad_reads.const_data_ptr();
  p.grad_memory = data(grad_memory);
  p.grad_weights = data(grad_read_weights);
  p.grad_memory_in = need_memory_grad ? grad_memory_in.mutable_data_ptr() : nullptr;
  p.grad_weights_in = grad_weights_in.mutable_data_ptr();
  p.grad_keys = grad_keys.mutable_data_ptr();
  p.grad_gates = grad_gates.mutable_data_ptr();
  p.grad_strengths = strengths.has_value() ? grad_strengths.mutable_data_ptr() : nullptr;
  p.grad_contents = contents.has_value() ? grad_contents.mutable_data_ptr() : nullptr;

  if (s.steps == 0) {
    if (need_memory_grad) {
      if (grad_memory.has_value())
        torch::stable::copy_(grad_memory_in, *grad_memory);
      else
        torch::stable::zero_(grad_memory_in);
    }
    if (grad_read_weights.has_value())
      torch::stable::copy_(grad_weights_in, *grad_read_weights);
    else
      torch::stable::zero_(grad_weights_in);
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
  return {grad_memory_in, grad_weights_in, grad_keys, grad_gates, grad_strengths, grad_contents};
}

}  // namespace
}  // namespace mann_ext::lrua

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("lrua_scan", TORCH_BOX(&mann_ext::lrua::lrua_scan));
  m.impl("lrua_scan_backward", TORCH_BOX(&mann_ext::lrua::lrua_scan_backward));
}
