// The forward pass of lrua_scan in resident form: see lrua_resident.h.
//
// A step is two pieces of work with a barrier after each: rows (erase, write, scores and their
// exponentials), then sums over slots for the reads, while a few warps make read weights and usage
// and find the next step's slots. Reads are finished with the next step's rows, whose vectors
// arrive meanwhile.
#include "cuda/lrua_resident.h"

namespace mann_ext::cuda::lrua {
namespace {

template <class A, class S>
struct ForwardScan : Forward<A, S> {
  Layout layout;
};

template <class A, class S>
struct ForwardMemory {
  S* rows;                   // [rows][stride]
  A* weights;                // [rows][heads]: read weights of the step before
  A* usage;                  // [rows]
  A* scores;                 // [rows][heads]; they become exponentials
  A* partial;                // [groups][heads][width]
  A *keys, *contents;        // [2][heads][width], of step t in half t % 2
  A *length, *strength;      // [2][heads]
  A* gate;                   // [2][heads]
  A* totals;                 // [blocks][warps][heads]
  UsageOrder<A>* least_key;  // [blocks][choosing warps][heads]
  unsigned* least_slot;
  A* tops;   // [blocks][heads]: the largest scores
  A* reads;  // [heads][W]: of this block's slots
  int64_t bytes;

