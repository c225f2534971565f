// NTM memory: address, write, read (forward), and the same walked backwards.
//
// Multiply-adds an element of the memory and step: forward 2 H + 2 writes, backward 4 H + 7 writes,
// and an exponential, a logarithm and a power for each weight. The write is not invertible, so the
// backward pass has M_t from snapshots. Between two of them it makes the memories again, all those
// of one such segment, by the saved weights: that is the write alone, no addressing.
#include "cpu/ntm.h"

#include <algorithm>
#include <limits>

#include "cpu/lrua_tile.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {
namespace {

using namespace mann_ext::ntm;
static_assert(kTile == kPadding);

// Tiles whose sums over slots are formed in one run; the runs are added in double.
constexpr int64_t kBlock = 8;

// now = before * prod_h (1 - w_h e_h^T) + sum_h w_h a_h^T over one tile. Heads: how many, if that
// is known; else 0.
template <class A, int Heads>
MANN_EXT_OUTLINE void tile_update(const A* before, A* now, int64_t width, int64_t heads,
                                  const A* weights, int64_t stride, const A* erases,
                                  const A* adds) {
  const int64_t count = Heads > 0 ? Heads : heads;
  for (int64_t j = 0; j < width; ++j)
    for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
      Vec<A> m = load<A>(before + j * kTile + lane), added = {};
      for (int64_t h = 0; h < count; ++h) {
        const Vec<A> w = load<A>(weights + h * stride + lane);
        m *= A(1) - w * erases[h * width + j];
        added += w * adds[h * width + j];
      }
      store<A>(now + j * kTile + lane, m + added);
    }
}

// The gradient of that, grad in and out: kept_h = grad * before * prod_{other than h} (1 - w e^T),
// whose sums over the slots are minus the gradients of the erases, and
// weight_grads_h += sum_j (grad_j a_h,j - kept_h,j e_h,j).
template <class A, int Heads>
MANN_EXT_OUTLINE void tile_update_gradient(const A* before, A* grad, int64_t width, int64_t heads,
                                           const A* weights, int64_t stride, const A* erases,
                                           const A* adds, A* kept, int64_t kept_stride,
                                           A* weight_grads, int64_t grads_stride) {
  const int64_t count = Heads > 0 ? Heads : heads;
  for (int64_t lane = 0; lane < kTile; lane += kLanes<A>)
    for (int64_t j0 = 0; j0 < width; j0 += kColumns) {
      const int64_t j1 = std::min(width, j0 + kColumns);
      Vec<A> sums[Heads > 0 ? Heads : kMaxHeads];
      for (int64_t h = 0; h < count; ++h) sums[h] = Vec<A>{};
      for (int64_t j = j0; j < j1; ++j) {
        const Vec<A> g = load<A>(grad + j * kTile + lane);
        const Vec<A> product = g * load<A>(before + j * kTile + lane);
        Vec<A> all = broadcast<A>(A(1));
        for (int64_t h = 0; h < count; ++h) {
          const A* w = weights + lane;
          Vec<A> others = product;
          for (int64_t k = 0; k < count; ++k)
            if (k != h) others *= A(1) - load<A>(w + k * stride) * erases[k * width + j];
          store<A>(kept + h * kept_stride + j * kTile + lane, others);
          sums[h] += g * adds[h * width + j] - others * erases[h * width + j];
          all *= A(1) - load<A>(w + h * stride) * erases[h * width + j];
        }
        store<A>(grad + j * kTile + lane, g * all);
      }
      for (int64_t h = 0; h < count; ++h) {
        A* to = weight_grads + h * grads_stride + lane;
        store<A>(to, load<A>(to) + sums[h]);
      }
    }
}

// grad += sum_g weights_g rows_g^T over one tile, and (Self) self * tile.
template <class A, int G, bool Self>
MANN_EXT_OUTLINE void tile_add(A* grad, int64_t width, const A* weights, int64_t stride,
                               const A* rows, const A* self, const A* tile) {
  for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
    Vec<A> w[G], own = {};
    for (int g = 0; g < G; ++g) w[g] = load<A>(weights + g * stride + lane);
    if constexpr (Self) own = load<A>(self + lane);
    for (int64_t j = 0; j < width; ++j) {
      Vec<A> total = load<A>(grad + j * kTile + lane);
      if constexpr (Self) total += own * load<A>(tile + j * kTile + lane);
      for (int g = 0; g < G; ++g) total += w[g] * rows[g * width + j];
      store<A>(grad + j * kTile + lane, total);
    }
  }
}

template <class A>
struct Scan {
  static constexpr int L = kLanes<A>;

  // ---------------------------------------------------------------- what both directions share

