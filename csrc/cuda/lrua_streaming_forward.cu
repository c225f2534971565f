// The forward pass of lrua_scan in streaming form: see lrua_streaming.h.
#include "cuda/lrua_streaming.h"

namespace mann_ext::cuda::lrua {
namespace {

// Blocks of a pass on a multiprocessor at a time, which limits their registers.
template <class A>
constexpr int kBlocks = sizeof(A) == 4 ? 4 : 2;

template <class A, class S>
struct ForwardPass : Forward<A, S> {
  Split split;
  A* initial;           // [B][R][padded]: the read weights given
  A* recent;            // [2][B][R][padded]: where no history is kept
  A* usage_now;         // [B][padded]
  A* partial;           // [B][blocks][R][W + 2]: reads, total and top
  int64_t slot_blocks;  // of forward_weights, for each batch element
  A* least_usage;       // [B][slot_blocks][n]
  int64_t* least_slot;

  // w_t: scores until forward_weights(t); t = -1: what the scan was given.
  __device__ A* read_weights(int64_t t, int64_t b) const {
    const Sizes& s = this->scan.sizes;
    if (t < 0) return initial + b * s.heads * s.padded;
    A* all = this->history.weights;
    return (all == nullptr ? recent + this->scan.at(t % 2, b) * s.heads * s.padded
                           : all + this->scan.at(t, b) * s.heads * s.padded);
  }
  __device__ bool saves_all() const {
    return this->history.snapshots != nullptr && this->scan.snapshot_every == 1;
  }
  // Where M_t is written at step t, and read at step t + 1.
  __device__ S* memory_at(int64_t t, int64_t b) const {
    const Sizes& s = this->scan.sizes;
    return saves_all() ? this->history.snapshots + this->scan.snapshot_at(t, b)
                       : this->history.memory_out + b * s.slots * s.width;
  }
  // Where it is written as well, or null.
  __device__ S* copy_at(int64_t t, int64_t b) const {
    const Sizes& s = this->scan.sizes;
    if (saves_all())
      return t + 1 == s.steps ? this->history.memory_out + b * s.slots * s.width : nullptr;
    return this->history.snapshots != nullptr && this->scan.has_snapshot(t)
               ? this->history.snapshots + this->scan.snapshot_at(t, b)
               : nullptr;
  }
};

// A pass's shared memory.
template <class A, class S>
struct ForwardRoom {
  S* rows;                                     // [stages][rows][stride]
  A* previous;                                 // [stages][R][rows]
  A* usage;                                    // [stages][rows]
  A* sums;                                     // at the end, where the rows are: [row groups][G][W]
  A *write, *scores;                           // [rows][R]; scores become exponentials
  A* square;                                   // [rows]
  int* mark;                                   // [rows]: which of the n slots, or -1
  A *keys, *contents;                          // [R][W], or null: too large
  A *length, *strength, *gate, *top, *factor;  // [R]
  A* totals;                                   // [warps][R]
  int64_t* slots;                              // [n]
  A* least_usage;                              // [warps][n]
  int64_t* least_slot;
  int64_t bytes;

