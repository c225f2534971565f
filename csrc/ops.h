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

inline std::string shape_text(const int64_t* shape, int64_t dims) {
  std::string text = "(";
  for (int64_t d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + ")";
}
inline std::string shape_text(const Tensor& tensor) {
  return shape_text(tensor.sizes().data(), tensor.dim());
}

// A contiguous tensor of exactly this shape and dtype.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) same = same && tensor.size(d++) == size;
  if (!same)
    throw std::invalid_argument(std::string(op) + ": expected " + name + " of shape " +
                                shape_text(shape.begin(), static_cast<int64_t>(shape.size())) +
                                ", got " + shape_text(tensor));
  require(tensor.scalar_type() == dtype,
          std::string(op) + ": " + name + " has a dtype that does not fit the memory's");
  require(tensor.is_contiguous(),
          std::string(op) + ": " + name + " must be contiguous; call .contiguous()");
}

inline void check_tensor(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  if (tensor.has_value()) check_tensor(op, name, *tensor, shape, dtype);
}

// An operator's kernels run on the device of one tensor: the others must be there too.
inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& like) {
  require(tensor.device() == like.device(),
          std::string(op) + ": " + name + " is on another device than the memory");
}
inline void check_device(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         const Tensor& like) {
  if (tensor.has_value()) check_device(op, name, *tensor, like);
}

// The type that sums are formed in: float64 for float64, else float32.
inline ScalarType accumulation_dtype(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// See blocks.h.
std::optional<Tensor> large_tensor(const Tensor& like, const int64_t* shape, int64_t dims,
                                   ScalarType dtype);

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
  if (std::optional<Tensor> large =
          large_tensor(like, shape.begin(), static_cast<int64_t>(shape.size()), dtype))
    return *large;
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), dtype);
}

struct ContentSizes {
  int64_t batch, queries, slots, key_width, value_width;
  int64_t mask_queries;  // 1 or all of them; 0 without a mask
};

// The sizes of a content_read, whose arguments fit together.
inline ContentSizes content_sizes(const char* op, const Tensor& queries, const Tensor& keys,
                                  const std::optional<Tensor>& values,
                                  const std::optional<Tensor>& strengths,
                                  const std::optional<Tensor>& mask) {
  require(queries.dim() == 3 && keys.dim() == 3,
          std::string(op) + ": expected queries (B, Q, K) and keys (B, N, K), got " +
              shape_text(queries) + " and " + shape_text(keys));
  require(!values.has_value() || values->dim() == 3,
          std::string(op) + ": expected values (B, N, V)");
  ContentSizes n{};
  n.batch = keys.size(0);
  n.slots = keys.size(1);
  n.key_width = keys.size(2);
  n.queries = queries.size(1);
  n.value_width = values.has_value() ? values->size(2) : n.key_width;
  require(n.slots > 0 && n.key_width > 0, std::string(op) + ": keys must have slots and width");
  const ScalarType dtype = keys.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  check_tensor(op, "queries", queries, {n.batch, n.queries, n.key_width}, acc);
  check_tensor(op, "keys", keys, {n.batch, n.slots, n.key_width}, dtype);
  check_tensor(op, "values", values, {n.batch, n.slots, n.value_width}, dtype);
  check_tensor(op, "strengths", strengths, {n.batch, n.queries}, acc);
  if (mask.has_value()) {
    n.mask_queries = mask->dim() == 3 ? mask->size(1) : 0;
    require(n.mask_queries == 1 || n.mask_queries == n.queries,
            std::string(op) + ": expected mask of shape (B, Q or 1, N), got " + shape_text(*mask));
    check_tensor(op, "mask", *mask, {n.batch, n.mask_queries, n.slots}, ScalarType::Bool);
  }
  check_device(op, "queries", queries, keys);
  check_device(op, "values", values, keys);
  check_device(op, "strengths", strengths, keys);
  check_device(op, "mask", mask, keys);
  return n;
}

inline const void* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace mann_ext
