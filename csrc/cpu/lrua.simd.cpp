// LRUA memory, one step at a time: erase, write, address, read, usage (forward), and the same
// walked backwards, each in one pass over the memory a step.
//
// Bytes a slot and step when the memory does not fit in cache (4-byte numbers): forward 8 W + 16 R
// + 16, backward 16 W + 16 R rolling back, 12 W + 16 R with every M_t saved. Multiply-adds an
// element: forward 3 R + 1, backward 7 R + 2 (8 R + 2 rolling back).
#include "cpu/lrua.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/lrua_tile.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {
namespace {

using namespace mann_ext::lrua;

// Tiles of a memory in RAM that are written and addressed before they are read: together they fit
// in the second-level cache, and the sums of the reads are loaded and stored once for all of them.
constexpr int64_t kRunTiles = 4;

template <class A>
struct Candidate {
  A usage;
  int64_t slot;  // -1: none yet
};

// The n smallest usages seen so far, smallest first; NaN is larger than any number, and of equal
// usages the one seen first stays ahead, so slots must be offered in ascending order.
template <class A>
struct LeastUsed {
  Candidate<A>* best;
  int64_t n;

  static bool smaller(A a, A b) { return a < b || (b != b && a == a); }

  void clear() const {
    for (int64_t i = 0; i < n; ++i) best[i] = {std::numeric_limits<A>::quiet_NaN(), -1};
  }
  A bound() const { return best[n - 1].usage; }
  void offer(A usage, int64_t slot) const {
    int64_t i = n - 1;
    if (best[i].slot >= 0 && !smaller(usage, best[i].usage)) return;
    for (; i > 0 && (best[i - 1].slot < 0 || smaller(usage, best[i - 1].usage)); --i)
      best[i] = best[i - 1];
    best[i] = {usage, slot};
  }
  // A number that the n-th smallest of `count` usages (whole vectors) does not exceed: the largest
  // of the minima of n or more groups of them. NaN where there is none.
  A limit(const A* usage, int64_t count) const {
    constexpr int L = kLanes<A>;
    if (n > L || count == 0) return std::numeric_limits<A>::quiet_NaN();
    Vec<A> least = broadcast<A>(std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < count; i += L) {
      const Vec<A> u = load<A>(usage + i);
      least = u < least ? u : least;
    }
    alignas(kVectorBytes) A groups[L];
    store<A>(groups, least);
    int size = L;
    for (; size / 2 >= n; size /= 2)
      for (int i = 0; i < size / 2; ++i) groups[i] = std::min(groups[i], groups[i + size / 2]);
    const A most = *std::max_element(groups, groups + size);
    // Infinity: there may be too few numbers.
    return most <= std::numeric_limits<A>::max() ? most : std::numeric_limits<A>::quiet_NaN();
  }
  // Offers the slots first .. first + kTile that exist and do not exceed `limit`.
  MANN_EXT_INLINE void offer_tile(const A* usage, int64_t first, int64_t slots, A limit) const {
    for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
      const Vec<A> u = load<A>(usage + lane);
      uint32_t open = lanes_where<Compare::kNotAtLeast, A>(u, bound()) &
                      ~lanes_where<Compare::kAbove, A>(u, limit);
      while (open != 0) {
        const int64_t i = lane + __builtin_ctz(open);
        open &= open - 1;
        if (first + i < slots) offer(usage[i], first + i);
      }
    }
  }
};

// Per-thread room for what lives only within one block; `which` tells several such rooms apart.
template <int which>
inline char* thread_scratch(int64_t bytes) {
  thread_local std::vector<char> room;
  if (static_cast<int64_t>(room.size()) < bytes + 64) room.resize(bytes + 64);
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~uintptr_t{63});
}

template <class A, class S>
struct Scan {
  using Int = typename Lanes<A>::Int;

  // ---------------------------------------------------------------- shared by both directions

  static int64_t at(const Shape& s, int64_t t, int64_t b) { return t * s.batch + b; }
  static bool resets(const Inputs& in, const Shape& s, int64_t t, int64_t b) {
    return in.reset != nullptr && in.reset[at(s, t, b)];
  }
  static const A* key(const Inputs& in, const Shape& s, int64_t t, int64_t b) {
    return static_cast<const A*>(in.keys) + at(s, t, b) * s.heads * s.width;
  }
  static const A* content(const Inputs& in, const Shape& s, int64_t t, int64_t b) {
    return static_cast<const A*>(in.contents) + at(s, t, b) * s.heads * s.width;
  }
  static const A* gate(const Inputs& in, const Shape& s, int64_t t, int64_t b) {
    return static_cast<const A*>(in.gates) + at(s, t, b) * s.heads;
  }
  static A strength(const Inputs& in, const Shape& s, int64_t t, int64_t b, int64_t r) {
    return in.strengths == nullptr ? A(1)
                                   : static_cast<const A*>(in.strengths)[at(s, t, b) * s.heads + r];
  }
  static int64_t tile_slots(const Shape& s, int64_t tile) {
    return std::min(kTile, s.slots - tile * kTile);
  }

  // w_w = g * w_prev + (1 - g) * lu over one tile (eq. 22), and which slots survive the erase.
  // `scales` [R], if given, turn `previous` into weights. Returns false where nothing of this tile
  // is erased.
  template <class H>
  static MANN_EXT_INLINE bool write_weights(const Shape& s, const Options& o, const A* previous,
                                            const A* gates, const int64_t* slots, int64_t tile,
                                            A* weights, int64_t stride, Int* keep, H heads,
                                            const A* scales = nullptr) {
    for (int64_t r = 0; r < heads; ++r) {
      const A g = gates[r], scale = scales == nullptr ? A(1) : scales[r];
      for (int64_t lane = 0; lane < kTile; lane += kLanes<A>)
        store<A>(weights + r * stride + lane,
                 g * (load<A>(previous + r * s.padded + tile * kTile + lane) * scale));
    }
    bool any = false;
    for (int64_t i = 0; i < s.chosen; ++i) {
      const int64_t lane = slots[i] - tile * kTile;
      if (lane < 0 || lane >= kTile) continue;
      if (!any) std::fill(keep, keep + kTile, Int(-1));
      any = true;
      keep[lane] = 0;
      for (int64_t r = 0; r < heads; ++r)
        if (o.shared || r % s.chosen == i) weights[r * stride + lane] += A(1) - gates[r];
    }
    return any;
  }

  // dst = keep * src + sum_r weights_r contents_r^T, all heads, unscored.
  template <class D, class Src>
  static void write_tile(const Shape& s, const Src* src, D* dst, const Int* keep, const A* weights,
                         const A* contents, int64_t ahead = 0) {
    for_head_groups(s.heads, [&](int64_t r, auto G) {
      if (r == 0)
        tile_write<A, D, Src, G, false>(src, dst, s.width, keep, weights, contents, nullptr,
                                        nullptr, nullptr, ahead);
      else
        tile_write<A, D, D, G, false>(dst, dst, s.width, nullptr, weights + r * kTile,
                                      contents + r * s.width, nullptr, nullptr, nullptr, 0);
    });
  }

  // The memory that an episode of this batch element starts from: the argument, or the constant.
  static void initial_tile(const Inputs& in, const Shape& s, const Options& o, int64_t b,
                           int64_t tile, bool given, S* dst) {
    const int64_t count = tile_slots(s, tile);
    if (given) {
      tile_from_rows(dst,
                     static_cast<const S*>(in.memory) + b * in.memory_batch_stride +
                         tile * kTile * in.memory_slot_stride,
                     in.memory_slot_stride, in.memory_width_stride, count, s.width);
    } else {
      S value;
      store_scalar<A>(&value, static_cast<A>(o.initial_value));
      tile_from_rows(dst, &value, 0, 0, count, s.width);
    }
  }

  static void copy_padded(const A* rows, int64_t heads, int64_t slots, int64_t padded, A* out) {
    for (int64_t r = 0; r < heads; ++r) {
      if (rows == nullptr)
        std::fill(out + r * padded, out + r * padded + slots, A(0));
      else
        std::copy(rows + r * slots, rows + (r + 1) * slots, out + r * padded);
      std::fill(out + r * padded + slots, out + (r + 1) * padded, A(0));
    }
  }

  // Tiles of one block, for a sequence of a single step, which never comes back to them.
  template <class T, int which>
  static T* block_room(const Shape& s) {
    const int64_t bytes = s.block_tiles * s.width * kTile * static_cast<int64_t>(sizeof(T));
    return reinterpret_cast<T*>(thread_scratch<which>(bytes));
  }

  // ---------------------------------------------------------------- forward

  struct ForwardScratch {
    S* memory;                 // tiles; a single step has those of the block at work only
    A* initial;                // [R][padded]: read weights given
    A* fresh;                  // [R][padded]: read weights after a reset, one-hot at slot 0
    A* weights;                // [chunk + 1 or 1][R][padded]: where no history is kept
    A* usage;                  // [padded]
    A* partial;                // [blocks][R * W reads, R totals, R shifts]
    Candidate<A>* candidates;  // [blocks][n]
    int64_t* slots;            // [n]: for the coming step
    double* sums;              // [chunk][R]: of the weights as they were rounded
    int64_t bytes;

