// relu_pool on the GPU: a thread has a number of the result, its window of every part and their
// gradients. Nothing is shared; bytes are the floor, parts * 16 + 5 a window (float32) and back.
#include <algorithm>
#include <limits>
#include <tuple>

#include "cuda/lrua.h"
#include "relu_pool_tensors.h"

namespace mann_ext::cuda::relu_pool {
namespace {

namespace tensors = mann_ext::relu_pool;
using cuda::lrua::pointer;
using tensors::kFirstPart;
using tensors::kParts;
using tensors::kWhich;
using tensors::Sizes;

constexpr int kThreads = 256;

template <class A>
struct Arguments {
  Sizes sizes;
  int64_t numbers;  // of the result
  int parts;
  const A* in[kParts];  // [planes][H][W]
  A* out;               // [planes][h][w]
  uint8_t* where;       // [planes][h][w]
};

template <class A>
struct BackwardArguments {
  Sizes sizes;
  int64_t numbers;
  int parts;
  const A* grad;         // [planes][h][w]
  const uint8_t* where;  // [planes][h][w]
  A* out[kParts];        // [planes][H][W]
};

// A window: where its first number is, and which of its rows and columns there are.
struct Window {
  int64_t first;
  bool below, right;
};
__device__ __forceinline__ Window window(const Sizes& n, int64_t number) {
  const int64_t w = n.pooled_width(), h = n.pooled_height();
  const int64_t column = 2 * (number % w), row = 2 * (number / w % h), plane = number / w / h;
  return {(plane * n.height + row) * n.width + column, row + 1 < n.height, column + 1 < n.width};
}

template <class A>
__global__ void __launch_bounds__(kThreads) forward(Arguments<A> p) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.numbers; i += step) {
    const Window at = window(p.sizes, i);
    A best = -std::numeric_limits<A>::infinity();
    int found = 0;
#pragma unroll
    for (int which = 0; which <= kWhich; ++which) {
      if (((which & 1) != 0 && !at.right) || ((which & 2) != 0 && !at.below)) continue;
      const int64_t from = at.first + (which & 1) + (which >> 1) * p.sizes.width;
      A sum = 0;
      int code = which;
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        if (k >= p.parts) break;
        const A x = p.in[k][from];
        const bool clipped = x <= A(0);  // NaN is not
        sum += clipped ? A(0) : x;
        code |= clipped ? 0 : 1 << (kFirstPart + k);
      }
      // The first of the largest, and NaN above all, as PyTorch's max_pool2d.
      if (which == 0 || sum > best || sum != sum) {
        best = sum;
        found = code;
      }
    }
    p.out[i] = best;
    p.where[i] = static_cast<uint8_t>(found);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) backward(BackwardArguments<A> p) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.numbers; i += step) {
    const Window at = window(p.sizes, i);
    const A grad = p.grad[i];
    const int code = p.where[i];
#pragma unroll
    for (int which = 0; which <= kWhich; ++which) {
      if (((which & 1) != 0 && !at.right) || ((which & 2) != 0 && !at.below)) continue;
      const int64_t to = at.first + (which & 1) + (which >> 1) * p.sizes.width;
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        if (k >= p.parts) break;
        const bool open = (code & kWhich) == which && (code >> (kFirstPart + k) & 1) != 0;
        p.out[k][to] = open ? grad : A(0);
      }
    }
  }
}

// Calls f with a number of the dtype.
template <class F>
void for_dtype(const Tensor& like, F&& f) {
  like.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

template <auto Kernel, class Arguments>
void start(const Arguments& p, const OnDevice& device) {
  if (p.numbers == 0) return;
  const int64_t blocks = (p.numbers + kThreads - 1) / kThreads;
  const int64_t at_once = multiprocessors() * blocks_per_multiprocessor<Kernel>(kThreads, 0);
  launch<Kernel>({.grid = static_cast<unsigned>(std::min(blocks, at_once)),
                  .block = kThreads,
                  .stream = device.stream()},
                 p);
}

int64_t numbers(const Sizes& n) { return n.planes() * n.pooled_height() * n.pooled_width(); }

std::tuple<Tensor, Tensor> relu_pool(Tensor a, std::optional<Tensor> b, std::optional<Tensor> c) {
  const Sizes n = tensors::check_arguments("relu_pool", a, b, c);
  const OnDevice device(a);
  const int64_t h = n.pooled_height(), w = n.pooled_width();
  const Tensor out = new_tensor(a, {n.images, n.channels, h, w}, a.scalar_type());
  const Tensor where = new_tensor(a, {n.images, n.channels, h, w}, ScalarType::Byte);
  for_dtype(a, [&](auto number) {
    using A = decltype(number);
    const Arguments<A> p{
        n,
        numbers(n),
        c.has_value()   ? 3
        : b.has_value() ? 2
                        : 1,
        {pointer<const A>(a), static_cast<const A*>(data(b)), static_cast<const A*>(data(c))},
        pointer<A>(out),
        pointer<uint8_t>(where)};
    start<forward<A>>(p, device);
  });
  return {out, where};
}

std::tuple<Tensor, Tensor, Tensor> relu_pool_backward(Tensor grad, Tensor where, int64_t height,
                                                      int64_t width, int64_t parts) {
  const Sizes n = tensors::check_backward("relu_pool_backward", grad, where, height, width, parts);
  const OnDevice device(grad);
  const Tensor a = tensors::new_part(grad, n, true), b = tensors::new_part(grad, n, parts > 1),
               c = tensors::new_part(grad, n, parts > 2);
  for_dtype(grad, [&](auto number) {
    using A = decltype(number);
    const BackwardArguments<A> p{n,
                                 numbers(n),
                                 static_cast<int>(parts),
                                 pointer<const A>(grad),
                                 pointer<const uint8_t>(where),
                                 {pointer<A>(a), pointer<A>(b), pointer<A>(c)}};
    start<backward<A>>(p, device);
  });
  return {a, b, c};
}

}  // namespace
}  // namespace mann_ext::cuda::relu_pool

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("relu_pool", TORCH_BOX(&mann_ext::cuda::relu_pool::relu_pool));
  m.impl("relu_pool_backward", TORCH_BOX(&mann_ext::cuda::relu_pool::relu_pool_backward));
}
