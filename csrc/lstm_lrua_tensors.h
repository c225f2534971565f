// The tensors of lstm_lrua_scan and its backward pass: checks and allocation, the same on every
// device. Those of the memory are lrua_scan's.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "lrua_tensors.h"
#include "lstm_lrua_sizes.h"

namespace mann_ext::lstm_lrua {

// What both directions are given.
struct Given {
  const Tensor &x, &h, &c, &reads, &memory, &read_weights, &weight_ih, &weight_hh,
      &interface_weight;
  const std::optional<Tensor>&strengths, &reset;
  bool tanh_keys, write_content, strength_per_step;

  ScalarType acc() const { return accumulation_dtype(memory.scalar_type()); }
};

template <class MaybeTensor>
void check(const char* op, const Given& in, const char* name, const MaybeTensor& tensor,
           std::initializer_list<int64_t> shape) {
  check_tensor(op, name, tensor, shape, in.acc());
  check_device(op, name, tensor, in.memory);
}

inline Sizes check_arguments(const char* op, const Given& in) {
  require(in.x.dim() == 3 && in.h.dim() == 2 && in.reads.dim() == 3,
          std::string(op) + ": expected x (T, B, I), h (B, H) and reads (B, R, W), got " +
              shape_text(in.x) + ", " + shape_text(in.h) + " and " + shape_text(in.reads));
  const Sizes n{in.x.size(0), in.h.size(0),     in.x.size(2),
                in.h.size(1), in.reads.size(1), in.reads.size(2),
                in.tanh_keys, in.write_content, in.strength_per_step};
  require(n.inputs > 0 && n.hidden > 0, std::string(op) + ": x and h must have columns");
  require(!(in.strengths.has_value() && in.strength_per_step),
          std::string(op) + ": strengths are given or made every step, not both");
  check(op, in, "x", in.x, {n.steps, n.batch, n.inputs});
  check(op, in, "h", in.h, {n.batch, n.hidden});
  check(op, in, "c", in.c, {n.batch, n.hidden});
  check(op, in, "reads", in.reads, {n.batch, n.heads, n.width});
  check(op, in, "weight_ih", in.weight_ih, {4 * n.hidden, n.columns()});
  check(op, in, "weight_hh", in.weight_hh, {4 * n.hidden, n.hidden});
  check(op, in, "interface_weight", in.interface_weight, {n.numbers(), n.hidden});
  check(op, in, "strengths", in.strengths, {n.heads});
  return n;
}

inline Sizes check_forward(const char* op, const Given& in, const Tensor& usage,
                           const Tensor& bias_ih, const Tensor& bias_hh,
                           const Tensor& interface_bias) {
  const Sizes n = check_arguments(op, in);
  check(op, in, "bias_ih", bias_ih, {4 * n.hidden});
  check(op, in, "bias_hh", bias_hh, {4 * n.hidden});
  check(op, in, "interface_bias", interface_bias, {n.numbers()});
  require(in.memory.dim() == 3,
          std::string(op) + ": expected memory (B, N, W), got " + shape_text(in.memory));
  check(op, in, "usage", usage, {n.batch, in.memory.size(1)});
  return n;
}

// What is given to the memory at every step.
struct Interface {
  Tensor keys, gates;
  std::optional<Tensor> strengths, contents;
};

inline Interface make_interface(const Given& in, const Sizes& n) {
  const auto vectors = [&] {
    return new_tensor(in.h, {n.steps, n.batch, n.heads, n.width}, in.acc());
  };
  const auto scalars = [&] { return new_tensor(in.h, {n.steps, n.batch, n.heads}, in.acc()); };
  Interface made{vectors(), scalars(), std::nullopt, std::nullopt};
  if (n.strength_per_step || in.strengths.has_value()) made.strengths = scalars();
  if (n.write_content) made.contents = vectors();
  return made;
}

// As the forward pass returned it.
inline Interface saved_interface(const Given& in, const Sizes& n, const Tensor& keys,
                                 const Tensor& gates, const Tensor& strengths,
                                 const Tensor& contents) {
  Interface made{keys, gates, std::nullopt, std::nullopt};
  if (n.strength_per_step || in.strengths.has_value()) made.strengths = strengths;
  if (n.write_content) made.contents = contents;
  return made;
}

inline lrua::Given for_memory(const Given& in, const Interface& made) {
  return {in.memory,      in.read_weights, made.keys, made.gates,
          made.strengths, made.contents,   in.reset};
}

inline lrua::Sizes check_memory(const char* op, const Given& in, const Sizes& n,
                                const lrua::Given& given) {
  const lrua::Sizes s = lrua::check_arguments(op, given);
  require(s.batch == n.batch && s.width == n.width && s.heads == n.heads && s.steps == n.steps,
          std::string(op) + ": memory " + shape_text(in.memory) + " and reads " +
              shape_text(in.reads) + " do not fit");
  return s;
}

// What the LSTM returns; the gates, activated, and the cells only where saved.
struct Outputs {
  Tensor hidden, c, gates, cells;
};

inline Outputs make_outputs(const Given& in, const Sizes& n, bool save) {
  const ScalarType acc = in.acc();
  return {new_tensor(in.h, {n.steps, n.batch, n.hidden}, acc),
          new_tensor(in.h, {n.batch, n.hidden}, acc),
          new_tensor(in.h, {n.steps, n.batch, 4 * n.hidden}, acc),
          save ? new_tensor(in.h, {n.steps, n.batch, n.hidden}, acc) : new_tensor(in.h, {0}, acc)};
}

// In the order of the schema.
inline auto all_outputs(const Given& in, const Outputs& out, const Interface& made,
                        const lrua::Outputs& memory, bool save) {
  const auto saved = [&](const std::optional<Tensor>& tensor) {
    return save && tensor.has_value() ? *tensor : new_tensor(in.h, {0}, in.acc());
  };
  return std::make_tuple(out.hidden, memory.reads, out.c, memory.memory, memory.weights,
                         memory.usage, saved(out.gates), out.cells, saved(made.keys),
                         saved(made.gates), saved(made.strengths), saved(made.contents),
                         memory.weight_history, memory.slot_history, memory.erased_rows,
                         memory.snapshots);
}

// What the backward pass gets of the LSTM beside the arguments of the forward one.
struct Saved {
  const std::optional<Tensor>&grad_hidden, &grad_reads, &grad_c_out;
  const Tensor &hidden, &gates, &cells;
};

inline Sizes check_backward(const char* op, const Given& in, const Saved& saved) {
  const Sizes n = check_arguments(op, in);
  check(op, in, "grad_hidden", saved.grad_hidden, {n.steps, n.batch, n.hidden});
  check(op, in, "grad_reads", saved.grad_reads, {n.steps, n.batch, n.heads, n.width});
  check(op, in, "grad_c_out", saved.grad_c_out, {n.batch, n.hidden});
  check(op, in, "hidden", saved.hidden, {n.steps, n.batch, n.hidden});
  check(op, in, "gates", saved.gates, {n.steps, n.batch, 4 * n.hidden});
  check(op, in, "cells", saved.cells, {n.steps, n.batch, n.hidden});
  return n;
}

// What the backward pass returns beside the gradients of the memory.
struct Gradients {
  Tensor x, h, c, reads, weight_ih, weight_hh, bias, interface_weight, interface_bias, strengths;
};

inline Gradients make_gradients(const Given& in, const Sizes& n, bool need_x_grad) {
  const ScalarType acc = in.acc();
  return {need_x_grad ? new_tensor(in.h, {n.steps, n.batch, n.inputs}, acc)
                      : new_tensor(in.h, {0}, acc),
          new_tensor(in.h, {n.batch, n.hidden}, acc),
          new_tensor(in.h, {n.batch, n.hidden}, acc),
          new_tensor(in.h, {n.batch, n.heads, n.width}, acc),
          new_tensor(in.h, {4 * n.hidden, n.columns()}, acc),
          new_tensor(in.h, {4 * n.hidden, n.hidden}, acc),
          new_tensor(in.h, {4 * n.hidden}, acc),
          new_tensor(in.h, {n.numbers(), n.hidden}, acc),
          new_tensor(in.h, {n.numbers()}, acc),
          new_tensor(in.h, {in.strengths.has_value() ? n.heads : 0}, acc)};
}

// In the order of the schema.
inline auto all_gradients(const Gradients& out, const lrua::Gradients& memory) {
  return std::make_tuple(out.x, out.h, out.c, out.reads, memory.memory, memory.read_weights,
                         out.weight_ih, out.weight_hh, out.bias, out.interface_weight,
                         out.interface_bias, out.strengths);
}

}  // namespace mann_ext::lstm_lrua
