// Shapes, checks and error messages shared by all operators and backends.
//
// The public functions in mann_ext.ops check arguments with messages for people. The checks here
// only keep a direct call of torch.ops.mann_ext.* from reading memory that is not there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

namespace mann_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d)
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

// A contiguous tensor of exactly this shape and dtype.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  int64_t d = 0;
  for (const int64_t size : shape) {
    same = same && tensor.size(d) == size;
    expected += (d++ ? ", " : "") + std::to_string(size);
  }
  require(same, std::string(op) + ": expected " + name + " of shape (" + expected + "), got " +
                    shape_text(tensor));
  require(tensor.scalar_type() == dtype,
          std::string(op) + ": " + name + " has a dtype that does not fit the memory's");
  require(tensor.is_contiguous(),
          std::string(op) + ": " + name + " must be contiguous; call .contiguous()");
}

inline void check_tensor(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  if (tensor.has_value()) check_tensor(op, name, *tensor, shape, dtype);
}

// The type that sums are formed in: float64 for float64, else float32.
inline ScalarType accumulation_dtype(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), dtype);
}

inline const void* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace mann_ext
