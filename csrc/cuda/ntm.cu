// ntm_scan on the GPU: one launch runs all steps, with one block for each batch element.
//
// Memory, weights and the stages of addressing lie in shared memory where they fit, as 900 slots of
// 40 float32 numbers with 5 heads do forward and 350 backward, else in global memory; the code is
// the same. MANN_EXT_CUDA_REGIME=streaming puts all of them there.
// Work on rows (dot products) is shared by the lanes of a row, addressing has one warp a head, and
// each warp forms the sums over slots of some columns.
#include <limits>
#include <tuple>

#include "cuda/lrua.h"
#include "ntm_tensors.h"

namespace mann_ext::cuda::ntm {
namespace {

namespace tensors = mann_ext::ntm;
using cuda::lrua::Arena;
using cuda::lrua::exponential;
using cuda::lrua::larger;
using cuda::lrua::largest_in_warp;
using cuda::lrua::length_by_warp;
using cuda::lrua::logarithm;
using cuda::lrua::pointer;
using cuda::lrua::square_root;
using tensors::Given;
using tensors::kMaxHeads;
using tensors::kTaps;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowLanes = 8;  // that share a row
constexpr int kRowStep = kThreads / kRowLanes;
constexpr int kGroup = 4;  // heads at a time, whose sums are in registers

// x^y for x in [0, 1] and y at least 0, as of real numbers.
template <class A>
__device__ __forceinline__ A power(A x, A y) {
  if (x == 0) return y == 0 ? A(1) : A(0);
  return exponential(y * logarithm(x));
}

// Arguments of the scan, the same forward and backward.
template <class A>
struct Scan {
  int64_t steps, batch;
  int slots, width, heads, reads, writes, padded;
  int stride;  // of rows in the room, odd: the lanes of a column meet different banks
  A eps, initial;
  int64_t snapshot_every;
  const A* memory;  // strides in elements
  int64_t batch_stride, slot_stride, width_stride;
  const A *weights, *keys, *strengths, *gates, *shifts, *sharpenings, *erases, *adds;
  const bool* reset;
  A* weight_history;  // [T][B][H][padded] or null
  A* snapshots;       // [T / snapshot_every][B][padded][W] or null
  A* room;            // [B][numbers a block] in global memory; null: in shared memory
  int64_t room_bytes;