  static int64_t at(const Sizes& s, int64_t t, int64_t b) { return t * s.batch + b; }
  static int64_t tile_size(const Sizes& s) { return s.width * kTile; }
  static int64_t memory_size(const Sizes& s) { return s.width * s.padded; }
  static int64_t block_end(const Sizes& s, int64_t slot) {
    return std::min(s.padded, slot + kBlock * kTile);
  }
  static bool resets(const Inputs& in, const Sizes& s, int64_t t, int64_t b) {
    return in.reset != nullptr && in.reset[at(s, t, b)];
  }
  static const A* key(const Inputs& in, const Sizes& s, int64_t t, int64_t b, int64_t h) {
    return static_cast<const A*>(in.keys) + (at(s, t, b) * s.heads + h) * s.width;
  }
  static const A* erase(const Inputs& in, const Sizes& s, int64_t t, int64_t b) {
    return static_cast<const A*>(in.erases) + at(s, t, b) * s.writes * s.width;
  }
  static const A* add(const Inputs& in, const Sizes& s, int64_t t, int64_t b) {
    return static_cast<const A*>(in.adds) + at(s, t, b) * s.writes * s.width;
  }

  // What one head is given at one step, besides its key.
  struct Head {
    A length;  // of the key
    A strength, gate, sharpening;
    A down, stay, up;  // the shift
    A eps;

    Head(const Inputs& in, const Sizes& s, int64_t t, int64_t b, int64_t h)
        : length(norm(key(in, s, t, b, h), s.width)), eps(static_cast<A>(in.eps)) {
      const int64_t i = at(s, t, b) * s.heads + h;
      strength = static_cast<const A*>(in.strengths)[i];
      gate = static_cast<const A*>(in.gates)[i];
      sharpening = static_cast<const A*>(in.sharpenings)[i];
      const A* shift = static_cast<const A*>(in.shifts) + i * kTaps;
      down = shift[0];
      stay = shift[1];
      up = shift[2];
    }
  };

  // A row of numbers of all slots, with room for one more at each end: the circle is closed there.
  struct Ring {
    A* x;
    void close(const Sizes& s) const {
      x[s.padded] = A(0);  // read where there is no slot, and multiplied by zero
      x[-1] = x[s.slots - 1];
      x[s.slots] = x[0];
    }
  };
  static Ring take_ring(Arena& arena, const Sizes& s) {
    A* from = arena.template take<A>(s.padded + 2 * kTile);
    return {from == nullptr ? nullptr : from + kTile};
  }

  // The stages of addressing of one head (eqs. 5-9).
  struct Stages {
    A* cosine;
    A* content;        // w_c
    Ring gated;        // w_g
    A* shifted;        // w~
    A largest = 0;     // of w~
    double total = 0;  // of (w~ / largest)^gamma

    Stages(Arena& arena, const Sizes& s)
        : cosine(arena.take<A>(s.padded)),
          content(arena.take<A>(s.padded)),
          gated(take_ring(arena, s)),
          shifted(arena.take<A>(s.padded)) {}
  };

  // v, the numbers of slots from i on, with `fill` where there is no slot.
  static MANN_EXT_INLINE Vec<A> only_slots(Vec<A> v, int64_t i, int64_t slots, A fill = 0) {
    if (i + L > slots)
      for (int lane = 0; lane < L; ++lane)
        if (i + lane >= slots) v[lane] = fill;
    return v;
  }
  static MANN_EXT_INLINE A largest_lane(Vec<A> v) {
    A top = v[0];
    for (int lane = 1; lane < L; ++lane) top = v[lane] > top ? v[lane] : top;
    return top;
  }

  // Calls f(i, sums) for the vectors of all slots; K sums over the slots. Terms that cancel make
  // their rounding show, so no chain of additions is long: fours, tiles, blocks, then in double.
  template <int K, class F>
  static MANN_EXT_INLINE void sum_slots(const Sizes& s, double (&totals)[K], const F& f) {
    for (double& total : totals) total = 0;
    for (int64_t first = 0; first < s.padded; first = block_end(s, first)) {
      Vec<A> of_block[K] = {};
      for (int64_t tile = first; tile < block_end(s, first); tile += kTile) {
        Vec<A> of_tile[K] = {};
        for (int64_t i = tile; i < tile + kTile; i += 4 * L) {
          Vec<A> parts[4][K] = {};
          for (int v = 0; v < 4; ++v) f(i + v * L, parts[v]);
          for (int k = 0; k < K; ++k)
            of_tile[k] += (parts[0][k] + parts[1][k]) + (parts[2][k] + parts[3][k]);
        }
        for (int k = 0; k < K; ++k) of_block[k] += of_tile[k];
      }
      for (int k = 0; k < K; ++k) totals[k] += static_cast<double>(sum_lanes<A>(of_block[k]));
    }
  }

