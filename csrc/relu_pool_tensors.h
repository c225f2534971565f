// The tensors of relu_pool and its backward pass: sizes and checks, the same on every device.
#pragma once

#include <string>

#include "ops.h"

namespace mann_ext::relu_pool {

constexpr int64_t kParts = 3;

// A byte for each number of the result: which of its window's four numbers is the largest (bit 0:
// column, bit 1: row), and from bit 2 on, which parts let a gradient through there.
constexpr int kWhich = 3, kFirstPart = 2;

struct Sizes {
  int64_t images, channels, height, width;
  constexpr int64_t planes() const { return images * channels; }
  constexpr int64_t pooled_height() const { return (height + 1) / 2; }
  constexpr int64_t pooled_width() const { return (width + 1) / 2; }
};

inline Sizes check_arguments(const char* op, const Tensor& a, const std::optional<Tensor>& b,
                             const std::optional<Tensor>& c) {
  const std::string name(op);
  const ScalarType dtype = a.scalar_type();
  require(a.dim() == 4, name + ": expected (B, C, H, W), got " + shape_text(a));
  require(dtype == ScalarType::Float || dtype == ScalarType::Double,
          name + ": a must be float32 or float64");
  require(a.is_contiguous(), name + ": a must be contiguous");
  require(b.has_value() || !c.has_value(), name + ": c is given without b");
  const Sizes n{a.size(0), a.size(1), a.size(2), a.size(3)};
  for (const auto& [part, tensor] : {std::pair{"b", &b}, std::pair{"c", &c}}) {
    check_tensor(op, part, *tensor, {n.images, n.channels, n.height, n.width}, dtype);
    check_device(op, part, *tensor, a);
  }
  return n;
}

inline Sizes check_backward(const char* op, const Tensor& grad, const Tensor& where, int64_t height,
                            int64_t width, int64_t parts) {
  const std::string name(op);
  const ScalarType dtype = grad.scalar_type();
  require(grad.dim() == 4, name + ": expected grad (B, C, h, w), got " + shape_text(grad));
  require(dtype == ScalarType::Float || dtype == ScalarType::Double,
          name + ": grad must be float32 or float64");
  require(parts >= 1 && parts <= kParts, name + ": expected 1 to 3 parts");
  const Sizes n{grad.size(0), grad.size(1), height, width};
  check_tensor(op, "grad", grad, {n.images, n.channels, n.pooled_height(), n.pooled_width()},
               dtype);
  check_tensor(op, "where", where, {n.images, n.channels, n.pooled_height(), n.pooled_width()},
               ScalarType::Byte);
  check_device(op, "where", where, grad);
  return n;
}

// The gradients of all parts; those that are not there are empty.
inline Tensor new_part(const Tensor& grad, const Sizes& n, bool given) {
  if (!given) return new_tensor(grad, {0}, grad.scalar_type());
  return new_tensor(grad, {n.images, n.channels, n.height, n.width}, grad.scalar_type());
}

}  // namespace mann_ext::relu_pool