    ForwardScratch(const Forward& p, void* base) {
      const Shape& s = p.shape;
      Arena arena(base);
      // With every M_t saved the snapshots are the memory.
      memory = arena.take<S>(saves_all(p) || s.steps == 1 ? 0 : s.tiles * s.width * kTile);
      initial = arena.take<A>(s.heads * s.padded);
      fresh = arena.take<A>(p.in.reset == nullptr ? 0 : s.heads * s.padded);
      weights = arena.take<A>(p.weight_history ? 0 : kept_steps(p) * s.heads * s.padded);
      usage = arena.take<A>(s.padded);
      partial = arena.take<A>(s.blocks * s.heads * (s.width + 2));
      candidates = arena.take<Candidate<A>>(s.blocks * s.chosen);
      slots = arena.take<int64_t>(s.chosen);
      sums = arena.take<double>(p.options.chunk * s.heads);
      bytes = arena.used();
    }

    // Steps whose weights are kept where no history is. One step at a time needs no more than the
    // last one's exponentials: they are scaled where they are used, and overwritten in place.
    static int64_t kept_steps(const Forward& p) {
      return p.options.chunk == 1 ? 1 : p.options.chunk + 1;
    }
    // w_t, written at step t (`unscaled`: its exponentials); t = -1: what the scan was given.
    A* read_weights(const Forward& p, int64_t b, int64_t t) const {
      if (t < 0) return initial;
      if (p.weight_history == nullptr)
        return weights + t % kept_steps(p) * p.shape.heads * p.shape.padded;
      return static_cast<A*>(p.weight_history) + at(p.shape, t, b) * p.shape.heads * p.shape.padded;
    }
    const A* previous_weights(const Forward& p, int64_t b, int64_t t) const {
      return resets(p.in, p.shape, t, b) ? fresh : read_weights(p, b, t - 1);
    }
  };

  static bool unscaled(const Forward& p) {
    return p.weight_history == nullptr && p.options.chunk == 1;
  }
  // [R] factors that turn a block's exponentials into weights, left there by forward_combine.
  static const A* block_scales(const Shape& s, const ForwardScratch& scratch, int64_t block) {
    return scratch.partial + block * s.heads * (s.width + 2) + s.heads * (s.width + 1);
  }
  static bool saves_all(const Forward& p) {
    return p.snapshots != nullptr && p.options.snapshot_every == 1;
  }
  static S* snapshot(const Forward& p, int64_t b, int64_t t) {
    const Shape& s = p.shape;
    return static_cast<S*>(p.snapshots) +
           at(s, t / p.options.snapshot_every, b) * s.tiles * s.width * kTile;
  }

  static int64_t forward_scratch_bytes(const Forward& p) {
    return ForwardScratch(p, nullptr).bytes;
  }

  static void forward_begin(const Forward& p, void* base, int64_t b) {
    const Shape& s = p.shape;
    const ForwardScratch scratch(p, base);
    copy_padded(static_cast<const A*>(p.in.read_weights) + b * s.heads * s.slots, s.heads, s.slots,
                s.padded, scratch.initial);
    if (p.in.reset != nullptr) {
      copy_padded(nullptr, s.heads, s.slots, s.padded, scratch.fresh);
      for (int64_t r = 0; r < s.heads; ++r) scratch.fresh[r * s.padded] = A(1);
    }
    const A* usage = static_cast<const A*>(p.usage) + b * s.slots;
    std::copy(usage, usage + s.slots, scratch.usage);
    // Slots that do not exist never look unused.
    std::fill(scratch.usage + s.slots, scratch.usage + s.padded,
              std::numeric_limits<A>::infinity());
    for (int64_t block = 0; block < s.blocks; ++block) offer_block(s, scratch, block);
    forward_select(p, base, b, -1);
  }

  static void offer_block(const Shape& s, const ForwardScratch& scratch, int64_t block) {
    const LeastUsed<A> least{scratch.candidates + block * s.chosen, s.chosen};
    least.clear();
    const int64_t begin = block * s.block_tiles;
    const int64_t end = std::min(s.tiles, begin + s.block_tiles);
    const int64_t whole = std::min(end, s.slots / kTile);  // the others have slots that are not
    const A limit = least.limit(scratch.usage + begin * kTile, (whole - begin) * kTile);
    for (int64_t tile = begin; tile < end; ++tile)
      least.offer_tile(scratch.usage + tile * kTile, tile * kTile, s.slots, limit);
  }

  // Merges the blocks' candidates, ascending, into the slots that step t + 1 erases and writes.
  static void forward_select(const Forward& p, void* base, int64_t b, int64_t t) {
    const Shape& s = p.shape;
    const ForwardScratch scratch(p, base);
    if (t + 1 >= s.steps) return;
    if (resets(p.in, s, t + 1, b)) {
      for (int64_t i = 0; i < s.chosen; ++i) scratch.slots[i] = (i + 1) % s.slots;
      std::fill(scratch.usage, scratch.usage + s.slots, A(0));
      scratch.usage[0] = A(1);
    } else {
      Candidate<A> best[kMaxHeads];
      const LeastUsed<A> least{best, s.chosen};
      least.clear();
      for (int64_t i = 0; i < s.blocks * s.chosen; ++i) {
        const Candidate<A>& candidate = scratch.candidates[i];
        if (candidate.slot >= 0) least.offer(candidate.usage, candidate.slot);
      }
      for (int64_t i = 0; i < s.chosen; ++i) scratch.slots[i] = best[i].slot;
    }
    if (p.slot_history != nullptr)
      std::copy(scratch.slots, scratch.slots + s.chosen,
                p.slot_history + at(s, t + 1, b) * s.chosen);
  }

  // Erase, write, address and read the blocks [block, end) at step t, up to the normalisation.
  static void forward_pass(const Forward& p, void* base, int64_t b, int64_t t, int64_t block,
                           int64_t end) {
    with_heads(p.shape.heads,
               [&](auto heads) { forward_blocks(p, base, b, t, block, end, heads); });
  }

  template <class H>
  static void forward_blocks(const Forward& p, void* base, int64_t b, int64_t t, int64_t block,
                             int64_t end, H heads) {
    const Shape& s = p.shape;
    const ForwardScratch scratch(p, base);
    const A* previous = scratch.previous_weights(p, b, t);
    A* weights = scratch.read_weights(p, b, t);
    const A* gates = gate(p.in, s, t, b);
    const A* keys = key(p.in, s, t, b);
    const A* contents = content(p.in, s, t, b);
    const bool starts = t == 0 || resets(p.in, s, t, b);
    const bool given = !resets(p.in, s, t, b);
    const bool snapshots = p.snapshots != nullptr && (t + 1) % p.options.snapshot_every == 0;
    const bool scale_previous = unscaled(p) && !starts;
    const int64_t tile_size = s.width * kTile;

    Arena room(thread_scratch<0>((2 * heads + 1) * kTile * sizeof(A) + kTile * sizeof(Int) +
                                 heads * s.width * kVectorBytes + tile_size * sizeof(S) + 1024));
    A* write = room.take<A>(heads * kTile);
    A* dots = room.take<A>(heads * kTile);
    A* squares = room.take<A>(kTile);
    Int* keep = room.take<Int>(kTile);
    A* reads = room.take<A>(heads * s.width * kLanes<A>);
    S* first = room.take<S>(tile_size);

    A key_norm[kMaxHeads], beta[kMaxHeads];
    bool shifted = false;
    for (int64_t r = 0; r < heads; ++r) {
      key_norm[r] = norm(keys + r * s.width, s.width);
      beta[r] = strength(p.in, s, t, b, r);
      shifted = shifted || !(std::abs(beta[r]) <= A(kUnshifted));
    }

    for (; block < end; ++block) {
      const int64_t tile0 = block * s.block_tiles;
      const int64_t tile1 = std::min(s.tiles, tile0 + s.block_tiles);
      S* memory = saves_all(p) ? snapshot(p, b, t) : scratch.memory;
      if (s.steps == 1 && !saves_all(p)) memory = block_room<S, 1>(s) - tile0 * tile_size;
      A* partial = scratch.partial + block * heads * (s.width + 2);
      A* totals = partial + heads * s.width;
      A scales[kRoom<H>];
      for (int64_t r = 0; r < heads; ++r)
        scales[r] = scale_previous ? block_scales(s, scratch, block)[r] : A(1);
      std::fill(totals, totals + 2 * heads, A(0));
      // Tiles that come from RAM are read while they are in a near cache, unless the exponentials
      // need the block's largest score first.
      const int64_t run = s.blocks > 1 && !shifted ? kRunTiles : s.block_tiles;
      for (int64_t run0 = tile0; run0 < tile1; run0 += run) {
        const int64_t run1 = std::min(tile1, run0 + run);
        for (int64_t tile = run0; tile < run1; ++tile) {
          S* dst = memory + tile * tile_size;
          const S* src = dst;
          if (starts) {
            initial_tile(p.in, s, p.options, b, tile, given, first);
            src = first;
          } else if (saves_all(p)) {
            src = snapshot(p, b, t - 1) + tile * tile_size;
          }
          if (s.blocks > 1) ask_for_tile(s, previous, weights, scratch.usage, tile + 1, heads);
          const bool erases = write_weights(s, p.options, previous, gates, scratch.slots, tile,
                                            write, kTile, keep, heads, scales);
          if (erases && p.erased_rows != nullptr) save_erased(p, b, t, scratch.slots, tile, src);
          decay_usage(p, scratch.usage + tile * kTile, write, heads);
          S* const rows = static_cast<S*>(p.memory_out) + (b * s.slots + tile * kTile) * s.width;
          if (t + 1 == s.steps)  // asked for early, and written below
            for (int64_t i = 0; i < tile_slots(s, tile) * s.width; i += 64 / int64_t{sizeof(S)})
              __builtin_prefetch(rows + i, 1);
          write_and_score(s, src, dst, erases ? keep : nullptr, write, contents, keys, dots,
                          squares, s.blocks > 1 ? tile_size : 0, heads);
          store_scores(p, dots, squares, key_norm, beta, weights + tile * kTile, heads);
          if (t + 1 == s.steps) tile_to_rows(dst, rows, tile_slots(s, tile), s.width);
          if (snapshots && !saves_all(p))
            std::copy(dst, dst + tile_size, snapshot(p, b, t) + tile * tile_size);
        }
        exponentials(s, weights, run0, run1, beta, totals, heads);
        for_head_groups(heads, [&](int64_t r, auto G) {
          column_sums<A, S, G>(memory + run0 * tile_size, run1 - run0, s.width,
                               weights + r * s.padded + run0 * kTile, s.padded,
                               reads + r * s.width * kLanes<A>, run0 == tile0);
        });
      }
      lane_sums(reads, heads * s.width, partial);
    }
  }

