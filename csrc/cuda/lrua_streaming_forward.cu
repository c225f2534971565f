// The forward pass of lrua_scan in streaming form: see lrua_streaming.h.
#include "cuda/lrua_streaming_forward.h"

namespace mann_ext::cuda::lrua {
namespace {

// A pass's shared memory.
template <class A, class S>
struct ForwardRoom {
  S* rows;                                     // [stages][rows][stride]
  A* previous;                                 // [stages][R][rows]
  A* usage;                                    // [stages][rows]
  A* sums;                                     // at the end, where the rows are: [row groups][G][W]
  A *write, *scores;                           // [rows][head_room]; scores become exponentials
  A* square;                                   // [rows]
  int* mark;                                   // [rows]: which of the n slots, or -1
  A *keys, *contents;                          // [R][W], or null: too large
  A *length, *strength, *gate, *top, *factor;  // [R]
  A* row_totals;                               // [R][rows]: of exponentials, of all tiles
  int64_t* slots;                              // [n]
  A* least_usage;                              // [warps][n]
  int64_t* least_slot;
  int64_t bytes;

  // `head_room`: heads that a row has room for, at least R.
  __host__ __device__ ForwardRoom(const Sizes& s, const Split& split, int head_room, bool apart,
                                  unsigned char* base) {
    Arena arena(base);
    sums = reinterpret_cast<A*>(base);
    rows = arena.take<S>(int64_t{split.stages} * split.rows * split.stride);
    arena.reach(kSumsBytes<A>);
    previous = arena.take<A>(int64_t{split.stages} * s.heads * split.rows);
    usage = arena.take<A>(split.stages * split.rows);
    write = arena.take<A>(int64_t{split.rows} * head_room);
    scores = arena.take<A>(int64_t{split.rows} * head_room);
    row_totals = arena.take<A>(int64_t{split.rows} * s.heads);
    square = arena.take<A>(split.rows);
    mark = arena.take<int>(split.rows);
    length = arena.take<A>(s.heads);
    strength = arena.take<A>(s.heads);
    gate = arena.take<A>(s.heads);
    top = arena.take<A>(s.heads);
    factor = arena.take<A>(s.heads);
    slots = arena.take<int64_t>(s.chosen);
    least_usage = arena.take<A>(kWarps * s.chosen);
    least_slot = arena.take<int64_t>(kWarps * s.chosen);
    keys = contents = nullptr;
    if (stage_vectors<A>(s)) {
      const int64_t count = int64_t{s.heads} * s.width;
      keys = arena.take<A>(count);
      contents = apart ? arena.take<A>(count) : keys;
    }
    bytes = arena.used();
  }
};

// Erase, write and score a tile: the rows of each warp by its lanes.
template <class A, class S, class H, bool Vectors>
__device__ __forceinline__ void forward_rows(const ForwardPass<A, S>& p,
                                             const ForwardRoom<A, S>& room, int64_t t, int64_t b,
                                             bool reset, int stage, int64_t first, const A* keys,
                                             const A* contents) {
  const Sizes& s = p.scan.sizes;
  const int heads = H::count(s.heads);
  const Split& split = p.split;
  const Items items(split, H::room(s.heads));
  const int64_t slot = first + items.row;
  const A* previous = room.previous + stage * heads * split.rows;
  const int mark = find_slot(room.slots, s.chosen, slot);
  if (items.first == 0) room.mark[items.row] = mark;
  items.for_heads(heads, [&](int r, int item, int at) {
    const A w = reset ? A(slot == 0) : previous[item];
    room.write[at] = p.scan.write_weight(room.gate[r], w, r, mark);
  });
  __syncwarp();

  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread >> split.lane_bits, lane = thread & (split.lanes - 1);
  const int64_t own_slot = first + row;
  S* numbers = room.rows + (stage * split.rows + row) * split.stride;
  const A* write = room.write + row * items.stride;
  if (own_slot < s.slots && room.mark[row] >= 0 && p.history.erased_rows != nullptr) {
    S* to = p.history.erased_rows +
            (p.scan.at(t, b) * s.chosen + room.mark[row]) * static_cast<int64_t>(s.width);
    for (int column = lane; column < s.width; column += split.lanes) to[column] = numbers[column];
  }
  __syncwarp();
  write_and_score<H::kGroup, H::kMany, kRun<Vectors>>(
      numbers, lane, split.lanes, s.width, heads, room.mark[row] >= 0, write, contents, keys,
      room.scores + row * items.stride, room.square + row);
  if (lane == 0 && own_slot < s.slots) {
    A usage = p.usage_decay * (reset ? A(own_slot == 0) : room.usage[stage * split.rows + row]);
    for (int r = 0; r < heads; ++r) usage += write[r];
    p.usage_now[b * s.padded + own_slot] = usage;
  }
  __syncwarp();

  A* out = p.read_weights(t, b) + slot;
  const A length = square_root(room.square[items.row]);
  items.for_heads(heads, [&](int r, int item, int at) {
    A& dot = room.scores[at];
    const A strength = room.strength[r];
    const A score = strength * dot / (room.length[r] * length + p.scan.eps);
    const bool shifted = is_shifted(strength);
    if (slot < s.slots) {
      out[r * s.padded] = score;
      dot = shifted ? score : exponential(score);
    } else {
      dot = shifted ? -std::numeric_limits<A>::infinity() : A(0);
    }
    if (!shifted) room.row_totals[item] += dot;
  });
}

// Scores of a tile to exponentials, where the largest score so far is subtracted.
template <class A, class S>
__device__ void shift_scores(const Sizes& s, const Split& split, const ForwardRoom<A, S>& room,
                             int stride) {
  const int lane = threadIdx.x % kWarp;
  for (int r = threadIdx.x / kWarp; r < s.heads; r += kWarps) {
    if (!is_shifted(room.strength[r])) continue;
    const A before = room.top[r];
    A top = before;
    for (int row = lane; row < split.rows; row += kWarp)
      top = larger(top, room.scores[row * stride + r]);
    top = largest_in_warp(top);
    const A factor =
        before == -std::numeric_limits<A>::infinity() ? A(0) : exponential(before - top);
    __syncwarp();
    for (int row = lane; row < split.rows; row += kWarp) {
      A &score = room.scores[row * stride + r], &total = room.row_totals[r * split.rows + row];
      score = score == -std::numeric_limits<A>::infinity() ? A(0) : exponential(score - top);
      total = total * factor + score;
    }
    if (lane == 0) {
      room.top[r] = top;
      room.factor[r] = factor;
    }
  }
  __syncthreads();
}

template <class A, class S, class H, bool Vectors>
__global__ __launch_bounds__(kThreads, kBlocks<A>) void forward_pass(const ForwardPass<A, S> p,
                                                                     const int64_t t) {
  constexpr int G = H::kGroup, Run = kRun<Vectors>;
  constexpr bool Many = H::kMany;
  const Sizes& s = p.scan.sizes;
  const int heads = H::count(s.heads);
  const Split& split = p.split;
  const bool apart = p.scan.contents != p.scan.keys;
  const ForwardRoom<A, S> room(s, split, H::room(s.heads), apart, shared_memory<unsigned char>());
  const int64_t b = blockIdx.x / split.blocks, block = blockIdx.x % split.blocks;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane_of_warp = thread % kWarp;
  const bool reset = p.scan.resets(t, b), starts = t == 0 || reset;
  const A* previous = p.read_weights(t - 1, b);

  const auto fetch = [&](int64_t tile, int stage) {
    if (tile < split.tiles) {
      const int64_t first = tile * split.rows;
      const int count = static_cast<int>(min(int64_t{split.rows}, s.slots - first));
      S* rows = room.rows + stage * split.rows * split.stride;
      if (starts)
        fetch_initial<Vectors>(p.scan, rows, split.stride, b, !reset, first, split.rows, count);
      else
        fetch_rows<Vectors>(rows, split.stride, p.memory_at(t - 1, b) + first * s.width, s.width,
                            split.rows, count);
      fetch_weights(room.previous + stage * heads * split.rows, previous + first, s.padded, heads,
                    split.rows);
      fetch_weights(room.usage + stage * split.rows, p.usage_now + b * s.padded + first, 0, 1,
                    split.rows);
    }
    async_commit();
  };
  fetch(block, 0);

  choose_slots<kWarps>(p, LeastUsed<A>{room.least_usage, room.least_slot, s.chosen}, room.slots, t,
                       b, reset, block == 0 && p.history.slots != nullptr);
  const int64_t count = int64_t{heads} * s.width;
  constexpr bool kAlways = kStaged<A, H, Vectors>;
  const A* keys = stage<kAlways>(room.keys, p.scan.key(t, b), count);
  const A* contents = keys;
  if (apart) contents = stage<kAlways>(room.contents, p.scan.content(t, b), count);
  bool shifted = false;
  for (int r = 0; r < heads; ++r) shifted = shifted || is_shifted(p.scan.strength(t, b, r));
  for (int r = warp; r < heads; r += kWarps) {
    const A length = length_by_warp(p.scan.key(t, b) + int64_t{r} * s.width, s.width);
    if (lane_of_warp == 0) {
      const A strength = p.scan.strength(t, b, r);
      room.length[r] = length;
      room.strength[r] = strength;
      room.gate[r] = p.scan.gate(t, b, r);
      room.top[r] = is_shifted(strength) ? -std::numeric_limits<A>::infinity() : A(0);
      room.factor[r] = A(1);
    }
  }
  for (int i = thread; i < heads * split.rows; i += kThreads) room.row_totals[i] = A(0);

  // Each thread sums one run of columns over every so many rows.
  const int runs = s.width / Run, groups = kThreads / runs;
  const int group = thread / runs, column = thread % runs * Run;
  A sums[G][Run] = {};
  A* partial = p.partial + (b * split.blocks + block) * heads * (s.width + 2);
  S *to = p.memory_at(t, b), *copy = p.copy_at(t, b);
  int stage = 0;
#pragma unroll 1
  for (int64_t tile = block; tile < split.tiles; tile += split.blocks) {
    async_wait<0>();
    __syncthreads();
    if (split.stages == 2) fetch(tile + split.blocks, stage ^ 1);
    const int64_t first = tile * split.rows;
    forward_rows<A, S, H, Vectors>(p, room, t, b, reset, stage, first, keys, contents);
    __syncthreads();
    if (shifted) shift_scores(s, split, room, H::room(s.heads));

    const S* numbers = room.rows + stage * split.rows * split.stride;
    const int present = static_cast<int>(min(int64_t{split.rows}, s.slots - first));
    const auto write_back = [&](int row, int column, const A(&run)[Run]) {
      const int64_t at = (first + row) * s.width + column;
      store_run<Run>(to + at, run);
      if (copy != nullptr) store_run<Run>(copy + at, run);
    };
    if constexpr (!Many) {
      if (shifted)
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
          for (int i = 0; i < Run; ++i) sums[g][i] *= room.factor[g < heads ? g : 0];
#pragma unroll 1
      for (int row = group; group < groups && row < present; row += groups) {
        A run[Run], scores[G];
        load_run<Run>(numbers + row * split.stride + column, run);
        load_run<G>(room.scores + row * G, scores);
#pragma unroll
        for (int g = 0; g < G; ++g) add_scaled<Run>(sums[g], scores[g], run);
        write_back(row, column, run);
      }
    } else {
      // More heads or columns than registers hold: sums are kept in global memory.
      const int head_groups = (heads + G - 1) / G;
#pragma unroll 1
      for (int item = thread; item < head_groups * runs; item += kThreads) {
        const int head = item / runs * G, at = item % runs * Run;
        A sum[G][Run] = {};
#pragma unroll 1
        for (int row = 0; row < present; ++row) {
          A run[Run];
          load_run<Run>(numbers + row * split.stride + at, run);
#pragma unroll
          for (int g = 0; g < G; ++g)
            add_scaled<Run>(sum[g], room.scores[row * heads + min(head + g, heads - 1)], run);
          if (head == 0) write_back(row, at, run);
        }
#pragma unroll
        for (int g = 0; g < G; ++g)
          if (head + g < heads) {
            A* kept = partial + static_cast<int64_t>(head + g) * (s.width + 2) + at;
#pragma unroll
            for (int i = 0; i < Run; ++i)
              kept[i] = (tile == block ? A(0) : kept[i] * room.factor[head + g]) + sum[g][i];
          }
      }
    }
    if (split.stages == 2) {
      stage ^= 1;
    } else {
      __syncthreads();
      fetch(tile + split.blocks, 0);
    }
  }
  __syncthreads();

  if constexpr (!Many) {
    if (group < groups)
#pragma unroll
      for (int g = 0; g < G; ++g)
        store_run<Run>(room.sums + (group * G + g) * s.width + column, sums[g]);
    __syncthreads();
    for (int i = thread; i < heads * s.width; i += kThreads) {
      const int r = i / s.width, column = i % s.width;
      A sum = 0;
      for (int k = 0; k < groups; ++k) sum += room.sums[(k * G + r) * s.width + column];
      partial[r * (s.width + 2) + column] = sum;
    }
  }
  for (int r = warp; r < heads; r += kWarps) {
    const A total = sum_of_rows(room.row_totals + r * split.rows, split.rows);
    A* sums_end = partial + static_cast<int64_t>(r) * (s.width + 2) + s.width;
    if (lane_of_warp > 0) continue;
    sums_end[0] = total;
    sums_end[1] = room.top[r];
  }
}

}  // namespace

template <class A, class S>
void forward_streaming(const Forward<A, S>& arguments, const Tensor& like, bool vectors,
                       const StepHook& before) {
  const OnDevice device(like);
  ForwardPass<A, S> p{};
  static_cast<Forward<A, S>&>(p) = arguments;
  const Sizes& s = p.scan.sizes;
  const bool apart = p.scan.contents != p.scan.keys;
  for_pass(s, vectors, [&](auto heads_of_pass, auto aligned) {
    using H = decltype(heads_of_pass);
    constexpr auto kPass = forward_pass<A, S, H, decltype(aligned)::value>;
    const auto bytes = [&](const Split& split) {
      return ForwardRoom<A, S>(s, split, H::room(s.heads), apart, nullptr).bytes;
    };
    p.split = make_split(s, vectors, sizeof(S), bytes);
    const size_t shared_bytes = static_cast<size_t>(bytes(p.split));
    p.split.blocks = share_blocks(s.batch, blocks_per_multiprocessor<kPass>(kThreads, shared_bytes),
                                  p.split.tiles);
    p.columns = s.width;
    const ForwardBuffers buffers(p, like, p.split.blocks, 2);
    launch_weights(p, -1, device.stream());
    for (int64_t t = 0; t < s.steps; ++t) {
      if (before) before(t);
      launch<kPass>({.grid = grid_size(s.batch * p.split.blocks),
                     .block = kThreads,
                     .stream = device.stream(),
                     .shared_bytes = shared_bytes},
                    p, t);
      launch_weights(p, t, device.stream());
    }
  });
}

template void forward_streaming(const Forward<float, float>&, const Tensor&, bool, const StepHook&);
template void forward_streaming(const Forward<double, double>&, const Tensor&, bool,
                                const StepHook&);
template void forward_streaming(const Forward<float, __nv_bfloat16>&, const Tensor&, bool,
                                const StepHook&);
template void forward_streaming(const Forward<float, __half>&, const Tensor&, bool,
                                const StepHook&);

}  // namespace mann_ext::cuda::lrua
