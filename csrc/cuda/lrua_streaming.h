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

#include <bit>

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
  int lane_bits;    // lanes = 1 << lane_bits: to divide by it is a shift
  int stride;       // of the rows in shared memory
  int stages;       // 2: the next tile is on its way while this one is worked on
  int64_t tiles;
  int64_t blocks;  // for each batch element
};

// Whether a step's keys and contents are copied to shared memory.
constexpr int64_t kStagedBytes = 8 << 10;
template <class A>
__host__ __device__ bool stage_vectors(const Sizes& s) {
  return int64_t{s.heads} * s.width * static_cast<int64_t>(sizeof(A)) <= kStagedBytes;
}
// Whether they always are in a pass for these sizes, see for_pass.
template <class A, class H, bool Aligned>
constexpr bool kStaged =
    !H::kMany && H::kGroup * int64_t{kThreads} * kRun<Aligned> * sizeof(A) <= kStagedBytes;

// Vectors of one step: in shared memory, if they are staged there, which Always makes known to the
// compiler.
template <bool Always, class A>
__device__ __forceinline__ const A* stage(A* to, const A* from, int64_t count) {
  if (!Always && to == nullptr) return from;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
  return to;
}

// What is done a row and head of a tile: neighbouring lanes of a warp have neighbouring rows of its
// part, and every so many heads.
struct Items {
  int rows;         // of the tile
  int row;          // this thread's
  int first, step;  // its heads
  int stride;       // between the numbers of two rows, which are [rows][stride]

  __device__ Items(const Split& split, int stride) : rows(split.rows), stride(stride) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int rows_of_warp = kWarp >> split.lane_bits;
    row = warp * rows_of_warp + (lane & (rows_of_warp - 1));
    first = lane >> (std::countr_zero(unsigned{kWarp}) - split.lane_bits);
    step = split.lanes;
  }
  // Calls f(head, where it is in numbers that are [R][rows], where in [rows][stride]).
  template <class F>
  __device__ __forceinline__ void for_heads(int heads, F&& f) const {
#pragma unroll 1
    for (int r = first; r < heads; r += step) f(r, r * rows + row, row * stride + r);
  }
};

// The sum over the rows of a tile of one of the sums that each has, which follow each other; a
// warp gets it.
template <class A>
__device__ __forceinline__ A sum_of_rows(const A* sums, int rows) {
  A sum = 0;
  for (int row = threadIdx.x % kWarp; row < rows; row += kWarp) sum += sums[row];
  return warp_sum(sum);
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
    split.lane_bits = std::countr_zero(static_cast<unsigned>(lanes));
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

// How many heads a pass works on, known to the compiler as far as it helps. IsExact: Group of them.
template <int Group, bool IsExact, bool IsMany>
struct Heads {
  static constexpr int kGroup = Group;   // at a time
  static constexpr bool kMany = IsMany;  // more heads, or columns, than registers hold
  // Heads there are, and those that the numbers of a row have room for.
  static __host__ __device__ int count(int heads) { return IsExact ? Group : heads; }
  static __host__ __device__ int room(int heads) { return IsMany ? heads : Group; }
};

// Calls f(Heads, whether rows are aligned), as types.
template <class F>
void for_pass(const Sizes& s, bool vectors, F&& f) {
  const auto choose = [&](auto aligned) {
    if (s.heads > kGroup || s.width / kRun<decltype(aligned)::value> > kThreads)
      f(Heads<kGroup, false, true>{}, aligned);
    else if (s.heads == 1)
      f(Heads<1, true, false>{}, aligned);
    else if (s.heads == kGroup)
      f(Heads<kGroup, true, false>{}, aligned);
    else
      f(Heads<kGroup, false, false>{}, aligned);
  };
  vectors ? choose(std::true_type{}) : choose(std::false_type{});
}

}  // namespace
}  // namespace mann_ext::cuda::lrua