  // Asks early for a tile's weights of both steps and its usage: short pieces of many arrays,
  // which the hardware does not foresee.
  template <class H>
  static MANN_EXT_INLINE void ask_for_tile(const Shape& s, const A* previous, const A* weights,
                                           const A* usage, int64_t tile, H heads) {
    const int64_t first = tile * kTile;
    for (int64_t i = first; i < first + kTile; i += 64 / static_cast<int64_t>(sizeof(A))) {
      __builtin_prefetch(usage + i, 1);
      for (int64_t r = 0; r < heads; ++r) {
        __builtin_prefetch(previous + r * s.padded + i);
        __builtin_prefetch(weights + r * s.padded + i, 1);
      }
    }
  }

  // u = decay * u + sum_r w_w,r over one tile; the read weights are added when they are known.
  template <class H>
  static MANN_EXT_INLINE void decay_usage(const Forward& p, A* usage, const A* write, H heads) {
    for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
      Vec<A> u = static_cast<A>(p.options.usage_decay) * load<A>(usage + lane);
      for (int64_t r = 0; r < heads; ++r) u += load<A>(write + r * kTile + lane);
      store<A>(usage + lane, u);
    }
  }

  // beta times the cosines of one tile, from its dot products and squared norms.
  template <class H>
  static MANN_EXT_INLINE void store_scores(const Forward& p, const A* dots, const A* squares,
                                           const A* key_norm, const A* beta, A* scores, H heads) {
    for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
      const Vec<A> length = square_root<A>(load<A>(squares + lane));
      for (int64_t r = 0; r < heads; ++r)
        store<A>(scores + r * p.shape.padded + lane,
                 beta[r] * load<A>(dots + r * kTile + lane) /
                     (key_norm[r] * length + static_cast<A>(p.options.eps)));
    }
  }

  static void save_erased(const Forward& p, int64_t b, int64_t t, const int64_t* slots,
                          int64_t tile, const S* src) {
    const Shape& s = p.shape;
    for (int64_t i = 0; i < s.chosen; ++i) {
      const int64_t lane = slots[i] - tile * kTile;
      if (lane < 0 || lane >= kTile) continue;
      S* row = static_cast<S*>(p.erased_rows) + (at(s, t, b) * s.chosen + i) * s.width;
      for (int64_t j = 0; j < s.width; ++j) row[j] = src[j * kTile + lane];
    }
  }

  // The last group of heads is scored while the finished row is in registers.
  template <class H>
  static MANN_EXT_INLINE void write_and_score(const Shape& s, const S* src, S* dst, const Int* keep,
                                              const A* weights, const A* contents, const A* keys,
                                              A* dots, A* squares, int64_t ahead, H heads) {
    for_head_groups(heads, [&](int64_t r, auto G) {
      if (r + G == heads)
        tile_write<A, S, S, G, true>(src, dst, s.width, keep, weights + r * kTile,
                                     contents + r * s.width, keys + r * s.width, dots + r * kTile,
                                     squares, ahead);
      else
        tile_write<A, S, S, G, false>(src, dst, s.width, keep, weights + r * kTile,
                                      contents + r * s.width, nullptr, nullptr, nullptr, 0);
      src = dst;
      keep = nullptr;
    });
    for_head_groups(heads, [&](int64_t r, auto G) {
      if (r + G != heads) tile_score<A, S, G>(dst, s.width, keys + r * s.width, dots + r * kTile);
    });
  }

  // Scores of the tiles [tile0, tile1) to exponentials in place; their sums are added to
  // totals [R]. Scores that could overflow are shifted by the largest of these tiles; the shifts
  // [R] follow the totals.
  template <class H>
  static MANN_EXT_INLINE void exponentials(const Shape& s, A* scores, int64_t tile0, int64_t tile1,
                                           const A* beta, A* totals, H heads) {
    const int64_t last = std::min(s.slots, tile1 * kTile);
    for (int64_t r = 0; r < heads; ++r) {
      A* const row = scores + r * s.padded;
      A top = A(0);
      if (!(std::abs(beta[r]) <= A(kUnshifted))) {
        top = row[tile0 * kTile];
        for (int64_t i = tile0 * kTile + 1; i < last; ++i)
          if (!(row[i] <= top)) top = row[i];
      }
      totals[heads + r] = top;
      Vec<A> sum[2] = {};
      for (int64_t i = tile0 * kTile; i < tile1 * kTile; i += 2 * kLanes<A>)
        for (int v = 0; v < 2; ++v) {
          A* at = row + i + v * kLanes<A>;
          Vec<A> e = exponential<A>(load<A>(at) - top);
          if (i + (v + 1) * kLanes<A> > last)
            for (int lane = 0; lane < kLanes<A>; ++lane)
              if (i + v * kLanes<A> + lane >= last) e[lane] = A(0);
          store<A>(at, e);
          sum[v] += e;
        }
      totals[r] += sum_lanes<A>(sum[0] + sum[1]);
    }
  }

  // Adds the blocks in their order: normaliser, reads (a chunk's come later), and the factor for
  // each block's weights.
  static void forward_combine(const Forward& p, void* base, int64_t b, int64_t t) {
    const Shape& s = p.shape;
    const ForwardScratch scratch(p, base);
    const int64_t size = s.heads * (s.width + 2);
    A* reads = static_cast<A*>(p.reads) + at(s, t, b) * s.heads * s.width;
    for (int64_t r = 0; r < s.heads; ++r) {
      A* totals = scratch.partial + s.heads * s.width + r;
      A* shifts = totals + s.heads;
      A top = shifts[0];
      for (int64_t k = 1; k < s.blocks; ++k)
        if (!(shifts[k * size] <= top)) top = shifts[k * size];
      double total = 0;
      for (int64_t k = 0; k < s.blocks; ++k) {
        shifts[k * size] = std::exp(shifts[k * size] - top);
        total += static_cast<double>(totals[k * size]) * shifts[k * size];
      }
      if (p.options.chunk == 1) {
        double* sums = reinterpret_cast<double*>(thread_scratch<0>(s.width * sizeof(double)));
        std::fill(sums, sums + s.width, 0.0);
        for (int64_t k = 0; k < s.blocks; ++k) {
          const A* part = scratch.partial + k * size + r * s.width;
          const double factor = shifts[k * size];
          for (int64_t j = 0; j < s.width; ++j) sums[j] += factor * static_cast<double>(part[j]);
        }
        const double inverse = 1 / total;
        for (int64_t j = 0; j < s.width; ++j)
          reads[r * s.width + j] = static_cast<A>(sums[j] * inverse);
      }
      double sum = 0;
      for (int64_t k = 0; k < s.blocks; ++k) {
        shifts[k * size] = static_cast<A>(shifts[k * size] / total);
        sum += static_cast<double>(totals[k * size]) * shifts[k * size];
      }
      scratch.sums[t % p.options.chunk * s.heads + r] = sum;
    }
  }

  // w = exponentials / normaliser; u = decay * u + sum_r (w_r + w_w,r); candidates for t + 1.
  static void forward_weights(const Forward& p, void* base, int64_t b, int64_t t, int64_t block,
                              int64_t end) {
    const Shape& s = p.shape;
    const ForwardScratch scratch(p, base);
    A* weights = scratch.read_weights(p, b, t);
    const bool keep = unscaled(p);
    for (; block < end; ++block) {
      const A* scales = block_scales(s, scratch, block);
      const int64_t last = std::min(s.tiles, (block + 1) * s.block_tiles) * kTile;
      with_heads(s.heads, [&](auto heads) {
        for (int64_t i = block * s.block_tiles * kTile; i < last; i += kLanes<A>) {
          Vec<A> u = load<A>(scratch.usage + i);
          for (int64_t r = 0; r < heads; ++r) {
            const Vec<A> w = apart(load<A>(weights + r * s.padded + i) * scales[r]);
            if (!keep) store<A>(weights + r * s.padded + i, w);
            u += w;
          }
          store<A>(scratch.usage + i, u);
        }
      });
      offer_block(s, scratch, block);
    }
  }

  static void forward_end(const Forward& p, void* base, int64_t b) {
    const Shape& s = p.shape;
    const ForwardScratch scratch(p, base);
    const A* weights = scratch.read_weights(p, b, s.steps - 1);
    A* weights_out = static_cast<A*>(p.weights_out) + b * s.heads * s.slots;
    for (int64_t r = 0; r < s.heads; ++r)
      for (int64_t block = 0; block < s.blocks; ++block) {
        const A scale = unscaled(p) ? block_scales(s, scratch, block)[r] : A(1);
        const int64_t last = std::min(s.slots, (block + 1) * s.block_tiles * kTile);
        for (int64_t i = block * s.block_tiles * kTile; i < last; ++i)
          weights_out[r * s.slots + i] = weights[r * s.padded + i] * scale;
      }
    std::copy(scratch.usage, scratch.usage + s.slots, static_cast<A*>(p.usage_out) + b * s.slots);
  }

  // ---------------------------------------------------------------- backward

  struct BackwardScratch {
    A* memory;        // tiles of M_t where it is not a snapshot
    A* grad;          // tiles of dL/dM_t
    A* weights_grad;  // [R][padded]: dL/dw_t from later steps
    A* initial;       // [R][padded]
    A* fresh;         // [R][padded]
    A* carry;         // [R]: sum_i w_t,i * weights_grad_i
    A* partial;       // [blocks][2 R W + 4 R], see Partial
    int64_t bytes;

    BackwardScratch(const Backward& p, void* base) {
      const Shape& s = p.shape;
      Arena arena(base);
      const int64_t numbers = s.tiles * s.width * kTile;
      memory = arena.take<A>(p.options.snapshot_every == 1 || s.steps == 1 ? 0 : numbers);
      grad = arena.take<A>(s.steps == 1 ? 0 : numbers);
      weights_grad = arena.take<A>(s.heads * s.padded);
      initial = arena.take<A>(s.heads * s.padded);
      fresh = arena.take<A>(p.in.reset == nullptr ? 0 : s.heads * s.padded);
      carry = arena.take<A>(s.heads);
      partial = arena.take<A>(s.blocks * partial_size(p));
      bytes = arena.used();
    }
    const A* read_weights(const Backward& p, int64_t b, int64_t t) const {
      if (t < 0) return initial;
      return static_cast<const A*>(p.weight_history) +
             at(p.shape, t, b) * p.shape.heads * p.shape.padded;
    }
    const A* previous_weights(const Backward& p, int64_t b, int64_t t) const {
      return resets(p.in, p.shape, t, b) ? fresh : read_weights(p, b, t - 1);
    }
  };

  // A block's sums: gradients of keys and of contents, [R][W] each, or of both where the keys are
  // what is written; then [R] each of sum dw_w * w_prev, sum dw_w * lu, sum ds * cos (for the
  // strength), sum of the cosine's own term.
  static int64_t row_sums(const Backward& p) {
    return (p.grad_contents == nullptr ? 1 : 2) * p.shape.heads * p.shape.width;
  }
  static int64_t partial_size(const Backward& p) { return row_sums(p) + 4 * p.shape.heads; }

  static bool has_snapshot(const Backward& p, int64_t t) {
    return p.options.snapshot_every > 0 && (t + 1) % p.options.snapshot_every == 0;
  }
  static const S* snapshot(const Backward& p, int64_t b, int64_t t) {
    const Shape& s = p.shape;
    return static_cast<const S*>(p.snapshots) +
           at(s, t / p.options.snapshot_every, b) * s.tiles * s.width * kTile;
  }
  static const int64_t* slots_at(const Backward& p, int64_t b, int64_t t) {
    return p.slot_history + at(p.shape, t, b) * p.shape.chosen;
  }

  static int64_t backward_scratch_bytes(const Backward& p) {
    return BackwardScratch(p, nullptr).bytes;
  }

  static void backward_begin(const Backward& p, void* base, int64_t b) {
    const Shape& s = p.shape;
    const BackwardScratch scratch(p, base);
    copy_padded(static_cast<const A*>(p.in.read_weights) + b * s.heads * s.slots, s.heads, s.slots,
                s.padded, scratch.initial);
    if (p.in.reset != nullptr) {
      copy_padded(nullptr, s.heads, s.slots, s.padded, scratch.fresh);
      for (int64_t r = 0; r < s.heads; ++r) scratch.fresh[r * s.padded] = A(1);
    }
    const A* weights_grad = p.grad_weights == nullptr
                                ? nullptr
                                : static_cast<const A*>(p.grad_weights) + b * s.heads * s.slots;
    copy_padded(weights_grad, s.heads, s.slots, s.padded, scratch.weights_grad);
    const A* last = scratch.read_weights(p, b, s.steps - 1);
    for (int64_t r = 0; r < s.heads; ++r) {
      double sum = 0;
      if (weights_grad != nullptr)
        for (int64_t i = 0; i < s.slots; ++i)
          sum += static_cast<double>(weights_grad[r * s.slots + i]) * last[r * s.padded + i];
      scratch.carry[r] = static_cast<A>(sum);
    }
  }

  // M_T and dL/dM_T of one tile, from the user's layout, at the first backward step.
  static void begin_tile(const Backward& p, const BackwardScratch& scratch, int64_t b,
                         int64_t tile) {
    const Shape& s = p.shape;
    const int64_t tile_size = s.width * kTile;
    const int64_t count = tile_slots(s, tile);
    const int64_t row = (b * s.slots + tile * kTile) * s.width;
    if (!has_snapshot(p, s.steps - 1))
      tile_from_rows(scratch.memory + tile * tile_size, static_cast<const S*>(p.memory_out) + row,
                     s.width, 1, count, s.width);
    A* grad = scratch.grad + tile * tile_size;
    if (p.grad_memory == nullptr)
      std::fill(grad, grad + tile_size, A(0));
    else
      tile_from_rows(grad, static_cast<const S*>(p.grad_memory) + row, s.width, 1, count, s.width);
  }

  static bool near_start(const Backward& p, int64_t t, int64_t b) {
    for (int64_t i = 0; i < kReplayed; ++i, --t)
      if (t == 0 || resets(p.in, p.shape, t, b)) return true;
    return false;
  }

  // M_{t-1} of one tile from its episode's start, exactly as the forward pass made it.
  static void replay_tile(const Backward& p, const BackwardScratch& scratch, int64_t b, int64_t t,
                          int64_t tile, A* write, Int* keep, S* replayed) {
    const Shape& s = p.shape;
    int64_t start = t - 1;
    while (start > 0 && !resets(p.in, s, start, b)) --start;
    initial_tile(p.in, s, p.options, b, tile, !resets(p.in, s, start, b), replayed);
    for (int64_t step = start; step < t; ++step) {
      const bool erases =
          write_weights(s, p.options, scratch.previous_weights(p, b, step), gate(p.in, s, step, b),
                        slots_at(p, b, step), tile, write, kTile, keep, s.heads);
      write_tile(s, replayed, replayed, erases ? keep : nullptr, write, content(p.in, s, step, b));
    }
    A* dst = scratch.memory + tile * s.width * kTile;
    for (int64_t i = 0; i < s.width * kTile; i += kLanes<A>)
      store<A>(dst + i, load<A>(replayed + i));
  }

  static void backward_pass(const Backward& p, void* base, int64_t b, int64_t t, int64_t block,
                            int64_t end) {
    BackwardScratch scratch(p, base);
    const int64_t tile_size = p.shape.width * kTile;
    for (; block < end; ++block) {
      const int64_t tile0 = block * p.shape.block_tiles;
      const int64_t tile1 = std::min(p.shape.tiles, tile0 + p.shape.block_tiles);
      if (p.shape.steps == 1) {
        scratch.grad = block_room<A, 1>(p.shape) - tile0 * tile_size;
        scratch.memory = block_room<A, 2>(p.shape) - tile0 * tile_size;
      }
      if (t + 1 == p.shape.steps)
        for (int64_t tile = tile0; tile < tile1; ++tile) begin_tile(p, scratch, b, tile);
      if (has_snapshot(p, t))
        backward_block(p, scratch, b, t, tile0, tile1, snapshot(p, b, t) + tile0 * tile_size);
      else
        backward_block(p, scratch, b, t, tile0, tile1,
                       static_cast<const A*>(scratch.memory + tile0 * tile_size));
    }
  }

  template <class M>
  static void backward_block(const Backward& p, const BackwardScratch& scratch, int64_t b,
                             int64_t t, int64_t tile0, int64_t tile1, const M* tiles) {
    if (t > 1 && p.shape.blocks == 1) ask_for_step(p, scratch, b, t - 2);
    with_heads(p.shape.heads,
               [&](auto heads) { backward_block(p, scratch, b, t, tile0, tile1, tiles, heads); });
  }

  // Asks early for the weights and the erased rows that step t will read: walking backwards through
  // arrays is not a pattern that the hardware foresees.
  static void ask_for_step(const Backward& p, const BackwardScratch& scratch, int64_t b,
                           int64_t t) {
    const Shape& s = p.shape;
    const auto ask = [](const auto* from, int64_t count) {
      const char* const bytes = reinterpret_cast<const char*>(from);
      for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(*from)); i += 64)
        __builtin_prefetch(bytes + i, 0, 2);
    };
    ask(scratch.previous_weights(p, b, t), s.heads * s.padded);
    if (p.erased_rows != nullptr) {
      const int64_t rows = s.chosen * s.width;
      ask(static_cast<const S*>(p.erased_rows) + at(s, t, b) * rows, rows);
    }
  }

  template <class M, class H>
  static void backward_block(const Backward& p, const BackwardScratch& scratch, int64_t b,
                             int64_t t, int64_t tile0, int64_t tile1, const M* tiles, H heads) {
    const Shape& s = p.shape;
    const int64_t tile_size = s.width * kTile;
    const int64_t block_slots = (tile1 - tile0) * kTile;
    const A* previous = scratch.previous_weights(p, b, t);
    const A* weights = scratch.read_weights(p, b, t);
    const A* keys = key(p.in, s, t, b);
    const A* contents = content(p.in, s, t, b);
    const A* gates = gate(p.in, s, t, b);
    const A* reads = static_cast<const A*>(p.reads) + at(s, t, b) * heads * s.width;
    const A* grads = static_cast<const A*>(p.grad_reads) + at(s, t, b) * heads * s.width;
    const int64_t* slots = slots_at(p, b, t);

    Arena room(thread_scratch<0>(
        (2 * heads * (block_slots + kTile) + 2 * kTile) * sizeof(A) + heads * kTile * sizeof(A) +
        kTile * sizeof(Int) + 2 * heads * s.width * kVectorBytes + tile_size * sizeof(S) + 1024));
    A* x = room.take<A>(heads * block_slots);      // dL/d(k . m), a block of slots
    A* write = room.take<A>(heads * block_slots);  // w_w, a block of slots
    A* x_tile = room.take<A>(heads * kTile);
    A* grad_dots = room.take<A>(heads * kTile);
    A* write_tile_weights = room.take<A>(heads * kTile);
    A* squares = room.take<A>(kTile);
    A* self = room.take<A>(kTile);
    Int* keep = room.take<Int>(kTile);
    A* vectors = room.take<A>(2 * heads * s.width * kLanes<A>);
    S* replayed = room.take<S>(tile_size);

    A* partial = scratch.partial + tile0 / s.block_tiles * partial_size(p);
    A* previous_sums = partial + row_sums(p);
    A* chosen_sums = previous_sums + heads;
    A* strength_sums = chosen_sums + heads;
    A* own_sums = strength_sums + heads;
    std::fill(chosen_sums, chosen_sums + heads, A(0));
    Vec<A> previous_sum[kRoom<H>], strength_sum[kRoom<H>], own_sum[kRoom<H>];
    for (int64_t r = 0; r < heads; ++r) previous_sum[r] = strength_sum[r] = own_sum[r] = Vec<A>{};

    A key_norm[kMaxHeads], beta[kMaxHeads], expected[kMaxHeads];
    for (int64_t r = 0; r < heads; ++r) {
      key_norm[r] = norm(keys + r * s.width, s.width);
      beta[r] = strength(p.in, s, t, b, r);
      // sum_i w_i dL/dw_i: what the softmax's gradient takes off every slot's.
      expected[r] =
          static_cast<A>(scratch.carry[r] + dot(grads + r * s.width, reads + r * s.width, s.width));
    }
    const A eps = static_cast<A>(p.options.eps);

    for (int64_t tile = tile0; tile < tile1; ++tile) {
      const M* m = tiles + (tile - tile0) * tile_size;
      A* grad = scratch.grad + tile * tile_size;
      const int64_t offset = (tile - tile0) * kTile;
      write_weights(s, p.options, previous, gates, slots, tile, write + offset, block_slots, keep,
                    heads);
      for_head_groups(heads, [&](int64_t r, auto G) {
        if (r == 0)
          tile_score_pair<A, M, G, true>(m, s.width, keys, grads, x_tile, grad_dots, squares);
        else
          tile_score_pair<A, M, G, false>(m, s.width, keys + r * s.width, grads + r * s.width,
                                          x_tile + r * kTile, grad_dots + r * kTile, nullptr);
      });
      for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
        const Vec<A> length = square_root<A>(load<A>(squares + lane));
        const Vec<A> inverse_length = length > A(0) ? A(1) / length : Vec<A>{};
        Vec<A> own = {};
        for (int64_t r = 0; r < heads; ++r) {
          const int64_t i = r * s.padded + tile * kTile + lane;
          const Vec<A> inverse = A(1) / (key_norm[r] * length + eps);
          const Vec<A> cosine = load<A>(x_tile + r * kTile + lane) * inverse;
          const Vec<A> score_grad =
              load<A>(weights + i) * (load<A>(grad_dots + r * kTile + lane) +
                                      load<A>(scratch.weights_grad + i) - expected[r]);
          const Vec<A> dot_grad = score_grad * beta[r] * inverse;
          strength_sum[r] += score_grad * cosine;
          own -= dot_grad * cosine * key_norm[r] * inverse_length;
          own_sum[r] += dot_grad * cosine * length;
          store<A>(x_tile + r * kTile + lane, dot_grad);
          store<A>(x + r * block_slots + offset + lane, dot_grad);
        }
        store<A>(self + lane, own);
      }
      gradient_of_tile(s, m, grad, x_tile, weights + tile * kTile, self, keys, grads, contents,
                       grad_dots, heads);
      // grad_dots is now dL/dw_w.
      for (int64_t r = 0; r < heads; ++r)
        for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
          const int64_t i = r * s.padded + tile * kTile + lane;
          const Vec<A> d = load<A>(grad_dots + r * kTile + lane);
          previous_sum[r] += d * load<A>(previous + i);
          store<A>(scratch.weights_grad + i, gates[r] * d);
        }
      for (int64_t i = 0; i < s.chosen; ++i) {
        const int64_t lane = slots[i] - tile * kTile;
        if (lane < 0 || lane >= kTile) continue;
        for (int64_t r = 0; r < heads; ++r)
          if (p.options.shared || r % s.chosen == i) chosen_sums[r] += grad_dots[r * kTile + lane];
      }
    }

    const bool apart = p.grad_contents != nullptr;
    for_head_groups(heads, [&](int64_t r, auto G) {
      column_sums<A, M, G>(tiles, tile1 - tile0, s.width, x + r * block_slots, block_slots,
                           vectors + r * s.width * kLanes<A>, true);
      column_sums<A, A, G>(scratch.grad + tile0 * tile_size, tile1 - tile0, s.width,
                           write + r * block_slots, block_slots,
                           vectors + (apart ? heads + r : r) * s.width * kLanes<A>, apart);
    });
    lane_sums(vectors, row_sums(p), partial);
    for (int64_t r = 0; r < heads; ++r) {
      previous_sums[r] = sum_lanes<A>(previous_sum[r]);
      strength_sums[r] = sum_lanes<A>(strength_sum[r]);
      own_sums[r] = sum_lanes<A>(own_sum[r]);
    }

    const bool reset = resets(p.in, s, t, b);
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      A* grad = scratch.grad + tile * tile_size;
      if (reset) {
        std::fill(grad, grad + tile_size, A(0));
        for (int64_t r = 0; r < heads; ++r) {
          A* d = scratch.weights_grad + r * s.padded + tile * kTile;
          std::fill(d, d + kTile, A(0));
        }
      } else {
        erase_gradient(s, slots, tile, grad);
      }
      if (t == 0) {
        if (p.grad_memory_in != nullptr)
          tile_to_rows(grad,
                       static_cast<S*>(p.grad_memory_in) + (b * s.slots + tile * kTile) * s.width,
                       tile_slots(s, tile), s.width);
      } else if (!has_snapshot(p, t - 1)) {
        if (reset || near_start(p, t - 1, b)) {
          replay_tile(p, scratch, b, t, tile, write_tile_weights, keep, replayed);
        } else {
          for (int64_t r = 0; r < heads; ++r)
            for (int64_t lane = 0; lane < kTile; lane += kLanes<A>)
              store<A>(write_tile_weights + r * kTile + lane,
                       -load<A>(write + r * block_slots + (tile - tile0) * kTile + lane));
          A* memory = scratch.memory + tile * tile_size;
          write_tile(s, tiles + (tile - tile0) * tile_size, memory, nullptr, write_tile_weights,
                     contents);
          restore_erased(p, b, t, tile, memory);
        }
      }
    }
  }

  template <class M, class H>
  static MANN_EXT_INLINE void gradient_of_tile(const Shape& s, const M* m, A* grad, const A* x,
                                               const A* weights, const A* self, const A* keys,
                                               const A* grads, const A* contents, A* dots,
                                               H heads) {
    for_head_groups(heads, [&](int64_t r, auto G) {
      const A* xr = x + r * kTile;
      const A* wr = weights + r * s.padded;
      const A* kr = keys + r * s.width;
      const A* gr = grads + r * s.width;
      const A* ar = contents + r * s.width;
      A* dr = dots + r * kTile;
      const bool first = r == 0, last = r + G == heads;
      if (first && last)
        tile_gradient<A, M, G, true, true>(m, grad, s.width, xr, wr, s.padded, self, kr, gr, ar,
                                           dr);
      else if (first)
        tile_gradient<A, M, G, true, false>(m, grad, s.width, xr, wr, s.padded, self, kr, gr, ar,
                                            dr);
      else if (last)
        tile_gradient<A, M, G, false, true>(m, grad, s.width, xr, wr, s.padded, self, kr, gr, ar,
                                            dr);
      else
        tile_gradient<A, M, G, false, false>(m, grad, s.width, xr, wr, s.padded, self, kr, gr, ar,
                                             dr);
    });
    for_head_groups(heads, [&](int64_t r, auto G) {
      if (r + G != heads)
        tile_score<A, A, G>(grad, s.width, contents + r * s.width, dots + r * kTile);
    });
  }

  static void erase_gradient(const Shape& s, const int64_t* slots, int64_t tile, A* grad) {
    for (int64_t i = 0; i < s.chosen; ++i) {
      const int64_t lane = slots[i] - tile * kTile;
      if (lane < 0 || lane >= kTile) continue;
      for (int64_t j = 0; j < s.width; ++j) grad[j * kTile + lane] = A(0);
    }
  }

  static void restore_erased(const Backward& p, int64_t b, int64_t t, int64_t tile, A* memory) {
    const Shape& s = p.shape;
    const int64_t* slots = slots_at(p, b, t);
    for (int64_t i = 0; i < s.chosen; ++i) {
      const int64_t lane = slots[i] - tile * kTile;
      if (lane < 0 || lane >= kTile) continue;
      const S* row = static_cast<const S*>(p.erased_rows) + (at(s, t, b) * s.chosen + i) * s.width;
      for (int64_t j = 0; j < s.width; ++j) memory[j * kTile + lane] = load_scalar<A>(row + j);
    }
  }

  static void backward_combine(const Backward& p, void* base, int64_t b, int64_t t) {
    const Shape& s = p.shape;
    const BackwardScratch scratch(p, base);
    const int64_t size = partial_size(p);
    // The blocks' sums, added up in the first one's place.
    A* sums = scratch.partial;
    if (s.blocks > 1)
      for (int64_t i = 0; i < size; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < s.blocks; ++k) sum += scratch.partial[k * size + i];
        sums[i] = static_cast<A>(sum);
      }
    const int64_t rw = s.heads * s.width;
    const A* of_heads = sums + row_sums(p);
    const A* keys = key(p.in, s, t, b);
    A* grad_keys = static_cast<A*>(p.grad_keys) + at(s, t, b) * rw;
    for (int64_t r = 0; r < s.heads; ++r) {
      const A key_norm = norm(keys + r * s.width, s.width);
      const A own = of_heads[3 * s.heads + r];
      const A along = key_norm > A(0) ? own / key_norm : A(0);
      for (int64_t i = r * s.width; i < (r + 1) * s.width; ++i)
        grad_keys[i] = sums[i] - along * keys[i];
      const A previous = of_heads[r];
      const int64_t head = at(s, t, b) * s.heads + r;
      static_cast<A*>(p.grad_gates)[head] = previous - of_heads[s.heads + r];
      if (p.grad_strengths != nullptr)
        static_cast<A*>(p.grad_strengths)[head] = of_heads[2 * s.heads + r];
      scratch.carry[r] = resets(p.in, s, t, b) ? A(0) : gate(p.in, s, t, b)[r] * previous;
    }
    if (p.grad_contents != nullptr)
      std::copy(sums + rw, sums + 2 * rw, static_cast<A*>(p.grad_contents) + at(s, t, b) * rw);
  }

  static void backward_end(const Backward& p, void* base, int64_t b) {
    const Shape& s = p.shape;
    const BackwardScratch scratch(p, base);
    A* out = static_cast<A*>(p.grad_weights_in) + b * s.heads * s.slots;
    for (int64_t r = 0; r < s.heads; ++r)
      std::copy(scratch.weights_grad + r * s.padded, scratch.weights_grad + r * s.padded + s.slots,
                out + r * s.slots);
  }
};