  // w from dots = k . m_i, squares = |m_i|^2 and the weights of the step before.
  static void address(const Sizes& s, const Head& head, const A* dots, const A* squares,
                      const A* previous, Stages& to, A* weights) {
    constexpr A kNothing = -std::numeric_limits<A>::infinity();
    Vec<A> top = broadcast<A>(kNothing);
    for (int64_t i = 0; i < s.padded; i += L) {
      const Vec<A> length = square_root<A>(load<A>(squares + i));
      const Vec<A> cosine = load<A>(dots + i) / (head.length * length + head.eps);
      const Vec<A> score = only_slots(head.strength * cosine, i, s.slots, kNothing);
      top = score > top ? score : top;
      store<A>(to.cosine + i, cosine);
      store<A>(to.content + i, score);
    }
    const A highest = largest_lane(top);
    double total[1];
    sum_slots(s, total, [&](int64_t i, Vec<A>* sum) {
      const Vec<A> e = exponential<A>(load<A>(to.content + i) - highest);
      store<A>(to.content + i, e);
      sum[0] += e;
    });
    const A normaliser = static_cast<A>(total[0]);
    for (int64_t i = 0; i < s.padded; i += L) {
      const Vec<A> content = load<A>(to.content + i) / normaliser;
      store<A>(to.content + i, content);
      store<A>(to.gated.x + i, head.gate * content + (A(1) - head.gate) * load<A>(previous + i));
    }
    to.gated.close(s);
    top = broadcast<A>(kNothing);
    for (int64_t i = 0; i < s.padded; i += L) {
      const A* gated = to.gated.x + i;
      const Vec<A> shifted =
          only_slots(head.down * load_unaligned<A>(gated + 1) + head.stay * load<A>(gated) +
                         head.up * load_unaligned<A>(gated - 1),
                     i, s.slots);
      top = shifted > top ? shifted : top;
      store<A>(to.shifted + i, shifted);
    }
    to.largest = largest_lane(top);
    sum_slots(s, total, [&](int64_t i, Vec<A>* sum) {
      const Vec<A> scaled = load<A>(to.shifted + i) / to.largest;
      const Vec<A> power =
          only_slots(exponential<A>(head.sharpening * logarithm<A>(scaled)), i, s.slots);
      store<A>(weights + i, power);
      sum[0] += power;
    });
    to.total = total[0];
    const A sum = static_cast<A>(to.total);
    for (int64_t i = 0; i < s.padded; i += L)
      store<A>(weights + i, only_slots(load<A>(weights + i) / sum, i, s.slots));
  }

  // The memory that an episode of this batch element starts from: the argument, or the constant.
  static void start_memory(const Inputs& in, const Sizes& s, int64_t b, bool given, A* to) {
    const A constant = static_cast<A>(in.initial_value);
    const A* rows = static_cast<const A*>(in.memory) + b * in.memory_batch_stride;
    for (int64_t slot = 0; slot < s.padded; slot += kTile) {
      const int64_t count = std::min(kTile, s.slots - slot);
      if (given)
        tile_from_rows(to + slot * s.width, rows + slot * in.memory_slot_stride,
                       in.memory_slot_stride, in.memory_width_stride, count, s.width);
      else
        tile_from_rows(to + slot * s.width, &constant, 0, 0, count, s.width);
    }
  }

  // [H][N] to [H][padded]; zeros for null.
  static void copy_padded(const A* from, const Sizes& s, A* to) {
    for (int64_t h = 0; h < s.heads; ++h) {
      A* row = to + h * s.padded;
      std::fill(row, row + s.padded, A(0));
      if (from != nullptr) std::copy(from + h * s.slots, from + (h + 1) * s.slots, row);
    }
  }

  // The weights that episodes start with: those given, and after a reset one-hot at slot 0.
  struct StartWeights {
    A *given, *fresh;  // [H][padded]

    StartWeights(Arena& arena, const Sizes& s)
        : given(arena.take<A>(s.heads * s.padded)), fresh(arena.take<A>(s.heads * s.padded)) {}
    void fill(const Inputs& in, const Sizes& s, int64_t b) const {
      copy_padded(static_cast<const A*>(in.weights) + b * s.heads * s.slots, s, given);
      copy_padded(nullptr, s, fresh);
      for (int64_t h = 0; h < s.heads; ++h) fresh[h * s.padded] = A(1);
    }
  };