  __device__ int64_t at(int64_t t, int64_t b) const { return t * batch + b; }
  __device__ bool resets(int64_t t, int64_t b) const { return reset != nullptr && reset[at(t, b)]; }
  __device__ const A* key(int64_t t, int64_t b, int h) const {
    return keys + (at(t, b) * heads + h) * width;
  }
  __device__ const A* erase(int64_t t, int64_t b) const {
    return erases + at(t, b) * writes * width;
  }
  __device__ const A* add(int64_t t, int64_t b) const { return adds + at(t, b) * writes * width; }
  __device__ A* history(int64_t t, int64_t b) const {
    return weight_history + at(t, b) * heads * padded;
  }
  __device__ A* snapshot(int64_t t, int64_t b) const {
    return snapshots + at(t / snapshot_every, b) * padded * width;
  }
  __device__ unsigned char* block_room() const {
    return room == nullptr ? shared_memory<unsigned char>()
                           : reinterpret_cast<unsigned char*>(room) + blockIdx.x * room_bytes;
  }
};

// Calls f(i) for what this thread has of `count` things.
template <class F>
__device__ __forceinline__ void share(int count, F&& f) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) f(i);
}
// Calls f(row, column) for all numbers of the memory.
template <class A, class F>
__device__ __forceinline__ void share_numbers(const Scan<A>& p, F&& f) {
  const int count = p.slots * p.width;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) f(i / p.width, i % p.width);
}
// Calls f(row, lane, whether there is that row) for the rows of this thread; whole warps do.
template <class F>
__device__ __forceinline__ void share_rows(int slots, F&& f) {
  const int first = static_cast<int>(threadIdx.x) / kRowLanes;
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  const int of_warp = static_cast<int>(threadIdx.x) / kWarp * (kWarp / kRowLanes);
#pragma unroll 1
  for (int base = 0; base + of_warp < slots; base += kRowStep) {
    const int row = base + first;
    f(row < slots ? row : slots - 1, lane, row < slots);
  }
}
template <class A>
__device__ __forceinline__ A sum_row(A x) {
#pragma unroll
  for (int step = 1; step < kRowLanes; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
// Calls f(i) for a warp's slots, and sums what it returns.
template <class A, class F>
__device__ __forceinline__ A sum_slots(int slots, F&& f) {
  A sum = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < slots; i += kWarp) sum += f(i);
  return warp_sum(sum);
}

// M_{-1} of an episode: the argument, or the constant.
template <class A>
__device__ __forceinline__ void start_memory(const Scan<A>& p, int64_t b, bool given, A* to) {
  const A* from = p.memory + b * p.batch_stride;
  share_numbers(p, [&](int i, int j) {
    to[i * p.stride + j] = given ? from[i * p.slot_stride + j * p.width_stride] : p.initial;
  });
}

// M_t of one number from M_{t-1}, by the weights w [writes][stride].
template <class A>
__device__ __forceinline__ A update(const Scan<A>& p, A m, const A* w, int stride, const A* erases,
                                    const A* adds, int column) {
  A added = 0;
#pragma unroll 1
  for (int h = 0; h < p.writes; ++h) {
    const A weight = w[h * stride];
    m *= A(1) - weight * erases[h * p.width + column];
    added += weight * adds[h * p.width + column];
  }
  return m + added;
}

// dots [heads][slots] of the rows with vectors [heads][width]; f(row, head, dot) by one lane.
template <class A, class F>
__device__ __forceinline__ void score_row(const Scan<A>& p, const A* row, int lane,
                                          const A* vectors, int heads, F&& f) {
#pragma unroll 1
  for (int h = 0; h < heads; h += kGroup) {
    A sums[kGroup] = {};
#pragma unroll 1
    for (int j = lane; j < p.width; j += kRowLanes) {
      const A m = row[j];
#pragma unroll
      for (int g = 0; g < kGroup; ++g)
        if (h + g < heads) sums[g] += m * vectors[(h + g) * p.width + j];
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      sums[g] = sum_row(sums[g]);
      if (lane == 0 && h + g < heads) f(h + g, sums[g]);
    }
  }
}
template <class A>
__device__ __forceinline__ A squared_row(const Scan<A>& p, const A* row, int lane) {
  A sum = 0;
#pragma unroll 1
  for (int j = lane; j < p.width; j += kRowLanes) sum += row[j] * row[j];
  return sum_row(sum);
}

// sum_i weights_h,i memory_ij of some heads and all columns: f(head, column, sum) by one lane.
template <class A, class F>
__device__ __forceinline__ void sums_over_slots(const Scan<A>& p, const A* memory, const A* weights,
                                                int heads, F&& f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x) / kWarp; j < p.width; j += kWarps)
#pragma unroll 1
    for (int h = 0; h < heads; h += kGroup) {
      A sums[kGroup] = {};
#pragma unroll 1
      for (int i = lane; i < p.slots; i += kWarp) {
        const A m = memory[i * p.stride + j];
#pragma unroll
        for (int g = 0; g < kGroup; ++g)
          if (h + g < heads) sums[g] += weights[(h + g) * p.slots + i] * m;
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        sums[g] = warp_sum(sums[g]);
        if (lane == 0 && h + g < heads) f(h + g, j, sums[g]);
      }
    }
}

// What one head is given at one step, in the registers of its warp.
template <class A>
struct Head {
  A length, strength, gate, sharpening, down, stay, up;

  __device__ Head(const Scan<A>& p, int64_t t, int64_t b, int h) {
    const int64_t i = p.at(t, b) * p.heads + h;
    length = length_by_warp(p.key(t, b, h), p.width);
    strength = p.strengths[i];
    gate = p.gates[i];
    sharpening = p.sharpenings[i];
    down = p.shifts[i * kTaps];
    stay = p.shifts[i * kTaps + 1];
    up = p.shifts[i * kTaps + 2];
  }
};

// One head's rows [slots] of the stages of addressing. cosine holds the dot products before.
template <class A>
struct Stages {
  A *cosine, *content, *gated, *shifted;
};
template <class A>
struct Powers {
  A largest, total;  // w~, and the sum of (w~ / largest)^gamma
};

__device__ __forceinline__ int above(int i, int slots) { return i + 1 < slots ? i + 1 : 0; }
__device__ __forceinline__ int below(int i, int slots) { return i > 0 ? i - 1 : slots - 1; }

// A warp makes one head's weights (eqs. 5-9). cosine, content and shifted may be the same row, for
// a caller that needs none of them afterwards.
template <class A>
__device__ __forceinline__ Powers<A> address(const Scan<A>& p, const Head<A>& head,
                                             const A* squares, const A* previous,
                                             const Stages<A>& to, A* weights) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, slots = p.slots;
  A top = -std::numeric_limits<A>::infinity();
