// The tensors of coordinate_lstm and its backward pass: sizes and checks, the same on every device.
#pragma once

#include <string>

#include "ops.h"

namespace mann_ext::coordinate_lstm {

constexpr int64_t kExtra = 3;  // inputs besides h: two of a gradient, and 1 for the bias
constexpr int64_t weight_gradients(int64_t hidden) { return 4 * hidden * (hidden + kExtra); }

// e^-7 and e^7: gradients below the first are given by sign and size in one.
constexpr double kSmallest = 9.118819655545162080e-4, kLargest = 1096.633158428458599;

struct Sizes {
  int64_t steps, coordinates, hidden;
};

inline Sizes check_arguments(const char* op, const Tensor& gradients, const Tensor& weights,
                             const Tensor& output) {
  const std::string name(op);
  const ScalarType dtype = gradients.scalar_type();
  require(gradients.dim() == 2 && output.dim() == 1 && output.size(0) > 1,
          name + ": expected gradients (T, P) and output (H + 1)");
  require(dtype == ScalarType::Float || dtype == ScalarType::Double,
          name + ": gradients must be float32 or float64");
  require(gradients.is_contiguous(), name + ": gradients must be contiguous");
  const Sizes n{gradients.size(0), gradients.size(1), output.size(0) - 1};
  check_tensor(op, "weights", weights, {4 * n.hidden, n.hidden + kExtra}, dtype);
  check_tensor(op, "output", output, {n.hidden + 1}, dtype);
  check_device(op, "weights", weights, gradients);
  check_device(op, "output", output, gradients);
  return n;
}

inline Sizes check_backward(const char* op, const Tensor& grad_out, const Tensor& gradients,
                            const Tensor& weights, const Tensor& output) {
  const Sizes n = check_arguments(op, gradients, weights, output);
  check_tensor(op, "grad_out", grad_out, {n.coordinates}, gradients.scalar_type());
  check_device(op, "grad_out", grad_out, gradients);
  return n;
}

}  // namespace mann_ext::coordinate_lstm
