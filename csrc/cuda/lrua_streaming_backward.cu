// The backward pass of lrua_scan in streaming form: see lrua_streaming.h.
#include "cuda/lrua_streaming.h"

namespace mann_ext::cuda::lrua {
namespace {

// Blocks of a pass on a multiprocessor at a time, which limits their registers. Before compute
// capability 9 its shared memory has no room for more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMostBlocks = 3;
#else
constexpr int kMostBlocks = 4;
#endif
template <class A, class H>
constexpr int kBlocks = sizeof(A) == 8 ? 2
                        : H::kMany     ? 3
                                       : kMostBlocks;

template <class A, class S>
struct BackwardPass : Backward<A, S> {
  Split split;
  A* initial;       // [B][R][padded]: the read weights given
  A* memory;        // [B][N][W]: M_t where it is not a snapshot
  A* grad;          // [B][N][W]: dL/dM_t
  A* weights_grad;  // [B][R][padded]: dL/dw_t from later steps
  // One head's sums over a block's slots: the gradients of key and content, then kSums more.
  A* partial;  // [2][B][blocks][R][2 W + kSums], of step t in half t % 2

  __device__ const A* read_weights(int64_t t, int64_t b) const {
    const Sizes& s = this->scan.sizes;
    if (t < 0) return initial + b * s.heads * s.padded;
    return this->history.weights + this->scan.at(t, b) * s.heads * s.padded;
  }
  // Where head 0's sums of block 0 are; others follow.
  __device__ A* sums(int64_t t, int64_t b) const {
    const Sizes& s = this->scan.sizes;
    return partial + ((t % 2) * s.batch + b) * split.blocks * block_stride();
  }
  __device__ int64_t head_stride() const { return 2 * int64_t{this->scan.sizes.width} + kSums; }
  __device__ int64_t block_stride() const { return this->scan.sizes.heads * head_stride(); }
};

template <class A>
struct BackwardRoom {
  A *memory, *grad;                        // [stages][rows][stride]
  A *weights, *previous, *weights_grad;    // [stages][R][rows]
  A* sums;                                 // at the end, where the rows are: [row groups][G][W]
  A *write, *x, *d;                        // [rows][head_room]: w_w, dL/d(k . m), and dL/dw_w
  A* row_sums;                             // [kSums][R][rows], of all tiles
  A* square;                               // [rows]
  int* mark;                               // [rows]: which of the n slots, or -1
  A *keys, *contents, *grads;              // [R][W], or null: too large
  A *length, *strength, *gate, *expected;  // [R]
  int64_t* slots;                          // [n]
  int64_t bytes;