#pragma unroll 1
  for (int i = lane; i < slots; i += kWarp) {
    const A cosine = to.cosine[i] / (head.length * square_root(squares[i]) + p.eps);
    to.cosine[i] = cosine;
    to.content[i] = head.strength * cosine;
    top = larger(top, head.strength * cosine);
  }
  top = largest_in_warp(top);
  const A normaliser =
      sum_slots<A>(slots, [&](int i) { return to.content[i] = exponential(to.content[i] - top); });
#pragma unroll 1
  for (int i = lane; i < slots; i += kWarp) {
    const A content = to.content[i] / normaliser;
    to.content[i] = content;
    to.gated[i] = head.gate * content + (A(1) - head.gate) * previous[i];
  }
  __syncwarp();
  A largest = -std::numeric_limits<A>::infinity();
#pragma unroll 1
  for (int i = lane; i < slots; i += kWarp) {
    const A shifted = head.down * to.gated[above(i, slots)] + head.stay * to.gated[i] +
                      head.up * to.gated[below(i, slots)];
    to.shifted[i] = shifted;
    largest = larger(largest, shifted);
  }
  largest = largest_in_warp(largest);
  const A total = sum_slots<A>(
      slots, [&](int i) { return weights[i] = power(to.shifted[i] / largest, head.sharpening); });
#pragma unroll 1
  for (int i = lane; i < slots; i += kWarp) weights[i] /= total;
  return {largest, total};
}

// ---------------------------------------------------------------- forward

template <class A>
struct Forward : Scan<A> {
  A* reads_out;    // [T][B][reads][W]
  A* memory_out;   // [B][N][W]
  A* weights_out;  // [B][H][N]
};

template <class A>
struct ForwardRoom {
  A *memory, *weights, *previous, *scores, *gated, *squares;
  int64_t bytes;

  __host__ __device__ ForwardRoom(const Scan<A>& p, unsigned char* base) {
    Arena arena(base);
    const int64_t of_heads = int64_t{p.heads} * p.slots;
    memory = arena.take<A>(int64_t{p.slots} * p.stride);
    weights = arena.take<A>(of_heads);
    previous = arena.take<A>(of_heads);
    scores = arena.take<A>(of_heads);
    gated = arena.take<A>(of_heads);
    squares = arena.take<A>(p.slots);
    bytes = arena.used();
  }
};

template <class A>
__global__ __launch_bounds__(kThreads) void forward_scan(const Forward<A> p) {
  const ForwardRoom<A> room(p, p.block_room());
  const int64_t b = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int of_heads = p.heads * p.slots;
  A *weights = room.weights, *previous = room.previous;

  const auto score = [&](int64_t t, int first, int heads) {
    share_rows(p.slots, [&](int i, int lane, bool present) {
      const A* row = room.memory + i * p.stride;
      score_row(p, row, lane, p.key(t, b, first), heads, [&](int h, A dot) {
        if (present) room.scores[(first + h) * p.slots + i] = dot;
      });
      const A square = squared_row(p, row, lane);
      if (lane == 0 && present) room.squares[i] = square;
    });
  };
  const auto address_heads = [&](int64_t t, int first, int end) {
#pragma unroll 1
    for (int h = first + warp; h < end; h += kWarps) {
      A* scores = room.scores + h * p.slots;
      address(p, Head<A>(p, t, b, h), room.squares, previous + h * p.slots,
              Stages<A>{scores, scores, room.gated + h * p.slots, scores}, weights + h * p.slots);
    }
  };

#pragma unroll 1
  for (int64_t t = 0; t < p.steps; ++t) {
    const bool reset = p.resets(t, b);
    if (t == 0 || reset) {
      start_memory(p, b, !reset, room.memory);
      share(of_heads, [&](int i) {
        previous[i] = reset ? A(i % p.slots == 0) : p.weights[b * of_heads + i];
      });
    }
    __syncthreads();
    score(t, p.reads, p.writes);
    __syncthreads();
    address_heads(t, p.reads, p.heads);
    __syncthreads();
    const A* write = weights + p.reads * p.slots;
    A* saved =
        p.snapshots != nullptr && (t + 1) % p.snapshot_every == 0 ? p.snapshot(t, b) : nullptr;
    share_numbers(p, [&](int i, int j) {
      A& m = room.memory[i * p.stride + j];
      m = update(static_cast<const Scan<A>&>(p), m, write + i, p.slots, p.erase(t, b), p.add(t, b),
                 j);
      if (saved != nullptr) saved[i * p.width + j] = m;
    });
    __syncthreads();
    score(t, 0, p.reads);
    __syncthreads();
    address_heads(t, 0, p.reads);
    __syncthreads();
    A* reads = p.reads_out + p.at(t, b) * p.reads * p.width;
    sums_over_slots(static_cast<const Scan<A>&>(p), room.memory, weights, p.reads,
                    [&](int h, int j, A sum) { reads[h * p.width + j] = sum; });
    if (p.weight_history != nullptr)
      share(of_heads,
            [&](int i) { p.history(t, b)[i / p.slots * p.padded + i % p.slots] = weights[i]; });
    __syncthreads();
    A* const last = weights;
    weights = previous;
    previous = last;
  }
  share_numbers(p, [&](int i, int j) {
    p.memory_out[(b * p.slots + i) * p.width + j] = room.memory[i * p.stride + j];
  });
  share(of_heads, [&](int i) { p.weights_out[b * of_heads + i] = previous[i]; });
}

