// The tensors of ntm_scan and its backward pass: sizes, checks and allocation, the same on every
// device.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "ops.h"

namespace mann_ext::ntm {

constexpr int64_t kMaxHeads = 64;
// Rows of the weight history are padded to a multiple of this many slots.
constexpr int64_t kPadding = 64;
constexpr int64_t kTaps = 3;  // of a shift: by -1, 0 and 1 slots

// Heads 0 to reads - 1 read, the others write.
struct Sizes {
  int64_t steps, batch, slots, width, heads;
  int64_t reads, writes;  // heads that read and that write
  int64_t padded;         // slots, padded
};

// What both directions are given; float32 or float64, all the same.
struct Given {
  const Tensor &memory, &weights, &keys, &strengths, &gates, &shifts, &sharpenings, &erases, &adds;
  const std::optional<Tensor>& reset;

  ScalarType dtype() const { return memory.scalar_type(); }
};

template <class MaybeTensor>
void check(const char* op, const Given& in, const char* name, const MaybeTensor& tensor,
           std::initializer_list<int64_t> shape, ScalarType dtype) {
  check_tensor(op, name, tensor, shape, dtype);
  check_device(op, name, tensor, in.memory);
}

inline Sizes check_arguments(const char* op, const Given& in) {
  const std::string name(op);
  require(in.memory.dim() == 3,
          name + ": expected memory of shape (B, N, W), got " + shape_text(in.memory));
  require(in.keys.dim() == 4,
          name + ": expected keys of shape (T, B, H, W), got " + shape_text(in.keys));
  require(in.erases.dim() == 4,
          name + ": expected erases of shape (T, B, write heads, W), got " + shape_text(in.erases));
  const ScalarType dtype = in.dtype();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double,
          name + ": memory must be float32 or float64");
  Sizes s{};
  s.steps = in.keys.size(0);
  s.batch = in.memory.size(0);
  s.slots = in.memory.size(1);
  s.width = in.memory.size(2);
  s.heads = in.keys.size(2);
  s.writes = in.erases.size(2);
  s.reads = s.heads - s.writes;
  s.padded = (s.slots + kPadding - 1) / kPadding * kPadding;
  require(s.slots > 0 && s.width > 0 && s.reads > 0 && s.writes > 0,
          name + ": slots, width, read and write heads must be at least 1, got memory " +
              shape_text(in.memory) + ", keys " + shape_text(in.keys) + " and erases " +
              shape_text(in.erases));
  require(s.heads <= kMaxHeads, name + ": at most 64 heads, got " + std::to_string(s.heads));
  check(op, in, "weights", in.weights, {s.batch, s.heads, s.slots}, dtype);
  check(op, in, "keys", in.keys, {s.steps, s.batch, s.heads, s.width}, dtype);
  check(op, in, "strengths", in.strengths, {s.steps, s.batch, s.heads}, dtype);
  check(op, in, "gates", in.gates, {s.steps, s.batch, s.heads}, dtype);
  check(op, in, "shifts", in.shifts, {s.steps, s.batch, s.heads, kTaps}, dtype);
  check(op, in, "sharpenings", in.sharpenings, {s.steps, s.batch, s.heads}, dtype);
  check(op, in, "erases", in.erases, {s.steps, s.batch, s.writes, s.width}, dtype);
  check(op, in, "adds", in.adds, {s.steps, s.batch, s.writes, s.width}, dtype);
  check(op, in, "reset", in.reset, {s.steps, s.batch}, ScalarType::Bool);
  return s;
}

inline void check_options(const char* op, int64_t snapshot_every) {
  require(snapshot_every > 0, std::string(op) + ": snapshot_every must be 1 or more");
}

// What the forward pass returns; the last two are empty unless saved for the backward pass.
struct Outputs {
  Tensor reads, memory, weights, weight_history, snapshots;
};

inline Outputs make_outputs(const Given& in, const Sizes& s, int64_t snapshot_every, bool save) {
  const Tensor& like = in.memory;
  const ScalarType dtype = in.dtype();
  const int64_t steps = save ? s.steps : 0, count = save ? s.steps / snapshot_every : 0;
  return {new_tensor(like, {s.steps, s.batch, s.reads, s.width}, dtype),
          new_tensor(like, {s.batch, s.slots, s.width}, dtype),
          new_tensor(like, {s.batch, s.heads, s.slots}, dtype),
          new_tensor(like, {steps, s.batch, s.heads, s.padded}, dtype),
          new_tensor(like, {count, s.batch, s.padded * s.width}, dtype)};
}

// No steps: the state passes through.
inline void pass_through(Outputs& out, const Given& in) {
  torch::stable::copy_(out.memory, in.memory);
  torch::stable::copy_(out.weights, in.weights);
}

// What the backward pass gets beside the arguments of the forward one.
struct Saved {
  const std::optional<Tensor>&grad_reads, &grad_memory, &grad_weights;
  const Tensor &weight_history, &snapshots;
};

inline void check_saved(const char* op, const Given& in, const Sizes& s, const Saved& saved,
                        int64_t snapshot_every) {
  const ScalarType dtype = in.dtype();
  check(op, in, "grad_reads", saved.grad_reads, {s.steps, s.batch, s.reads, s.width}, dtype);
  check(op, in, "grad_memory", saved.grad_memory, {s.batch, s.slots, s.width}, dtype);
  check(op, in, "grad_weights", saved.grad_weights, {s.batch, s.heads, s.slots}, dtype);
  check(op, in, "weight_history", saved.weight_history, {s.steps, s.batch, s.heads, s.padded},
        dtype);
  check(op, in, "snapshots", saved.snapshots,
        {s.steps / snapshot_every, s.batch, s.padded * s.width}, dtype);
}

struct Gradients {
  Tensor memory;  // empty if not wanted
  Tensor weights, keys, strengths, gates, shifts, sharpenings, erases, adds;
};

inline Gradients make_gradients(const Given& in, const Sizes& s, bool need_memory_grad) {
  const Tensor& like = in.memory;
  const ScalarType dtype = in.dtype();
  const auto of_heads = [&] { return new_tensor(like, {s.steps, s.batch, s.heads}, dtype); };
  const auto of_writes = [&] {
    return new_tensor(like, {s.steps, s.batch, s.writes, s.width}, dtype);
  };
  return {need_memory_grad ? new_tensor(like, {s.batch, s.slots, s.width}, dtype)
                           : new_tensor(like, {0}, dtype),
          new_tensor(like, {s.batch, s.heads, s.slots}, dtype),
          new_tensor(like, {s.steps, s.batch, s.heads, s.width}, dtype),
          of_heads(),
          of_heads(),
          new_tensor(like, {s.steps, s.batch, s.heads, kTaps}, dtype),
          of_heads(),
          of_writes(),
          of_writes()};
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
  pass(out.weights, saved.grad_weights);
}

}  // namespace mann_ext::ntm
