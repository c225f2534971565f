// The inner loops of the LRUA kernels: what is done to one tile of 64 slots or to one block of
// tiles.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/lrua.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {

using mann_ext::lrua::kTile;

// Takes aligned pieces off one allocation; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// x . y in double.
template <class A>
inline double dot(const A* x, const A* y, int64_t width) {
  constexpr int L = kLanes<double>;
  Vec<double> sum[2] = {};
  int64_t j = 0;
  for (; j + 2 * L <= width; j += 2 * L)
    for (int v = 0; v < 2; ++v) sum[v] += widen(x + j + v * L) * widen(y + j + v * L);
  for (; j + L <= width; j += L) sum[0] += widen(x + j) * widen(y + j);
  double total = sum_lanes<double>(sum[0] + sum[1]);
  for (; j < width; ++j) total += static_cast<double>(x[j]) * y[j];
  return total;
}
template <class A>
inline A norm(const A* v, int64_t width) {
  return static_cast<A>(std::sqrt(dot(v, v, width)));
}

// Vectors of slots worked on together: as many as keep every accumulator in a register.
constexpr int kTogether = kRegisters == 32 ? 2 : 1;

// Columns summed in one run of a dot product over the width; longer ones are sums of such runs,
// which keeps their rounding error that of a blocked sum. Shorter where a multiply-add rounds
// twice.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr int64_t kColumns = 20;
#else
constexpr int64_t kColumns = 8;
#endif

// sums = run for the first run of columns, else sums += run.
template <class A>
MANN_EXT_INLINE void store_run(A* sums, Vec<A> run, bool first) {
  store<A>(sums, first ? run : run + load<A>(sums));
}

// Calls body(first head, std::integral_constant<int, G>) for groups of 4, 2 and 1 heads.
template <class F>
MANN_EXT_INLINE void for_head_groups(int64_t heads, const F& body) {
  int64_t r = 0;
  for (; r + 4 <= heads; r += 4) body(r, std::integral_constant<int, 4>());
  if (r + 2 <= heads) {
    body(r, std::integral_constant<int, 2>());
    r += 2;
  }
  if (r < heads) body(r, std::integral_constant<int, 1>());
}

// Calls body(heads) with the number of heads as a constant where it is a usual one, so that loops
// over the heads are unrolled and what they add up stays in registers.
template <class F>
MANN_EXT_INLINE void with_heads(int64_t heads, const F& body) {
  switch (heads) {
    case 1: return body(std::integral_constant<int64_t, 1>());
    case 2: return body(std::integral_constant<int64_t, 2>());
    case 4: return body(std::integral_constant<int64_t, 4>());
    case 8: return body(std::integral_constant<int64_t, 8>());
    default: return body(heads);
  }
}

// Room for one thing a head, by the type that with_heads passes.
template <class H>
constexpr int64_t kRoom = mann_ext::lrua::kMaxHeads;
template <int64_t heads>
constexpr int64_t kRoom<std::integral_constant<int64_t, heads>> = heads;

template <class A>
MANN_EXT_INLINE Vec<A> keep_lanes(const typename Lanes<A>::Int* keep, Vec<A> v) {
  using Mask = typename Lanes<A>::mask;
  return reinterpret_cast<Vec<A>>(reinterpret_cast<Mask>(v) & *reinterpret_cast<const Mask*>(keep));
}

