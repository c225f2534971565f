// The forward pass of lrua_scan with deferred writes: the twin of `Chunks` in cpu/lrua.simd.cpp.
//
// Within a chunk of steps that starts at memory M, every later memory is
// M_t = M + sum_p A_p a_p^T, with the write weights A_p of the contents a_p written so far. So
// k . m_t = k . m + sum_p A_p (k . a_p), and |m_t|^2 = |m_{t-1}|^2 + sum_r w_r a_r . (m_{t-1} +
// m_t): given the dot products of all the chunk's keys with M, a step works on numbers a slot, not
// on rows. Between two chunks one pass over the memory, the turn, makes up for the writes and reads
// of the one and forms the dot products for the other. Slots erased within the chunk hold only what
// was written since; those few rows are kept as such, and updated by the last blocks of a step.
//
// Episodes start at any step of any batch element. From there on the memory is constant and written
// only by the steps since, so the dot products with M are replaced by those with a constant row.
//
// Bytes a slot and step (4-byte numbers), C steps a chunk: 8 W / C + 20 R + 2 R (C - 1) + 24.
#include "cuda/lrua_streaming_forward.h"

namespace mann_ext::cuda::lrua {
namespace {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / kWarp;
constexpr int kStepBlocks = 2;  // on a multiprocessor at a time, which limits their registers

// A warp of the turn has a strip of every row of a tile: each thread one run of columns of some
// rows, in registers while all steps of the chunk are made up for.
constexpr int kStripRuns = 4;
template <class A>
constexpr int kThreadRows = 32 / static_cast<int>(sizeof(A));
template <class A>
constexpr int kTileRows = kWarp / kStripRuns * kThreadRows<A>;
template <class A>
constexpr int kTurnBlocks = sizeof(A) == 4 ? 3 : 2;
static_assert(mann_ext::lrua::kPadding % kTileRows<float> == 0);

struct Chunk {
  int64_t begin;
  int count;
};

template <class A>
struct ChunkPass : ForwardPass<A, A> {
  int64_t longest;      // C: steps a chunk, at most
  int64_t turn_blocks;  // for each batch element
  int64_t step_blocks;  // for each batch element, those for rows kept apart not counted
  A* key_dots;          // [B][C R][padded]: keys . M
  A* content_dots;      // the same of the contents; null: they are the keys
  A* squares;           // [B][padded]: |m_t|^2, or kApart
  A* key_gram;          // [B][C R][C R]: contents . keys, of earlier steps times their gates
  A* content_gram;      // [B][C R][C R]: contents . contents likewise
  A* lengths;           // [B][C R]: of the keys
  A* key_starts;        // [B][C R]: keys . a row at an episode's start
  A* content_starts;    // [B][C R]
  A* rows;              // [B][C][n][W]: of the slots erased in this chunk
  int64_t* slots;       // [B][C][n]: those slots
  A* reads;             // [B][turn_blocks][C R][W + 2]: reads, sum of weights, 0

  __device__ bool apart() const { return content_dots != nullptr; }
  __device__ int64_t vectors() const { return longest * this->scan.sizes.heads; }
  // A chunk's vectors by their number: head i % R of step i / R.
  __device__ const A* vector(const A* all, const Chunk& chunk, int64_t b, int64_t i) const {
    const Sizes& s = this->scan.sizes;
    return all + (this->scan.at(chunk.begin + i / s.heads, b) * s.heads + i % s.heads) * s.width;
  }
  __device__ int64_t* slots_of(int64_t b, int64_t step) const {
    return slots + (b * longest + step) * this->scan.sizes.chosen;
  }
};

// Instead of its square: a row that is kept apart. (Squares that rounding made negative are 0.)
template <class A>
constexpr A kApart = A(-1);

// ---------------------------------------------------------------- the turn

template <class A>
struct TurnRoom {
  A* rows;           // [kTileRows][stride]
  A* sums;           // [C R][W + 2], or null: too large
  uint64_t* erased;  // [C]: the rows of the tile that each step erases, a bit each
  int stride;
  int64_t bytes;