// Deferred writes. Within a chunk of steps that starts at memory M, every later memory is
// M_t = M + sum_p A_p a_p^T, with the write weights A_p of the contents a_p written so far. So
// k . m_t = k . m + sum_p A_p (k . a_p), and |m_t|^2 = |m_{t-1}|^2 + sum_r w_r a_r . (m_{t-1} +
// m_t): given the dot products of all the chunk's keys with M, a step works on numbers a slot, not
// on rows. At the chunk's end the writes and reads are made up for, a few tiles in cache at a time.
// Slots erased within the chunk hold only what was written since; those few rows are kept as such.
//
// Bytes a slot and step, with C steps a chunk: 8 W / C + 20 R + 2 R (C - 1) + 24.
template <class A>
struct Chunks : Scan<A, A> {
  using Base = Scan<A, A>;
  using typename Base::ForwardScratch;
  using typename Base::Int;

  // Tiles that a chunk's steps are made up for together.
  static constexpr int64_t kReplayTiles = 4;

  struct Scratch {
    ForwardScratch forward;
    A* key_dots;      // [C][R][padded]: keys . M
    A* content_dots;  // [C][R][padded]: contents . M, where they are not the keys
    A* squares;       // [padded]: |m_t|^2
    A* key_gram;      // [C R][C R]: contents . keys
    A* content_gram;  // [C R][C R]: contents . contents, where they are not the keys
    A* reads;         // [blocks][C][R][W]
    A* rows;          // [C n][W]: of the slots erased in this chunk
    int64_t* erased;  // [C n]: those slots
    int64_t* counts;  // first step of the chunk, its steps, number of erased slots
    int64_t* slots;   // [C][n]: erased at each step
    int64_t bytes;