// dst = keep * src + sum_g weights_g contents_g^T over one tile; with Score also
// dots_g = dst . keys_g and squares = |dst|^2. `keep` (all ones or zero a slot) may be null.
// G heads: 2 G + 1 multiply-adds an element, one load and one store of the element. Where the
// memory streams from RAM the next tile, `ahead` elements on, is asked for early (0: it is in
// cache).
template <class A, class D, class S, int G, bool Score>
MANN_EXT_OUTLINE void tile_write(const S* src, D* dst, int64_t width,
                                 const typename Lanes<A>::Int* keep, const A* weights,
                                 const A* contents, const A* keys, A* dots, A* squares,
                                 int64_t ahead) {
  constexpr int L = kLanes<A>;
  constexpr int V = kTogether;
  for (int64_t lane = 0; lane < kTile; lane += V * L) {
    Vec<A> w[G][V];
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < V; ++v) w[g][v] = load<A>(weights + g * kTile + lane + v * L);
    for (int64_t j0 = 0; j0 < width; j0 += kColumns) {
      const int64_t j1 = j0 + kColumns < width ? j0 + kColumns : width;
      Vec<A> dot[G][V] = {}, square[V] = {};
      for (int64_t j = j0; j < j1; ++j) {
        Vec<A> m[V];
        if (ahead != 0)
          for (int v = 0; v < V; ++v)
            __builtin_prefetch(src + ahead + lane * width + (j * V + v) * L, 1);
        for (int v = 0; v < V; ++v) {
          m[v] = load<A>(src + j * kTile + lane + v * L);
          if (keep != nullptr) m[v] = keep_lanes<A>(keep + lane + v * L, m[v]);
        }
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < V; ++v) m[v] += w[g][v] * contents[g * width + j];
        for (int v = 0; v < V; ++v) m[v] = store_rounded<A>(dst + j * kTile + lane + v * L, m[v]);
        if constexpr (Score) {
          for (int g = 0; g < G; ++g)
            for (int v = 0; v < V; ++v) dot[g][v] += m[v] * keys[g * width + j];
          for (int v = 0; v < V; ++v) square[v] += m[v] * m[v];
        }
      }
      if constexpr (Score) {
        for (int v = 0; v < V; ++v) {
          for (int g = 0; g < G; ++g)
            store_run<A>(dots + g * kTile + lane + v * L, dot[g][v], j0 == 0);
          store_run<A>(squares + lane + v * L, square[v], j0 == 0);
        }
      }
    }
  }
}

// dots_g = m . rows_g over one tile, for heads that tile_write did not score, and (Squares) |m|^2.
template <class A, class S, int G, bool Squares = false>
MANN_EXT_OUTLINE void tile_score(const S* tile, int64_t width, const A* rows, A* dots,
                                 int64_t dots_stride = kTile, A* squares = nullptr) {
  constexpr int L = kLanes<A>;
  constexpr int V = kTogether;
  for (int64_t lane = 0; lane < kTile; lane += V * L) {
    for (int64_t j0 = 0; j0 < width; j0 += kColumns) {
      const int64_t j1 = j0 + kColumns < width ? j0 + kColumns : width;
      Vec<A> dot[G][V] = {}, square[V] = {};
      for (int64_t j = j0; j < j1; ++j) {
        Vec<A> m[V];
        for (int v = 0; v < V; ++v) m[v] = load<A>(tile + j * kTile + lane + v * L);
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < V; ++v) dot[g][v] += m[v] * rows[g * width + j];
        if constexpr (Squares)
          for (int v = 0; v < V; ++v) square[v] += m[v] * m[v];
      }
      for (int v = 0; v < V; ++v) {
        for (int g = 0; g < G; ++g)
          store_run<A>(dots + g * dots_stride + lane + v * L, dot[g][v], j0 == 0);
        if constexpr (Squares) store_run<A>(squares + lane + v * L, square[v], j0 == 0);
      }
    }
  }
}

// out_g = start_g + sum_q rows_q mix_{q,g} over one tile: what `count` deferred writes with weights
// rows_q add to a dot product with the memory as it was before them. Asks early for the next
// tile's: short pieces of many arrays, which the hardware does not foresee.
template <class A, int G>
MANN_EXT_OUTLINE void tile_mix(const A* start, int64_t start_stride, const A* const* rows,
                               int64_t count, int64_t offset, const A* mix, int64_t mix_stride,
                               A* out) {
  constexpr int L = kLanes<A>;
  constexpr int V = G == 1 ? std::min<int>(kTile / L, kRegisters / 4) : kTogether;
  for (int64_t lane = 0; lane < kTile; lane += V * L) {
    Vec<A> sum[G][V];
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < V; ++v) sum[g][v] = load<A>(start + g * start_stride + lane + v * L);
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < V; ++v)
        __builtin_prefetch(start + g * start_stride + lane + kTile + v * L);
    for (int64_t q = 0; q < count; ++q) {
      const A* row = rows[q] + offset + lane;
      Vec<A> w[V];
      for (int v = 0; v < V; ++v) {
        w[v] = load<A>(row + v * L);
        __builtin_prefetch(row + kTile + v * L);
      }
      for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) sum[g][v] += w[v] * mix[q * mix_stride + g];
    }
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < V; ++v) store<A>(out + g * kTile + lane + v * L, sum[g][v]);
  }
}