  __host__ __device__ ForwardMemory(const Layout& layout, bool apart, unsigned char* base) {
    Arena arena(base);
    const int64_t vectors = int64_t{kHeads} * layout.width();
    rows = arena.take<S>(int64_t{layout.rows} * layout.stride);
    weights = arena.take<A>(int64_t{layout.rows} * kHeads);
    usage = arena.take<A>(layout.rows);
    keys = arena.take<A>(2 * vectors);
    contents = apart ? arena.take<A>(2 * vectors) : keys;
    length = arena.take<A>(2 * kHeads);
    strength = arena.take<A>(2 * kHeads);
    gate = arena.take<A>(2 * kHeads);
    bytes_of_state = arena.used();
    scores = arena.take<A>(int64_t{layout.rows} * kHeads);
    partial = arena.take<A>(layout.groups * vectors);
    totals = arena.take<A>(layout.blocks * kMaxWarps * kHeads);
    least_key = arena.take<UsageOrder<A>>(layout.blocks * kMaxWarps * kHeads);
    least_slot = arena.take<unsigned>(layout.blocks * kMaxWarps * kHeads);
    tops = arena.take<A>(layout.blocks > 1 ? layout.blocks * kHeads : 0);
    reads = arena.take<A>(layout.blocks > 1 ? vectors : 0);
    bytes = arena.used();
  }
  int64_t bytes_of_state;  // up to here numbers that are not there must be zero
};

// What a thread has of one step.
template <class A>
struct Step {
  int64_t t, b;
  bool reset;
  unsigned slots[kHeads];  // rows erased and written
};

// Erase, write and score all rows; each warp has every so many tiles.
template <bool Clustered, class A, class S>
__device__ __forceinline__ void forward_rows(const ForwardScan<A, S>& p,
                                             const ForwardMemory<A, S>& room,
                                             const Part<Clustered>& part, const Step<A>& step) {
  const Sizes& s = p.scan.sizes;
  const Layout& layout = p.layout;
  const int half = static_cast<int>(step.t & 1), slots = part.slots;
  const int lane_of_warp = threadIdx.x % kWarp, lane = lane_of_warp % kHeads;
  const int warp = threadIdx.x / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const bool apart = room.contents != room.keys;
  const A* keys = room.keys + half * kHeads * layout.width();
  const A* contents = room.contents + half * kHeads * layout.width();
  const A length = room.length[half * kHeads + lane],
          strength = room.strength[half * kHeads + lane];
  const bool shifted = is_shifted(strength);
  const int64_t of_batch = (step.b * s.slots + part.first) * s.width;
  S* last = step.t + 1 == s.steps ? p.history.memory_out + of_batch : nullptr;
  S* saved =
      p.history.snapshots != nullptr && p.scan.has_snapshot(step.t)
          ? p.history.snapshots + p.scan.snapshot_at(step.t, step.b) + int64_t{part.first} * s.width
          : nullptr;
  S* erased_rows = p.history.erased_rows == nullptr
                       ? nullptr
                       : p.history.erased_rows + p.scan.at(step.t, step.b) * s.chosen * s.width;
  A total = 0;
#pragma unroll 1
  for (int tile = warp * kTileRows; tile < layout.rows; tile += warps * kTileRows) {
    const int row0 = tile + lane_of_warp / kHeads;
    A write[kRows][kHeads], dots[kRows][kHeads] = {}, square[kRows] = {};
    int mark[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int row = row0 + j * kRowStep;
      mark[j] = find_slot(step.slots, row);
      load_run<kHeads>(room.weights + row * kHeads, write[j]);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        const A previous = step.reset ? A(part.first + row == 0) : write[j][g];
        write[j][g] = g < s.heads
                          ? p.scan.write_weight(room.gate[half * kHeads + g], previous, g, mark[j])
                          : A(0);
      }
    }
#pragma unroll 1
    for (int column = lane * kColumns; column < layout.width(); column += kHeads * kColumns) {
      A vectors[kHeads][kColumns], run[kRows][kColumns];
#pragma unroll
      for (int g = 0; g < kHeads; ++g)
        load_run<kColumns>(contents + g * layout.width() + column, vectors[g]);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int row = row0 + j * kRowStep;
        S* numbers = room.rows + row * layout.stride + column;
        load_run<kColumns>(numbers, run[j]);
        if (step.reset)
#pragma unroll
          for (int i = 0; i < kColumns; ++i)
            run[j][i] = row < slots && column + i < s.width ? to_acc<A>(p.scan.initial) : A(0);
        if (mark[j] >= 0) {
          if (erased_rows != nullptr)
            store_columns(erased_rows + mark[j] * s.width, column, run[j], s.width, layout.vectors);
#pragma unroll
          for (A& number : run[j]) number = 0;
        }
#pragma unroll
        for (int g = 0; g < kHeads; ++g) add_scaled<kColumns>(run[j], write[j][g], vectors[g]);
        round_run<S, kColumns>(run[j]);
        store_run<kColumns>(numbers, run[j]);
        add_dot<kColumns>(square[j], run[j], run[j]);
        const int64_t at = int64_t{row} * s.width;
        if (last != nullptr && row < slots)
          store_columns(last + at, column, run[j], s.width, layout.vectors);
        if (saved != nullptr && row < slots)
          store_columns(saved + at, column, run[j], s.width, layout.vectors);
      }
      if (apart)
#pragma unroll
        for (int g = 0; g < kHeads; ++g)
          load_run<kColumns>(keys + g * layout.width() + column, vectors[g]);
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int g = 0; g < kHeads; ++g) add_dot<kColumns>(dots[j][g], run[j], vectors[g]);
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int row = row0 + j * kRowStep;
      const A dot = sum_scattered(dots[j], lane), norm = square_root(sum_row(square[j]));
      A value = 0;
      if (lane < s.heads && row < slots) {
        value = strength * dot / (length * norm + p.scan.eps);
        if (!shifted) total += value = exponential(value);
      }
      room.scores[row * kHeads + lane] = value;
      if (lane == 0) {
        A usage = p.usage_decay * (step.reset ? A(part.first + row == 0) : room.usage[row]);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) usage += write[j][g];
        room.usage[row] = usage;
      }
    }
  }
  total = sum_head(total);
  give_heads<Clustered>(room.totals + (static_cast<int>(part.rank) * warps + warp) * kHeads, total,
                        layout);
}

// Scores to exponentials, less the largest score, for the heads that need it.
template <bool Clustered, class A, class S>
__device__ __forceinline__ void shift_scores(const ForwardScan<A, S>& p,
                                             const ForwardMemory<A, S>& room,
                                             const Part<Clustered>& part, int half) {
  constexpr A kNothing = -std::numeric_limits<A>::infinity();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp, blocks = p.layout.blocks;
  const bool mine = warp < p.scan.sizes.heads && is_shifted(room.strength[half * kHeads + warp]);
  A* scores = room.scores + warp;
  A top = kNothing;
  if (mine) {
    for (int row = lane; row < part.slots; row += kWarp) top = larger(top, scores[row * kHeads]);
    top = largest_in_warp(top);
  }
  if constexpr (Clustered) {
    if (mine) give<true>(room.tops + part.rank * kHeads + warp, top, p.layout);
    cluster_barrier();
    if (mine) top = largest_in_warp(lane < blocks ? room.tops[lane * kHeads + warp] : kNothing);
  }
  if (mine) {
    A total = 0;
    for (int row = lane; row < part.slots; row += kWarp) {
      A& score = scores[row * kHeads];
      score = score == kNothing ? A(0) : exponential(score - top);
      total += score;
    }
    total = warp_sum(total);
    // The warps' were zero.
    const int at = static_cast<int>(part.rank) * warps * kHeads + warp;
    give<Clustered>(room.totals + at, total, p.layout);
  }
  barrier<Clustered>();
}

