// Content addressing and the softmax read, keys and values apart or the same.
//
// Scores put 64 slots in the vector lanes (a tile of keys is turned once per block); reads put the
// value width there, so that values of any width are streamed as they lie. Multiply-adds for each
// query and slot: K + V forward, 2 K + 2 V backward (+ K when the cosine is asked for).
#include "cpu/content.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/lrua_tile.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {
namespace {

using namespace mann_ext::content;

template <class T>
T* content_room(std::vector<char>& room, int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
  if (room.size() < bytes) room.resize(bytes);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~uintptr_t{63});
}

// Up to a vector of numbers, the missing lanes zero.
template <class A, class S>
MANN_EXT_INLINE Vec<A> load_some(const S* p, int64_t count) {
  if constexpr (std::is_same_v<S, A>) {
    if (count >= kLanes<A>) return load_unaligned<A>(p);
  } else {
    if (count >= kLanes<A>) return load<A>(p);
  }
  Vec<A> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = load_scalar<A>(p + i);
  return v;
}

template <class A>
MANN_EXT_INLINE void store_some(A* p, Vec<A> v, int64_t count) {
  if (count >= kLanes<A>) {
    std::memcpy(p, &v, sizeof(v));
    return;
  }
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

// out[a][j] = sum_i left[i * left_i + a * left_a] * rows[i][j], j in the lanes: four outputs share
// each row that is read.
template <class A, class S>
inline void weighted_rows(const A* left, int64_t left_i, int64_t left_a, int64_t outputs,
                          const S* rows, int64_t count, int64_t width, A* out, int64_t out_stride,
                          bool add) {
  constexpr int V = kTogether;
  for (int64_t j = 0; j < width; j += V * kLanes<A>) {
    for_head_groups(outputs, [&](int64_t a, auto G) {
      Vec<A> sum[G][V] = {};
      for (int64_t i = 0; i < count; ++i) {
        Vec<A> row[V];
        for (int v = 0; v < V; ++v)
          row[v] = load_some<A>(rows + i * width + j + v * kLanes<A>, width - j - v * kLanes<A>);
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < V; ++v) sum[g][v] += left[i * left_i + (a + g) * left_a] * row[v];
      }
      for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) {
          const int64_t left_over = width - j - v * kLanes<A>;
          if (left_over <= 0) continue;
          A* p = out + (a + g) * out_stride + j + v * kLanes<A>;
          store_some<A>(p, add ? sum[g][v] + load_some<A>(p, left_over) : sum[g][v], left_over);
        }
    });
  }
}

template <class A, class S>
struct Content {
  static int64_t blocks(const Read& p) { return (p.slots + kBlock - 1) / kBlock; }

  static A norm(const A* v, int64_t width) {
    double sum = 0;
    for (int64_t j = 0; j < width; ++j) sum += static_cast<double>(v[j]) * v[j];
    return static_cast<A>(std::sqrt(sum));
  }
  static const A* query(const Read& p, int64_t b, int64_t q) {
    return static_cast<const A*>(p.query) + (b * p.queries + q) * p.key_width;
  }
  static const S* key(const Read& p, int64_t b, int64_t slot) {
    return static_cast<const S*>(p.keys) + (b * p.slots + slot) * p.key_width;
  }
  static const S* value(const Read& p, int64_t b, int64_t slot) {
    return static_cast<const S*>(p.values) + (b * p.slots + slot) * p.value_width;
  }
  static A strength(const Read& p, int64_t b, int64_t q) {
    return p.strengths ? static_cast<const A*>(p.strengths)[b * p.queries + q] : A(1);
  }
  static A* weight(const Read& p, int64_t b, int64_t q) {
    return static_cast<A*>(p.weights) + (b * p.queries + q) * p.slots;
  }