  // `head_room`: heads that a row has room for, at least R.
  __host__ __device__ BackwardRoom(const Sizes& s, const Split& split, int head_room, bool apart,
                                   unsigned char* base) {
    Arena arena(base);
    sums = reinterpret_cast<A*>(base);
    memory = arena.take<A>(int64_t{split.stages} * split.rows * split.stride);
    grad = arena.take<A>(int64_t{split.stages} * split.rows * split.stride);
    arena.reach(kSumsBytes<A>);
    weights = arena.take<A>(int64_t{split.stages} * s.heads * split.rows);
    previous = arena.take<A>(int64_t{split.stages} * s.heads * split.rows);
    weights_grad = arena.take<A>(int64_t{split.stages} * s.heads * split.rows);
    write = arena.take<A>(int64_t{split.rows} * head_room);
    x = arena.take<A>(int64_t{split.rows} * head_room);
    d = arena.take<A>(int64_t{split.rows} * head_room);
    row_sums = arena.take<A>(int64_t{kSums} * s.heads * split.rows);
    square = arena.take<A>(split.rows);
    mark = arena.take<int>(split.rows);
    length = arena.take<A>(s.heads);
    strength = arena.take<A>(s.heads);
    gate = arena.take<A>(s.heads);
    expected = arena.take<A>(s.heads);
    slots = arena.take<int64_t>(s.chosen);
    keys = contents = grads = nullptr;
    if (stage_vectors<A>(s)) {
      const int64_t count = int64_t{s.heads} * s.width;
      keys = arena.take<A>(count);
      grads = arena.take<A>(count);
      contents = apart ? arena.take<A>(count) : keys;
    }
    bytes = arena.used();
  }
};

// Copies what the scan was given into rows of `padded` numbers, and begins the carry: the sum over
// slots of dL/dw_T w_T goes where a step T would have left it.
template <class A, class S>
__global__ __launch_bounds__(kThreads) void backward_begin(const BackwardPass<A, S> p) {
  __shared__ double room[kWarps];
  const Sizes& s = p.scan.sizes;
  const int64_t b = blockIdx.x / p.split.blocks, block = blockIdx.x % p.split.blocks;
  const A* last = p.read_weights(s.steps - 1, b);
  for (int r = 0; r < s.heads; ++r) {
    double sum = 0;
#pragma unroll 1
    for (int64_t i = block * kThreads + threadIdx.x; i < s.padded; i += p.split.blocks * kThreads) {
      const int64_t to = (b * s.heads + r) * s.padded + i;
      const int64_t from = (b * s.heads + r) * s.slots + i;
      const bool present = i < s.slots;
      p.initial[to] = present ? p.scan.read_weights[from] : A(0);
      const A grad = present && p.grad_weights != nullptr ? p.grad_weights[from] : A(0);
      p.weights_grad[to] = grad;
      if (present && p.grad_weights != nullptr)
        sum += static_cast<double>(grad) * last[r * s.padded + i];
    }
    sum = warp_sum(sum);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) sum += room[w];
      p.sums(s.steps,
             b)[block * p.block_stride() + r * p.head_stride() + 2 * s.width + previous_sum] =
          static_cast<A>(sum);
    }
  }
}

// A warp gets the sum over blocks of one of a head's sums of step t.
template <class A, class S>
__device__ __forceinline__ double total(const BackwardPass<A, S>& p, int64_t t, int64_t b, int r,
                                        Sum which) {
  const A* sums = p.sums(t, b) + r * p.head_stride() + 2 * p.scan.sizes.width + which;
  double sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < p.split.blocks; k += kWarp)
    sum += sums[k * p.block_stride()];
  return warp_sum(sum);
}

// The gradients of step t of one head, from the blocks' sums.
template <class A, class S>
__device__ void combine_step(const BackwardPass<A, S>& p, int64_t t, int64_t b, int r,
                             double* room) {
  const Sizes& s = p.scan.sizes;
  const int lane = threadIdx.x % kWarp;
  const int64_t head = p.scan.at(t, b) * s.heads + r;
  const A* key = p.scan.keys + head * s.width;
  const A length = length_by_warp(key, s.width);
  const double own = total(p, t, b, r, own_sum);
  const double along = length > 0 ? own / length : 0;
  const A* sums = p.sums(t, b) + r * p.head_stride();
  for (int first = 0; first < s.width; first += kWarp) {
    const int column = min(first + lane, s.width - 1);
    const double key_sum = sum_over_blocks<kThreads>(
        p.split.blocks, room, [&](int64_t k) { return sums[k * p.block_stride() + column]; });
    const double content_sum = sum_over_blocks<kThreads>(p.split.blocks, room, [&](int64_t k) {
      return sums[k * p.block_stride() + s.width + column];
    });
    if (threadIdx.x < kWarp && first + lane < s.width) {
      const double grad = key_sum - along * key[column];
      if (p.grad_contents != nullptr)
        p.grad_contents[head * s.width + column] = static_cast<A>(content_sum);
      p.grad_keys[head * s.width + column] =
          static_cast<A>(p.grad_contents != nullptr ? grad : grad + content_sum);
    }
  }
  const double gate = total(p, t, b, r, previous_sum) - total(p, t, b, r, chosen_sum);
  const double strength = total(p, t, b, r, strength_sum);
  if (threadIdx.x == 0) {
    p.grad_gates[head] = static_cast<A>(gate);
    if (p.grad_strengths != nullptr) p.grad_strengths[head] = static_cast<A>(strength);
  }
}