// ---------------------------------------------------------------- backward

template <class A>
struct Backward : Scan<A> {
  A* segment;  // [B][min(snapshot_every - 1, T)][N][W]: memories that are made again
  const A *grad_reads, *grad_memory, *grad_weights;  // or null
  A* grad_memory_in;                                 // or null
  A *grad_weights_in, *grad_keys, *grad_strengths, *grad_gates, *grad_shifts, *grad_sharpenings;
  A *grad_erases, *grad_adds;

  __device__ A* saved_memory(int64_t t, int64_t b) const {
    const int64_t every = this->snapshot_every;
    if ((t + 1) % every == 0) return this->snapshot(t, b);
    const int64_t count = every - 1 < this->steps ? every - 1 : this->steps;
    return segment + (b * count + t % every) * this->slots * this->width;
  }
};

template <class A>
struct BackwardRoom {
  A *now, *before, *grad;                 // M_t, M_{t-1} and dL/dM
  A *weights, *previous, *weights_grad;   // w_t, w_{t-1} and dL/dw_t
  A *cosine, *content, *gated, *shifted;  // as Stages; then self, x, -, dL/dw_g
  A *shifted_grad, *squares, *own;
  int64_t bytes;

  __host__ __device__ BackwardRoom(const Scan<A>& p, unsigned char* base) {
    Arena arena(base);
    const int64_t numbers = int64_t{p.slots} * p.stride, of_heads = int64_t{p.heads} * p.slots;
    now = arena.take<A>(numbers);
    before = arena.take<A>(numbers);
    grad = arena.take<A>(numbers);
    weights = arena.take<A>(of_heads);
    previous = arena.take<A>(of_heads);
    weights_grad = arena.take<A>(of_heads);
    cosine = arena.take<A>(of_heads);
    content = arena.take<A>(of_heads);
    gated = arena.take<A>(of_heads);
    shifted = arena.take<A>(of_heads);
    shifted_grad = arena.take<A>(of_heads);
    squares = arena.take<A>(p.slots);
    own = arena.take<A>(p.heads);
    bytes = arena.used();
  }
};

// A warp goes through one head's stages backwards. `grad`: dL/dw in, dL/dw_{t-1} out.
template <class A>
__device__ __forceinline__ void differentiate(const Backward<A>& p, const BackwardRoom<A>& room,
                                              const Head<A>& head, const Powers<A>& powers,
                                              int64_t i_head, int h) {
  const int slots = p.slots, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{h} * slots;
  const A *weights = room.weights + row, *previous = room.previous + row;
  A *grad = room.weights_grad + row, *shifted_grad = room.shifted_grad + row;
  A *cosine = room.cosine + row, *content = room.content + row, *shifted = room.shifted + row;
  const A* gated = room.gated + row;

  // Sharpening is a softmax of gamma ln(w~).
  const A mean = sum_slots<A>(slots, [&](int i) { return weights[i] * grad[i]; });
  const A scale = head.sharpening / (powers.total * powers.largest);
  const A sharpening = sum_slots<A>(slots, [&](int i) {
    const A scaled = shifted[i] / powers.largest, difference = grad[i] - mean;
    shifted_grad[i] = scale * power(scaled, head.sharpening - A(1)) * difference;
    return scaled == 0 ? A(0) : weights[i] * difference * logarithm(scaled);
  });
  __syncwarp();

  // Shift and gate.
  A sums[5] = {};
#pragma unroll 1
  for (int i = lane; i < slots; i += kWarp) {
    const int up = above(i, slots), down = below(i, slots);
    const A d = shifted_grad[i];
    const A gated_grad =
        head.down * shifted_grad[down] + head.stay * d + head.up * shifted_grad[up];
    sums[0] += d * gated[up];
    sums[1] += d * gated[i];
    sums[2] += d * gated[down];
    sums[3] += gated_grad * (content[i] - previous[i]);
    sums[4] += gated_grad * content[i];
    shifted[i] = gated_grad;
    grad[i] = (A(1) - head.gate) * gated_grad;
  }
#pragma unroll
  for (A& sum : sums) sum = warp_sum(sum);

  // Softmax and cosine.
  A strength = 0, own = 0;
#pragma unroll 1
  for (int i = lane; i < slots; i += kWarp) {
    const A length = square_root(room.squares[i]), c = cosine[i];
    const A score_grad = content[i] * head.gate * (shifted[i] - sums[4]);
    const A dot_grad = score_grad * head.strength / (head.length * length + p.eps);
    strength += score_grad * c;
    own += dot_grad * c * length;
    content[i] = dot_grad;
    cosine[i] = length > 0 ? -dot_grad * c * head.length / length : A(0);
  }
  strength = warp_sum(strength);
  own = warp_sum(own);
  if (lane != 0) return;
  room.own[h] = head.length > 0 ? own / head.length : A(0);
  p.grad_strengths[i_head] = strength;
  p.grad_gates[i_head] = sums[3];
  p.grad_sharpenings[i_head] = sharpening;
  p.grad_shifts[i_head * kTaps] = sums[0];
  p.grad_shifts[i_head * kTaps + 1] = sums[1];
  p.grad_shifts[i_head * kTaps + 2] = sums[2];
}