  __host__ __device__ TurnRoom(const Sizes& s, bool vectors, int64_t longest, unsigned char* base) {
    const int run = vectors ? kRun<true> : kRun<false>;
    // Neighbouring rows start in different banks.
    stride = s.width / run % 2 == 1 ? s.width : s.width + run;
    const int64_t count = longest * s.heads * (s.width + 2);
    Arena arena(base);
    rows = arena.take<A>(int64_t{kTileRows<A>} * stride);
    erased = arena.take<uint64_t>(longest);
    sums = nullptr;
    if (count * static_cast<int64_t>(sizeof(A)) <= 32 << 10) sums = arena.take<A>(count);
    bytes = arena.used();
  }
};

// The run of columns of a thread in its rows of M, where `begins`: of what the scan was given.
template <bool Vectors, class A, int Rows, int Run>
__device__ __forceinline__ void load_rows(const ChunkPass<A>& p, bool begins, int64_t b,
                                          int64_t first, int column, A (&rows)[Rows][Run]) {
  const Scan<A, A>& scan = p.scan;
  const Sizes& s = scan.sizes;
  const bool packed = !begins || (Vectors && scan.packed);
  const A* from =
      !begins ? p.history.memory_out + b * s.slots * s.width : scan.memory + b * scan.batch_stride;
#pragma unroll
  for (int j = 0; j < Rows; ++j) {
#pragma unroll
    for (int i = 0; i < Run; ++i) rows[j][i] = 0;
    if (first + j >= s.slots || column >= s.width) continue;
    if (packed) {
      load_run<Run>(from + (first + j) * s.width + column, rows[j]);
    } else {
#pragma unroll
      for (int i = 0; i < Run; ++i)
        rows[j][i] = from[(first + j) * scan.slot_stride + (column + i) * scan.width_stride];
    }
  }
}

// Step t in the rows and columns of a thread: starts an episode, erases, writes, and adds to the
// reads. `erased` has a bit a row. All lanes of the warp call this.
template <class A, int Rows, int Run>
__device__ __forceinline__ void replay_step(const ChunkPass<A>& p, const int64_t* slots, int64_t t,
                                            int64_t b, unsigned erased, int64_t first, int column,
                                            A (&rows)[Rows][Run], A* sums) {
  const Scan<A, A>& scan = p.scan;
  const Sizes& s = scan.sizes;
  const int lane = threadIdx.x % kWarp;
  const bool reset = scan.resets(t, b), live = column < s.width;
  const A* previous = p.read_weights(t - 1, b) + first;
  const A* weights = p.read_weights(t, b) + first;
  if (reset)
#pragma unroll
    for (int j = 0; j < Rows; ++j)
#pragma unroll
      for (int i = 0; i < Run; ++i) rows[j][i] = scan.initial;
  if (erased != 0)
#pragma unroll
    for (int j = 0; j < Rows; ++j) {
      if ((erased >> j & 1) == 0) continue;
      if (p.history.erased_rows != nullptr && live) {
        const int64_t k = find_slot(slots, s.chosen, first + j);
        store_run<Run>(p.history.erased_rows + (scan.at(t, b) * s.chosen + k) * s.width + column,
                       rows[j]);
      }
#pragma unroll
      for (int i = 0; i < Run; ++i) rows[j][i] = 0;
    }
#pragma unroll 1
  for (int r = 0; r < s.heads; ++r) {
    const A gate = scan.gate(t, b, r);
    A write[Rows], content[Run] = {};
    if (live) load_run<Run>(scan.content(t, b) + r * s.width + column, content);
    load_run<Rows>(previous + r * s.padded, write);
#pragma unroll
    for (int j = 0; j < Rows; ++j) {
      if (reset) write[j] = A(first + j == 0);
      const int k = (erased >> j & 1) == 0 ? -1 : find_slot(slots, s.chosen, first + j);
      add_scaled<Run>(rows[j], scan.write_weight(gate, write[j], r, k), content);
    }
  }
#pragma unroll 1
  for (int r = 0; r < s.heads; ++r, sums += s.width + 2) {
    A weight[Rows], sum[Run] = {}, total = 0;
    load_run<Rows>(weights + r * s.padded, weight);
#pragma unroll
    for (int j = 0; j < Rows; ++j) {
      add_scaled<Run>(sum, weight[j], rows[j]);
      total += weight[j];
    }
#pragma unroll
    for (int step = kStripRuns; step < kWarp; step *= 2) {
#pragma unroll
      for (int i = 0; i < Run; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], step);
      total += __shfl_xor_sync(kAllLanes, total, step);
    }
    if (lane >= kStripRuns || !live) continue;
#pragma unroll
    for (int i = 0; i < Run; ++i) sums[column + i] += sum[i];
    if (column == 0) sums[s.width] += total;
  }
}

// The dot products of a tile's rows with a chunk's vectors, and the rows' squares or null.
template <class A, int Run>
__device__ __forceinline__ void dot_products(const ChunkPass<A>& p, const TurnRoom<A>& room,
                                             const A* all, const Chunk& chunk, int64_t b,
                                             int64_t first, A* dots, A* squares) {
  constexpr int kRows = kTileRows<A> / kWarp;
  const Sizes& s = p.scan.sizes;
  const int lane = threadIdx.x % kWarp, count = chunk.count * s.heads;
#pragma unroll 1
  for (int v = threadIdx.x / kWarp * kGroup; v < count; v += kWarps * kGroup) {
    const A* vectors[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) vectors[g] = p.vector(all, chunk, b, min(v + g, count - 1));
    A sums[kRows][kGroup] = {}, square[kRows] = {};
#pragma unroll 1
    for (int column = 0; column < s.width; column += Run) {
      A row[kRows][Run];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        load_run<Run>(room.rows + (lane + k * kWarp) * room.stride + column, row[k]);
        add_dot<Run>(square[k], row[k], row[k]);
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        A vector[Run];
        load_run<Run>(vectors[g] + column, vector);
#pragma unroll
        for (int k = 0; k < kRows; ++k) add_dot<Run>(sums[k][g], row[k], vector);
      }
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t slot = first + lane + k * kWarp;
      if (slot >= s.slots) continue;
#pragma unroll
      for (int g = 0; g < kGroup; ++g)
        if (v + g < count) dots[(v + g) * s.padded + slot] = sums[k][g];
      if (v == 0 && squares != nullptr) squares[slot] = square[k];
    }
  }
}