template <class A, class S>
__global__ __launch_bounds__(kThreads) void backward_combine(const BackwardPass<A, S> p,
                                                             const int64_t t) {
  __shared__ double room[kThreads];
  const int heads = p.scan.sizes.heads;
  combine_step(p, t, blockIdx.x / heads, static_cast<int>(blockIdx.x % heads), room);
}

// M_{t-1} of one run of columns from its episode's start, as the forward pass made it.
template <int Run, class A, class S>
__device__ void replay(const BackwardPass<A, S>& p, int64_t start, int64_t t, int64_t b,
                       int64_t slot, int column, A (&run)[Run]) {
  const Sizes& s = p.scan.sizes;
  const bool given = !p.scan.resets(start, b);
  const S* from = p.scan.memory + b * p.scan.batch_stride + slot * p.scan.slot_stride;
#pragma unroll
  for (int i = 0; i < Run; ++i)
    run[i] = to_acc<A>(given ? from[(column + i) * p.scan.width_stride] : p.scan.initial);
#pragma unroll 1
  for (int64_t step = start; step < t; ++step) {
    const int k = find_slot(p.history.slots + p.scan.at(step, b) * s.chosen, s.chosen, slot);
    const A* previous = p.read_weights(step - 1, b);
    const A* contents = p.scan.content(step, b);
    if (k >= 0)
#pragma unroll
      for (A& number : run) number = 0;
#pragma unroll 1
    for (int r = 0; r < s.heads; ++r) {
      const A w = p.scan.resets(step, b) ? A(slot == 0) : previous[r * s.padded + slot];
      A content[Run];
      load_run<Run>(contents + r * s.width + column, content);
      add_scaled<Run>(run, p.scan.write_weight(p.scan.gate(step, b, r), w, r, k), content);
    }
    round_run<S, Run>(run);
  }
}

// Dot products of a row with the keys and with the gradients of the reads, and its squared length.
template <int G, bool Many, int Run, class A>
__device__ __forceinline__ void score_pair(const A* row, int lane, int lanes, int width, int heads,
                                           const A* keys, const A* grads, A* key_dots, A* grad_dots,
                                           A* square) {
  A norm = 0;
#pragma unroll 1
  for (int first = 0; first < heads; first += G) {
    A key_sums[G] = {}, grad_sums[G] = {};
#pragma unroll 1
    for (int column = lane * Run; column < width; column += lanes * Run) {
      A run[Run], vector[Run];
      load_run<Run>(row + column, run);
      if (first == 0) add_dot<Run>(norm, run, run);
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (first + g < heads) {
          load_run<Run>(keys + (first + g) * width + column, vector);
          add_dot<Run>(key_sums[g], run, vector);
          load_run<Run>(grads + (first + g) * width + column, vector);
          add_dot<Run>(grad_sums[g], run, vector);
        }
    }
    sum_lanes(key_sums, lanes);
    sum_lanes(grad_sums, lanes);
    if (lane == 0)
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (first + g < heads) {
          key_dots[first + g] = key_sums[g];
          grad_dots[first + g] = grad_sums[g];
        }
    if constexpr (!Many) break;
  }
  norm = sum_lanes(norm, lanes);
  if (lane == 0) *square = norm;
}

// Finishes G = dL/dM_t of a row and forms its dot products with the contents. The row's weights
// are `weights_stride` apart. On entry `d` has each head's part of the factor of m itself.
template <int G, bool Many, int Run, class A>
__device__ __forceinline__ void gradient_of_row(const A* row, A* grad, int lane, int lanes,
                                                int width, int heads, const A* weights,
                                                int weights_stride, const A* x, A* d, const A* keys,
                                                const A* grads, const A* contents) {
  A own = 0, weight[G], dot_grad[G];
#pragma unroll 1
  for (int r = 0; r < heads; ++r) own += d[r];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    weight[g] = !Many && g < heads ? weights[g * weights_stride] : A(0);
    dot_grad[g] = !Many && g < heads ? x[g] : A(0);
  }
  __syncwarp();  // d is overwritten