// Each warp finds the least-used of its slots, from `first` to before `end`.
template <class A>
struct Chooser {
  Least<UsageOrder<A>> least;

  __device__ void offer(A usage, int slot) {
    least.offer(usage_order(usage), static_cast<unsigned>(slot));
  }
  template <bool Clustered, class S>
  __device__ void finish(const ForwardMemory<A, S>& room, const Part<Clustered>& part,
                         const Layout& layout, int warp) {
    const int list = static_cast<int>(part.rank) * layout.choosing_warps + warp;
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      UsageOrder<A> key;
      unsigned slot;
      least.take(&key, &slot);
      give<Clustered>(room.least_key + list * kHeads + k, key, layout);
      give<Clustered>(room.least_slot + list * kHeads + k, slot, layout);
    }
  }
};

// The n slots that step t erases and writes, as rows, in the registers of every thread.
template <bool Clustered, class A, class S>
__device__ __forceinline__ void choose_slots(const ForwardScan<A, S>& p,
                                             const ForwardMemory<A, S>& room,
                                             const Part<Clustered>& part, Step<A>& step) {
  const Sizes& s = p.scan.sizes;
  const int lists = p.layout.choosing_warps * p.layout.blocks;
  if (step.reset) {
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      step.slots[k] = static_cast<unsigned>(k + 1) % static_cast<unsigned>(s.slots);
  } else if (lists == 1) {
#pragma unroll
    for (int k = 0; k < kHeads; ++k) step.slots[k] = room.least_slot[k];
  } else {
    Least<UsageOrder<A>> least;
    // At most 8 warps choose, so what a lane meets next comes from a block of higher slots.
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < lists * kHeads; i += kWarp)
      least.offer(room.least_key[i], room.least_slot[i]);
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
      UsageOrder<A> key;
      least.take(&key, &step.slots[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kHeads; ++k)
    if (k >= s.chosen) step.slots[k] = kNoSlot;
  if (threadIdx.x == 0 && part.rank == 0 && p.history.slots != nullptr)
#pragma unroll
    for (int k = 0; k < kHeads; ++k)
      if (k < s.chosen) p.history.slots[p.scan.at(step.t, step.b) * s.chosen + k] = step.slots[k];
#pragma unroll
  for (int k = 0; k < kHeads; ++k) step.slots[k] = part.row_of(step.slots[k]);
}

// w_t = exponentials / totals; u_t += sum_r w_t; the least-used slots of each choosing warp.
template <bool Clustered, class A, class S>
__device__ __forceinline__ void forward_weights(const ForwardScan<A, S>& p,
                                                const ForwardMemory<A, S>& room,
                                                const Part<Clustered>& part, const Step<A>& step,
                                                const A (&inverse)[kHeads]) {
  const Sizes& s = p.scan.sizes;
  // The last block's rows go on to the end of the padding.
  const bool at_end = static_cast<int>(part.rank) + 1 == p.layout.blocks;
  const int slots = part.slots, rest = static_cast<int>(s.padded) - part.first;
  const int padded = at_end ? rest : min(p.layout.share, rest);
  const bool last = step.t + 1 == s.steps;
  A* history =
      p.history.weights == nullptr
          ? nullptr
          : p.history.weights + p.scan.at(step.t, step.b) * s.heads * s.padded + part.first;
  A* weights_out = p.weights_out + step.b * s.heads * s.slots + part.first;
  A* usage_out = p.usage_out + step.b * s.slots + part.first;
  Chooser<A> chooser;
#pragma unroll 2
  for (int row = threadIdx.x; row < padded; row += p.layout.choosing_warps * kWarp) {
    A w[kHeads] = {};
    if (row < slots) {
      load_run<kHeads>(room.scores + row * kHeads, w);
      A usage = room.usage[row];
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        w[g] *= inverse[g];
        usage += w[g];
        if (last && g < s.heads) weights_out[g * s.slots + row] = w[g];
      }
      store_run<kHeads>(room.weights + row * kHeads, w);
      room.usage[row] = usage;
      if (last) usage_out[row] = usage;
      chooser.offer(usage, part.first + row);
    }
    if (history != nullptr)
#pragma unroll
      for (int g = 0; g < kHeads; ++g)
        if (g < s.heads) history[g * s.padded + row] = w[g];
  }
  if (!last) chooser.finish(room, part, p.layout, threadIdx.x / kWarp);
}

