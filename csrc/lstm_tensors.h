// The tensors of lstm_scan and its backward pass: sizes, checks and outputs, the same on every
// device.
#pragma once

#include <string>

#include "ops.h"

namespace mann_ext::lstm {

struct Sizes {
  int64_t steps, batch, inputs, hidden;
};

struct Given {
  Tensor x, h, c, weight_ih, weight_hh;
  std::optional<Tensor> reset;
  ScalarType dtype() const { return x.scalar_type(); }
};

// What the forward pass saves for it, and the gradients of its outputs.
struct Saved {
  std::optional<Tensor> grad_hidden, grad_h_out, grad_c_out;
  Tensor hidden, gates, cells;
};

template <class T>  // Tensor or std::optional<Tensor>
void check(const char* op, const char* name, const T& tensor, std::initializer_list<int64_t> shape,
           ScalarType dtype, const Tensor& like) {
  check_tensor(op, name, tensor, shape, dtype);
  check_device(op, name, tensor, like);
}

inline Sizes check_given(const char* op, const Given& in) {
  const std::string name(op);
  require(in.x.dim() == 3 && in.h.dim() == 2, name + ": expected x (T, B, I) and h (B, H), got " +
                                                  shape_text(in.x) + " and " + shape_text(in.h));
  const ScalarType dtype = in.dtype();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double,
          name + ": x must be float32 or float64");
  const Sizes n{in.x.size(0), in.x.size(1), in.x.size(2), in.h.size(1)};
  require(n.inputs > 0 && n.hidden > 0, name + ": x and h must have columns");
  check_tensor(op, "x", in.x, {n.steps, n.batch, n.inputs}, dtype);
  check(op, "h", in.h, {n.batch, n.hidden}, dtype, in.x);
  check(op, "c", in.c, {n.batch, n.hidden}, dtype, in.x);
  check(op, "weight_ih", in.weight_ih, {4 * n.hidden, n.inputs}, dtype, in.x);
  check(op, "weight_hh", in.weight_hh, {4 * n.hidden, n.hidden}, dtype, in.x);
  check(op, "reset", in.reset, {n.steps, n.batch}, ScalarType::Bool, in.x);
  return n;
}

inline Sizes check_forward(const char* op, const Given& in, const Tensor& bias_ih,
                           const Tensor& bias_hh) {
  const Sizes n = check_given(op, in);
  check(op, "bias_ih", bias_ih, {4 * n.hidden}, in.dtype(), in.x);
  check(op, "bias_hh", bias_hh, {4 * n.hidden}, in.dtype(), in.x);
  return n;
}

inline Sizes check_backward(const char* op, const Given& in, const Saved& saved) {
  const Sizes n = check_given(op, in);
  const ScalarType dtype = in.dtype();
  check(op, "grad_hidden", saved.grad_hidden, {n.steps, n.batch, n.hidden}, dtype, in.x);
  check(op, "grad_h_out", saved.grad_h_out, {n.batch, n.hidden}, dtype, in.x);
  check(op, "grad_c_out", saved.grad_c_out, {n.batch, n.hidden}, dtype, in.x);
  check(op, "hidden", saved.hidden, {n.steps, n.batch, n.hidden}, dtype, in.x);
  check(op, "gates", saved.gates, {n.steps, n.batch, 4 * n.hidden}, dtype, in.x);
  check(op, "cells", saved.cells, {n.steps, n.batch, n.hidden}, dtype, in.x);
  return n;
}

struct Outputs {
  Tensor hidden, h, c, cells;
};

inline Outputs make_outputs(const Given& in, const Sizes& n, bool save_for_backward) {
  const ScalarType dtype = in.dtype();
  return {new_tensor(in.x, {n.steps, n.batch, n.hidden}, dtype),
          new_tensor(in.x, {n.batch, n.hidden}, dtype),
          new_tensor(in.x, {n.batch, n.hidden}, dtype),
          save_for_backward ? new_tensor(in.x, {n.steps, n.batch, n.hidden}, dtype)
                            : new_tensor(in.x, {0}, dtype)};
}

}  // namespace mann_ext::lstm