    Scratch(const Forward& p, void* base) : forward(p, base) {
      const Shape& s = p.shape;
      const int64_t chunk = p.options.chunk, all = chunk * s.heads;
      const bool apart = p.in.contents != p.in.keys;
      Arena arena(base == nullptr ? nullptr : static_cast<char*>(base) + forward.bytes);
      key_dots = arena.take<A>(all * s.padded);
      content_dots = arena.take<A>(apart ? all * s.padded : 0);
      squares = arena.take<A>(s.padded);
      key_gram = arena.take<A>(all * all);
      content_gram = arena.take<A>(apart ? all * all : 0);
      reads = arena.take<A>(s.blocks * all * s.width);
      rows = arena.take<A>(chunk * s.chosen * s.width);
      erased = arena.take<int64_t>(chunk * s.chosen);
      counts = arena.take<int64_t>(3);
      slots = arena.take<int64_t>(chunk * s.chosen);
      bytes = forward.bytes + arena.used();
    }
    int64_t& begin() const { return counts[0]; }
    int64_t& steps() const { return counts[1]; }
    int64_t& erased_count() const { return counts[2]; }
  };

  static int64_t scratch_bytes(const Forward& p) {
    return p.options.chunk > 1 ? Scratch(p, nullptr).bytes : Base::forward_scratch_bytes(p);
  }