template <class A, class S, bool Clustered>
__global__ __launch_bounds__(max_threads<A>(Clustered),
                             1) void forward_scan(const ForwardScan<A, S> p) {
  if constexpr (Clustered && !kClusters) return;
  const Sizes& s = p.scan.sizes;
  const Layout& layout = p.layout;
  unsigned char* base = shared_memory<unsigned char>();
  const ForwardMemory<A, S> room(layout, p.scan.contents != p.scan.keys, base);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane_of_warp = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const Part<Clustered> part(s, layout);
  const int slots = part.slots, width = layout.width();
  const bool apart = room.contents != room.keys;
  // Of the threads that form sums: each has one run of columns of every so many rows.
  const int adder = thread - layout.choosing_warps * kWarp;
  const int group = adder / layout.runs, column = adder % layout.runs * kColumns;
  Step<A> step{};
  step.b = blockIdx.x / static_cast<unsigned>(Clustered ? layout.blocks : 1);

  const auto fetch = [&](int64_t t) {
    const int64_t half = (t & 1) * kHeads * width;
    fetch_vectors(room.keys + half, p.scan.key(t, step.b), s, layout);
    if (apart) fetch_vectors(room.contents + half, p.scan.content(t, step.b), s, layout);
    async_commit();
  };
  // Gate and strength of the coming step, on their way in the first threads' registers.
  A gate = 0, strength = 0;
  unsigned char reset = 0;
  const auto fetch_scalars = [&](int64_t t) {
    fetch_reset(p.scan, t, step.b, reset);
    if (thread < s.heads) {
      gate = p.scan.gate(t, step.b, thread);
      strength = p.scan.strength(t, step.b, thread);
    }
  };
  // When the vectors have arrived: what the rows need of a step besides.
  const auto prepare = [&](int64_t t) {
    const int half = static_cast<int>(t & 1) * kHeads;
    if (thread < s.heads) {
      room.gate[half + thread] = gate;
      room.strength[half + thread] = strength;
    }
    for (int r = warps - 1 - warp; r < s.heads; r += warps) {
      const A length = length_by_warp(room.keys + (half + r) * width, width);
      if (lane_of_warp == 0) room.length[half + r] = length;
    }
  };

  fill_zero(reinterpret_cast<int4*>(base), room.bytes_of_state / 16);
  barrier<Clustered>();  // and no block is given anything before it runs
  fetch(0);
  fetch_scalars(0);
  const auto fetch_memory = [&](auto vectors) {
    fetch_initial<decltype(vectors)::value>(p.scan, room.rows, layout.stride, step.b, true,
                                            part.first, slots, slots);
  };
  layout.vectors ? fetch_memory(std::true_type{}) : fetch_memory(std::false_type{});
  async_commit();
  for (int r = 0; r < s.heads; ++r)
    for (int row = thread; row < slots; row += threads)
      room.weights[row * kHeads + r] =
          p.scan.read_weights[(step.b * s.heads + r) * s.slots + part.first + row];
  if (warp < layout.choosing_warps) {
    Chooser<A> chooser;
#pragma unroll 1
    for (int row = thread; row < slots; row += layout.choosing_warps * kWarp) {
      const A usage = p.usage[step.b * s.slots + part.first + row];
      room.usage[row] = usage;
      chooser.offer(usage, part.first + row);
    }
    chooser.finish(room, part, layout, warp);
  }
  async_wait<0>();
  __syncthreads();
  prepare(0);
  barrier<Clustered>();

  A inverse[kHeads] = {};
  const auto finish_reads = [&](int64_t t) {
    A* reads = p.history.reads + p.scan.at(t, step.b) * s.heads * s.width;
#pragma unroll 1
    for (int i = thread; i < s.heads * s.width; i += threads) {
      const int r = i / s.width;
      const A* from = room.partial + r * width + i % s.width;
      A sum = 0;
#pragma unroll 8
      for (int k = 0; k < layout.groups; ++k) sum += from[k * kHeads * width];
      (Clustered ? room.reads : reads)[i] = sum * of_head(inverse, r);
    }
  };
  // And those of all blocks, a barrier later.
  const auto join_reads = [&](int64_t t) {
    A* reads = p.history.reads + p.scan.at(t, step.b) * s.heads * s.width;
    sum_blocks<1>(room.reads, 0, s.heads * s.width, layout, part.rank,
                  [&](int i, const A(&sum)[1]) { reads[i] = sum[0]; });
  };
#pragma unroll 1
  for (step.t = 0; step.t < s.steps; ++step.t) {
    const int half = static_cast<int>(step.t & 1);
    const bool more = step.t + 1 < s.steps;
    step.reset = reset != 0;
    if (more) {
      fetch(step.t + 1);
      fetch_scalars(step.t + 1);
    }
    choose_slots(p, room, part, step);
    if (step.t > 0) finish_reads(step.t - 1);
    forward_rows(p, room, part, step);
    async_wait<0>();
    barrier<Clustered>();
    if (Clustered && step.t > 0) join_reads(step.t - 1);
    bool shifted = false;
#pragma unroll
    for (int r = 0; r < kHeads; ++r)
      shifted = shifted || is_shifted(room.strength[half * kHeads + r]);
    if (shifted) shift_scores(p, room, part, half);

    const A total = sum_warps(room.totals, layout.blocks * warps);
    const A own = lane_of_warp % kHeads < s.heads ? A(1) / total : A(0);
#pragma unroll
    for (int g = 0; g < kHeads; ++g) inverse[g] = __shfl_sync(kAllLanes, own, g);
    if (warp < layout.choosing_warps) {
      forward_weights(p, room, part, step, inverse);
    } else if (group < layout.groups) {
      A sums[kHeads][kColumns] = {};
#pragma unroll 2
      for (int row = group; row < slots; row += layout.groups) {
        A run[kColumns], w[kHeads];
        load_run<kColumns>(room.rows + row * layout.stride + column, run);
        load_run<kHeads>(room.scores + row * kHeads, w);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) add_scaled<kColumns>(sums[g], w[g], run);
      }
#pragma unroll
      for (int g = 0; g < kHeads; ++g)
        store_run<kColumns>(room.partial + (group * kHeads + g) * width + column, sums[g]);
    }
    __syncwarp();
    if (more) prepare(step.t + 1);
    barrier<Clustered>();
  }
  finish_reads(s.steps - 1);
  if constexpr (Clustered) {
    cluster_barrier();
    join_reads(s.steps - 1);
    cluster_barrier();  // no block ends while others read what it has
  }
}

