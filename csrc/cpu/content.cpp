// content_read on the CPU: allocation, choice of instruction set, and threads.
#include "cpu/content.h"

#include <tuple>

#include "cpu/driver.h"
#include "cpu/isa.h"
#include "ops.h"

namespace mann_ext::content {
namespace {

const Kernels& kernels(Storage storage) { return MANN_EXT_CALL_BEST(content_kernels, storage); }

int64_t block_count(const Read& p) { return (p.slots + kBlock - 1) / kBlock; }

Read make_read(const char* op, const Tensor& queries, const Tensor& keys,
               const std::optional<Tensor>& values, const std::optional<Tensor>& strengths,
               const std::optional<Tensor>& mask, bool cosine, double eps) {
  const ContentSizes n = content_sizes(op, queries, keys, values, strengths, mask);
  Read p{};
  p.batch = n.batch;
  p.slots = n.slots;
  p.key_width = n.key_width;
  p.queries = n.queries;
  p.value_width = n.value_width;
  p.mask_queries = n.mask_queries;
  p.cosine = cosine;
  p.eps = eps;
  p.query = queries.const_data_ptr();
  p.keys = keys.const_data_ptr();
  p.values = values.has_value() ? values->const_data_ptr() : p.keys;
  p.strengths = data(strengths);
  p.mask = static_cast<const bool*>(data(mask));
  return p;
}

std::tuple<Tensor, Tensor> content_read(Tensor queries, Tensor keys, std::optional<Tensor> values,
                                        std::optional<Tensor> strengths, std::optional<Tensor> mask,
                                        bool cosine, double eps) {
  Read p = make_read("content_read", queries, keys, values, strengths, mask, cosine, eps);
  const ScalarType acc = accumulation_dtype(keys.scalar_type());
  Tensor reads = new_tensor(keys, {p.batch, p.queries, p.value_width}, acc);
  Tensor weights = new_tensor(keys, {p.batch, p.queries, p.slots}, acc);
  p.reads = reads.mutable_data_ptr();
  p.weights = weights.mutable_data_ptr();
  if (p.batch > 0 && p.queries > 0) {
    const Kernels& k = kernels(lrua::storage_of(keys));
    const int64_t bytes = k.scratch_bytes(p);
    lrua::for_each_element(
        p.batch, block_count(p), p.slots * (p.key_width + p.value_width),
        [&](int64_t b, const auto& each_block) {
          const lrua::Scratch scratch = lrua::allocate(bytes);
          void* room = scratch.get();
          each_block([&](int64_t i, int64_t end) { k.pass(p, room, b, i, end); });
          k.combine(p, room, b);
          each_block([&](int64_t i, int64_t end) { k.normalise(p, room, b, i, end); });
        });
  }
  return {reads, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> content_read_backward(
    Tensor grad_reads, std::optional<Tensor> grad_weights, Tensor queries, Tensor keys,
    std::optional<Tensor> values, std::optional<Tensor> strengths, Tensor reads, Tensor weights,
    bool cosine, double eps) {
  constexpr const char* op = "content_read_backward";
  ReadBackward p{};
  p.forward = make_read(op, queries, keys, values, strengths, std::nullopt, cosine, eps);
  const Read& f = p.forward;
  const ScalarType dtype = keys.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  check_tensor(op, "grad_reads", grad_reads, {f.batch, f.queries, f.value_width}, acc);
  check_tensor(op, "grad_weights", grad_weights, {f.batch, f.queries, f.slots}, acc);
  check_tensor(op, "reads", reads, {f.batch, f.queries, f.value_width}, acc);
  check_tensor(op, "weights", weights, {f.batch, f.queries, f.slots}, acc);
  Tensor grad_queries = new_tensor(keys, {f.batch, f.queries, f.key_width}, acc);
  Tensor grad_keys = new_tensor(keys, {f.batch, f.slots, f.key_width}, dtype);
  Tensor grad_values = values.has_value()
                           ? new_tensor(keys, {f.batch, f.slots, f.value_width}, dtype)
                           : new_tensor(keys, {0}, dtype);
  Tensor grad_strengths = strengths.has_value() ? new_tensor(keys, {f.batch, f.queries}, acc)
                                                : new_tensor(keys, {0}, acc);
  p.forward.reads = const_cast<void*>(reads.const_data_ptr());
  p.forward.weights = const_cast<void*>(weights.const_data_ptr());
  p.values_given = values.has_value();
  p.grad_reads = grad_reads.const_data_ptr();
  p.grad_weights = data(grad_weights);
  p.grad_query = grad_queries.mutable_data_ptr();
  p.grad_keys = grad_keys.mutable_data_ptr();
  p.grad_values = values.has_value() ? grad_values.mutable_data_ptr() : nullptr;
  p.grad_strengths = strengths.has_value() ? grad_strengths.mutable_data_ptr() : nullptr;
  if (f.batch > 0 && f.queries > 0) {
    const Kernels& k = kernels(lrua::storage_of(keys));
    const int64_t bytes = k.backward_scratch_bytes(p);
    lrua::for_each_element(
        f.batch, block_count(f), f.slots * (f.key_width + f.value_width),
        [&](int64_t b, const auto& each_block) {
          const lrua::Scratch scratch = lrua::allocate(bytes);
          void* room = scratch.get();
          k.backward_begin(p, room, b);
          each_block([&](int64_t i, int64_t end) { k.backward_pass(p, room, b, i, end); });
          k.backward_combine(p, room, b);
        });
  } else {
    torch::stable::zero_(grad_keys);
    torch::stable::zero_(grad_values);
  }
  return {grad_queries, grad_keys, grad_values, grad_strengths};
}

}  // namespace
}  // namespace mann_ext::content

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("content_read", TORCH_BOX(&mann_ext::content::content_read));
  m.impl("content_read_backward", TORCH_BOX(&mann_ext::content::content_read_backward));
}