// Makes up for the chunk `done` and prepares the chunk `next`; one of the two may have no steps.
template <class A, bool Vectors>
__global__ __launch_bounds__(kThreads, kTurnBlocks<A>) void chunk_turn(const ChunkPass<A> p,
                                                                       const Chunk done,
                                                                       const Chunk next) {
  constexpr int Run = kRun<Vectors>, kRows = kThreadRows<A>;
  const Sizes& s = p.scan.sizes;
  const TurnRoom<A> room(s, Vectors, p.longest, shared_memory<unsigned char>());
  const int64_t b = blockIdx.x / p.turn_blocks, block = blockIdx.x % p.turn_blocks;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int64_t tiles = (s.slots + kTileRows<A> - 1) / kTileRows<A>;
  const bool begins = done.count == 0 || done.begin == 0;
  const int64_t count = int64_t{done.count} * s.heads * (s.width + 2);
  A* partial = p.reads + (b * p.turn_blocks + block) * p.vectors() * (s.width + 2);
  A* sums = room.sums == nullptr ? partial : room.sums;
  for (int64_t i = thread; i < count; i += kThreads) sums[i] = 0;

#pragma unroll 1
  for (int64_t tile = block; tile < tiles; tile += p.turn_blocks) {
    const int64_t first = tile * kTileRows<A>;
    for (int u = thread; u < done.count; u += kThreads) {
      uint64_t mask = 0;
      for (int k = 0; k < s.chosen; ++k) {
        const int64_t row = p.slots_of(b, u)[k] - first;
        if (row >= 0 && row < kTileRows<A>) mask |= uint64_t{1} << row;
      }
      room.erased[u] = mask;
    }
    __syncthreads();
#pragma unroll 1
    for (int strip = warp; strip * kStripRuns * Run < s.width; strip += kWarps) {
      const int row0 = lane / kStripRuns * kRows;
      const int column = (strip * kStripRuns + lane % kStripRuns) * Run;
      A rows[kRows][Run];
      load_rows<Vectors>(p, begins, b, first + row0, column, rows);
#pragma unroll 1
      for (int u = 0; u < done.count; ++u)
        replay_step(p, p.slots_of(b, u), done.begin + u, b,
                    static_cast<unsigned>(room.erased[u] >> row0), first + row0, column, rows,
                    sums + int64_t{u} * s.heads * (s.width + 2));
      if (column >= s.width) continue;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int64_t slot = first + row0 + j;
        if (done.count > 0 && slot < s.slots)
          store_run<Run>(p.history.memory_out + (b * s.slots + slot) * s.width + column, rows[j]);
        if (next.count > 0) store_run<Run>(room.rows + (row0 + j) * room.stride + column, rows[j]);
      }
    }
    __syncthreads();
    if (next.count > 0) {
      const int64_t at = b * p.vectors() * s.padded;
      dot_products<A, Run>(p, room, p.scan.keys, next, b, first, p.key_dots + at,
                           p.squares + b * s.padded);
      if (p.apart())
        dot_products<A, Run>(p, room, p.scan.contents, next, b, first, p.content_dots + at,
                             static_cast<A*>(nullptr));
    }
  }
  if (room.sums == nullptr) return;
  __syncthreads();
  for (int64_t i = thread; i < count; i += kThreads) partial[i] = sums[i];
}

