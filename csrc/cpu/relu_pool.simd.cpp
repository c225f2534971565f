// The sum of the ReLUs of one to three arrays, and of each 2 x 2 window of it the largest: every
// number is read once, and the way back writes every gradient once. (As separate operators the
// arrays go through memory seven times forward and nine times backward.)
//
// A plane at a time goes through scratch memory in the first-level cache, whose rows vectors may
// overrun: images are often narrower than two vectors.
#include "cpu/relu_pool.h"

#include <algorithm>
#include <vector>

#include "cpu/simd.h"

namespace MANN_EXT_ISA {
namespace {

using namespace mann_ext::relu_pool;

template <class A, int... I>
MANN_EXT_INLINE void split(Vec<A> (&v)[2], std::integer_sequence<int, I...>) {
  using Mask = typename Lanes<A>::mask;
  const Mask even = {(2 * I)...}, odd = {(2 * I + 1)...};
  const Vec<A> first = __builtin_shuffle(v[0], v[1], even);
  v[1] = __builtin_shuffle(v[0], v[1], odd);
  v[0] = first;
}

template <class A, int... I>
MANN_EXT_INLINE void merge(Vec<A> (&v)[2], std::integer_sequence<int, I...>) {
  using Mask = typename Lanes<A>::mask;
  constexpr int L = kLanes<A>;
  const Mask low = {(I / 2 + I % 2 * L)...}, high = {(L / 2 + I / 2 + I % 2 * L)...};
  const Vec<A> first = __builtin_shuffle(v[0], v[1], low);
  v[1] = __builtin_shuffle(v[0], v[1], high);
  v[0] = first;
}

template <class A, int parts>
struct ReluPool {
  using V = Vec<A>;
  using Int = typename Lanes<A>::Int;
  using Mask = typename Lanes<A>::mask;
  static constexpr int64_t L = kLanes<A>;
  static constexpr auto kOrder = std::make_integer_sequence<int, kLanes<A>>();

  template <class T>
  static T at(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  // Two vectors of a row: even columns and odd ones, of the sums of the parts' ReLUs and of the
  // bits of the parts that are not clipped (as numbers that are shuffled alike).
  static MANN_EXT_INLINE void sums_at(const A* const* in, int64_t offset, V (&sums)[2],
                                      V (&open)[2]) {
    for (int v = 0; v < 2; ++v) {
      V sum = {};
      Mask bits = {};
      for (int k = 0; k < parts; ++k) {
        const V x = at<V>(in[k] + offset + v * L);
        const Mask clipped = x <= A(0);  // NaN is not
        sum += clipped ? V{} : x;
        bits |= ~clipped & (Int{1} << (kFirstPart + k));
      }
      sums[v] = sum;
      open[v] = reinterpret_cast<V>(bits);
    }
    split<A>(sums, kOrder);
    split<A>(open, kOrder);
  }
  // The first of the largest, and NaN above all, as PyTorch's max_pool2d.
  static MANN_EXT_INLINE void take(V v, V open, Int which, V& best, Mask& found) {
    const Mask better = (v > best) | (v != v);
    best = better ? v : best;
    found = better ? reinterpret_cast<Mask>(open) | which : found;
  }

  static void forward(const Arguments& s, int64_t first, int64_t end) {
    const Sizes n = s.sizes;
    const int64_t h = n.pooled_height(), w = n.pooled_width();
    const int64_t padded = 4 * h * w + 2 * L, pooled = h * w + L;
    // Zeros in the row and column that an odd size lacks: never larger than what is there.
    std::vector<A> room(static_cast<size_t>(parts * padded + pooled));
    std::vector<Int> codes(static_cast<size_t>(pooled));
    A* planes[parts];
    for (int k = 0; k < parts; ++k) planes[k] = room.data() + k * padded;
    A* out = room.data() + parts * padded;
    for (int64_t plane = first; plane < end; ++plane) {
      for (int k = 0; k < parts; ++k) {
        const A* from = static_cast<const A*>(s.parts[k]) + plane * n.height * n.width;
        if (n.width % 2 == 0)
          std::copy(from, from + n.height * n.width, planes[k]);
        else
          for (int64_t i = 0; i < n.height; ++i)
            std::copy(from + i * n.width, from + (i + 1) * n.width, planes[k] + i * 2 * w);
      }
      for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < w; j += L) {
          V top[2], bottom[2], top_open[2], bottom_open[2];
          sums_at(planes, 4 * i * w + 2 * j, top, top_open);
          sums_at(planes, (4 * i + 2) * w + 2 * j, bottom, bottom_open);
          V best = top[0];
          Mask found = reinterpret_cast<Mask>(top_open[0]);
          take(top[1], top_open[1], 1, best, found);
          take(bottom[0], bottom_open[0], 2, best, found);
          take(bottom[1], bottom_open[1], 3, best, found);
          std::memcpy(out + i * w + j, &best, sizeof(best));
          std::memcpy(codes.data() + i * w + j, &found, sizeof(found));
        }
      std::copy(out, out + h * w, static_cast<A*>(s.out) + plane * h * w);
      std::transform(codes.data(), codes.data() + h * w, s.where + plane * h * w,
                     [](Int code) { return static_cast<uint8_t>(code); });
    }
  }