// Backward of addressing, first half: dots with the keys and with the gradients of the reads, and
// (First) the squared norms.
template <class A, class M, int G, bool First>
MANN_EXT_OUTLINE void tile_score_pair(const M* tile, int64_t width, const A* keys, const A* grads,
                                      A* key_dots, A* grad_dots, A* squares) {
  constexpr int L = kLanes<A>;
  constexpr int V = kTogether;
  for (int64_t lane = 0; lane < kTile; lane += V * L) {
    for (int64_t j0 = 0; j0 < width; j0 += kColumns) {
      const int64_t j1 = j0 + kColumns < width ? j0 + kColumns : width;
      Vec<A> key_dot[G][V] = {}, grad_dot[G][V] = {}, square[V] = {};
      for (int64_t j = j0; j < j1; ++j) {
        Vec<A> m[V];
        for (int v = 0; v < V; ++v) m[v] = load<A>(tile + j * kTile + lane + v * L);
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < V; ++v) {
            key_dot[g][v] += m[v] * keys[g * width + j];
            grad_dot[g][v] += m[v] * grads[g * width + j];
          }
        if constexpr (First)
          for (int v = 0; v < V; ++v) square[v] += m[v] * m[v];
      }
      for (int v = 0; v < V; ++v) {
        for (int g = 0; g < G; ++g) {
          store_run<A>(key_dots + g * kTile + lane + v * L, key_dot[g][v], j0 == 0);
          store_run<A>(grad_dots + g * kTile + lane + v * L, grad_dot[g][v], j0 == 0);
        }
        if constexpr (First) store_run<A>(squares + lane + v * L, square[v], j0 == 0);
      }
    }
  }
}

// Second half: the gradient of the tile, grad += sum_g x_g keys_g^T + w_g grads_g^T (+ self * m),
// and (Last) with the finished gradient dots_g = grad . contents_g.
template <class A, class M, int G, bool First, bool Last>
MANN_EXT_OUTLINE void tile_gradient(const M* tile, A* grad, int64_t width, const A* x, const A* w,
                                    int64_t w_stride, const A* self, const A* keys, const A* grads,
                                    const A* contents, A* dots) {
  constexpr int L = kLanes<A>;
  constexpr int V = kTogether;
  for (int64_t lane = 0; lane < kTile; lane += V * L) {
    Vec<A> xv[G][V], wv[G][V], own[V];
    for (int v = 0; v < V; ++v) {
      for (int g = 0; g < G; ++g) {
        xv[g][v] = load<A>(x + g * kTile + lane + v * L);
        wv[g][v] = load<A>(w + g * w_stride + lane + v * L);
      }
      own[v] = load<A>(self + lane + v * L);
    }
    for (int64_t j0 = 0; j0 < width; j0 += kColumns) {
      const int64_t j1 = j0 + kColumns < width ? j0 + kColumns : width;
      Vec<A> dot[G][V] = {};
      for (int64_t j = j0; j < j1; ++j) {
        Vec<A> total[V];
        for (int v = 0; v < V; ++v) {
          A* p = grad + j * kTile + lane + v * L;
          total[v] = load<A>(p);
          if constexpr (First) total[v] += own[v] * load<A>(tile + j * kTile + lane + v * L);
        }
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < V; ++v) {
            total[v] += xv[g][v] * keys[g * width + j];
            total[v] += wv[g][v] * grads[g * width + j];
          }
        for (int v = 0; v < V; ++v) store<A>(grad + j * kTile + lane + v * L, total[v]);
        if constexpr (Last)
          for (int g = 0; g < G; ++g)
            for (int v = 0; v < V; ++v) dot[g][v] += total[v] * contents[g * width + j];
      }
      if constexpr (Last)
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < V; ++v)
            store_run<A>(dots + g * kTile + lane + v * L, dot[g][v], j0 == 0);
    }
  }
}