// ---------------------------------------------------------------- a chunk's beginning

// A warp gets a dot product of vectors, or the sum of one.
template <class A>
__device__ __forceinline__ double dot_by_warp(const A* x, const A* y, int width) {
  double sum = 0;
  for (int j = threadIdx.x % kWarp; j < width; j += kWarp)
    sum += static_cast<double>(x[j]) * (y == nullptr ? A(1) : y[j]);
  return warp_sum(sum);
}

// The first blocks of a batch element add up a read of the chunk before each, over the turn's
// blocks. (The backward pass takes a read for the mean of the rows under weights that sum to one.)
// The others have a warp for each number of the Gram matrices, and one for each vector alone.
template <class A>
__global__ __launch_bounds__(kWeightThreads,
                             kStepBlocks) void chunk_begin(const ChunkPass<A> p, const Chunk done,
                                                           const Chunk next, const int64_t blocks) {
  __shared__ double sums[kWeightThreads];
  const Sizes& s = p.scan.sizes;
  const int64_t b = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t reads = int64_t{done.count} * s.heads, all = p.vectors();
  if (block < reads) {
    const int64_t stride = all * (s.width + 2);
    const int64_t read = p.scan.at(done.begin + block / s.heads, b) * s.heads + block % s.heads;
    combine_read(p.reads + b * p.turn_blocks * stride + block * (s.width + 2), p.turn_blocks,
                 stride, s.width, p.history.reads + read * s.width, sums);
    return;
  }
  const int64_t count = int64_t{next.count} * s.heads;
  const int64_t item = ((block - reads) * kWeightThreads + threadIdx.x) / kWarp;
  const int64_t v = item / (count + 1), q = item % (count + 1);
  if (v >= count || (q < count && q / s.heads > v / s.heads)) return;
  const A* key = p.vector(p.scan.keys, next, b, v);
  const A* content = p.vector(p.scan.contents, next, b, v);
  const bool first = threadIdx.x % kWarp == 0;
  if (q == count) {
    const double initial = p.scan.initial;
    const A length = length_by_warp(key, s.width);
    const double key_sum = dot_by_warp<A>(key, nullptr, s.width);
    const double content_sum = dot_by_warp<A>(content, nullptr, s.width);
    if (first) {
      p.lengths[b * all + v] = length;
      p.key_starts[b * all + v] = static_cast<A>(initial * key_sum);
      p.content_starts[b * all + v] = static_cast<A>(initial * content_sum);
    }
    return;
  }
  const A* written = p.vector(p.scan.contents, next, b, q);
  const double gate = q / s.heads == v / s.heads
                          ? 1
                          : p.scan.gate(next.begin + q / s.heads, b, static_cast<int>(q % s.heads));
  const double key_dot = dot_by_warp(written, key, s.width);
  if (first) p.key_gram[(b * all + q) * all + v] = static_cast<A>(gate * key_dot);
  if (!p.apart()) return;
  const double content_dot = dot_by_warp(written, content, s.width);
  if (first) p.content_gram[(b * all + q) * all + v] = static_cast<A>(gate * content_dot);
}

// ---------------------------------------------------------------- a step

template <class A>
struct StepRoom {
  A gate[kMaxHeads], strength[kMaxHeads], length[kMaxHeads];
  int64_t slots[kMaxHeads];
  A least_usage[kStepWarps * kMaxHeads];
  int64_t least_slot[kStepWarps * kMaxHeads];
  A tops[kStepWarps * kMaxHeads], totals[kStepWarps * kMaxHeads];
};

// What a thread, warp or block has added up of one head's exponentials, shifted by `top`.
template <class A>
struct Exponentials {
  A top, total;