  // Sums over slots weights_g * memory, as tiles, for `heads` heads: to [heads][W], times `sign`.
  static void sums_over_slots(const Sizes& s, const A* memory, const A* weights, int64_t heads,
                              double* room, A* part, A* to, A sign = 1) {
    std::fill(room, room + heads * s.width, 0.0);
    for (int64_t slot = 0; slot < s.padded; slot = block_end(s, slot))
      add_sums(s, memory + slot * s.width, weights + slot, heads, slot, room, part);
    for (int64_t i = 0; i < heads * s.width; ++i) to[i] = sign * static_cast<A>(room[i]);
  }
  // The same of one block, added to `room`.
  static void add_sums(const Sizes& s, const A* memory, const A* weights, int64_t heads,
                       int64_t slot, double* room, A* part) {
    const int64_t tiles = (block_end(s, slot) - slot) / kTile;
    for_head_groups(heads, [&](int64_t r, auto G) {
      column_sums<A, A, G>(memory, tiles, s.width, weights + r * s.padded, s.padded,
                           part + r * s.width * kLanes<A>, true);
    });
    lane_sums(part, heads * s.width, part);  // each lands before what is still to be read
    for (int64_t i = 0; i < heads * s.width; ++i) room[i] += static_cast<double>(part[i]);
  }

  // M_t from M_{t-1} by the weights of the write heads.
  static void update_tile(const Inputs& in, const Sizes& s, int64_t t, int64_t b, int64_t slot,
                          const A* weights, const A* before, A* now) {
    const A* w = weights + s.reads * s.padded + slot;
    const int64_t i = slot * s.width;
    if (s.writes == 1)
      tile_update<A, 1>(before + i, now + i, s.width, 1, w, s.padded, erase(in, s, t, b),
                        add(in, s, t, b));
    else
      tile_update<A, 0>(before + i, now + i, s.width, s.writes, w, s.padded, erase(in, s, t, b),
                        add(in, s, t, b));
  }

  // Dot products of one tile with the keys of some heads, and the squared lengths of its rows.
  static void score_tile(const Sizes& s, const A* tile, const A* keys, int64_t heads, A* dots,
                         A* squares) {
    for_head_groups(heads, [&](int64_t r, auto G) {
      if (r == 0)
        tile_score<A, A, G, true>(tile, s.width, keys, dots, s.padded, squares);
      else
        tile_score<A, A, G>(tile, s.width, keys + r * s.width, dots + r * s.padded, s.padded);
    });
  }

  // ---------------------------------------------------------------- forward

  struct ForwardRoom {
    StartWeights start;
    Stages stages;
    A* memory;     // tiles, where not every M_t is saved; else those that an episode starts from
    A* weights;    // [2][H][padded]: of this step and the last, where no history is kept
    A* dots;       // [H][padded]
    A* squares;    // [padded]
    A* part;       // [reads][W], a vector each
    double* sums;  // [reads][W]
    int64_t bytes;

    ForwardRoom(const Forward& p, Arena arena) : start(arena, p.sizes), stages(arena, p.sizes) {
      const Sizes& s = p.sizes;
      memory = arena.take<A>(memory_size(s));
      weights = arena.take<A>(p.weight_history == nullptr ? 2 * s.heads * s.padded : 0);
      dots = arena.take<A>(s.heads * s.padded);
      squares = arena.take<A>(s.padded);
      part = arena.take<A>(s.reads * s.width * kLanes<A>);
      sums = arena.take<double>(s.reads * s.width);
      bytes = arena.used();
    }
  };

  static int64_t forward_bytes(const Forward& p) { return ForwardRoom(p, Arena(nullptr)).bytes; }

  static A* snapshot(const Sizes& s, const Inputs& in, const void* snapshots, int64_t t,
                     int64_t b) {
    return static_cast<A*>(const_cast<void*>(snapshots)) +
           at(s, t / in.snapshot_every, b) * memory_size(s);
  }