  __host__ __device__ ForwardRoom(const Sizes& s, const Split& split, bool apart,
                                  unsigned char* base) {
    Arena arena(base);
    sums = reinterpret_cast<A*>(base);
    rows = arena.take<S>(int64_t{split.stages} * split.rows * split.stride);
    arena.reach(kSumsBytes<A>);
    previous = arena.take<A>(int64_t{split.stages} * s.heads * split.rows);
    usage = arena.take<A>(split.stages * split.rows);
    write = arena.take<A>(int64_t{split.rows} * s.heads);
    scores = arena.take<A>(int64_t{split.rows} * s.heads);
    square = arena.take<A>(split.rows);
    mark = arena.take<int>(split.rows);
    length = arena.take<A>(s.heads);
    strength = arena.take<A>(s.heads);
    gate = arena.take<A>(s.heads);
    top = arena.take<A>(s.heads);
    factor = arena.take<A>(s.heads);
    totals = arena.take<A>(kWarps * s.heads);
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

// The n slots that step t erases and writes, from the candidates of the blocks of forward_weights.
template <class A, class S>
__device__ void choose_slots(const ForwardPass<A, S>& p, const ForwardRoom<A, S>& room, int64_t t,
                             int64_t b, bool reset, bool save) {
  const Sizes& s = p.scan.sizes;
  const int warp = threadIdx.x / kWarp;
  const int64_t count = p.slot_blocks * s.chosen;
  if (!reset) {
    const LeastUsed<A> mine{room.least_usage + warp * s.chosen, room.least_slot + warp * s.chosen,
                            s.chosen};
    mine.clear();
    const int64_t part = (count + kWarps - 1) / kWarps;
    const int64_t begin = min(count, warp * part), end = min(count, begin + part);
    mine.offer_all(p.least_usage + b * count + begin, p.least_slot + b * count + begin,
                   end - begin);
    __syncthreads();
    if (warp == 0)
      mine.offer_all(room.least_usage + s.chosen, room.least_slot + s.chosen,
                     (kWarps - 1) * s.chosen);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < s.chosen; i += kThreads) {
    const int64_t slot = reset ? (i + 1) % s.slots : room.least_slot[i];
    room.slots[i] = slot;
    if (save) p.history.slots[p.scan.at(t, b) * s.chosen + i] = slot;
  }
}

// Erase, write and score a tile: the rows of each warp by its lanes.
template <class A, class S, int G, bool Vectors, bool Many>
__device__ __forceinline__ void forward_rows(const ForwardPass<A, S>& p,
                                             const ForwardRoom<A, S>& room, int64_t t, int64_t b,
                                             bool reset, int stage, int64_t first, const A* keys,
                                             const A* contents) {
  constexpr int Run = kRun<Vectors>;
  const Sizes& s = p.scan.sizes;
  const Split& split = p.split;
  const int lane_of_warp = threadIdx.x % kWarp;
  const int rows = kWarp / split.lanes;  // of this warp
  const int row0 = threadIdx.x / kWarp * rows;
  const A* previous = room.previous + stage * s.heads * split.rows;

  if (lane_of_warp < rows)
    room.mark[row0 + lane_of_warp] = find_slot(room.slots, s.chosen, first + row0 + lane_of_warp);
  __syncwarp();
  for (int item = lane_of_warp; item < rows * s.heads; item += kWarp) {
    const int row = row0 + item % rows, r = item / rows;
    const A w = reset ? A(first + row == 0) : previous[r * split.rows + row];
    room.write[row * s.heads + r] = p.scan.write_weight(room.gate[r], w, r, room.mark[row]);
  }
  __syncwarp();

  const int row = row0 + lane_of_warp / split.lanes, lane = lane_of_warp % split.lanes;
  const int64_t slot = first + row;
  const bool present = slot < s.slots;
  S* numbers = room.rows + (stage * split.rows + row) * split.stride;
  const A* write = room.write + row * s.heads;
  if (present && room.mark[row] >= 0 && p.history.erased_rows != nullptr) {
    S* to = p.history.erased_rows +
            (p.scan.at(t, b) * s.chosen + room.mark[row]) * static_cast<int64_t>(s.width);
    for (int column = lane; column < s.width; column += split.lanes) to[column] = numbers[column];
  }
  __syncwarp();
  write_and_score<G, Many, Run>(numbers, lane, split.lanes, s.width, s.heads, room.mark[row] >= 0,
                                write, contents, keys, room.scores + row * s.heads,
                                room.square + row);
  if (lane == 0 && present) {
    A usage = p.usage_decay * (reset ? A(slot == 0) : room.usage[stage * split.rows + row]);
    for (int r = 0; r < s.heads; ++r) usage += write[r];
    p.usage_now[b * s.padded + slot] = usage;
  }
  __syncwarp();

  A* out = p.read_weights(t, b);
  for (int item = lane_of_warp; item < rows * s.heads; item += kWarp) {
    const int row = row0 + item % rows, r = item / rows;
    A& dot = room.scores[row * s.heads + r];
    const A score =
        room.strength[r] * dot / (room.length[r] * square_root(room.square[row]) + p.scan.eps);
    const bool shifted = is_shifted(room.strength[r]);
    if (first + row < s.slots) {
      out[r * s.padded + first + row] = score;
      dot = shifted ? score : exponential(score);
    } else {
      dot = shifted ? -std::numeric_limits<A>::infinity() : A(0);
    }
  }
}

// Scores of a tile to exponentials, where the largest score so far is subtracted.
template <class A, class S>
__device__ void shift_scores(const Sizes& s, const Split& split, const ForwardRoom<A, S>& room) {
  const int lane = threadIdx.x % kWarp;
  for (int r = threadIdx.x / kWarp; r < s.heads; r += kWarps) {
    if (!is_shifted(room.strength[r])) continue;
    const A before = room.top[r];
    A top = before;
    for (int row = lane; row < split.rows; row += kWarp)
      top = larger(top, room.scores[row * s.heads + r]);
    top = largest_in_warp(top);
    __syncwarp();
    for (int row = lane; row < split.rows; row += kWarp) {
      A& score = room.scores[row * s.heads + r];
      score = score == -std::numeric_limits<A>::infinity() ? A(0) : exponential(score - top);
    }
    if (lane == 0) {
      room.top[r] = top;
      room.factor[r] =
          before == -std::numeric_limits<A>::infinity() ? A(0) : exponential(before - top);
    }
  }
  __syncthreads();
}

template <class A, class S, int G, bool Vectors, bool Many>
__global__ __launch_bounds__(kThreads, kBlocks<A>) void forward_pass(const ForwardPass<A, S> p,
                                                                     const int64_t t) {
  constexpr int Run = kRun<Vectors>;
  const Sizes& s = p.scan.sizes;
  const Split& split = p.split;
  const bool apart = p.scan.contents != p.scan.keys;
  const ForwardRoom<A, S> room(s, split, apart, shared_memory<unsigned char>());
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
      fetch_weights(room.previous + stage * s.heads * split.rows, previous + first, s.padded,
                    s.heads, split.rows);
      fetch_weights(room.usage + stage * split.rows, p.usage_now + b * s.padded + first, 0, 1,
                    split.rows);
    }
    async_commit();
  };
  fetch(block, 0);

