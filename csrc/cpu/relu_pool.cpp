// relu_pool on the CPU: allocation, choice of instruction set, and threads.
#include "cpu/relu_pool.h"

#include <tuple>

#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mann_ext::relu_pool {
namespace {

const Kernels& kernels(const Tensor& like) {
  return MANN_EXT_CALL_BEST(relu_pool_kernels, like.scalar_type() == ScalarType::Double);
}

std::tuple<Tensor, Tensor> relu_pool(Tensor a, std::optional<Tensor> b, std::optional<Tensor> c) {
  const Sizes n = check_arguments("relu_pool", a, b, c);
  const int64_t h = n.pooled_height(), w = n.pooled_width();
  Tensor out = new_tensor(a, {n.images, n.channels, h, w}, a.scalar_type());
  Tensor where = new_tensor(a, {n.images, n.channels, h, w}, ScalarType::Byte);
  const Arguments s{n,
                    {a.const_data_ptr(), data(b), data(c)},
                    out.mutable_data_ptr(),
                    static_cast<uint8_t*>(where.mutable_data_ptr())};
  const Kernels& k = kernels(a);
  parallel(n.planes(), [&](int64_t first, int64_t end) { k.forward(s, first, end); });
  return {out, where};
}

std::tuple<Tensor, Tensor, Tensor> relu_pool_backward(Tensor grad, Tensor where, int64_t height,
                                                      int64_t width, int64_t parts) {
  const Sizes n = check_backward("relu_pool_backward", grad, where, height, width, parts);
  Tensor a = new_part(grad, n, true), b = new_part(grad, n, parts > 1),
         c = new_part(grad, n, parts > 2);
  const BackwardArguments s{n,
                            grad.const_data_ptr(),
                            static_cast<const uint8_t*>(where.const_data_ptr()),
                            {a.mutable_data_ptr(), parts > 1 ? b.mutable_data_ptr() : nullptr,
                             parts > 2 ? c.mutable_data_ptr() : nullptr}};
  const Kernels& k = kernels(grad);
  parallel(n.planes(), [&](int64_t first, int64_t end) { k.backward(s, first, end); });
  return {a, b, c};
}

}  // namespace
}  // namespace mann_ext::relu_pool

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("relu_pool", TORCH_BOX(&mann_ext::relu_pool::relu_pool));
  m.impl("relu_pool_backward", TORCH_BOX(&mann_ext::relu_pool::relu_pool_backward));
}