  static void forward(const Forward& p, void* base, int64_t b) {
    const Sizes& s = p.sizes;
    const Inputs& in = p.in;
    ForwardRoom room(p, Arena(base));
    room.start.fill(in, s, b);
    const bool saves_all = p.snapshots != nullptr && in.snapshot_every == 1;
    const A* previous = room.start.given;
    const A* before = room.memory;
    for (int64_t t = 0; t < s.steps; ++t) {
      const bool reset = resets(in, s, t, b);
      if (t == 0 || reset) {
        start_memory(in, s, b, !reset, room.memory);
        before = room.memory;
      }
      if (reset) previous = room.start.fresh;
      A* now = saves_all ? snapshot(s, in, p.snapshots, t, b) : room.memory;
      A* weights = p.weight_history != nullptr
                       ? static_cast<A*>(p.weight_history) + at(s, t, b) * s.heads * s.padded
                       : room.weights + t % 2 * s.heads * s.padded;
      const auto address_heads = [&](int64_t first, int64_t end) {
        for (int64_t h = first; h < end; ++h)
          address(s, Head(in, s, t, b, h), room.dots + h * s.padded, room.squares,
                  previous + h * s.padded, room.stages, weights + h * s.padded);
      };
      for (int64_t slot = 0; slot < s.padded; slot += kTile)
        score_tile(s, before + slot * s.width, key(in, s, t, b, s.reads), s.writes,
                   room.dots + s.reads * s.padded + slot, room.squares + slot);
      address_heads(s.reads, s.heads);
      for (int64_t slot = 0; slot < s.padded; slot += kTile) {
        update_tile(in, s, t, b, slot, weights, before, now);
        score_tile(s, now + slot * s.width, key(in, s, t, b, 0), s.reads, room.dots + slot,
                   room.squares + slot);
      }
      address_heads(0, s.reads);
      sums_over_slots(s, now, weights, s.reads, room.sums, room.part,
                      static_cast<A*>(p.reads) + at(s, t, b) * s.reads * s.width);
      if (p.snapshots != nullptr && !saves_all && (t + 1) % in.snapshot_every == 0)
        std::copy(now, now + memory_size(s), snapshot(s, in, p.snapshots, t, b));
      before = now;
      previous = weights;
    }
    for (int64_t slot = 0; slot < s.padded; slot += kTile)
      tile_to_rows(before + slot * s.width,
                   static_cast<A*>(p.memory_out) + (b * s.slots + slot) * s.width,
                   std::min(kTile, s.slots - slot), s.width);
    for (int64_t h = 0; h < s.heads; ++h)
      std::copy(previous + h * s.padded, previous + h * s.padded + s.slots,
                static_cast<A*>(p.weights_out) + (b * s.heads + h) * s.slots);
  }

  // ---------------------------------------------------------------- backward

  struct BackwardRoom {
    StartWeights start;
    Stages stages;
    Ring shifted_grad;  // dL/dw~
    A* gated_grad;      // [padded]: dL/dw_g
    A* again;           // [padded]: the weights, made again
    A* segment;         // [K][tiles]: the memories of a segment that are not snapshots
    A* first;           // tiles: those that an episode starts from
    A* grad;            // tiles: dL/dM
    A* kept;            // [writes][tiles of a block]: see tile_update_gradient
    A* weights_grad;    // [H][padded]: dL/dw_t from later steps
    A* dots;            // [H][padded]
    A* grad_dots;       // [reads][kTile]
    A* x;               // [H][padded]: dL/d(k . m)
    A* self;            // [padded]: the factor of m in its own gradient
    A* squares;         // [padded]
    A* part;            // [H][W], a vector each
    double* sums;       // [H][W]
    double* own;        // [H]: of the key in its own gradient
    int64_t bytes;

    BackwardRoom(const Backward& p, Arena arena)
        : start(arena, p.sizes), stages(arena, p.sizes), shifted_grad(take_ring(arena, p.sizes)) {
      const Sizes& s = p.sizes;
      gated_grad = arena.take<A>(s.padded);
      again = arena.take<A>(s.padded);
      segment = arena.take<A>(std::min(p.in.snapshot_every - 1, s.steps) * memory_size(s));
      first = arena.take<A>(memory_size(s));
      grad = arena.take<A>(memory_size(s));
      kept = arena.take<A>(s.writes * std::min(memory_size(s), kBlock * tile_size(s)));
      weights_grad = arena.take<A>(s.heads * s.padded);
      dots = arena.take<A>(s.heads * s.padded);
      grad_dots = arena.take<A>(s.reads * kTile);
      x = arena.take<A>(s.heads * s.padded);
      self = arena.take<A>(s.padded);
      squares = arena.take<A>(s.padded);
      part = arena.take<A>(s.heads * s.width * kLanes<A>);
      sums = arena.take<double>(s.heads * s.width);
      own = arena.take<double>(s.heads);
      bytes = arena.used();
    }
  };

  static int64_t backward_bytes(const Backward& p) { return BackwardRoom(p, Arena(nullptr)).bytes; }