  // Between two chunks, one pass over the memory: the writes and reads of the last one, then the
  // dot products for the `count` steps from t on. t = 0: nothing to make up for; count = 0: the
  // end.
  static void chunk_turn(const Forward& p, void* base, int64_t b, int64_t t, int64_t count,
                         int64_t block, int64_t end) {
    const Shape& s = p.shape;
    const Scratch scratch(p, base);
    const int64_t size = s.width * kTile;
    const bool apart = p.in.contents != p.in.keys;
    const int64_t coming = count * s.heads;
    Together together(p, scratch, b, t > 0 ? scratch.steps() : 0, 2 * coming * s.width);
    A* keys = together.room.template take<A>(coming * s.width);
    A* contents = together.room.template take<A>(apart ? coming * s.width : 0);
    pack(p, b, t, count, &Base::key, keys);
    if (apart) pack(p, b, t, count, &Base::content, contents);
    for (; block < end; ++block) {
      const int64_t last = std::min(s.tiles, (block + 1) * s.block_tiles);
      A* reads = scratch.reads + block * p.options.chunk * s.heads * s.width;
      if (t > 0) {
        std::fill(reads, reads + scratch.steps() * s.heads * s.width, A(0));
        together.clear();
      }
      for (int64_t tile0 = block * s.block_tiles; tile0 < last; tile0 += kReplayTiles) {
        const int64_t tile1 = std::min(last, tile0 + kReplayTiles);
        if (t > 0) {
          if (erases(scratch, tile0, tile1))
            replay(p, scratch, b, tile0, tile1, reads);
          else
            together.replay(tile0, tile1);
        }
        for (int64_t tile = tile0; tile < tile1; ++tile) {
          A* memory = scratch.forward.memory + tile * size;
          if (count == 0) {
            tile_to_rows(memory,
                         static_cast<A*>(p.memory_out) + (b * s.slots + tile * kTile) * s.width,
                         Base::tile_slots(s, tile), s.width);
            continue;
          }
          const bool reset = Base::resets(p.in, s, t, b);
          if (t == 0 || reset) Base::initial_tile(p.in, s, p.options, b, tile, !reset, memory);
          dot_products(s, memory, keys, coming, scratch.key_dots + tile * kTile,
                       scratch.squares + tile * kTile);
          if (apart)
            dot_products(s, memory, contents, coming, scratch.content_dots + tile * kTile, nullptr);
        }
      }
      if (t > 0) together.add_to(reads);
    }
  }

  // Vectors of the steps [t, t + count), [count][R][W].
  template <class Vectors>
  static void pack(const Forward& p, int64_t b, int64_t t, int64_t count, const Vectors& vectors,
                   A* out) {
    const int64_t size = p.shape.heads * p.shape.width;
    for (int64_t u = 0; u < count; ++u) {
      const A* from = vectors(p.in, p.shape, t + u, b);
      std::copy(from, from + size, out + u * size);
    }
  }