template <class A, class S>
ForwardScan<A, S> make_forward(const Forward<A, S>& arguments, bool vectors, int blocks,
                               int64_t* bytes) {
  ForwardScan<A, S> p{};
  static_cast<Forward<A, S>&>(p) = arguments;
  const auto needed = [&](const Layout& layout) {
    return ForwardMemory<A, S>(layout, p.scan.contents != p.scan.keys, nullptr).bytes;
  };
  p.layout = fit_layout<A>(p.scan.sizes, vectors, blocks, true, needed);
  *bytes = needed(p.layout);
  return p;
}

}  // namespace

bool has_clusters() { return cuda::has_clusters<forward_scan<float, float, true>>(); }

template <class A, class S>
int64_t forward_resident_bytes(const Forward<A, S>& arguments, bool vectors, int blocks) {
  int64_t bytes;
  make_forward(arguments, vectors, blocks, &bytes);
  return bytes;
}

template <class A, class S>
void forward_resident(const Forward<A, S>& arguments, const Tensor& like, bool vectors,
                      int blocks) {
  const OnDevice device(like);
  int64_t bytes;
  const ForwardScan<A, S> p = make_forward(arguments, vectors, blocks, &bytes);
  const Launch how{.grid = grid_size(p.scan.sizes.batch * blocks),
                   .block = static_cast<unsigned>(p.layout.threads),
                   .stream = device.stream(),
                   .shared_bytes = static_cast<size_t>(bytes),
                   .cluster = static_cast<unsigned>(blocks)};
  blocks > 1 ? launch<forward_scan<A, S, true>>(how, p) : launch<forward_scan<A, S, false>>(how, p);
}

#define INSTANTIATE(A, S)                                                   \
  template int64_t forward_resident_bytes(const Forward<A, S>&, bool, int); \
  template void forward_resident(const Forward<A, S>&, const Tensor&, bool, int)
INSTANTIATE(float, float);
INSTANTIATE(double, double);
INSTANTIATE(float, __nv_bfloat16);
INSTANTIATE(float, __half);
#undef INSTANTIATE

}  // namespace mann_ext::cuda::lrua