  static __device__ Exponentials none(A strength) {
    return {is_shifted(strength) ? -std::numeric_limits<A>::infinity() : A(0), A(0)};
  }
  __device__ void add(const Exponentials& other) {
    const A top_of_both = larger(top, other.top);
    total = shifted(top_of_both) + other.shifted(top_of_both);
    top = top_of_both;
  }
  __device__ void add_score(A score, A strength) {
    if (is_shifted(strength))
      add({score, A(1)});
    else
      total += exponential(score);
  }
  __device__ A shifted(A by) const {
    return total == 0 || top == by ? total : total * exponential(top - by);
  }
  __device__ void add_warp() {
#pragma unroll 1
    for (int step = kWarp / 2; step > 0; step /= 2)
      add({__shfl_xor_sync(kAllLanes, top, step), __shfl_xor_sync(kAllLanes, total, step)});
  }
};

template <class A>
__device__ __forceinline__ A score_of(const ChunkPass<A>& p, const StepRoom<A>& room, int r, A dot,
                                      A square) {
  return room.strength[r] * dot / (room.length[r] * square_root(square) + p.scan.eps);
}

// What the steps of a chunk before step t, since an episode's start, have left of the memory.
struct Past {
  int64_t begin;  // of the chunk
  int since, now;
  bool constant;  // an episode starts at step `since`
};

// For one slot: old_dots = contents . m_{t-1}, new_dots = contents . m_t and dots = keys . m_t, of
// `heads` heads from head r on. Many: these are not all. The factors are columns of the Gram
// matrices, from the first step that counts on.
template <class A, int G, bool Many>
__device__ __forceinline__ void mix(const ChunkPass<A>& p, const StepRoom<A>& room,
                                    const Past& past, int64_t b, int64_t slot, int r, int heads,
                                    const A* key_factors, const A* content_factors, int64_t stride,
                                    A (&old_dots)[G], A (&new_dots)[G], A (&dots)[G]) {
  const Sizes& s = p.scan.sizes;
  const bool apart = p.apart();
  const int64_t here = b * p.vectors() + int64_t{past.now} * s.heads + r;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    dots[g] = old_dots[g] = 0;
    if (g >= heads) continue;
    const int64_t at = (here + g) * s.padded + slot;
    dots[g] = past.constant ? p.key_starts[here + g] : p.key_dots[at];
    if (apart) old_dots[g] = past.constant ? p.content_starts[here + g] : p.content_dots[at];
  }
  // Adds the writes of step u of the chunk; the Gram matrices hold the gates of steps before `now`.
  const auto add_writes = [&](int u, A(&content_dots)[G]) {
    const bool starts = past.constant && u == past.since, now = u == past.now;
    const A* weights = p.read_weights(past.begin + u - 1, b) + slot;
    const int64_t first = int64_t{u - past.since} * s.heads;
#pragma unroll 4
    for (int q = 0; q < (Many ? s.heads : G); ++q) {
      if (!Many && q >= heads) continue;
      A weight = starts ? A(slot == 0) : weights[q * s.padded];
      if (now) weight *= room.gate[q];
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (g < heads) {
          dots[g] += weight * key_factors[(first + q) * stride + g];
          if (apart) content_dots[g] += weight * content_factors[(first + q) * stride + g];
        }
    }
  };
  // Several steps' weights are on their way at a time, as registers allow.
  constexpr int kSteps = G == 1 ? 4 : sizeof(A) == 4 ? 2 : 1;
#pragma unroll kSteps
  for (int u = past.since; u < past.now; ++u) add_writes(u, old_dots);
#pragma unroll
  for (int g = 0; g < G; ++g) new_dots[g] = old_dots[g] = apart ? old_dots[g] : dots[g];
  add_writes(past.now, new_dots);
  if (!apart)
#pragma unroll
    for (int g = 0; g < G; ++g) new_dots[g] = dots[g];
}

