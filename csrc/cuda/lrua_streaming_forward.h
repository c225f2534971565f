// What the forms of lrua_scan that stream the memory share forward, with writes at every step or
// deferred: the choice of slots, the weights once their normaliser is known, and the reads.
#pragma once

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
  int64_t kept;         // read weights of so many steps, where no history is kept:
  A* recent;            // [kept][B][R][padded]
  A* usage_now;         // [B][padded]
  int columns;          // of the reads that a step's pass sums: W, or 0: reads are left for later
  A* partial;           // [B][blocks][R][columns + 2]: reads, total and top
  int64_t slot_blocks;  // of forward_weights, for each batch element
  A* least_usage;       // [B][slot_blocks][n]
  int64_t* least_slot;

  // w_t: scores until forward_weights(t); t = -1: what the scan was given.
  __device__ A* read_weights(int64_t t, int64_t b) const {
    const Sizes& s = this->scan.sizes;
    if (t < 0) return initial + b * s.heads * s.padded;
    A* all = this->history.weights;
    return (all == nullptr ? recent + this->scan.at(t % kept, b) * s.heads * s.padded
                           : all + this->scan.at(t, b) * s.heads * s.padded);
  }
  // Blocks of forward_weights, for each batch element.
  __host__ __device__ int64_t weight_blocks(int64_t t) const {
    return slot_blocks + (t < 0 || columns == 0 ? 0 : this->scan.sizes.heads);
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

// The n slots that step t erases and writes, from the candidates of the blocks of forward_weights.
// `room` is shared memory, with a list of least-used slots a warp; `slots` are theirs.
template <int Warps, class A, class S>
__device__ void choose_slots(const ForwardPass<A, S>& p, const LeastUsed<A>& room, int64_t* slots,
                             int64_t t, int64_t b, bool reset, bool save) {
  const Sizes& s = p.scan.sizes;
  const int warp = threadIdx.x / kWarp;
  const int64_t count = p.slot_blocks * s.chosen;
  if (!reset) {
    const LeastUsed<A> mine{room.usage + warp * s.chosen, room.slot + warp * s.chosen, s.chosen};
    mine.clear();
    const int64_t part = (count + Warps - 1) / Warps;
    const int64_t begin = min(count, warp * part), end = min(count, begin + part);
    mine.offer_all(p.least_usage + b * count + begin, p.least_slot + b * count + begin,
                   end - begin);
    __syncthreads();
    if (warp == 0)
      mine.offer_all(room.usage + s.chosen, room.slot + s.chosen, (Warps - 1) * s.chosen);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < s.chosen; i += Warps * kWarp) {
    const int64_t slot = reset ? (i + 1) % s.slots : room.slot[i];
    slots[i] = slot;
    if (save) p.history.slots[p.scan.at(t, b) * s.chosen + i] = slot;
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

// One head's read: the blocks' sums, added in their order. `partial` is the first block's.
template <class A>
__device__ __forceinline__ void combine_read(const A* partial, int64_t blocks, int64_t block_stride,
                                             int width, A* read, double* room) {
  A top;
  double total;
  normaliser(partial, blocks, block_stride, width, &top, &total);
  const int lane = threadIdx.x % kWarp;
  for (int first = 0; first < width; first += kWarp) {
    const int column = min(first + lane, width - 1);
    const double sum = sum_over_blocks<kWeightThreads>(blocks, room, [&](int64_t k) {
      const A* of_block = partial + k * block_stride;
      return static_cast<double>(of_block[column]) * exponential(of_block[width + 1] - top);
    });
    if (threadIdx.x < kWarp && first + lane < width) read[column] = static_cast<A>(sum / total);
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
  const int64_t blocks = p.weight_blocks(t), block_stride = int64_t{s.heads} * (p.columns + 2);
  const int64_t b = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int warp = threadIdx.x / kWarp;
  if (block >= p.slot_blocks) {
    const int64_t r = block - p.slot_blocks;
    combine_read(p.partial + b * p.split.blocks * block_stride + r * (s.width + 2), p.split.blocks,
                 block_stride, s.width, p.history.reads + (p.scan.at(t, b) * s.heads + r) * s.width,
                 sums);
    return;
  }
  const bool last = t + 1 == s.steps;
  const LeastUsed<A> least{least_usage + warp * s.chosen, least_slot + warp * s.chosen, s.chosen};
  least.clear();
  if (t >= 0) {
    for (int r = warp; r < s.heads; r += warps) {
      A top;
      double total;
      normaliser(p.partial + b * p.split.blocks * block_stride + int64_t{r} * (p.columns + 2),
                 p.split.blocks, block_stride, p.columns, &top, &total);
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

// ---------------------------------------------------------------- host

// What a scan needs from step to step. `blocks`: of a step's pass, at most.
struct ForwardBuffers {
  Tensor initial, recent, usage, partial, least_usage, least_slot;

  template <class A, class S>
  ForwardBuffers(ForwardPass<A, S>& p, const Tensor& like, int64_t blocks, int64_t kept)
      : ForwardBuffers(like, p.scan.sizes, slot_blocks(p.scan.sizes), p.columns + 2, blocks,
                       p.history.weights == nullptr ? kept : 0) {
    p.slot_blocks = slot_blocks(p.scan.sizes);
    p.kept = kept;
    p.initial = pointer<A>(initial);
    p.recent = pointer<A>(recent);
    p.usage_now = pointer<A>(usage);
    p.partial = pointer<A>(partial);
    p.least_usage = pointer<A>(least_usage);
    p.least_slot = pointer<int64_t>(least_slot);
  }

 private:
  static int64_t slot_blocks(const Sizes& s) {
    return share_blocks(s.batch, 2, (s.padded + kWeightThreads - 1) / kWeightThreads);
  }
  ForwardBuffers(const Tensor& like, const Sizes& s, int64_t slot_blocks, int64_t sums,
                 int64_t blocks, int64_t kept)
      : initial(numbers(like, {s.batch, s.heads, s.padded})),
        recent(numbers(like, {kept, s.batch, s.heads, s.padded})),
        usage(numbers(like, {s.batch, s.padded})),
        partial(numbers(like, {s.batch, blocks, s.heads, sums})),
        least_usage(numbers(like, {s.batch, slot_blocks, s.chosen})),
        least_slot(new_tensor(like, {s.batch, slot_blocks, s.chosen}, ScalarType::Long)) {}
  static Tensor numbers(const Tensor& like, std::initializer_list<int64_t> shape) {
    return new_tensor(like, shape, accumulation_dtype(like.scalar_type()));
  }
};

template <class A, class S>
void launch_weights(const ForwardPass<A, S>& p, int64_t t, cudaStream_t stream) {
  launch<forward_weights<A, S>>({.grid = grid_size(p.scan.sizes.batch * p.weight_blocks(t)),
                                 .block = kWeightThreads,
                                 .stream = stream},
                                p, t);
}

}  // namespace
}  // namespace mann_ext::cuda::lrua