template <class A, class M, int G, int J>
MANN_EXT_INLINE void column_sums_at(const M* tiles, int64_t count, int64_t width, int64_t j,
                                    const A* weights, int64_t stride, A* sums, bool first) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[G][J] = {};
  if (!first)
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < J; ++i) sum[g][i] = load<A>(sums + (g * width + j + i) * L);
  for (int64_t tile = 0; tile < count; ++tile) {
    const M* column = tiles + (tile * width + j) * kTile;
    const A* w = weights + tile * kTile;
    for (int64_t lane = 0; lane < kTile; lane += L) {
      Vec<A> wv[G];
      for (int g = 0; g < G; ++g) wv[g] = load<A>(w + g * stride + lane);
      for (int i = 0; i < J; ++i) {
        const Vec<A> m = load<A>(column + i * kTile + lane);
        for (int g = 0; g < G; ++g) sum[g][i] += wv[g] * m;
      }
    }
  }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < J; ++i) store<A>(sums + (g * width + j + i) * L, sum[g][i]);
}

// sums_g[j] += sum over the slots of `count` tiles of weights_g[slot] * tile[j][slot], a vector
// of lanes each (to be added up by lane_sums): the read, and the gradients of keys and contents.
// `first`: from zero. An outer product in registers, G * J accumulators.
template <class A, class M, int G>
MANN_EXT_OUTLINE void column_sums(const M* tiles, int64_t count, int64_t width, const A* weights,
                                  int64_t stride, A* sums, bool first) {
  constexpr int J = kRegisters == 32 ? 5 : 2;
  int64_t j = 0;
  for (; j + J <= width; j += J)
    column_sums_at<A, M, G, J>(tiles, count, width, j, weights, stride, sums, first);
  for (; j < width; ++j)
    column_sums_at<A, M, G, 1>(tiles, count, width, j, weights, stride, sums, first);
}

// ---- between the user's layout [N][W] and tiles [W][kTile] ----

// Four columns of kLanes<float> rows at a time, in registers: lane 4 l + k of a vector belongs to
// row 4 l + k, so a vector first takes four numbers each of every fourth row, and 4 x 4 numbers are
// then turned within each 16 bytes.
template <int... I>
MANN_EXT_INLINE void turn4(Vec<float> (&v)[4], std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<float>;
  using Mask = typename Lanes<float>::mask;
  // From two vectors, of each 16 bytes: numbers 0 and 1 in turn, 2 and 3 in turn, halves 0, 1.
  const Mask low = {(I / 4 * 4 + I % 4 / 2 + I % 2 * L)...};
  const Mask high = {(I / 4 * 4 + 2 + I % 4 / 2 + I % 2 * L)...};
  const Mask first = {(I / 4 * 4 + I % 2 + I % 4 / 2 * L)...};
  const Mask second = {(I / 4 * 4 + 2 + I % 2 + I % 4 / 2 * L)...};
  const Vec<float> low01 = __builtin_shuffle(v[0], v[1], low);
  const Vec<float> high01 = __builtin_shuffle(v[0], v[1], high);
  const Vec<float> low23 = __builtin_shuffle(v[2], v[3], low);
  const Vec<float> high23 = __builtin_shuffle(v[2], v[3], high);
  v[0] = __builtin_shuffle(low01, low23, first);
  v[1] = __builtin_shuffle(low01, low23, second);
  v[2] = __builtin_shuffle(high01, high23, first);
  v[3] = __builtin_shuffle(high01, high23, second);
}

// Four numbers each of rows 0, 4, 8, ... (Written to the stack and read again as one vector, they
// would wait for the last of the stores.)
MANN_EXT_INLINE Vec<float> every_fourth_row(const float* p, [[maybe_unused]] int64_t stride) {
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 4 * stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 8 * stride), 2);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 12 * stride), 3);
  return reinterpret_cast<Vec<float>>(v);