#pragma unroll 1
  for (int first = 0; first < heads; first += G) {
    A sums[G] = {};
#pragma unroll 1
    for (int column = lane * Run; column < width; column += lanes * Run) {
      A run[Run], vector[Run];
      load_run<Run>(grad + column, run);
      if (first == 0) {
        load_run<Run>(row + column, vector);
        add_scaled<Run>(run, own, vector);
        const auto add_head = [&](int r, A read_weight, A key_weight) {
          load_run<Run>(grads + r * width + column, vector);
          add_scaled<Run>(run, read_weight, vector);
          load_run<Run>(keys + r * width + column, vector);
          add_scaled<Run>(run, key_weight, vector);
        };
        if constexpr (Many) {
#pragma unroll 1
          for (int r = 0; r < heads; ++r) add_head(r, weights[r * weights_stride], x[r]);
        } else {
#pragma unroll
          for (int g = 0; g < G; ++g)
            if (g < heads) add_head(g, weight[g], dot_grad[g]);
        }
        store_run<Run>(grad + column, run);
      }
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (first + g < heads) {
          load_run<Run>(contents + (first + g) * width + column, vector);
          add_dot<Run>(sums[g], run, vector);
        }
    }
    sum_lanes(sums, lanes);
    if (lane == 0)
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (first + g < heads) d[first + g] = sums[g];
    if constexpr (!Many) break;
  }
}

// Vectors of the step at work, in shared or global memory.
template <class A>
struct Vectors {
  const A *keys, *contents, *grads;
};

// All that is done to the rows of a tile: each warp has some, and `lanes` threads share one.
template <class A, class S, class H, bool Aligned>
__device__ __forceinline__ void backward_rows(const BackwardPass<A, S>& p,
                                              const BackwardRoom<A>& room, int64_t t, int64_t b,
                                              bool reset, int stage, int64_t first,
                                              const Vectors<A>& vectors) {
  constexpr int G = H::kGroup, Run = kRun<Aligned>;
  constexpr bool Many = H::kMany;
  const Sizes& s = p.scan.sizes;
  const int heads = H::count(s.heads);
  const Split& split = p.split;
  const Items items(split, H::room(s.heads));
  const int row = items.row, of_stage = stage * heads * split.rows;
  const A *weights = room.weights + of_stage, *previous = room.previous + of_stage;
  const A* weights_grad = room.weights_grad + of_stage;
  const int64_t slot = first + row;
  const bool present = slot < s.slots;
  const auto add = [&](Sum which, int item, A number) {
    room.row_sums[which * heads * split.rows + item] += number;
  };
  const int mark = find_slot(room.slots, s.chosen, slot);
  if (items.first == 0) room.mark[row] = mark;
  const auto previous_weight = [&](int item) { return reset ? A(slot == 0) : previous[item]; };
  items.for_heads(heads, [&](int r, int item, int at) {
    room.write[at] = p.scan.write_weight(room.gate[r], previous_weight(item), r, mark);
  });

  const int thread = static_cast<int>(threadIdx.x);
  const int own_row = thread >> split.lane_bits, lane = thread & (split.lanes - 1);
  const A* numbers = room.memory + (stage * split.rows + own_row) * split.stride;
  A* grad = room.grad + (stage * split.rows + own_row) * split.stride;
  score_pair<G, Many, Run>(numbers, lane, split.lanes, s.width, heads, vectors.keys, vectors.grads,
                           room.x + own_row * items.stride, room.d + own_row * items.stride,
                           room.square + own_row);
  __syncwarp();
  const A length = square_root(room.square[row]);
  const A inverse_length = length > 0 ? A(1) / length : A(0);
  items.for_heads(heads, [&](int r, int item, int at) {
    A &x = room.x[at], &d = room.d[at];
    const A inverse = A(1) / (room.length[r] * length + p.scan.eps);
    const A cosine = x * inverse;
    const A score_grad = present ? weights[item] * (d + weights_grad[item] - room.expected[r]) : 0;
    const A dot_grad = score_grad * room.strength[r] * inverse;
    add(strength_sum, item, present ? score_grad * cosine : 0);
    add(own_sum, item, present ? dot_grad * cosine * length : 0);
    x = dot_grad;
    d = -dot_grad * cosine * room.length[r] * inverse_length;
  });
  __syncwarp();
  gradient_of_row<G, Many, Run>(numbers, grad, lane, split.lanes, s.width, heads, weights + own_row,
                                split.rows, room.x + own_row * items.stride,
                                room.d + own_row * items.stride, vectors.keys, vectors.grads,
                                vectors.contents);
  __syncwarp();
  A* weights_grad_to =
      t == 0 ? p.grad_weights_in + b * heads * s.slots : p.weights_grad + b * heads * s.padded;
  const int64_t head_stride = t == 0 ? s.slots : s.padded;
  items.for_heads(heads, [&](int r, int item, int at) {
    if (!present) return;
    const A d = room.d[at];
    weights_grad_to[r * head_stride + slot] = reset ? A(0) : room.gate[r] * d;
    add(previous_sum, item, d * previous_weight(item));
    if (p.scan.writes(r, mark)) add(chosen_sum, item, d);
  });
}