// A warp updates and addresses a row that is kept apart: that of the slot erased k-th at a step of
// the chunk, if no later step erased it as well. Each head's score joins `tops` and `totals`.
template <class A>
__device__ void step_row(const ChunkPass<A>& p, const StepRoom<A>& room, const Past& past,
                         int64_t b, int step, int k, A* tops, A* totals) {
  const Sizes& s = p.scan.sizes;
  const int lane = threadIdx.x % kWarp;
  const int64_t t = past.begin + past.now;
  const bool now = step == past.now, reset = past.constant && past.since == past.now;
  const int64_t slot = now ? room.slots[k] : p.slots_of(b, step)[k];
  const int64_t* later = p.slots_of(b, step + 1);
  bool again = false;
  for (int i = lane; i < (past.now - step - 1) * s.chosen; i += kWarp) again |= later[i] == slot;
  if (!now) again |= find_slot(room.slots, s.chosen, slot) >= 0;
  if (__any_sync(kAllLanes, again)) return;

  A* row = p.rows + ((b * p.longest + step) * s.chosen + k) * s.width;
  const A *keys = p.scan.key(t, b), *contents = p.scan.content(t, b);
  const A* previous = p.read_weights(t - 1, b) + slot;
  double square = 0;
  for (int j = lane; j < s.width; j += kWarp) {
    A x = now ? A(0) : row[j];
    for (int r = 0; r < s.heads; ++r) {
      const A w = reset ? A(slot == 0) : previous[r * s.padded];
      x += p.scan.write_weight(room.gate[r], w, r, now ? k : -1) * contents[r * s.width + j];
    }
    row[j] = x;
    square += static_cast<double>(x) * x;
  }
  square = warp_sum(square);
  for (int r = 0; r < s.heads; ++r) {
    const A dot = static_cast<A>(dot_by_warp<A>(row, keys + r * s.width, s.width));
    const A score = score_of(p, room, r, dot, static_cast<A>(square));
    if (lane > 0) continue;
    p.read_weights(t, b)[r * s.padded + slot] = score;
    Exponentials<A> sum{tops[r], totals[r]};
    sum.add_score(score, room.strength[r]);
    tops[r] = sum.top;
    totals[r] = sum.total;
  }
}