#elif defined(__AVX2__)
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(p));
  return reinterpret_cast<Vec<float>>(_mm256_insertf128_ps(v, _mm_loadu_ps(p + 4 * stride), 1));
#else
  static_assert(kLanes<float> == 4);
  return load_unaligned<float>(p);
#endif
}

// All of a whole tile's columns but the last width % 4; returns where those begin.
template <bool ToTile>
inline int64_t transpose_tile(const float* from, float* to, int64_t slot_stride, int64_t width) {
  constexpr int L = kLanes<float>;
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  const int64_t end = width / 4 * 4;
  for (int64_t i = 0; i < kTile; i += L)
    for (int64_t j = 0; j < end; j += 4) {
      Vec<float> v[4];
      if constexpr (ToTile)  // the next tile's rows, a cache line each in turn
        for (int l = 0; l < L / 4; ++l)
          __builtin_prefetch(from + (kTile + i + 4 * l + j % 16 / 4) * slot_stride + j / 16 * 16);
      for (int k = 0; k < 4; ++k) {
        if constexpr (ToTile)
          v[k] = every_fourth_row(from + (i + k) * slot_stride + j, slot_stride);
        else
          v[k] = load<float>(from + (j + k) * kTile + i);
      }
      turn4(v, std::make_integer_sequence<int, L>());
      for (int k = 0; k < 4; ++k) {
        if constexpr (ToTile) {
          store<float>(to + (j + k) * kTile + i, v[k]);
        } else {
          const Four* lanes = reinterpret_cast<const Four*>(&v[k]);
          for (int l = 0; l < L / 4; ++l)
            *reinterpret_cast<Four*>(to + (i + 4 * l + k) * slot_stride + j) = lanes[l];
        }
      }
    }
  return end;
}

// rows (at most kTile of them, strides in elements) to one tile; slots past `count` are zero.
template <class D, class S>
inline void tile_from_rows(D* tile, const S* rows, int64_t slot_stride, int64_t width_stride,
                           int64_t count, int64_t width) {
  using A = std::conditional_t<std::is_same_v<D, double>, double, float>;
  if (slot_stride == 0 && width_stride == 0 && count == kTile) {
    D value;
    store_scalar<A>(&value, load_scalar<A>(rows));
    for (int64_t i = 0; i < width * kTile; ++i) tile[i] = value;
    return;
  }
  int64_t begin = 0;
  if constexpr (std::is_same_v<D, float> && std::is_same_v<S, float>)
    if (count == kTile && width_stride == 1)
      begin = transpose_tile<true>(rows, tile, slot_stride, width);
  // Eight columns at a time: a cache line of each row is used while it is in L1.
  for (int64_t j0 = begin; j0 < width; j0 += 8) {
    const int64_t j1 = j0 + 8 < width ? j0 + 8 : width;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = j0; j < j1; ++j) {
        const S* p = rows + i * slot_stride + j * width_stride;
        if constexpr (std::is_same_v<D, S>)
          tile[j * kTile + i] = *p;
        else
          store_scalar<A>(tile + j * kTile + i, load_scalar<A>(p));
      }
    for (int64_t i = count; i < kTile; ++i)
      for (int64_t j = j0; j < j1; ++j) store_scalar<A>(tile + j * kTile + i, A(0));
  }
}

template <class D, class S>
inline void tile_to_rows(const S* tile, D* rows, int64_t count, int64_t width) {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  int64_t begin = 0;
  if constexpr (std::is_same_v<D, float> && std::is_same_v<S, float>)
    if (count == kTile) begin = transpose_tile<false>(tile, rows, width, width);
  for (int64_t j0 = begin; j0 < width; j0 += 8) {
    const int64_t j1 = j0 + 8 < width ? j0 + 8 : width;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = j0; j < j1; ++j) {
        if constexpr (std::is_same_v<D, S>)
          rows[i * width + j] = tile[j * kTile + i];
        else
          store_scalar<A>(rows + i * width + j, load_scalar<A>(tile + j * kTile + i));
      }
  }
}

}  // namespace MANN_EXT_ISA