// One step back. The blocks after those that share the slots add up the step before (t + 1).
template <class A, class S, class H, bool Aligned>
__global__ __launch_bounds__(kThreads, kBlocks<A, H>) void backward_pass(const BackwardPass<A, S> p,
                                                                         const int64_t t) {
  constexpr int G = H::kGroup, Run = kRun<Aligned>;
  constexpr bool Many = H::kMany;
  const Sizes& s = p.scan.sizes;
  const int heads = H::count(s.heads);
  const Split& split = p.split;
  unsigned char* base = shared_memory<unsigned char>();
  if (blockIdx.x >= s.batch * split.blocks) {
    const int64_t head = blockIdx.x - s.batch * split.blocks;
    combine_step(p, t + 1, head / heads, static_cast<int>(head % heads),
                 reinterpret_cast<double*>(base));
    return;
  }
  const bool apart = p.scan.contents != p.scan.keys;
  const BackwardRoom<A> room(s, split, H::room(s.heads), apart, base);
  const int64_t b = blockIdx.x / split.blocks, block = blockIdx.x % split.blocks;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane_of_warp = thread % kWarp;
  const bool reset = p.scan.resets(t, b), last = t + 1 == s.steps;
  const int64_t of_batch = b * s.slots * s.width, of_weights = b * heads * s.padded;

  const auto fetch = [&](int64_t tile, int stage) {
    if (tile < split.tiles) {
      const int64_t first = tile * split.rows, at = of_batch + first * s.width;
      const int count = static_cast<int>(min(int64_t{split.rows}, s.slots - first));
      const auto fetch_to = [&](A* to, const auto* from, int present) {
        fetch_rows<Aligned>(to + stage * split.rows * split.stride, split.stride, from, s.width,
                            split.rows, present);
      };
      if (p.scan.has_snapshot(t))
        fetch_to(room.memory, p.history.snapshots + p.scan.snapshot_at(t, b) + first * s.width,
                 count);
      else if (last)
        fetch_to(room.memory, p.history.memory_out + at, count);
      else
        fetch_to(room.memory, p.memory + at, count);
      if (last)
        fetch_to(room.grad, p.grad_memory + at, p.grad_memory != nullptr ? count : 0);
      else
        fetch_to(room.grad, p.grad + at, count);
      constexpr int kPiece = kVector<A>;
      for (int at = thread * kPiece; at < heads * split.rows; at += kThreads * kPiece) {
        const int head = at * split.lanes / kThreads, to = stage * heads * split.rows + at;
        const int64_t from = head * s.padded + first + (at & (split.rows - 1));
        async_copy16(room.weights + to, p.read_weights(t, b) + from);
        async_copy16(room.previous + to, p.read_weights(t - 1, b) + from);
        async_copy16(room.weights_grad + to, p.weights_grad + of_weights + from);
      }
    }
    async_commit();
  };
  fetch(block, 0);

  const int64_t count = int64_t{heads} * s.width;
  const A* grad_reads = p.grad_reads + p.scan.at(t, b) * count;
  const A* reads = p.history.reads + p.scan.at(t, b) * count;
  Vectors<A> vectors;
  constexpr bool kAlways = kStaged<A, H, Aligned>;
  vectors.keys = stage<kAlways>(room.keys, p.scan.key(t, b), count);
  vectors.contents = vectors.keys;
  if (apart) vectors.contents = stage<kAlways>(room.contents, p.scan.content(t, b), count);
  vectors.grads = stage<kAlways>(room.grads, grad_reads, count);
  for (int i = thread; i < s.chosen; i += kThreads)
    room.slots[i] = p.history.slots[p.scan.at(t, b) * s.chosen + i];
  for (int r = warp; r < heads; r += kWarps) {
    const A length = length_by_warp(p.scan.key(t, b) + int64_t{r} * s.width, s.width);
    double expected = 0;  // c_r of the equations: sum_i w_i dL/dw_i
    for (int j = lane_of_warp; j < s.width; j += kWarp)
      expected += static_cast<double>(grad_reads[r * s.width + j]) * reads[r * s.width + j];
    expected = warp_sum(expected);
    const double carry = total(p, t + 1, b, r, previous_sum);
    if (last)
      expected += carry;
    else if (!p.scan.resets(t + 1, b))
      expected += p.scan.gate(t + 1, b, r) * carry;
    if (lane_of_warp == 0) {
      room.length[r] = length;
      room.strength[r] = p.scan.strength(t, b, r);
      room.gate[r] = p.scan.gate(t, b, r);
      room.expected[r] = static_cast<A>(expected);
    }
  }
  for (int i = thread; i < kSums * heads * split.rows; i += kThreads) room.row_sums[i] = A(0);

  const bool rolls = t > 0 && !p.scan.has_snapshot(t - 1);
  const bool replays = rolls && (reset || p.scan.near_start(t - 1, b));
  const int64_t start = replays ? p.scan.episode_start(t - 1, b) : 0;

  // Each thread sums one run of columns over every so many rows.
  const int runs = s.width / Run, groups = kThreads / runs;
  const int group = thread / runs, own_column = thread % runs * Run;
  A key_sums[G][Run] = {}, content_sums[G][Run] = {};
  A* sums = p.sums(t, b) + block * p.block_stride();
  int stage = 0;
#pragma unroll 1
  for (int64_t tile = block; tile < split.tiles; tile += split.blocks) {
    async_wait<0>();
    __syncthreads();
    if (split.stages == 2) fetch(tile + split.blocks, stage ^ 1);
    const int64_t first = tile * split.rows;
    backward_rows<A, S, H, Aligned>(p, room, t, b, reset, stage, first, vectors);
    __syncthreads();

    const A* memory = room.memory + stage * split.rows * split.stride;
    const A* grad = room.grad + stage * split.rows * split.stride;
    const int present = static_cast<int>(min(int64_t{split.rows}, s.slots - first));
    const int64_t of_tile = of_batch + first * s.width;
    // M_{t-1} and dL/dM_{t-1} of one run, from M_t without what this step has written, and dL/dM_t;
    // `at` is where they go.
    const auto step_back = [&](int row, int column, int64_t at, A(&m)[Run], A(&g)[Run]) {
      const int mark = room.mark[row];
      if (reset || mark >= 0)
#pragma unroll
        for (A& number : g) number = 0;
      if (t > 0)
        store_run<Run>(p.grad + at, g);
      else if (p.grad_memory_in != nullptr)
        store_run<Run>(p.grad_memory_in + at, g);
      if (!rolls) return;
      if (replays)
        replay<Run>(p, start, t, b, first + row, column, m);
      else if (mark >= 0)
        load_run<Run>(p.history.erased_rows +
                          (p.scan.at(t, b) * s.chosen + mark) * static_cast<int64_t>(s.width) +
                          column,
                      m);
      store_run<Run>(p.memory + at, m);
    };
    if constexpr (!Many) {
      A contents[G][Run];
#pragma unroll
      for (int i = 0; i < G; ++i)
        load_run<Run>(vectors.contents + (i < heads ? i : 0) * s.width + own_column, contents[i]);
      // Counted up, or the compiler works them out for every row.
      int64_t at = of_tile + group * s.width + own_column;
      int in_tile = group * split.stride + own_column;
#pragma unroll 1
      for (int row = group; group < groups && row < present; row += groups) {
        A m[Run], g[Run], x[G], write[G];
        load_run<Run>(memory + in_tile, m);
        load_run<Run>(grad + in_tile, g);
        load_run<G>(room.x + row * G, x);
        load_run<G>(room.write + row * G, write);
#pragma unroll
        for (int i = 0; i < G; ++i) {
          add_scaled<Run>(key_sums[i], x[i], m);
          add_scaled<Run>(content_sums[i], write[i], g);
        }
#pragma unroll
        for (int i = 0; i < G; ++i)
          if (i < heads) add_scaled<Run>(m, -write[i], contents[i]);
        step_back(row, own_column, at, m, g);
        at += groups * s.width;
        in_tile += groups * split.stride;
      }
    } else {
      // More heads or columns than registers hold: sums are kept in global memory.
      const int head_groups = (heads + G - 1) / G;
#pragma unroll 1
      for (int item = thread; item < head_groups * runs; item += kThreads) {
        const int head = item / runs * G, column = item % runs * Run;
        A key_sum[G][Run] = {}, content_sum[G][Run] = {};
#pragma unroll 1
        for (int row = 0; row < present; ++row) {
          A m[Run], g[Run];
          load_run<Run>(memory + row * split.stride + column, m);
          load_run<Run>(grad + row * split.stride + column, g);
#pragma unroll
          for (int i = 0; i < G; ++i) {
            const int at = row * heads + min(head + i, heads - 1);
            add_scaled<Run>(key_sum[i], room.x[at], m);
            add_scaled<Run>(content_sum[i], room.write[at], g);
          }
          if (head > 0) continue;
#pragma unroll 1
          for (int r = 0; r < heads; ++r) {
            A content[Run];
            load_run<Run>(vectors.contents + r * s.width + column, content);
            add_scaled<Run>(m, -room.write[row * heads + r], content);
          }
          step_back(row, column, of_tile + row * s.width + column, m, g);
        }
#pragma unroll
        for (int i = 0; i < G; ++i)
          if (head + i < heads) {
            A* kept = sums + (head + i) * p.head_stride() + column;
#pragma unroll
            for (int j = 0; j < Run; ++j) {
              kept[j] = (tile == block ? A(0) : kept[j]) + key_sum[i][j];
              kept[s.width + j] = (tile == block ? A(0) : kept[s.width + j]) + content_sum[i][j];
            }
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

  if constexpr (!Many) {
    const auto reduce = [&](const A(&of_thread)[G][Run], int offset) {
      __syncthreads();
      if (group < groups)
#pragma unroll
        for (int g = 0; g < G; ++g)
          store_run<Run>(room.sums + (group * G + g) * s.width + own_column, of_thread[g]);
      __syncthreads();
      for (int i = thread; i < heads * s.width; i += kThreads) {
        const int r = i / s.width, column = i % s.width;
        A sum = 0;
        for (int k = 0; k < groups; ++k) sum += room.sums[(k * G + r) * s.width + column];
        sums[r * p.head_stride() + offset + column] = sum;
      }
    };
    reduce(key_sums, 0);
    reduce(content_sums, s.width);
  }
  __syncthreads();
  for (int i = warp; i < kSums * heads; i += kWarps) {
    const A sum = sum_of_rows(room.row_sums + i * split.rows, split.rows);
    if (lane_of_warp == 0) sums[i % heads * p.head_stride() + 2 * s.width + i / heads] = sum;
  }
}

}  // namespace

template <class A, class S>
void backward_streaming(const Backward<A, S>& arguments, const Tensor& like, bool vectors,
                        const StepHook& after) {
  const OnDevice device(like);
  BackwardPass<A, S> p{};
  static_cast<Backward<A, S>&>(p) = arguments;
  const Sizes& s = p.scan.sizes;
  const ScalarType acc = accumulation_dtype(like.scalar_type());
  const bool apart = p.scan.contents != p.scan.keys;
  for_pass(s, vectors, [&](auto heads_of_pass, auto aligned) {
    using H = decltype(heads_of_pass);
    constexpr auto kPass = backward_pass<A, S, H, decltype(aligned)::value>;
    const auto bytes = [&](const Split& split) {
      return BackwardRoom<A>(s, split, H::room(s.heads), apart, nullptr).bytes;
    };
    p.split = make_split(s, vectors, sizeof(A), bytes);
    const size_t shared_bytes = static_cast<size_t>(bytes(p.split));
    p.split.blocks = share_blocks(s.batch, blocks_per_multiprocessor<kPass>(kThreads, shared_bytes),
                                  p.split.tiles);
    const int64_t of_memory = s.steps == 1 || p.scan.snapshot_every == 1 ? 0 : s.batch;
    Tensor initial = new_tensor(like, {s.batch, s.heads, s.padded}, acc);
    Tensor memory = new_tensor(like, {of_memory, s.slots, s.width}, acc);
    Tensor grad = new_tensor(like, {s.steps == 1 ? 0 : s.batch, s.slots, s.width}, acc);
    Tensor weights_grad = new_tensor(like, {s.batch, s.heads, s.padded}, acc);
    Tensor partial =
        new_tensor(like, {2, s.batch, p.split.blocks, s.heads, 2 * int64_t{s.width} + kSums}, acc);
    p.initial = pointer<A>(initial);
    p.memory = pointer<A>(memory);
    p.grad = pointer<A>(grad);
    p.weights_grad = pointer<A>(weights_grad);
    p.partial = pointer<A>(partial);
    const int64_t blocks = s.batch * p.split.blocks, heads = s.batch * s.heads;
    launch<backward_begin<A, S>>(
        {.grid = grid_size(blocks), .block = kThreads, .stream = device.stream()}, p);
    const auto combine = [&](int64_t t) {
      launch<backward_combine<A, S>>(
          {.grid = grid_size(heads), .block = kThreads, .stream = device.stream()}, p, t);
    };
    for (int64_t t = s.steps - 1; t >= 0; --t) {
      // A step's sums are added up by the pass after it, unless they are needed before.
      const bool adds = t + 1 < s.steps && !after;
      launch<kPass>({.grid = grid_size(blocks + (adds ? heads : 0)),
                     .block = kThreads,
                     .stream = device.stream(),
                     .shared_bytes = shared_bytes},
                    p, t);
      if (after) {
        combine(t);
        after(t);
      }
    }
    if (!after) combine(0);
  });
}

template void backward_streaming(const Backward<float, float>&, const Tensor&, bool,
                                 const StepHook&);
template void backward_streaming(const Backward<double, double>&, const Tensor&, bool,
                                 const StepHook&);
template void backward_streaming(const Backward<float, __nv_bfloat16>&, const Tensor&, bool,
                                 const StepHook&);
template void backward_streaming(const Backward<float, __half>&, const Tensor&, bool,
                                 const StepHook&);

}  // namespace mann_ext::cuda::lrua