  // One head through the stages of addressing backwards. `grad`: dL/dw in, dL/dw_{t-1} out.
  static void differentiate(const Backward& p, const BackwardRoom& room, const Head& head,
                            int64_t i_head, const A* weights, const A* previous, A* grad, A* x,
                            double* own) {
    const Sizes& s = p.sizes;
    const Stages& stages = room.stages;
    // Sharpening is a softmax of gamma ln(w~).
    double expected[1];
    sum_slots(s, expected,
              [&](int64_t i, Vec<A>* sum) { sum[0] += load<A>(weights + i) * load<A>(grad + i); });
    const A mean = static_cast<A>(expected[0]);
    const A scale = static_cast<A>(head.sharpening / (stages.total * stages.largest));
    const A less = head.sharpening - A(1);
    const A at_zero = less == A(0) ? A(1) : A(0);  // 0^(gamma - 1)
    double sharpening[1];
    sum_slots(s, sharpening, [&](int64_t i, Vec<A>* sum) {
      const Vec<A> scaled = load<A>(stages.shifted + i) / stages.largest;
      const Vec<A> difference = load<A>(grad + i) - mean;
      const Vec<A> logs = logarithm<A>(scaled);
      Vec<A> power = exponential<A>(less * logs);
      power = scaled == A(0) ? broadcast<A>(at_zero) : power;
      sum[0] += scaled == A(0) ? Vec<A>{} : load<A>(weights + i) * difference * logs;
      store<A>(room.shifted_grad.x + i, only_slots(scale * power * difference, i, s.slots));
    });
    room.shifted_grad.close(s);

    // Shift and gate.
    double sums[5];
    sum_slots(s, sums, [&](int64_t i, Vec<A>* sum) {
      const A* d = room.shifted_grad.x + i;
      const A* gated = stages.gated.x + i;
      const Vec<A> here = only_slots(load<A>(d), i, s.slots);
      sum[0] += here * load_unaligned<A>(gated + 1);
      sum[1] += here * load<A>(gated);
      sum[2] += here * load_unaligned<A>(gated - 1);
      const Vec<A> gated_grad = only_slots(head.down * load_unaligned<A>(d - 1) + head.stay * here +
                                               head.up * load_unaligned<A>(d + 1),
                                           i, s.slots);
      const Vec<A> content = load<A>(stages.content + i);
      sum[3] += gated_grad * (content - load<A>(previous + i));
      sum[4] += gated_grad * content;
      store<A>(room.gated_grad + i, gated_grad);
      store<A>(grad + i, (A(1) - head.gate) * gated_grad);
    });

    // Softmax and cosine.
    const A content_mean = static_cast<A>(sums[4]);
    double strength_and_own[2];
    sum_slots(s, strength_and_own, [&](int64_t i, Vec<A>* sum) {
      const Vec<A> cosine = load<A>(stages.cosine + i);
      const Vec<A> length = square_root<A>(load<A>(room.squares + i));
      const Vec<A> inverse_length = length > A(0) ? A(1) / length : Vec<A>{};
      const Vec<A> score_grad =
          load<A>(stages.content + i) * head.gate * (load<A>(room.gated_grad + i) - content_mean);
      const Vec<A> dot_grad = score_grad * head.strength / (head.length * length + head.eps);
      sum[0] += score_grad * cosine;
      sum[1] += dot_grad * cosine * length;
      store<A>(x + i, dot_grad);
      store<A>(room.self + i,
               load<A>(room.self + i) - dot_grad * cosine * head.length * inverse_length);
    });
    *own = strength_and_own[1];

    static_cast<A*>(p.grad_sharpenings)[i_head] = static_cast<A>(sharpening[0]);
    static_cast<A*>(p.grad_gates)[i_head] = static_cast<A>(sums[3]);
    static_cast<A*>(p.grad_strengths)[i_head] = static_cast<A>(strength_and_own[0]);
    for (int k = 0; k < kTaps; ++k)
      static_cast<A*>(p.grad_shifts)[i_head * kTaps + k] = static_cast<A>(sums[k]);
  }

  // Addressing of the heads from `head` to `end` backwards, whose dot products with `memory` are in
  // the room: the gradients of their parameters, of the memory, and of the weights before.
  static void unaddress(const Backward& p, BackwardRoom& room, int64_t t, int64_t b, int64_t head,
                        int64_t end, const A* memory, const A* weights, const A* previous) {
    const Sizes& s = p.sizes;
    std::fill(room.self, room.self + s.padded, A(0));
    for (int64_t h = head; h < end; ++h) {
      const Head given(p.in, s, t, b, h);
      address(s, given, room.dots + h * s.padded, room.squares, previous + h * s.padded,
              room.stages, room.again);
      differentiate(p, room, given, at(s, t, b) * s.heads + h, weights + h * s.padded,
                    previous + h * s.padded, room.weights_grad + h * s.padded,
                    room.x + h * s.padded, room.own + h);
    }
    const A* keys = key(p.in, s, t, b, head);
    const A* x = room.x + head * s.padded;
    for (int64_t slot = 0; slot < s.padded; slot += kTile)
      add_rows(s, room.grad + slot * s.width, x + slot, keys, end - head, room.self + slot,
               memory + slot * s.width);
    A* grad = static_cast<A*>(p.grad_keys) + (at(s, t, b) * s.heads + head) * s.width;
    sums_over_slots(s, memory, x, end - head, room.sums, room.part, grad);
    for (int64_t h = head; h < end; ++h, keys += s.width, grad += s.width) {
      const A length = norm(keys, s.width);
      const A factor = length > A(0) ? static_cast<A>(room.own[h] / length) : A(0);
      for (int64_t j = 0; j < s.width; ++j) grad[j] -= factor * keys[j];
    }
  }