  // dots[q][slot of the tile] of rows `width` wide with every vector, and squared lengths of the
  // rows.
  static void tile_dots(const S* rows, int64_t count, int64_t width, const A* vectors,
                        int64_t number, A* tile, A* dots, A* squares) {
    tile_from_rows(tile, rows, width, 1, count, width);
    for_head_groups(number, [&](int64_t q, auto G) {
      tile_score<A, A, G>(tile, width, vectors + q * width, dots + q * kTile);
    });
    if (squares == nullptr) return;
    for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
      Vec<A> sum = {};
      for (int64_t j = 0; j < width; ++j) {
        const Vec<A> v = load<A>(tile + j * kTile + lane);
        sum += v * v;
      }
      store<A>(squares + lane, sum);
    }
  }

  // Per block: [Q][V] partial reads, [Q] totals, [Q] shifts.
  static int64_t partial_size(const Read& p) { return p.queries * (p.value_width + 2); }
  static int64_t scratch_bytes(const Read& p) {
    return blocks(p) * partial_size(p) * static_cast<int64_t>(sizeof(A));
  }

  static void pass(const Read& p, void* scratch, int64_t b, int64_t block, int64_t end) {
    thread_local std::vector<char> room;
    A* tile = content_room<A>(room, (p.key_width + p.queries + 1) * kTile);
    A* dots = tile + p.key_width * kTile;
    A* squares = dots + p.queries * kTile;
    for (; block < end; ++block) {
      const int64_t first = block * kBlock, last = std::min(p.slots, first + kBlock);
      for (int64_t slot = first; slot < last; slot += kTile) {
        const int64_t count = std::min(kTile, last - slot);
        tile_dots(key(p, b, slot), count, p.key_width, query(p, b, 0), p.queries, tile, dots,
                  p.cosine ? squares : nullptr);
        for (int64_t q = 0; q < p.queries; ++q) {
          const A beta = strength(p, b, q);
          const A length = p.cosine ? norm(query(p, b, q), p.key_width) : A(0);
          const bool* mask =
              p.mask == nullptr
                  ? nullptr
                  : p.mask + (b * p.mask_queries + (p.mask_queries > 1 ? q : 0)) * p.slots + slot;
          A* scores = weight(p, b, q) + slot;
          for (int64_t i = 0; i < count; ++i) {
            A score = beta * dots[q * kTile + i];
            if (p.cosine) score /= length * std::sqrt(squares[i]) + static_cast<A>(p.eps);
            scores[i] = mask == nullptr || mask[i] ? score : -std::numeric_limits<A>::infinity();
          }
        }
      }
      A* partial = static_cast<A*>(scratch) + block * partial_size(p);
      A* totals = partial + p.queries * p.value_width;
      A* shifts = totals + p.queries;
      for (int64_t q = 0; q < p.queries; ++q) {
        A* w = weight(p, b, q);
        A top = w[first];
        for (int64_t i = first + 1; i < last; ++i)
          if (!(w[i] <= top)) top = w[i];
        shifts[q] = top;
        // Every slot masked: nothing to subtract, and all weights come out zero.
        const A shift = top == -std::numeric_limits<A>::infinity() ? A(0) : top;
        Vec<A> sum = {};
        for (int64_t i = first; i < last; i += kLanes<A>) {
          const Vec<A> scores = load_some<A>(w + i, last - i);
          Vec<A> e = exponential<A>(scores - shift);
          for (int64_t lane = last - i; lane < kLanes<A>; ++lane) e[lane] = A(0);
          store_some<A>(w + i, e, last - i);
          sum += e;
        }
        totals[q] = sum_lanes<A>(sum);
      }
      weighted_rows<A, S>(weight(p, b, 0) + first, 1, p.slots, p.queries, value(p, b, first),
                          last - first, p.value_width, partial, p.value_width, false);
    }
  }

  static void combine(const Read& p, void* scratch, int64_t b) {
    const int64_t size = partial_size(p), count = blocks(p);
    A* partial = static_cast<A*>(scratch);
    A* reads = static_cast<A*>(p.reads) + b * p.queries * p.value_width;
    for (int64_t q = 0; q < p.queries; ++q) {
      A* totals = partial + p.queries * p.value_width + q;
      A* shifts = totals + p.queries;
      A top = -std::numeric_limits<A>::infinity();
      for (int64_t k = 0; k < count; ++k)
        if (!(shifts[k * size] <= top)) top = shifts[k * size];
      const bool masked = top == -std::numeric_limits<A>::infinity();
      double total = 0;
      for (int64_t k = 0; k < count; ++k) {
        shifts[k * size] = masked ? A(0) : std::exp(shifts[k * size] - top);
        total += static_cast<double>(totals[k * size]) * shifts[k * size];
      }
      for (int64_t k = 0; k < count; ++k)
        shifts[k * size] = masked ? A(0) : static_cast<A>(shifts[k * size] / total);
      for (int64_t j = 0; j < p.value_width; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < count; ++k)
          if (shifts[k * size] != A(0))
            sum +=
                static_cast<double>(partial[k * size + q * p.value_width + j]) * shifts[k * size];
        reads[q * p.value_width + j] = static_cast<A>(sum);
      }
    }
  }

  static void normalise(const Read& p, void* scratch, int64_t b, int64_t block, int64_t end) {
    for (; block < end; ++block) {
      const A* scales =
          static_cast<A*>(scratch) + block * partial_size(p) + p.queries * (p.value_width + 1);
      const int64_t last = std::min(p.slots, (block + 1) * kBlock);
      for (int64_t q = 0; q < p.queries; ++q) {
        A* w = weight(p, b, q);
        for (int64_t i = block * kBlock; i < last; ++i) w[i] *= scales[q];
      }
    }
  }

  // ---------------------------------------------------------------- backward

  // Scratch: [Q] expected gradient of the weights, [Q] query lengths; per block [Q][K] gradient of
  // the queries, [Q] of the strengths, [Q] own term of the cosine.
  static int64_t backward_size(const ReadBackward& p) {
    return p.forward.queries * (p.forward.key_width + 2);
  }
  static int64_t backward_scratch_bytes(const ReadBackward& p) {
    return (2 * p.forward.queries + blocks(p.forward) * backward_size(p)) *
           static_cast<int64_t>(sizeof(A));
  }

  static void backward_begin(const ReadBackward& p, void* scratch, int64_t b) {
    const Read& f = p.forward;
    A* expected = static_cast<A*>(scratch);
    A* lengths = expected + f.queries;
    const A* grads = static_cast<const A*>(p.grad_reads) + b * f.queries * f.value_width;
    const A* reads = static_cast<const A*>(f.reads) + b * f.queries * f.value_width;
    for (int64_t q = 0; q < f.queries; ++q) {
      double sum = 0;
      for (int64_t j = 0; j < f.value_width; ++j)
        sum += static_cast<double>(grads[q * f.value_width + j]) * reads[q * f.value_width + j];
      if (p.grad_weights != nullptr) {
        const A* g = static_cast<const A*>(p.grad_weights) + (b * f.queries + q) * f.slots;
        const A* w = weight(f, b, q);
        for (int64_t i = 0; i < f.slots; ++i) sum += static_cast<double>(g[i]) * w[i];
      }
      expected[q] = static_cast<A>(sum);
      lengths[q] = norm(query(f, b, q), f.key_width);
    }
  }

  static void backward_pass(const ReadBackward& p, void* scratch, int64_t b, int64_t block,
                            int64_t end) {
    const Read& f = p.forward;
    const int64_t Q = f.queries, K = f.key_width, V = f.value_width;
    const A* expected = static_cast<A*>(scratch);
    const A* lengths = expected + Q;
    const A* grads = static_cast<const A*>(p.grad_reads) + b * Q * V;
    thread_local std::vector<char> room;
    A* tile = content_room<A>(room, (std::max(K, V) + 2 * Q + 1 + K + V) * kTile);
    A* dots = tile + std::max(K, V) * kTile;
    A* grad_dots = dots + Q * kTile;
    A* squares = grad_dots + Q * kTile;
    A* key_rows = squares + kTile;         // [kTile][K]
    A* value_rows = key_rows + K * kTile;  // [kTile][V]
    for (; block < end; ++block) {
      A* query_sums = static_cast<A*>(scratch) + 2 * Q + block * backward_size(p);
      A* strength_sums = query_sums + Q * K;
      A* own_sums = strength_sums + Q;
      std::fill(query_sums, query_sums + backward_size(p), A(0));
      const int64_t last = std::min(f.slots, (block + 1) * kBlock);
      for (int64_t slot = block * kBlock; slot < last; slot += kTile) {
        const int64_t count = std::min(kTile, last - slot);
        tile_dots(value(f, b, slot), count, V, grads, Q, tile, grad_dots, nullptr);
        tile_dots(key(f, b, slot), count, K, query(f, b, 0), Q, tile, dots, squares);
        A self[kTile] = {};
        for (int64_t q = 0; q < Q; ++q) {
          const A beta = strength(f, b, q);
          const A* w = weight(f, b, q) + slot;
          const A* given = p.grad_weights == nullptr ? nullptr
                                                     : static_cast<const A*>(p.grad_weights) +
                                                           (b * Q + q) * f.slots + slot;
          for (int64_t i = 0; i < count; ++i) {
            A& x = dots[q * kTile + i];
            const A weight_grad = grad_dots[q * kTile + i] + (given ? given[i] : A(0));
            const A score_grad = w[i] == A(0) ? A(0) : w[i] * (weight_grad - expected[q]);
            if (f.cosine) {
              const A length = std::sqrt(squares[i]);
              const A inverse = A(1) / (lengths[q] * length + static_cast<A>(f.eps));
              const A cosine = x * inverse;
              strength_sums[q] += score_grad * cosine;
              x = score_grad * beta * inverse;
              own_sums[q] += x * cosine * length;
              if (length > A(0)) self[i] -= x * cosine * lengths[q] / length;
            } else {
              strength_sums[q] += score_grad * x;
              x = score_grad * beta;
            }
          }
        }
        // `tile` still holds the keys, a column a slot.
        for_head_groups(Q, [&](int64_t q, auto G) {
          for (int64_t i = count; i < kTile; ++i)
            for (int g = 0; g < G; ++g) dots[(q + g) * kTile + i] = A(0);
          constexpr int64_t J = 64;
          alignas(kVectorBytes) A vectors[G * J * kLanes<A>];
          A sums[G * J];
          for (int64_t j0 = 0; j0 < K; j0 += J) {
            const int64_t width = std::min(J, K - j0);
            column_sums<A, A, G>(tile + j0 * kTile, 1, width, dots + q * kTile, kTile, vectors,
                                 true);
            lane_sums(vectors, G * width, sums);
            for (int g = 0; g < G; ++g)
              for (int64_t j = 0; j < width; ++j)
                query_sums[(q + g) * K + j0 + j] += sums[g * width + j];
          }
        });
        weighted_rows<A, A>(dots, kTile, 1, count, query(f, b, 0), Q, K, key_rows, K, false);
        if (f.cosine)
          for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < K; ++j)
              key_rows[i * K + j] += self[i] * load_scalar<A>(key(f, b, slot + i) + j);
        if (p.values_given) {
          weighted_rows<A, A>(weight(f, b, 0) + slot, f.slots, 1, count, grads, Q, V, value_rows, V,
                              false);
          store_rows(value_rows, count * V,
                     static_cast<S*>(p.grad_values) + (b * f.slots + slot) * V);
        } else {
          weighted_rows<A, A>(weight(f, b, 0) + slot, f.slots, 1, count, grads, Q, V, key_rows, K,
                              true);
        }
        store_rows(key_rows, count * K, static_cast<S*>(p.grad_keys) + (b * f.slots + slot) * K);
      }
    }
  }

  static void store_rows(const A* from, int64_t count, S* to) {
    for (int64_t i = 0; i < count; ++i) store_scalar<A>(to + i, from[i]);
  }

  static void backward_combine(const ReadBackward& p, void* scratch, int64_t b) {
    const Read& f = p.forward;
    const int64_t size = backward_size(p);
    const A* lengths = static_cast<A*>(scratch) + f.queries;
    const A* sums = static_cast<A*>(scratch) + 2 * f.queries;
    const auto total = [&](int64_t i) {
      double sum = 0;
      for (int64_t k = 0; k < blocks(f); ++k) sum += sums[k * size + i];
      return static_cast<A>(sum);
    };
    for (int64_t q = 0; q < f.queries; ++q) {
      const A own = total(f.queries * (f.key_width + 1) + q);
      const A along = f.cosine && lengths[q] > A(0) ? own / lengths[q] : A(0);
      A* grad = static_cast<A*>(p.grad_query) + (b * f.queries + q) * f.key_width;
      for (int64_t j = 0; j < f.key_width; ++j)
        grad[j] = total(q * f.key_width + j) - along * query(f, b, q)[j];
      if (p.grad_strengths != nullptr)
        static_cast<A*>(p.grad_strengths)[b * f.queries + q] = total(f.queries * f.key_width + q);
    }
  }

  static const Kernels table;
};

template <class A, class S>
const Kernels Content<A, S>::table = {
    scratch_bytes,          pass,           combine,       normalise,
    backward_scratch_bytes, backward_begin, backward_pass, backward_combine};

}  // namespace

const Kernels& content_kernels(Storage storage) {
  switch (storage) {
    case Storage::float64: return Content<double, double>::table;
    case Storage::bfloat16: return Content<float, BFloat16>::table;
    case Storage::float16: return Content<float, Half>::table;
    default: return Content<float, float>::table;
  }
}

}  // namespace MANN_EXT_ISA
