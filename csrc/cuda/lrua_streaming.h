// lrua_scan for memories of any size: every step is one pass over the memory, split over its slots.
//
// A block takes every so many tiles of one batch element and brings the next one to shared memory
// while it works on this one. What it sums over its slots goes to a place of its own; the launch
// after it adds the blocks' sums, always in the same order. Two launches a step forward: the pass,
// up to scores, and the weights, once their normaliser is known. One a step backward.
//
// Bytes a slot and step (4-byte numbers): forward 8 W + 16 R + 16; backward 16 W + 16 R rolling
// back, 12 W + 16 R with every M_t saved.
#pragma once

#include "cuda/lrua.h"

namespace mann_ext::cuda::lrua {
namespace {

constexpr int kThreads = 128;  // of a pass
constexpr int kWarps = kThreads / kWarp;
constexpr int kWeightThreads = 256;  // of forward_weights and the last sums
constexpr int64_t kTileBytes = 16 << 10;
constexpr int64_t kBlockBytes = 56 << 10;  // of shared memory: four blocks a multiprocessor

// Room for the sums of every thread of a pass: of kGroup heads and one run of columns.
template <class A>
constexpr int64_t kSumsBytes = int64_t{kThreads} * kGroup * kRun<true> * sizeof(A);

// How a pass over the memory is divided.
struct Split {
  int lanes, rows;  // that share a row, and rows a tile: kThreads / lanes
  int stride;       // of the rows in shared memory
  int stages;       // 2: the next tile is on its way while this one is worked on
  int64_t tiles;
  int64_t blocks;  // for each batch element
};

// Whether a step's keys and contents are copied to shared memory.
template <class A>
__host__ __device__ bool stage_vectors(const Sizes& s) {
  return int64_t{s.heads} * s.width * static_cast<int64_t>(sizeof(A)) <= 8 << 10;
}

// Vectors of one step: in shared memory, if they are staged there.
template <class A>
__device__ __forceinline__ const A* stage(A* to, const A* from, int64_t count) {
  if (to == nullptr) return from;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
  return to;
}

// The sum over blocks of one number, in a block of Threads: threads of the first warp get
// that of their column. `value` gives a block's.
template <int Threads, class F>
__device__ __forceinline__ double sum_over_blocks(int64_t blocks, double* room, F&& value) {
  constexpr int warps = Threads / kWarp;
  double sum = 0;
#pragma unroll 4
  for (int64_t k = threadIdx.x / kWarp; k < blocks; k += warps) sum += value(k);
  __syncthreads();  // `room` may still be read from the call before
  room[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  if (threadIdx.x < kWarp)
    for (int w = 0; w < warps; ++w) sum += room[w * kWarp + threadIdx.x];
  return sum;
}

// ---------------------------------------------------------------- host

// Enough blocks to fill the device, shared out over the batch elements, and each with some work.
inline int64_t share_blocks(int64_t batch, int64_t a_multiprocessor, int64_t most) {
  const int64_t wanted = a_multiprocessor * multiprocessors();
  return max(int64_t{1}, min(most, (wanted + batch - 1) / batch));
}

// The fewest lanes a row whose tiles are small enough; `bytes` gives a split's shared memory.
template <class Bytes>
Split make_split(const Sizes& s, bool vectors, int64_t number_bytes, Bytes&& bytes) {
  Split split{};
  split.stages = 2;
  const auto set_lanes = [&](int lanes) {
    split.lanes = lanes;
    split.rows = kThreads / lanes;
    // Lanes that read the same column of their rows at once should meet different banks.
    const int run = vectors ? kRun<true> : kRun<false>, odd = run * lanes;
    split.stride = s.width;
    if (lanes < 8)
      split.stride = (s.width + odd - 1) / odd % 2 == 1 ? (s.width + odd - 1) / odd * odd
                                                        : ((s.width + odd - 1) / odd + 1) * odd;
    split.tiles = (s.slots + split.rows - 1) / split.rows;
  };
  set_lanes(2);
  while (split.lanes < kWarp &&
         (split.rows * split.stride * number_bytes > kTileBytes || bytes(split) > kBlockBytes))
    set_lanes(2 * split.lanes);
  const auto most = static_cast<int64_t>(max_shared_bytes());
  if (bytes(split) > most) split.stages = 1;
  require(bytes(split) <= most, "lrua_scan: rows of " + std::to_string(s.width) + " columns and " +
                                    std::to_string(s.heads) +
                                    " heads do not fit in this GPU's shared memory");
  return split;
}

// Calls f(heads at a time, more than that, whether rows are aligned), as types.
template <class F>
void for_pass(const Sizes& s, bool vectors, F&& f) {
  using One = std::integral_constant<int, 1>;
  using Group = std::integral_constant<int, kGroup>;
  const bool many = s.heads > kGroup || s.width / (vectors ? 4 : 1) > kThreads;
  const auto choose = [&](auto aligned_rows) {
    if (many)
      f(Group{}, std::true_type{}, aligned_rows);
    else if (s.heads == 1)
      f(One{}, std::false_type{}, aligned_rows);
    else
      f(Group{}, std::false_type{}, aligned_rows);
  };
  vectors ? choose(std::true_type{}) : choose(std::false_type{});
}

}  // namespace
}  // namespace mann_ext::cuda::lrua