// Scores of step t, in numbers a slot, and the sums of their exponentials. Many: more heads than G.
template <class A, int G, bool Many>
__global__ __launch_bounds__(kStepThreads, kStepBlocks) void chunk_step(const ChunkPass<A> p,
                                                                        const Chunk chunk,
                                                                        const int64_t t) {
  __shared__ StepRoom<A> room;
  __shared__ A key_factors[Many ? 1 : mann_ext::lrua::kMaxChunk * G * G];
  __shared__ A content_factors[Many ? 1 : mann_ext::lrua::kMaxChunk * G * G];
  const Sizes& s = p.scan.sizes;
  const int64_t b = blockIdx.x / p.split.blocks, block = blockIdx.x % p.split.blocks;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp;
  const bool reset = p.scan.resets(t, b);
  Past past{chunk.begin, 0, static_cast<int>(t - chunk.begin), false};
  for (int u = 0; u <= past.now; ++u)
    if (p.scan.resets(chunk.begin + u, b)) past.since = u, past.constant = true;

  choose_slots<kStepWarps>(p, LeastUsed<A>{room.least_usage, room.least_slot, s.chosen}, room.slots,
                           t, b, reset, block == 0 && p.history.slots != nullptr);
  const int64_t all = p.vectors(), now = int64_t{past.now} * s.heads;
  for (int r = thread; r < s.heads; r += kStepThreads) {
    room.gate[r] = p.scan.gate(t, b, r);
    room.strength[r] = p.scan.strength(t, b, r);
    room.length[r] = p.lengths[b * all + now + r];
  }
  // The Gram matrices' columns of this step, from the first step that counts on.
  const int64_t gram_at = (b * all + int64_t{past.since} * s.heads) * all + now;
  if constexpr (!Many) {
    const int count = (past.now + 1 - past.since) * s.heads * G;
    for (int i = thread; i < count; i += kStepThreads) {
      const int64_t at = gram_at + i / G * all + min(i % G, s.heads - 1);
      key_factors[i] = p.key_gram[at];
      if (p.apart()) content_factors[i] = p.content_gram[at];
    }
  }
  __syncthreads();
  if (block == 0)
    for (int i = thread; i < s.chosen; i += kStepThreads)
      p.slots_of(b, past.now)[i] = room.slots[i];
  for (int r = lane; r < s.heads; r += kWarp) {
    const auto none = Exponentials<A>::none(room.strength[r]);
    room.tops[warp * s.heads + r] = none.top;
    room.totals[warp * s.heads + r] = none.total;
  }
  __syncwarp();

  A* scores = p.read_weights(t, b);
  if (block >= p.step_blocks) {
    const int64_t item = (block - p.step_blocks) * kStepWarps + warp;
    const int step = static_cast<int>(item / s.chosen), k = static_cast<int>(item % s.chosen);
    if (step >= past.since && step <= past.now)
      step_row(p, room, past, b, step, k, room.tops + warp * s.heads, room.totals + warp * s.heads);
  } else {
    const A* previous = p.read_weights(t - 1, b);
    A* squares = p.squares + b * s.padded;
    const auto previous_weight = [&](int r, int64_t slot) {
      return reset ? A(slot == 0) : previous[r * s.padded + slot];
    };
    Exponentials<A> sums[G];
#pragma unroll
    for (int g = 0; g < G; ++g) sums[g] = Exponentials<A>::none(room.strength[min(g, s.heads - 1)]);
    const int64_t step = p.step_blocks * kStepThreads;
#pragma unroll 1
    for (int64_t slot = block * kStepThreads + thread; slot < s.slots; slot += step) {
      const int mark = find_slot(room.slots, s.chosen, slot);
      A usage = p.usage_decay * (reset ? A(slot == 0) : p.usage_now[b * s.padded + slot]);
      for (int r = 0; r < s.heads; ++r)
        usage += p.scan.write_weight(room.gate[r], previous_weight(r, slot), r, mark);
      p.usage_now[b * s.padded + slot] = usage;
      A square = squares[slot];
      if (reset) square = p.scan.initial * p.scan.initial * static_cast<A>(s.width);
      if (mark >= 0) square = kApart<A>;
      if (square == kApart<A>) {
        squares[slot] = square;
        continue;
      }
      A dots[G];
#pragma unroll 1
      for (int r = 0; r < s.heads; r += G) {
        const int heads = min(G, s.heads - r);
        A old_dots[G], new_dots[G];
        if constexpr (Many)
          mix<A, G, Many>(p, room, past, b, slot, r, heads, p.key_gram + gram_at + r,
                          p.content_gram + gram_at + r, all, old_dots, new_dots, dots);
        else
          mix<A, G, Many>(p, room, past, b, slot, r, heads, key_factors, content_factors, G,
                          old_dots, new_dots, dots);
#pragma unroll
        for (int g = 0; g < G; ++g)
          if (g < heads) {
            square += room.gate[r + g] * previous_weight(r + g, slot) * (old_dots[g] + new_dots[g]);
            if constexpr (Many) scores[(r + g) * s.padded + slot] = dots[g];
          }
      }
      square = square < 0 ? A(0) : square;  // NaN stays
      squares[slot] = square;
      if constexpr (Many) {
        for (int r = 0; r < s.heads; ++r) {
          A& score = scores[r * s.padded + slot];
          score = score_of(p, room, r, score, square);
        }
      } else {
#pragma unroll
        for (int g = 0; g < G; ++g)
          if (g < s.heads) {
            const A score = score_of(p, room, g, dots[g], square);
            scores[g * s.padded + slot] = score;
            sums[g].add_score(score, room.strength[g]);
          }
      }
    }
    const auto keep = [&](int r, Exponentials<A> sum) {
      sum.add_warp();
      if (lane > 0) return;
      room.tops[warp * s.heads + r] = sum.top;
      room.totals[warp * s.heads + r] = sum.total;
    };
    if constexpr (Many) {
#pragma unroll 1
      for (int r = 0; r < s.heads; ++r) {
        auto sum = Exponentials<A>::none(room.strength[r]);
#pragma unroll 1
        for (int64_t slot = block * kStepThreads + thread; slot < s.slots; slot += step)
          if (squares[slot] != kApart<A>)
            sum.add_score(scores[r * s.padded + slot], room.strength[r]);
        keep(r, sum);
      }
    } else {
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (g < s.heads) keep(g, sums[g]);
    }
  }
  __syncthreads();
  for (int r = thread; r < s.heads; r += kStepThreads) {
    Exponentials<A> sum{room.tops[r], room.totals[r]};
    for (int w = 1; w < kStepWarps; ++w)
      sum.add({room.tops[w * s.heads + r], room.totals[w * s.heads + r]});
    A* partial = p.partial + ((b * p.split.blocks + block) * s.heads + r) * 2;
    partial[0] = sum.total;
    partial[1] = sum.top;
  }
}

}  // namespace

// ---------------------------------------------------------------- host

template <class A>
int64_t forward_chunked_bytes(const Forward<A, A>& p, bool vectors, int64_t chunk) {
  return TurnRoom<A>(p.scan.sizes, vectors, chunk, nullptr).bytes;
}