  choose_slots(p, room, t, b, reset, block == 0 && p.history.slots != nullptr);
  const int64_t count = int64_t{s.heads} * s.width;
  const A* keys = stage(room.keys, p.scan.key(t, b), count);
  const A* contents = apart ? stage(room.contents, p.scan.content(t, b), count) : keys;
  bool shifted = false;
  for (int r = 0; r < s.heads; ++r) shifted = shifted || is_shifted(p.scan.strength(t, b, r));
  for (int r = warp; r < s.heads; r += kWarps) {
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
  for (int i = lane_of_warp; i < s.heads; i += kWarp) room.totals[warp * s.heads + i] = A(0);

  // Each thread sums one run of columns over every so many rows.
  const int runs = s.width / Run, groups = kThreads / runs;
  const int group = thread / runs, column = thread % runs * Run;
  A sums[G][Run] = {};
  A* partial = p.partial + (b * split.blocks + block) * s.heads * (s.width + 2);
  S *to = p.memory_at(t, b), *copy = p.copy_at(t, b);
  int stage = 0;
#pragma unroll 1
  for (int64_t tile = block; tile < split.tiles; tile += split.blocks) {
    async_wait<0>();
    __syncthreads();
    if (split.stages == 2) fetch(tile + split.blocks, stage ^ 1);
    const int64_t first = tile * split.rows;
    forward_rows<A, S, G, Vectors, Many>(p, room, t, b, reset, stage, first, keys, contents);
    __syncthreads();
    if (shifted) shift_scores(s, split, room);

    const int rows = kWarp / split.lanes;  // of this warp
    for (int r = lane_of_warp; r < s.heads; r += kWarp) {
      A total = 0;
      for (int row = warp * rows; row < (warp + 1) * rows; ++row)
        total += room.scores[row * s.heads + r];
      A& sum = room.totals[warp * s.heads + r];
      sum = sum * room.factor[r] + total;
    }
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
          for (int i = 0; i < Run; ++i) sums[g][i] *= room.factor[g < s.heads ? g : 0];
#pragma unroll 1
      for (int row = group; group < groups && row < present; row += groups) {
        A run[Run];
        load_run<Run>(numbers + row * split.stride + column, run);
#pragma unroll
        for (int g = 0; g < G; ++g)
          add_scaled<Run>(sums[g], room.scores[row * s.heads + (g < s.heads ? g : 0)], run);
        write_back(row, column, run);
      }
    } else {
      // More heads or columns than registers hold: sums are kept in global memory.
      const int head_groups = (s.heads + G - 1) / G;
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
            add_scaled<Run>(sum[g], room.scores[row * s.heads + min(head + g, s.heads - 1)], run);
          if (head == 0) write_back(row, at, run);
        }
#pragma unroll
        for (int g = 0; g < G; ++g)
          if (head + g < s.heads) {
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
    for (int i = thread; i < s.heads * s.width; i += kThreads) {
      const int r = i / s.width, column = i % s.width;
      A sum = 0;
      for (int k = 0; k < groups; ++k) sum += room.sums[(k * G + r) * s.width + column];
      partial[r * (s.width + 2) + column] = sum;
    }
  }
  for (int r = thread; r < s.heads; r += kThreads) {
    A total = 0;
    for (int w = 0; w < kWarps; ++w) total += room.totals[w * s.heads + r];
    A* sums_end = partial + static_cast<int64_t>(r) * (s.width + 2) + s.width;
    sums_end[0] = total;
    sums_end[1] = room.top[r];
  }
}

// A warp gets what one head's scores are shifted by, over all blocks, and the normaliser.
template <class A>
__device__ __forceinline__ void normaliser(const A* partial, int64_t blocks, int64_t block_stride,
                                           int width, A* top, double* total) {
  const int lane = threadIdx.x % kWarp;
  A largest = -std::numeric_limits<A>::infinity();
  for (int64_t k = lane; k < blocks; k += kWarp)
    largest = larger(largest, partial[k * block_stride + width + 1]);
  largest = largest_in_warp(largest);
  double sum = 0;
  for (int64_t k = lane; k < blocks; k += kWarp) {
    const A* end = partial + k * block_stride + width;
    sum += static_cast<double>(end[0]) * exponential(end[1] - largest);
  }
  *top = largest;
  *total = warp_sum(sum);
}

// One head's read: the blocks' sums, added in their order.
template <class A, class S>
__device__ void combine_reads(const ForwardPass<A, S>& p, int64_t t, int64_t b, int r,
                              double* room) {
  const Sizes& s = p.scan.sizes;
  const int64_t block_stride = int64_t{s.heads} * (s.width + 2);
  const A* partial = p.partial + b * p.split.blocks * block_stride + int64_t{r} * (s.width + 2);
  A top;
  double total;
  normaliser(partial, p.split.blocks, block_stride, s.width, &top, &total);
  const int lane = threadIdx.x % kWarp;
  for (int first = 0; first < s.width; first += kWarp) {
    const int column = min(first + lane, s.width - 1);
    const double sum = sum_over_blocks<kWeightThreads>(p.split.blocks, room, [&](int64_t k) {
      const A* of_block = partial + k * block_stride;
      return static_cast<double>(of_block[column]) * exponential(of_block[s.width + 1] - top);
    });
    if (threadIdx.x < kWarp && first + lane < s.width)
      p.history.reads[(p.scan.at(t, b) * s.heads + r) * s.width + column] =
          static_cast<A>(sum / total);
  }
}

// w = exp(score) / total; u = decay u + sum_r (w_r + w_w,r); candidates for step t + 1. t = -1: the
// state that the scan was given. The last R blocks of a batch element add up its reads.
template <class A, class S>
__global__ __launch_bounds__(kWeightThreads) void forward_weights(const ForwardPass<A, S> p,
                                                                  const int64_t t) {
  constexpr int warps = kWeightThreads / kWarp;
  __shared__ double sums[kWeightThreads];
  __shared__ A tops[kMaxHeads], inverse[kMaxHeads];
  __shared__ A least_usage[warps * kMaxHeads];
  __shared__ int64_t least_slot[warps * kMaxHeads];
  const Sizes& s = p.scan.sizes;
  const int64_t blocks = p.slot_blocks + (t < 0 ? 0 : s.heads);
  const int64_t b = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int warp = threadIdx.x / kWarp;
  if (block >= p.slot_blocks) {
    combine_reads(p, t, b, static_cast<int>(block - p.slot_blocks), sums);
    return;
  }
  const bool last = t + 1 == s.steps;
  const LeastUsed<A> least{least_usage + warp * s.chosen, least_slot + warp * s.chosen, s.chosen};
  least.clear();
  if (t >= 0) {
    const int64_t block_stride = int64_t{s.heads} * (s.width + 2);
    for (int r = warp; r < s.heads; r += warps) {
      A top;
      double total;
      normaliser(p.partial + b * p.split.blocks * block_stride + int64_t{r} * (s.width + 2),
                 p.split.blocks, block_stride, s.width, &top, &total);
      if (threadIdx.x % kWarp == 0) {
        tops[r] = top;
        inverse[r] = static_cast<A>(1 / total);
      }
    }
    __syncthreads();
  }
  A* weights = p.read_weights(t, b);
#pragma unroll 1
  for (int64_t begin = block * kWeightThreads; begin < s.padded;
       begin += p.slot_blocks * kWeightThreads) {
    const int64_t i = begin + threadIdx.x;
    const bool present = i < s.slots;
    A usage = 0;
    if (i < s.padded) {
      A* now = p.usage_now + b * s.padded + i;
      if (present) usage = t < 0 ? p.usage[b * s.slots + i] : *now;
#pragma unroll 4
      for (int r = 0; r < s.heads; ++r) {
        A* weight = weights + r * s.padded + i;
        const int64_t given = (b * s.heads + r) * s.slots + i;
        A w = 0;
        if (present)
          w = t < 0 ? p.scan.read_weights[given] : exponential(*weight - tops[r]) * inverse[r];
        *weight = w;
        if (t >= 0) usage += w;
        if (last && present) p.weights_out[given] = w;
      }
      *now = usage;
      if (last && present) p.usage_out[b * s.slots + i] = usage;
    }
    if (!last) least.offer(present, usage, i);
  }
  if (last) return;
  __syncthreads();
  if (warp > 0) return;
  least.offer_all(least_usage + s.chosen, least_slot + s.chosen, (warps - 1) * s.chosen);
  const int64_t to = (b * p.slot_blocks + block) * s.chosen;
  for (int i = threadIdx.x; i < s.chosen; i += kWarp) {
    p.least_usage[to + i] = least_usage[i];
    p.least_slot[to + i] = least_slot[i];
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
  const ScalarType acc = accumulation_dtype(like.scalar_type());
  const bool apart = p.scan.contents != p.scan.keys;
  const auto bytes = [&](const Split& split) {
    return ForwardRoom<A, S>(s, split, apart, nullptr).bytes;
  };
  p.split = make_split(s, vectors, sizeof(S), bytes);
  const size_t shared_bytes = static_cast<size_t>(bytes(p.split));
  p.slot_blocks = share_blocks(s.batch, 2, (s.padded + kWeightThreads - 1) / kWeightThreads);
  for_pass(s, vectors, [&](auto group, auto many, auto aligned_rows) {
    constexpr auto kPass = forward_pass<A, S, decltype(group)::value, decltype(aligned_rows)::value,
                                        decltype(many)::value>;
    p.split.blocks = share_blocks(s.batch, blocks_per_multiprocessor<kPass>(kThreads, shared_bytes),
                                  p.split.tiles);
    const bool keeps = p.history.weights != nullptr;
    Tensor initial = new_tensor(like, {s.batch, s.heads, s.padded}, acc);
    Tensor recent = new_tensor(like, {keeps ? 0 : 2, s.batch, s.heads, s.padded}, acc);
    Tensor usage = new_tensor(like, {s.batch, s.padded}, acc);
    Tensor partial = new_tensor(like, {s.batch, p.split.blocks, s.heads, s.width + 2}, acc);
    Tensor least_usage = new_tensor(like, {s.batch, p.slot_blocks, s.chosen}, acc);
    Tensor least_slot = new_tensor(like, {s.batch, p.slot_blocks, s.chosen}, ScalarType::Long);
    p.initial = pointer<A>(initial);
    p.recent = keeps ? nullptr : pointer<A>(recent);
    p.usage_now = pointer<A>(usage);
    p.partial = pointer<A>(partial);
    p.least_usage = pointer<A>(least_usage);
    p.least_slot = pointer<int64_t>(least_slot);
    const auto weights = [&](int64_t t) {
      launch<forward_weights<A, S>>(
          {.grid = grid_size(s.batch * (p.slot_blocks + (t < 0 ? 0 : s.heads))),
           .block = kWeightThreads,
           .stream = device.stream()},
          p, t);
    };
    weights(-1);
    for (int64_t t = 0; t < s.steps; ++t) {
      if (before) before(t);
      launch<kPass>({.grid = grid_size(s.batch * p.split.blocks),
                     .block = kThreads,
                     .stream = device.stream(),
                     .shared_bytes = shared_bytes},
                    p, t);
      weights(t);
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