// Addressing of the heads from `first` to `end` backwards, whose dot products with `memory` are in
// the room; with the reads' share of the memory's gradient. Ends with a barrier.
template <class A>
__device__ __forceinline__ void unaddress(const Backward<A>& p, const BackwardRoom<A>& room,
                                          int64_t t, int64_t b, int first, int end, const A* memory,
                                          const A* grad_reads) {
  const int slots = p.slots;
#pragma unroll 1
  for (int h = first + static_cast<int>(threadIdx.x) / kWarp; h < end; h += kWarps) {
    const Head<A> head(p, t, b, h);
    const int64_t row = int64_t{h} * slots;
    const Stages<A> stages{room.cosine + row, room.content + row, room.gated + row,
                           room.shifted + row};
    const Powers<A> powers =
        address(p, head, room.squares, room.previous + row, stages, room.weights + row);
    differentiate(p, room, head, powers, p.at(t, b) * p.heads + h, h);
  }
  __syncthreads();
  const A* keys = p.key(t, b, 0);
  share_numbers(p, [&](int i, int j) {
    A total = 0, self = 0;
#pragma unroll 1
    for (int h = first; h < end; ++h) {
      total += room.content[h * slots + i] * keys[h * p.width + j];
      self += room.cosine[h * slots + i];
      if (grad_reads != nullptr) total += room.weights[h * slots + i] * grad_reads[h * p.width + j];
    }
    room.grad[i * p.stride + j] += total + self * memory[i * p.stride + j];
  });
  A* grad_keys = p.grad_keys + (p.at(t, b) * p.heads + first) * p.width;
  sums_over_slots(static_cast<const Scan<A>&>(p), memory, room.content + first * slots, end - first,
                  [&](int h, int j, A sum) {
                    grad_keys[h * p.width + j] =
                        sum - room.own[first + h] * keys[(first + h) * p.width + j];
                  });
  __syncthreads();
}

// prod (1 - w_k e_k) over the write heads but `h`, of one number.
template <class A>
__device__ __forceinline__ A kept_by_others(const Scan<A>& p, const A* w, const A* erases, int h,
                                            int column) {
  A kept = 1;
#pragma unroll 1
  for (int k = 0; k < p.writes; ++k)
    if (k != h) kept *= A(1) - w[k * p.slots] * erases[k * p.width + column];
  return kept;
}