template <class A>
void forward_chunked(const Forward<A, A>& arguments, const Tensor& like, bool vectors,
                     int64_t chunk) {
  const OnDevice device(like);
  ChunkPass<A> p{};
  static_cast<Forward<A, A>&>(p) = arguments;
  p.longest = chunk;
  const Sizes& s = p.scan.sizes;
  const auto shared_bytes = static_cast<size_t>(forward_chunked_bytes(arguments, vectors, chunk));
  const int64_t all = chunk * s.heads, tiles = (s.slots + kTileRows<A> - 1) / kTileRows<A>;
  const int64_t apart = p.scan.contents == p.scan.keys ? 0 : 1;
  const auto row_blocks = [&](int64_t steps) {
    return (steps * s.chosen + kStepWarps - 1) / kStepWarps;
  };
  p.step_blocks = share_blocks(s.batch, kStepBlocks, (s.slots + kStepThreads - 1) / kStepThreads);
  p.turn_blocks = share_blocks(
      s.batch,
      vectors ? blocks_per_multiprocessor<chunk_turn<A, true>>(kThreads, shared_bytes)
              : blocks_per_multiprocessor<chunk_turn<A, false>>(kThreads, shared_bytes),
      tiles);

  const ForwardBuffers buffers(p, like, p.step_blocks + row_blocks(chunk), chunk + 1);
  const auto numbers = [&](std::initializer_list<int64_t> shape) {
    return new_tensor(like, shape, like.scalar_type());
  };
  Tensor dots = numbers({1 + apart, s.batch, all, s.padded});
  Tensor squares = numbers({s.batch, s.padded});
  Tensor gram = numbers({1 + apart, s.batch, all, all});
  Tensor facts = numbers({3, s.batch, all});
  Tensor rows = numbers({s.batch, chunk, s.chosen, s.width});
  Tensor slots = new_tensor(like, {s.batch, chunk, s.chosen}, ScalarType::Long);
  Tensor reads = numbers({s.batch, p.turn_blocks, all, s.width + 2});
  p.key_dots = pointer<A>(dots);
  p.content_dots = apart == 1 ? p.key_dots + s.batch * all * s.padded : nullptr;
  p.squares = pointer<A>(squares);
  p.key_gram = pointer<A>(gram);
  p.content_gram = p.key_gram + apart * s.batch * all * all;
  p.lengths = pointer<A>(facts);
  p.key_starts = p.lengths + s.batch * all;
  p.content_starts = p.key_starts + s.batch * all;
  p.rows = pointer<A>(rows);
  p.slots = pointer<int64_t>(slots);
  p.reads = pointer<A>(reads);

  const auto turn = [&](const Chunk& done, const Chunk& next) {
    const Launch how{.grid = grid_size(s.batch * p.turn_blocks),
                     .block = kThreads,
                     .stream = device.stream(),
                     .shared_bytes = shared_bytes};
    if (vectors)
      launch<chunk_turn<A, true>>(how, p, done, next);
    else
      launch<chunk_turn<A, false>>(how, p, done, next);
    const int64_t count = int64_t{next.count} * s.heads;
    const int64_t warps = kWeightThreads / kWarp;
    const int64_t blocks = done.count * s.heads + (count * (count + 1) + warps - 1) / warps;
    launch<chunk_begin<A>>(
        {.grid = grid_size(s.batch * blocks), .block = kWeightThreads, .stream = device.stream()},
        p, done, next, blocks);
  };
  const auto step = [&](const Chunk& now, int64_t t) {
    p.split.blocks = p.step_blocks + row_blocks(t - now.begin + 1);
    const Launch how{.grid = grid_size(s.batch * p.split.blocks),
                     .block = kStepThreads,
                     .stream = device.stream()};
    if (s.heads > kGroup)
      launch<chunk_step<A, kGroup, true>>(how, p, now, t);
    else if (s.heads == 1)
      launch<chunk_step<A, 1, false>>(how, p, now, t);
    else
      launch<chunk_step<A, kGroup, false>>(how, p, now, t);
    launch_weights<A, A>(p, t, device.stream());
  };
  launch_weights<A, A>(p, -1, device.stream());
  Chunk done{0, 0};
  for (int64_t t = 0; t < s.steps; t += chunk) {
    const Chunk now{t, static_cast<int>(min(chunk, s.steps - t))};
    turn(done, now);
    for (int u = 0; u < now.count; ++u) step(now, t + u);
    done = now;
  }
  turn(done, {s.steps, 0});
}

template int64_t forward_chunked_bytes(const Forward<float, float>&, bool, int64_t);
template int64_t forward_chunked_bytes(const Forward<double, double>&, bool, int64_t);
template void forward_chunked(const Forward<float, float>&, const Tensor&, bool, int64_t);
template void forward_chunked(const Forward<double, double>&, const Tensor&, bool, int64_t);

}  // namespace mann_ext::cuda::lrua