  // grad += sum_h weights_h rows_h^T (+ self * tile) over one tile.
  static void add_rows(const Sizes& s, A* grad, const A* weights, const A* rows, int64_t heads,
                       const A* self, const A* tile) {
    for_head_groups(heads, [&](int64_t r, auto G) {
      const A* w = weights + r * s.padded;
      if (r == 0 && self != nullptr)
        tile_add<A, G, true>(grad, s.width, w, s.padded, rows, self, tile);
      else
        tile_add<A, G, false>(grad, s.width, w, s.padded, rows + r * s.width, nullptr, nullptr);
    });
  }

  // The reads backwards: dL/dM += w_r dr_r^T and dL/dw_r += M dr_r; and the keys' dot products.
  static void unread(const Backward& p, const BackwardRoom& room, int64_t t, int64_t b,
                     const A* memory, const A* weights) {
    const Sizes& s = p.sizes;
    const A* keys = key(p.in, s, t, b, 0);
    const A* grads = p.grad_reads == nullptr
                         ? nullptr
                         : static_cast<const A*>(p.grad_reads) + at(s, t, b) * s.reads * s.width;
    for (int64_t slot = 0; slot < s.padded; slot += kTile) {
      const A* tile = memory + slot * s.width;
      score_tile(s, tile, keys, s.reads, room.dots + slot, room.squares + slot);
      if (grads == nullptr) continue;
      for_head_groups(s.reads, [&](int64_t r, auto G) {
        tile_score<A, A, G>(tile, s.width, grads + r * s.width, room.grad_dots + r * kTile);
      });
      for (int64_t r = 0; r < s.reads; ++r)
        for (int64_t lane = 0; lane < kTile; lane += L) {
          A* to = room.weights_grad + r * s.padded + slot + lane;
          store<A>(to, load<A>(to) + load<A>(room.grad_dots + r * kTile + lane));
        }
      add_rows(s, room.grad + slot * s.width, weights + slot, grads, s.reads, nullptr, nullptr);
    }
  }

  // The write backwards: the gradients of erases, adds, the write weights and the memory before.
  static void unwrite(const Backward& p, const BackwardRoom& room, int64_t t, int64_t b,
                      const A* before, const A* weights) {
    const Sizes& s = p.sizes;
    const int64_t numbers = s.writes * s.width;
    const A* erases = erase(p.in, s, t, b);
    const A* adds = add(p.in, s, t, b);
    const A* w = weights + s.reads * s.padded;
    A* grad_adds = static_cast<A*>(p.grad_adds) + at(s, t, b) * numbers;
    A* grad_erases = static_cast<A*>(p.grad_erases) + at(s, t, b) * numbers;
    sums_over_slots(s, room.grad, w, s.writes, room.sums, room.part, grad_adds);
    const int64_t stride = std::min(memory_size(s), kBlock * tile_size(s));
    std::fill(room.sums, room.sums + numbers, 0.0);
    for (int64_t slot = 0; slot < s.padded; slot = block_end(s, slot)) {
      const int64_t end = block_end(s, slot);
      for (int64_t i = slot; i < end; i += kTile) {
        A* grads = room.weights_grad + s.reads * s.padded + i;
        A* kept = room.kept + (i - slot) * s.width;
        if (s.writes == 1)
          tile_update_gradient<A, 1>(before + i * s.width, room.grad + i * s.width, s.width, 1,
                                     w + i, s.padded, erases, adds, kept, stride, grads, s.padded);
        else
          tile_update_gradient<A, 0>(before + i * s.width, room.grad + i * s.width, s.width,
                                     s.writes, w + i, s.padded, erases, adds, kept, stride, grads,
                                     s.padded);
      }
      for (int64_t h = 0; h < s.writes; ++h)
        add_sums(s, room.kept + h * stride, w + h * s.padded + slot, 1, slot,
                 room.sums + h * s.width, room.part);
    }
    for (int64_t i = 0; i < numbers; ++i) grad_erases[i] = static_cast<A>(-room.sums[i]);
  }