// The write backwards, and the dot products of M_{t-1} with the keys of the write heads.
template <class A>
__device__ __forceinline__ void unwrite(const Backward<A>& p, const BackwardRoom<A>& room,
                                        int64_t t, int64_t b) {
  const A *w = room.weights + p.reads * p.slots, *erases = p.erase(t, b), *adds = p.add(t, b);
  const int lane_of_warp = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = p.at(t, b) * p.writes;
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x) / kWarp; j < p.width; j += kWarps)
#pragma unroll 1
    for (int h = 0; h < p.writes; ++h) {
      A added = 0, erased = 0;
#pragma unroll 1
      for (int i = lane_of_warp; i < p.slots; i += kWarp) {
        const A g = room.grad[i * p.stride + j] * w[h * p.slots + i];
        added += g;
        erased -= g * room.before[i * p.stride + j] * kept_by_others(p, w + i, erases, h, j);
      }
      added = warp_sum(added);
      erased = warp_sum(erased);
      if (lane_of_warp == 0) {
        p.grad_adds[(row + h) * p.width + j] = added;
        p.grad_erases[(row + h) * p.width + j] = erased;
      }
    }
  __syncthreads();
  share_rows(p.slots, [&](int i, int lane, bool present) {
    A* grad = room.grad + i * p.stride;
    const A* before = room.before + i * p.stride;
#pragma unroll 1
    for (int h = 0; h < p.writes; ++h) {
      A sum = 0;
#pragma unroll 1
      for (int j = lane; j < p.width; j += kRowLanes)
        sum += grad[j] * (adds[h * p.width + j] - before[j] * erases[h * p.width + j] *
                                                      kept_by_others(p, w + i, erases, h, j));
      sum = sum_row(sum);
      if (lane == 0 && present) room.weights_grad[(p.reads + h) * p.slots + i] += sum;
    }
    if (present)
#pragma unroll 1
      for (int j = lane; j < p.width; j += kRowLanes)
        grad[j] *= kept_by_others(p, w + i, erases, -1, j);
    score_row(p, before, lane, p.key(t, b, p.reads), p.writes, [&](int h, A dot) {
      if (present) room.cosine[(p.reads + h) * p.slots + i] = dot;
    });
    const A square = squared_row(p, before, lane);
    if (lane == 0 && present) room.squares[i] = square;
  });
  __syncthreads();
}

// The memories from step `t` on up to the next snapshot. Each number is one thread's throughout.
template <class A>
__device__ __forceinline__ void make_segment(const Backward<A>& p, int64_t t, int64_t b) {
  const A* start = p.memory + b * p.batch_stride;
  share_numbers(p, [&](int i, int j) {
#pragma unroll 1
    for (int64_t step = t; step < p.steps && (step + 1) % p.snapshot_every != 0; ++step) {
      const int64_t at = int64_t{i} * p.width + j;
      const A m = p.resets(step, b) ? p.initial
                  : step == 0       ? start[i * p.slot_stride + j * p.width_stride]
                                    : p.saved_memory(step - 1, b)[at];
      p.saved_memory(step, b)[at] =
          update(static_cast<const Scan<A>&>(p), m, p.history(step, b) + p.reads * p.padded + i,
                 p.padded, p.erase(step, b), p.add(step, b), j);
    }
  });
  __syncthreads();
}

template <class A>
__global__ __launch_bounds__(kThreads, 1) void backward_scan(const Backward<A> p) {
  BackwardRoom<A> room(p, p.block_room());
  const int64_t b = blockIdx.x;
  const int slots = p.slots, of_heads = p.heads * slots;

  const auto fetch_memory = [&](int64_t t, A* to) {
    const A* from = p.saved_memory(t, b);
    share_numbers(p, [&](int i, int j) { to[i * p.stride + j] = from[i * p.width + j]; });
  };
  share_numbers(p, [&](int i, int j) {
    room.grad[i * p.stride + j] =
        p.grad_memory == nullptr ? A(0) : p.grad_memory[(b * slots + i) * p.width + j];
  });
  share(of_heads, [&](int i) {
    room.weights_grad[i] = p.grad_weights == nullptr ? A(0) : p.grad_weights[b * of_heads + i];
    room.weights[i] = p.history(p.steps - 1, b)[i / slots * p.padded + i % slots];
  });
  make_segment(p, (p.steps - 1) / p.snapshot_every * p.snapshot_every, b);
  fetch_memory(p.steps - 1, room.now);
#pragma unroll 1
  for (int64_t t = p.steps - 1; t >= 0; --t) {
    const bool reset = p.resets(t, b);
    // M_{t-1} of a step that begins a segment is a snapshot. Before it, there is another segment.
    if (t > 0 && t + 1 < p.steps && (t + 1) % p.snapshot_every == 0)
      make_segment(p, t / p.snapshot_every * p.snapshot_every, b);
    if (t == 0 || reset)
      start_memory(p, b, !reset, room.before);
    else
      fetch_memory(t - 1, room.before);
    share(of_heads, [&](int i) {
      room.previous[i] = reset    ? A(i % slots == 0)
                         : t == 0 ? p.weights[b * of_heads + i]
                                  : p.history(t - 1, b)[i / slots * p.padded + i % slots];
    });
    __syncthreads();
    const A* grad_reads =
        p.grad_reads == nullptr ? nullptr : p.grad_reads + p.at(t, b) * p.reads * p.width;
    share_rows(slots, [&](int i, int lane, bool present) {
      const A* row = room.now + i * p.stride;
      score_row(p, row, lane, p.key(t, b, 0), p.reads, [&](int h, A dot) {
        if (present) room.cosine[h * slots + i] = dot;
      });
      if (grad_reads != nullptr)
        score_row(p, row, lane, grad_reads, p.reads, [&](int h, A dot) {
          if (present) room.weights_grad[h * slots + i] += dot;
        });
      const A square = squared_row(p, row, lane);
      if (lane == 0 && present) room.squares[i] = square;
    });
    __syncthreads();
    unaddress(p, room, t, b, 0, p.reads, room.now, grad_reads);
    unwrite(p, room, t, b);
    unaddress(p, room, t, b, p.reads, p.heads, room.before, static_cast<const A*>(nullptr));
    if (reset) {
      share_numbers(p, [&](int i, int j) { room.grad[i * p.stride + j] = 0; });
      share(of_heads, [&](int i) { room.weights_grad[i] = 0; });
      // The step before did not begin here: its memory and weights are those it made.
      if (t > 0) {
        fetch_memory(t - 1, room.before);
        share(of_heads, [&](int i) {
          room.previous[i] = p.history(t - 1, b)[i / slots * p.padded + i % slots];
        });
      }
    }
    A* const now = room.now;
    room.now = room.before;
    room.before = now;
    A* const weights = room.weights;
    room.weights = room.previous;
    room.previous = weights;
    __syncthreads();
  }
  if (p.grad_memory_in != nullptr)
    share_numbers(p, [&](int i, int j) {
      p.grad_memory_in[(b * slots + i) * p.width + j] = room.grad[i * p.stride + j];
    });
  share(of_heads, [&](int i) { p.grad_weights_in[b * of_heads + i] = room.weights_grad[i]; });
}