  static void backward(const BackwardArguments& s, int64_t first, int64_t end) {
    const Sizes n = s.sizes;
    const int64_t h = n.pooled_height(), w = n.pooled_width(), size = n.height * n.width;
    std::vector<A> room(static_cast<size_t>(h * w + L + size + 2 * L));
    std::vector<Int> codes(static_cast<size_t>(h * w + L));
    A* grad = room.data();
    A* out = grad + h * w + L;
    for (int64_t plane = first; plane < end; ++plane) {
      const A* from = static_cast<const A*>(s.grad) + plane * h * w;
      const uint8_t* where = s.where + plane * h * w;
      std::copy(from, from + h * w, grad);
      std::copy(where, where + h * w, codes.data());
      for (int k = 0; k < parts; ++k) {
        const Int open = Int{1} << (kFirstPart + k);
        // Rows in their order: the next one overwrites what a row's last vector has too many.
        for (int64_t row = 0; row < n.height; ++row)
          for (int64_t j = 0; j < w; j += L) {
            const int64_t i = row / 2 * w + j;
            const V g = at<V>(grad + i);
            const Mask code = at<Mask>(codes.data() + i) & (kWhich | open);
            const Int left = row % 2 * 2 | open;
            V both[2] = {code == left ? g : V{}, code == (left | 1) ? g : V{}};
            merge<A>(both, kOrder);
            std::memcpy(out + row * n.width + 2 * j, both, sizeof(both));
          }
        std::copy(out, out + size, static_cast<A*>(s.parts[k]) + plane * size);
      }
    }
  }
};

// The number of parts is a constant in the loops.
template <class A>
struct AnyParts {
  static void forward(const Arguments& s, int64_t first, int64_t end) {
    if (s.parts[2] != nullptr) return ReluPool<A, 3>::forward(s, first, end);
    if (s.parts[1] != nullptr) return ReluPool<A, 2>::forward(s, first, end);
    ReluPool<A, 1>::forward(s, first, end);
  }
  static void backward(const BackwardArguments& s, int64_t first, int64_t end) {
    if (s.parts[2] != nullptr) return ReluPool<A, 3>::backward(s, first, end);
    if (s.parts[1] != nullptr) return ReluPool<A, 2>::backward(s, first, end);
    ReluPool<A, 1>::backward(s, first, end);
  }
  static const Kernels table;
};

template <class A>
const Kernels AnyParts<A>::table = {forward, backward};

}  // namespace

const Kernels& relu_pool_kernels(bool float64) {
  return float64 ? AnyParts<double>::table : AnyParts<float>::table;
}

}  // namespace MANN_EXT_ISA
