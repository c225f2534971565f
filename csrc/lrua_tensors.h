// The tensors of lrua_scan and its backward pass: checks and allocation, the same on every device.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "lrua_sizes.h"
#include "ops.h"

namespace mann_ext::lrua {

// What both directions are given.
struct Given {
  const Tensor &memory, &read_weights, &keys, &gates;
  const std::optional<Tensor>&strengths, &contents, &reset;

  ScalarType dtype() const { return memory.scalar_type(); }
  ScalarType acc() const { return accumulation_dtype(dtype()); }
};

template <class MaybeTensor>
void check(const char* op, const Given& in, const char* name, const MaybeTensor& tensor,
           std::initializer_list<int64_t> shape, ScalarType dtype) {
  check_tensor(op, name, tensor, shape, dtype);
  check_device(op, name, tensor, in.memory);
}

inline Sizes check_arguments(const char* op, const Given& in) {
  require(in.memory.dim() == 3,
          std::string(op) + ": expected memory of shape (B, N, W), got " + shape_text(in.memory));
  require(in.keys.dim() == 4,
          std::string(op) + ": expected keys of shape (T, B, R, W), got " + shape_text(in.keys));
  Sizes s{};
  s.steps = in.keys.size(0);
  s.batch = in.memory.size(0);
  s.slots = in.memory.size(1);
  s.width = in.memory.size(2);
  s.heads = in.keys.size(2);
  require(s.slots > 0 && s.width > 0 && s.heads > 0,
          std::string(op) + ": slots, width and heads must be at least 1, got memory " +
              shape_text(in.memory) + " and keys " + shape_text(in.keys));
  require(s.heads <= kMaxHeads,
          std::string(op) + ": at most 64 heads, got " + std::to_string(s.heads));
  s.chosen = std::min(s.heads, s.slots);
  s.padded = (s.slots + kPadding - 1) / kPadding * kPadding;
  check(op, in, "read_weights", in.read_weights, {s.batch, s.heads, s.slots}, in.acc());
  check(op, in, "keys", in.keys, {s.steps, s.batch, s.heads, s.width}, in.acc());
  check(op, in, "gates", in.gates, {s.steps, s.batch, s.heads}, in.acc());
  check(op, in, "strengths", in.strengths, {s.steps, s.batch, s.heads}, in.acc());
  check(op, in, "contents", in.contents, {s.steps, s.batch, s.heads, s.width}, in.acc());
  check(op, in, "reset", in.reset, {s.steps, s.batch}, ScalarType::Bool);
  return s;
}

inline void check_options(int64_t snapshot_every, int64_t chunk) {
  require(snapshot_every >= 0, "lrua_scan: snapshot_every must be 0 or more");
  require(chunk >= 0 && chunk <= kMaxChunk, "lrua_scan: chunk must be 0 (chosen here) to 32");
}

// From this many numbers a batch element on, the writes of several steps are deferred together.
constexpr int64_t kDeferNumbers = int64_t{1} << 22;

// Steps whose writes are deferred together: what was asked for, or by size.
inline int64_t steps_a_chunk(const Sizes& s, ScalarType dtype, int64_t asked, bool snapshots) {
  if (dtype != accumulation_dtype(dtype) || snapshots) return 1;
  // A row of one to three numbers is easily all but cancelled by a write, and then its norm, kept
  // up to date by differences, is lost.
  if (s.width < 4) return 1;
  if (asked == 0) {
    // It pays where the memory does not stay in cache and rows are long; with more than two heads
    // arithmetic is what takes the time, and there is as much of it. The fewest bytes are moved
    // with C = 2 sqrt(W / R), but the dot products made up for grow with C.
    if (s.slots * s.width < kDeferNumbers || s.width < 20 * s.heads || s.heads > 2) return 1;
    asked = std::llround(1.25 * std::sqrt(static_cast<double>(s.width) / s.heads));
  }
  return std::clamp<int64_t>(std::min(asked, s.steps), 1, kMaxChunk);
}

inline int64_t snapshot_count(const Sizes& s, int64_t snapshot_every) {
  return snapshot_every > 0 ? s.steps / snapshot_every : 0;
}

// What the forward pass returns; the last four are empty unless saved for the backward pass.
struct Outputs {
  Tensor reads, memory, weights, usage;
  Tensor weight_history, slot_history, erased_rows, snapshots;
};

inline Outputs make_outputs(const Given& in, const Sizes& s, int64_t snapshot_every, bool save) {
  const Tensor& like = in.memory;
  const ScalarType dtype = in.dtype(), acc = in.acc();
  Outputs out{new_tensor(like, {s.steps, s.batch, s.heads, s.width}, acc),
              new_tensor(like, {s.batch, s.slots, s.width}, dtype),
              new_tensor(like, {s.batch, s.heads, s.slots}, acc),
              new_tensor(like, {s.batch, s.slots}, acc),
              new_tensor(like, {0}, acc),
              new_tensor(like, {0}, ScalarType::Long),
              new_tensor(like, {0}, dtype),
              new_tensor(like, {0}, dtype)};
  if (save) {
    out.weight_history = new_tensor(like, {s.steps, s.batch, s.heads, s.padded}, acc);
    out.slot_history = new_tensor(like, {s.steps, s.batch, s.chosen}, ScalarType::Long);
    if (snapshot_every != 1)
      out.erased_rows = new_tensor(like, {s.steps, s.batch, s.chosen, s.width}, dtype);
    out.snapshots =
        new_tensor(like, {snapshot_count(s, snapshot_every), s.batch, s.padded * s.width}, dtype);
  }
  return out;
}

// No steps: the state passes through.
inline void pass_through(Outputs& out, const Given& in, const Tensor& usage) {
  torch::stable::copy_(out.memory, in.memory);
  torch::stable::copy_(out.weights, in.read_weights);
  torch::stable::copy_(out.usage, usage);
}

// What the backward pass gets beside the arguments of the forward one.
struct Saved {
  const Tensor& grad_reads;
  const std::optional<Tensor>&grad_memory, &grad_read_weights;
  const Tensor &reads, &memory_out, &weight_history, &slot_history, &erased_rows, &snapshots;
};

inline void check_saved(const char* op, const Given& in, const Sizes& s, const Saved& saved,
                        int64_t snapshot_every) {
  const ScalarType dtype = in.dtype(), acc = in.acc();
  check(op, in, "grad_reads", saved.grad_reads, {s.steps, s.batch, s.heads, s.width}, acc);
  check(op, in, "grad_memory", saved.grad_memory, {s.batch, s.slots, s.width}, dtype);
  check(op, in, "grad_read_weights", saved.grad_read_weights, {s.batch, s.heads, s.slots}, acc);
  check(op, in, "reads", saved.reads, {s.steps, s.batch, s.heads, s.width}, acc);
  check(op, in, "memory_out", saved.memory_out, {s.batch, s.slots, s.width}, dtype);
  check(op, in, "weight_history", saved.weight_history, {s.steps, s.batch, s.heads, s.padded}, acc);
  check(op, in, "slot_history", saved.slot_history, {s.steps, s.batch, s.chosen}, ScalarType::Long);
  if (snapshot_every != 1)
    check(op, in, "erased_rows", saved.erased_rows, {s.steps, s.batch, s.chosen, s.width}, dtype);
  check(op, in, "snapshots", saved.snapshots,
        {snapshot_count(s, snapshot_every), s.batch, s.padded * s.width}, dtype);
}

// What the backward pass returns; empty where there is nothing to differentiate.
struct Gradients {
  Tensor memory, read_weights, keys, gates, strengths, contents;
};

inline Gradients make_gradients(const Given& in, const Sizes& s, bool need_memory_grad) {
  const Tensor& like = in.memory;
  const ScalarType dtype = in.dtype(), acc = in.acc();
  return {need_memory_grad ? new_tensor(like, {s.batch, s.slots, s.width}, dtype)
                           : new_tensor(like, {0}, dtype),
          new_tensor(like, {s.batch, s.heads, s.slots}, acc),
          new_tensor(like, {s.steps, s.batch, s.heads, s.width}, acc),
          new_tensor(like, {s.steps, s.batch, s.heads}, acc),
          in.strengths.has_value() ? new_tensor(like, {s.steps, s.batch, s.heads}, acc)
                                   : new_tensor(like, {0}, acc),
          in.contents.has_value() ? new_tensor(like, {s.steps, s.batch, s.heads, s.width}, acc)
                                  : new_tensor(like, {0}, acc)};
}

// No steps: the gradients of the state pass through.
inline void pass_through(Gradients& out, const Saved& saved, bool need_memory_grad) {
  const auto pass = [](Tensor& to, const std::optional<Tensor>& from) {
    if (from.has_value())
      torch::stable::copy_(to, *from);
    else
      torch::stable::zero_(to);
  };
  if (need_memory_grad) pass(out.memory, saved.grad_memory);
  pass(out.read_weights, saved.grad_read_weights);
}

}  // namespace mann_ext::lrua