// ---------------------------------------------------------------- host

template <class A>
void fill_scan(Scan<A>& p, const char* op, const tensors::Sizes& s, const Given& in, double eps,
               double initial_value, int64_t snapshot_every) {
  require(s.slots * (s.width + 1) < int64_t{1} << 31 && s.padded * s.heads < int64_t{1} << 31 &&
              s.batch < int64_t{1} << 31,
          std::string(op) + ": 2^31 numbers a batch element or more");
  p.steps = s.steps;
  p.batch = s.batch;
  p.slots = static_cast<int>(s.slots);
  p.width = static_cast<int>(s.width);
  p.heads = static_cast<int>(s.heads);
  p.reads = static_cast<int>(s.reads);
  p.writes = static_cast<int>(s.writes);
  p.padded = static_cast<int>(s.padded);
  p.stride = p.width | 1;
  p.eps = static_cast<A>(eps);
  p.initial = static_cast<A>(initial_value);
  p.snapshot_every = snapshot_every;
  const auto given = [](const Tensor& x) { return static_cast<const A*>(x.const_data_ptr()); };
  p.memory = given(in.memory);
  p.batch_stride = in.memory.stride(0);
  p.slot_stride = in.memory.stride(1);
  p.width_stride = in.memory.stride(2);
  p.weights = given(in.weights);
  p.keys = given(in.keys);
  p.strengths = given(in.strengths);
  p.gates = given(in.gates);
  p.shifts = given(in.shifts);
  p.sharpenings = given(in.sharpenings);
  p.erases = given(in.erases);
  p.adds = given(in.adds);
  p.reset = static_cast<const bool*>(data(in.reset));
}

// Runs Kernel with one block a batch element and Room<A> of room in shared memory or, where that
// does not fit, in global memory.
template <auto Kernel, template <class> class Room, class P, class A>
void launch_scan(P& p, const Tensor& like, A number) {
  const OnDevice device(like);
  p.room_bytes = Room<A>(p, nullptr).bytes;
  const bool resident =
      regime() != "streaming" && p.room_bytes <= static_cast<int64_t>(max_shared_bytes());
  const int64_t numbers = resident ? 0 : p.batch * p.room_bytes / static_cast<int64_t>(sizeof(A));
  const Tensor room = new_tensor(like, {numbers}, like.scalar_type());
  p.room = resident ? nullptr : pointer<A>(room);
  launch<Kernel>({.grid = static_cast<unsigned>(p.batch),
                  .block = kThreads,
                  .stream = device.stream(),
                  .shared_bytes = resident ? static_cast<size_t>(p.room_bytes) : 0},
                 p);
}