  static void dot_products(const Shape& s, const A* memory, const A* vectors, int64_t count,
                           A* dots, A* squares) {
    for_head_groups(count, [&](int64_t r, auto G) {
      if (squares != nullptr && r == 0)
        tile_score<A, A, G, true>(memory, s.width, vectors, dots, s.padded, squares);
      else
        tile_score<A, A, G>(memory, s.width, vectors + r * s.width, dots + r * s.padded, s.padded);
    });
  }

  // Whether a step of the chunk erases a slot of these tiles.
  static bool erases(const Scratch& scratch, int64_t tile0, int64_t tile1) {
    for (int64_t i = 0; i < scratch.erased_count(); ++i)
      if (scratch.erased[i] / kTile >= tile0 && scratch.erased[i] / kTile < tile1) return true;
    return false;
  }

  // All steps of a chunk at once, for tiles of which it erases nothing: with P = C R contents a_p
  // written by weights A_p to the memory M, read q is w_q . M + sum_p (w_q . A_p) a_p over what was
  // written by then, and what is left is M + sum_p A_p a_p^T.
  struct Together {
    static constexpr int64_t kSlots = kReplayTiles * kTile;
    const Forward& p;
    const Scratch& scratch;
    int64_t b, steps, rank;  // P
    Arena room;
    A* contents;  // [P][W]
    A* weights;   // [P][kSlots]
    A* writes;    // [kReplayTiles][P][kTile]
    A* vectors;   // [P][W][lanes]: w_q . M so far
    A* overlap;   // [P][P]: w_q . A_p
    A* sums;      // [P][W]
    Int* keep;
    bool first = true;

    Together(const Forward& forward, const Scratch& of_chunk, int64_t element, int64_t count,
             int64_t more)
        : p(forward),
          scratch(of_chunk),
          b(element),
          steps(count),
          rank(count * forward.shape.heads),
          room(thread_scratch<3>((rank * (2 * forward.shape.width + 2 * kSlots + rank) + more) *
                                     static_cast<int64_t>(sizeof(A)) +
                                 rank * forward.shape.width * kVectorBytes +
                                 kTile * static_cast<int64_t>(sizeof(Int)) + 1024)) {
      const int64_t width = p.shape.width;
      contents = room.take<A>(rank * width);
      weights = room.take<A>(rank * kSlots);
      writes = room.take<A>(rank * kSlots);
      vectors = room.take<A>(rank * width * kLanes<A>);
      overlap = room.take<A>(rank * rank);
      sums = room.take<A>(rank * width);
      keep = room.take<Int>(kTile);
      if (steps > 0) pack(p, b, scratch.begin(), steps, &Base::content, contents);
    }

    void clear() {
      first = true;
      std::fill(overlap, overlap + rank * rank, A(0));
    }

    void replay(int64_t tile0, int64_t tile1) {
      const Shape& s = p.shape;
      const int64_t size = s.width * kTile, slots = (tile1 - tile0) * kTile;
      A* memory = scratch.forward.memory + tile0 * size;
      for (int64_t u = 0; u < steps; ++u) {
        const int64_t t = scratch.begin() + u;
        const A* previous = scratch.forward.previous_weights(p, b, t);
        const A* now = scratch.forward.read_weights(p, b, t) + tile0 * kTile;
        for (int64_t r = 0; r < s.heads; ++r) {
          const A* row = now + r * s.padded;
          for (int64_t i = 0; i < slots; i += kLanes<A>) {
            __builtin_prefetch(row + kSlots + i);
            store<A>(weights + (u * s.heads + r) * kSlots + i, load<A>(row + i));
          }
        }
        for (int64_t tile = tile0; tile < tile1; ++tile)
          Base::write_weights(
              s, p.options, previous, Base::gate(p.in, s, t, b), scratch.slots + u * s.chosen, tile,
              writes + ((tile - tile0) * rank + u * s.heads) * kTile, kTile, keep, s.heads);
      }
      for_head_groups(rank, [&](int64_t q, auto G) {
        column_sums<A, A, G>(memory, tile1 - tile0, s.width, weights + q * kSlots, kSlots,
                             vectors + q * s.width * kLanes<A>, first);
      });
      first = false;
      for (int64_t q = 0; q < rank; ++q)
        for (int64_t before = 0; before < (q / s.heads + 1) * s.heads; ++before) {
          Vec<A> sum = {};
          for (int64_t i = 0; i < slots; i += kLanes<A>)
            sum += load<A>(weights + q * kSlots + i) *
                   load<A>(writes + (i / kTile * rank + before) * kTile + i % kTile);
          overlap[q * rank + before] += sum_lanes<A>(sum);
        }
      for (int64_t tile = 0; tile < tile1 - tile0; ++tile)
        for_head_groups(rank, [&](int64_t q, auto G) {
          tile_write<A, A, A, G, false>(memory + tile * size, memory + tile * size, s.width,
                                        nullptr, writes + (tile * rank + q) * kTile,
                                        contents + q * s.width, nullptr, nullptr, nullptr,
                                        q == 0 ? kReplayTiles * size : 0);
        });
    }

    // Adds the reads [C][R][W] of the tiles since `clear`.
    void add_to(A* reads) const {
      if (first) return;
      const Shape& s = p.shape;
      lane_sums(vectors, rank * s.width, sums);
      for (int64_t q = 0; q < rank; ++q) {
        A* read = reads + q * s.width;
        for (int64_t j = 0; j < s.width; ++j) read[j] += sums[q * s.width + j];
        for (int64_t before = 0; before < (q / s.heads + 1) * s.heads; ++before)
          for (int64_t j = 0; j < s.width; ++j)
            read[j] += overlap[q * rank + before] * contents[before * s.width + j];
      }
    }
  };