  static const A* weights_at(const Backward& p, int64_t t, int64_t b) {
    return static_cast<const A*>(p.weight_history) +
           at(p.sizes, t, b) * p.sizes.heads * p.sizes.padded;
  }

  // M_t, where the segment that it is in has been made again.
  static A* memory_at(const Backward& p, const BackwardRoom& room, int64_t t, int64_t b) {
    const int64_t every = p.in.snapshot_every;
    if ((t + 1) % every == 0) return snapshot(p.sizes, p.in, p.snapshots, t, b);
    return room.segment + t % every * memory_size(p.sizes);
  }

  // M_{t-1}; the start of an episode is made anew.
  static const A* memory_before(const Backward& p, const BackwardRoom& room, int64_t t, int64_t b) {
    const bool reset = resets(p.in, p.sizes, t, b);
    if (t > 0 && !reset) return memory_at(p, room, t - 1, b);
    start_memory(p.in, p.sizes, b, !reset, room.first);
    return room.first;
  }

  // The memories of the steps from `t` on up to the next snapshot, by the saved weights.
  static void make_segment(const Backward& p, const BackwardRoom& room, int64_t t, int64_t b) {
    const Sizes& s = p.sizes;
    for (; t < s.steps && (t + 1) % p.in.snapshot_every != 0; ++t) {
      const A* before = memory_before(p, room, t, b);
      for (int64_t slot = 0; slot < s.padded; slot += kTile)
        update_tile(p.in, s, t, b, slot, weights_at(p, t, b), before, memory_at(p, room, t, b));
    }
  }

  static void backward(const Backward& p, void* base, int64_t b) {
    const Sizes& s = p.sizes;
    BackwardRoom room(p, Arena(base));
    room.start.fill(p.in, s, b);
    copy_padded(p.grad_weights == nullptr
                    ? nullptr
                    : static_cast<const A*>(p.grad_weights) + b * s.heads * s.slots,
                s, room.weights_grad);
    if (p.grad_memory == nullptr)
      std::fill(room.grad, room.grad + memory_size(s), A(0));
    else
      for (int64_t slot = 0; slot < s.padded; slot += kTile)
        tile_from_rows(room.grad + slot * s.width,
                       static_cast<const A*>(p.grad_memory) + (b * s.slots + slot) * s.width,
                       s.width, 1, std::min(kTile, s.slots - slot), s.width);

    for (int64_t t = s.steps - 1; t >= 0; --t) {
      if (t == s.steps - 1 || (t + 1) % p.in.snapshot_every == 0)
        make_segment(p, room, t / p.in.snapshot_every * p.in.snapshot_every, b);
      const bool reset = resets(p.in, s, t, b);
      const A* weights = weights_at(p, t, b);
      const A* previous = reset    ? room.start.fresh
                          : t == 0 ? room.start.given
                                   : weights_at(p, t - 1, b);
      const A* now = memory_at(p, room, t, b);
      unread(p, room, t, b, now, weights);
      unaddress(p, room, t, b, 0, s.reads, now, weights, previous);

      const A* before = memory_before(p, room, t, b);
      unwrite(p, room, t, b, before, weights);
      for (int64_t slot = 0; slot < s.padded; slot += kTile)
        score_tile(s, before + slot * s.width, key(p.in, s, t, b, s.reads), s.writes,
                   room.dots + s.reads * s.padded + slot, room.squares + slot);
      unaddress(p, room, t, b, s.reads, s.heads, before, weights, previous);
      if (reset) {
        std::fill(room.grad, room.grad + memory_size(s), A(0));
        std::fill(room.weights_grad, room.weights_grad + s.heads * s.padded, A(0));
      }
    }
    for (int64_t slot = 0; slot < s.padded && p.grad_memory_in != nullptr; slot += kTile)
      tile_to_rows(room.grad + slot * s.width,
                   static_cast<A*>(p.grad_memory_in) + (b * s.slots + slot) * s.width,
                   std::min(kTile, s.slots - slot), s.width);
    for (int64_t h = 0; h < s.heads; ++h)
      std::copy(room.weights_grad + h * s.padded, room.weights_grad + h * s.padded + s.slots,
                static_cast<A*>(p.grad_weights_in) + (b * s.heads + h) * s.slots);
  }

  static constexpr Kernels kTable = {forward_bytes, forward, backward_bytes, backward};
};

}  // namespace

const Kernels& ntm_kernels(bool float64) {
  static const Kernels tables[] = {Scan<float>::kTable, Scan<double>::kTable};
  return tables[float64 ? 1 : 0];
}

}  // namespace MANN_EXT_ISA