template <class F>
void for_dtype(ScalarType dtype, F&& f) {
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ntm_scan(
    Tensor memory, Tensor weights, Tensor keys, Tensor strengths, Tensor gates, Tensor shifts,
    Tensor sharpenings, Tensor erases, Tensor adds, std::optional<Tensor> reset, double eps,
    double initial_value, int64_t snapshot_every, bool save_for_backward) {
  constexpr const char* op = "ntm_scan";
  const Given in{memory, weights, keys, strengths, gates, shifts, sharpenings, erases, adds, reset};
  const tensors::Sizes s = tensors::check_arguments(op, in);
  tensors::check_options(op, snapshot_every);
  const OnDevice device(memory);
  tensors::Outputs out = tensors::make_outputs(in, s, snapshot_every, save_for_backward);
  if (s.steps == 0) {
    tensors::pass_through(out, in);
  } else if (s.batch > 0) {
    for_dtype(in.dtype(), [&](auto number) {
      using A = decltype(number);
      Forward<A> p{};
      fill_scan(p, op, s, in, eps, initial_value, snapshot_every);
      p.reads_out = pointer<A>(out.reads);
      p.memory_out = pointer<A>(out.memory);
      p.weights_out = pointer<A>(out.weights);
      p.weight_history = save_for_backward ? pointer<A>(out.weight_history) : nullptr;
      p.snapshots = save_for_backward ? pointer<A>(out.snapshots) : nullptr;
      launch_scan<forward_scan<A>, ForwardRoom>(p, memory, number);
    });
  }
  return {out.reads, out.memory, out.weights, out.weight_history, out.snapshots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
ntm_scan_backward(std::optional<Tensor> grad_reads, std::optional<Tensor> grad_memory,
                  std::optional<Tensor> grad_weights, Tensor memory, Tensor weights, Tensor keys,
                  Tensor strengths, Tensor gates, Tensor shifts, Tensor sharpenings, Tensor erases,
                  Tensor adds, std::optional<Tensor> reset, Tensor weight_history, Tensor snapshots,
                  double eps, double initial_value, int64_t snapshot_every, bool need_memory_grad) {
  constexpr const char* op = "ntm_scan_backward";
  const Given in{memory, weights, keys, strengths, gates, shifts, sharpenings, erases, adds, reset};
  const tensors::Saved saved{grad_reads, grad_memory, grad_weights, weight_history, snapshots};
  const tensors::Sizes s = tensors::check_arguments(op, in);
  tensors::check_options(op, snapshot_every);
  tensors::check_saved(op, in, s, saved, snapshot_every);
  const OnDevice device(memory);
  tensors::Gradients out = tensors::make_gradients(in, s, need_memory_grad);
  if (s.steps == 0) {
    tensors::pass_through(out, saved, need_memory_grad);
  } else if (s.batch > 0) {
    for_dtype(in.dtype(), [&](auto number) {
      using A = decltype(number);
      const auto maybe = [](const std::optional<Tensor>& x) {
        return static_cast<const A*>(data(x));
      };
      const int64_t again = std::min(snapshot_every - 1, s.steps);
      const Tensor segment = new_tensor(memory, {s.batch * again * s.slots * s.width}, in.dtype());
      Backward<A> p{};
      fill_scan(p, op, s, in, eps, initial_value, snapshot_every);
      p.weight_history = pointer<A>(weight_history);
      p.snapshots = pointer<A>(snapshots);
      p.segment = pointer<A>(segment);
      p.grad_reads = maybe(grad_reads);
      p.grad_memory = maybe(grad_memory);
      p.grad_weights = maybe(grad_weights);
      p.grad_memory_in = need_memory_grad ? pointer<A>(out.memory) : nullptr;
      p.grad_weights_in = pointer<A>(out.weights);
      p.grad_keys = pointer<A>(out.keys);
      p.grad_strengths = pointer<A>(out.strengths);
      p.grad_gates = pointer<A>(out.gates);
      p.grad_shifts = pointer<A>(out.shifts);
      p.grad_sharpenings = pointer<A>(out.sharpenings);
      p.grad_erases = pointer<A>(out.erases);
      p.grad_adds = pointer<A>(out.adds);
      launch_scan<backward_scan<A>, BackwardRoom>(p, memory, number);
    });
  }
  return {out.memory, out.weights,     out.keys,   out.strengths, out.gates,
          out.shifts, out.sharpenings, out.erases, out.adds};
}

}  // namespace
}  // namespace mann_ext::cuda::ntm

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("ntm_scan", TORCH_BOX(&mann_ext::cuda::ntm::ntm_scan));
  m.impl("ntm_scan_backward", TORCH_BOX(&mann_ext::cuda::ntm::ntm_scan_backward));
}