  // The same step by step.
  static void replay(const Forward& p, const Scratch& scratch, int64_t b, int64_t tile0,
                     int64_t tile1, A* reads) {
    const Shape& s = p.shape;
    const int64_t size = s.width * kTile;
    A* memory = scratch.forward.memory;
    Arena room(thread_scratch<0>((s.heads * kTile + s.heads * s.width) * sizeof(A) +
                                 s.heads * s.width * kVectorBytes + kTile * sizeof(Int) + 1024));
    A* write = room.take<A>(s.heads * kTile);
    A* vectors = room.take<A>(s.heads * s.width * kLanes<A>);
    A* sums = room.take<A>(s.heads * s.width);
    Int* keep = room.take<Int>(kTile);
    for (int64_t u = 0; u < scratch.steps(); ++u) {
      const int64_t t = scratch.begin() + u;
      const A* previous = scratch.forward.previous_weights(p, b, t);
      const A* weights = scratch.forward.read_weights(p, b, t);
      const int64_t* slots = scratch.slots + u * s.chosen;
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        A* m = memory + tile * size;
        const bool erases = Base::write_weights(s, p.options, previous, Base::gate(p.in, s, t, b),
                                                slots, tile, write, kTile, keep, s.heads);
        if (erases && p.erased_rows != nullptr) Base::save_erased(p, b, t, slots, tile, m);
        Base::write_tile(s, m, m, erases ? keep : nullptr, write, Base::content(p.in, s, t, b),
                         u == 0 ? kReplayTiles * size : 0);
      }
      for_head_groups(s.heads, [&](int64_t r, auto G) {
        column_sums<A, A, G>(memory + tile0 * size, tile1 - tile0, s.width,
                             weights + r * s.padded + tile0 * kTile, s.padded,
                             vectors + r * s.width * kLanes<A>, true);
      });
      lane_sums(vectors, s.heads * s.width, sums);
      A* total = reads + u * s.heads * s.width;
      for (int64_t i = 0; i < s.heads * s.width; ++i) total[i] += sums[i];
    }
  }

  // The reads of the chunk before, added over the blocks, and the Gram matrices of this one.
  static void chunk_begin(const Forward& p, void* base, int64_t b, int64_t t, int64_t count) {
    const Shape& s = p.shape;
    const Scratch scratch(p, base);
    const int64_t rw = s.heads * s.width;
    if (t > 0)
      for (int64_t u = 0; u < scratch.steps(); ++u) {
        const int64_t last = scratch.begin() + u;
        A* reads = static_cast<A*>(p.reads) + Base::at(s, last, b) * rw;
        // The backward pass takes a read for the mean of the rows under weights that sum to one.
        const double* sums = scratch.forward.sums + last % p.options.chunk * s.heads;
        for (int64_t i = 0; i < rw; ++i) {
          double sum = 0;
          for (int64_t k = 0; k < s.blocks; ++k)
            sum += scratch.reads[(k * p.options.chunk + u) * rw + i];
          reads[i] = static_cast<A>(sum / sums[i / s.width]);
        }
      }
    scratch.begin() = t;
    scratch.steps() = count;
    scratch.erased_count() = 0;
    gram(p, b, t, count, &Base::key, scratch.key_gram);
    if (p.in.contents != p.in.keys) gram(p, b, t, count, &Base::content, scratch.content_gram);
  }

  // gram[u R + q][v R + r] = content q of step t + u . vector r of step t + v, where u <= v.
  template <class Vectors>
  static void gram(const Forward& p, int64_t b, int64_t t, int64_t count, const Vectors& vectors,
                   A* gram) {
    const Shape& s = p.shape;
    const int64_t all = p.options.chunk * s.heads;
    for (int64_t v = 0; v < count; ++v)
      for (int64_t r = 0; r < s.heads; ++r) {
        const A* y = vectors(p.in, s, t + v, b) + r * s.width;
        for (int64_t q = 0; q < (v + 1) * s.heads; ++q) {
          const A* x = Base::content(p.in, s, t + q / s.heads, b) + q % s.heads * s.width;
          gram[q * all + v * s.heads + r] = static_cast<A>(dot(x, y, s.width));
        }
      }
  }

  // The slots that step t erases join the rows kept apart.
  static void chunk_step(const Forward& p, void* base, int64_t, int64_t t) {
    const Shape& s = p.shape;
    const Scratch scratch(p, base);
    std::copy(scratch.forward.slots, scratch.forward.slots + s.chosen,
              scratch.slots + (t - scratch.begin()) * s.chosen);
    for (int64_t i = 0; i < s.chosen; ++i) {
      const int64_t slot = scratch.forward.slots[i];
      int64_t at = 0;
      while (at < scratch.erased_count() && scratch.erased[at] != slot) ++at;
      if (at == scratch.erased_count()) scratch.erased[scratch.erased_count()++] = slot;
      std::fill(scratch.rows + at * s.width, scratch.rows + (at + 1) * s.width, A(0));
    }
  }

  // forward_pass without the memory: writes are known by their weights, reads are left for later.
  static void chunk_pass(const Forward& p, void* base, int64_t b, int64_t t, int64_t block,
                         int64_t end) {
    const Shape& s = p.shape;
    const Scratch scratch(p, base);
    const ForwardScratch& forward = scratch.forward;
    const int64_t step = t - scratch.begin(), before = step * s.heads;
    const int64_t all = p.options.chunk * s.heads;
    const bool apart = p.in.contents != p.in.keys;
    const A* previous = forward.previous_weights(p, b, t);
    A* weights = forward.read_weights(p, b, t);
    const A* gates = Base::gate(p.in, s, t, b);
    const A* keys = Base::key(p.in, s, t, b);
    const A* contents = Base::content(p.in, s, t, b);

    Arena room(thread_scratch<0>((5 * s.heads + 1) * kTile * sizeof(A) +
                                 2 * before * s.heads * sizeof(A) + kTile * sizeof(Int) + 1024));
    A* write = room.take<A>(s.heads * kTile);
    A* old_dots = room.take<A>(s.heads * kTile);  // contents . m_{t-1}
    A* new_dots = room.take<A>(s.heads * kTile);  // contents . m_t
    A* dots = room.take<A>(s.heads * kTile);      // keys . m_t, where the contents are not they
    A* key_mix = room.take<A>(before * s.heads);
    A* content_mix = room.take<A>(before * s.heads);
    Int* keep = room.take<Int>(kTile);

    // What was written before, by the weights it was made of: A = gate * previous weights.
    const A* rows[kMaxChunk * kMaxHeads];
    const A* now[kMaxHeads];
    for (int64_t u = 0; u < step; ++u) {
      const A* from = forward.previous_weights(p, b, scratch.begin() + u);
      const A* gate = Base::gate(p.in, s, scratch.begin() + u, b);
      for (int64_t r = 0; r < s.heads; ++r) {
        const int64_t q = u * s.heads + r;
        rows[q] = from + r * s.padded;
        for (int64_t h = 0; h < s.heads; ++h) {
          key_mix[q * s.heads + h] = gate[r] * scratch.key_gram[q * all + before + h];
          if (apart)
            content_mix[q * s.heads + h] = gate[r] * scratch.content_gram[q * all + before + h];
        }
      }
    }
    for (int64_t r = 0; r < s.heads; ++r) now[r] = write + r * kTile;
    A key_norm[kMaxHeads], beta[kMaxHeads];
    for (int64_t r = 0; r < s.heads; ++r) {
      key_norm[r] = norm(keys + r * s.width, s.width);
      beta[r] = Base::strength(p.in, s, t, b, r);
    }
    const A* key_now = scratch.key_gram + before * all + before;
    const A* content_now = scratch.content_gram + before * all + before;

    for (; block < end; ++block) {
      const int64_t tile0 = block * s.block_tiles;
      const int64_t tile1 = std::min(s.tiles, tile0 + s.block_tiles);
      int64_t here[kMaxChunk * kMaxHeads], erased_here = 0;
      for (int64_t i = 0; i < scratch.erased_count(); ++i)
        if (scratch.erased[i] / kTile >= tile0 && scratch.erased[i] / kTile < tile1)
          here[erased_here++] = i;
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t slot0 = tile * kTile, row = before * s.padded + slot0;
        A* squares = scratch.squares + slot0;
        Base::ask_for_tile(s, previous, weights, forward.usage, tile + 1, s.heads);
        for (int64_t i = slot0 + kTile; i < slot0 + 2 * kTile; i += 64 / int64_t{sizeof(A)})
          __builtin_prefetch(scratch.squares + i, 1);
        Base::write_weights(s, p.options, previous, gates, forward.slots, tile, write, kTile, keep,
                            s.heads);
        Base::decay_usage(p, forward.usage + slot0, write, s.heads);
        if (apart) {
          mix(s, scratch.content_dots + row, s.padded, rows, before, slot0, content_mix, s.heads,
              old_dots);
          mix(s, old_dots, kTile, now, s.heads, 0, content_now, all, new_dots);
          mix(s, scratch.key_dots + row, s.padded, rows, before, slot0, key_mix, s.heads, dots);
          mix(s, dots, kTile, now, s.heads, 0, key_now, all, dots);
        } else {
          mix(s, scratch.key_dots + row, s.padded, rows, before, slot0, key_mix, s.heads, old_dots);
          mix(s, old_dots, kTile, now, s.heads, 0, key_now, all, new_dots);
        }
        A* key_dots = apart ? dots : new_dots;
        for (int64_t lane = 0; lane < kTile; lane += kLanes<A>) {
          Vec<A> square = load<A>(squares + lane);
          for (int64_t r = 0; r < s.heads; ++r) {
            const int64_t i = r * kTile + lane;
            square += load<A>(write + i) * (load<A>(old_dots + i) + load<A>(new_dots + i));
          }
          store<A>(squares + lane, square < A(0) ? Vec<A>{} : square);  // NaN stays
        }
        for (int64_t i = 0; i < erased_here; ++i) {
          const int64_t lane = scratch.erased[here[i]] - slot0;
          if (lane < 0 || lane >= kTile) continue;
          write_row(s, scratch.rows + here[i] * s.width, write + lane, contents, keys,
                    key_dots + lane, squares + lane);
        }
        Base::store_scores(p, key_dots, squares, key_norm, beta, weights + slot0, s.heads);
      }
      A* totals = forward.partial + block * s.heads * (s.width + 2) + s.heads * s.width;
      std::fill(totals, totals + 2 * s.heads, A(0));
      Base::exponentials(s, weights, tile0, tile1, beta, totals, s.heads);
    }
  }

  static MANN_EXT_INLINE void mix(const Shape& s, const A* start, int64_t start_stride,
                                  const A* const* rows, int64_t count, int64_t offset,
                                  const A* factors, int64_t stride, A* out) {
    for_head_groups(s.heads, [&](int64_t r, auto G) {
      tile_mix<A, G>(start + r * start_stride, start_stride, rows, count, offset, factors + r,
                     stride, out + r * kTile);
    });
  }

  // One row written and addressed as it is; `weights` and `dots` have a stride of kTile.
  static void write_row(const Shape& s, A* row, const A* weights, const A* contents, const A* keys,
                        A* dots, A* square) {
    double sum = 0;
    for (int64_t j = 0; j < s.width; ++j) {
      for (int64_t r = 0; r < s.heads; ++r)
        row[j] += weights[r * kTile] * contents[r * s.width + j];
      sum += static_cast<double>(row[j]) * row[j];
    }
    *square = static_cast<A>(sum);
    for (int64_t r = 0; r < s.heads; ++r) {
      double dot = 0;
      for (int64_t j = 0; j < s.width; ++j)
        dot += static_cast<double>(row[j]) * keys[r * s.width + j];
      dots[r * kTile] = static_cast<A>(dot);
    }
  }
};

template <class A, class S>
Kernels make_table() {
  using K = Scan<A, S>;
  Kernels table{K::forward_scratch_bytes,
                K::forward_begin,
                K::forward_pass,
                K::forward_combine,
                K::forward_weights,
                K::forward_select,
                K::forward_end,
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                K::backward_scratch_bytes,
                K::backward_begin,
                K::backward_pass,
                K::backward_combine,
                K::backward_end};
  // A 16-bit memory is rounded at every step, so its writes cannot wait.
  if constexpr (std::is_same_v<A, S>) {
    table.forward_scratch_bytes = Chunks<A>::scratch_bytes;
    table.chunk_turn = Chunks<A>::chunk_turn;
    table.chunk_begin = Chunks<A>::chunk_begin;
    table.chunk_step = Chunks<A>::chunk_step;
    table.chunk_pass = Chunks<A>::chunk_pass;
  }
  return table;
}

}  // namespace

const Kernels& lrua_kernels(Storage storage) {
  static const Kernels tables[] = {make_table<float, float>(), make_table<double, double>(),
                                   make_table<float, BFloat16>(), make_table<float, Half>()};
  return tables[static_cast<int>(storage)];
}

}  // namespace MANN_EXT_ISA
