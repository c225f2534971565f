// lrua_scan for memories that fit in shared memory: one launch runs all steps, with one block for
// each batch element, and the memory does not leave the multiprocessor. Larger ones are shared out
// between the blocks of a cluster, each with some of the slots: sums over slots, the least-used
// slots and partial reads then cross to the other blocks' shared memory.
//
// Rows in shared memory are whole runs of four columns, and there are always four heads: what is
// missing is zero. Four lanes share a row. They work on kRows rows at once, so that a step's
// vectors are loaded once for all of them, and after a row's sums over columns each lane has those
// of one head. Numbers of a row and head lie in shared memory as [row][head].
#pragma once

#include "cuda/lrua.h"

namespace mann_ext::cuda::lrua {
namespace {

constexpr int kHeads = kGroup;  // and lanes that share a row
constexpr int kColumns = 4;     // in a run
constexpr int kRows = 2;        // of a thread at once
constexpr int kRowStep = kWarp / kHeads;
constexpr int kTileRows = kRowStep * kRows;  // of a warp at once
constexpr int kMaxWarps = 16;
// So that one instruction of a warp gives every block of the cluster a number of each head.
static_assert(kMaxCluster * kHeads <= kWarp);
// Blocks of a cluster have fewer warps, for they need more registers.
template <class A>
__host__ __device__ constexpr int max_threads(bool clustered) {
  return (sizeof(A) == 4 ? kMaxWarps : kMaxWarps / 2) * kWarp * (clustered ? 3 : 4) / 4;
}

struct Layout {
  int blocks;  // that share the memory of a batch element
  int share;   // slots of a block; the last ones may have fewer, or none
  int threads;
  int runs;            // of four columns in a row
  int stride;          // of rows, in numbers
  int rows;            // whole tiles of a share
  int groups;          // of threads that share the rows in sums over slots
  int choosing_warps;  // that look for the least-used slots
  bool vectors;        // rows in global memory are whole aligned runs

  __host__ __device__ int width() const { return runs * kColumns; }
};

// The slots of this block.
template <bool Clustered>
struct Part {
  unsigned rank = 0;
  int first = 0, slots;

  __device__ Part(const Sizes& s, const Layout& layout) : slots(static_cast<int>(s.slots)) {
    if constexpr (Clustered) {
      rank = cluster_rank();
      first = static_cast<int>(rank) * layout.share;
      slots = max(0, min(layout.share, slots - first));
    }
  }
  // Its row here, or none.
  __device__ unsigned row_of(unsigned slot) const {
    if constexpr (!Clustered) return slot;
    const unsigned row = slot - static_cast<unsigned>(first);
    return row < static_cast<unsigned>(slots) ? row : ~0u;
  }
};

// Puts a number of each head, which its lanes have, at `to` in every block.
template <bool Clustered, class A>
__device__ __forceinline__ void give_heads(A* to, A number, const Layout& layout) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (Clustered) {
    if (lane / kHeads < layout.blocks)
      *cluster_shared(to + lane % kHeads, static_cast<unsigned>(lane / kHeads)) = number;
  } else {
    if (lane < kHeads) to[lane] = number;
  }
}

// Puts a number that all lanes have at `to` in every block.
template <bool Clustered, class T>
__device__ __forceinline__ void give(T* to, T number, const Layout& layout) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (Clustered) {
    if (lane < layout.blocks) *cluster_shared(to, static_cast<unsigned>(lane)) = number;
  } else {
    if (lane == 0) *to = number;
  }
}

// Calls finish(i, x) with the sums x over all blocks of the C numbers at from + i, from + i +
// stride ..., for this block's part of the i before `count`.
template <int C, class A, class F>
__device__ __forceinline__ void sum_blocks(A* from, int stride, int count, const Layout& layout,
                                           unsigned rank, F&& finish) {
  const int share = (count + layout.blocks - 1) / layout.blocks;
  const int first = static_cast<int>(rank) * share;
#pragma unroll 1
  for (int i = first + static_cast<int>(threadIdx.x); i < min(count, first + share);
       i += static_cast<int>(blockDim.x)) {
    A sums[C] = {};
#pragma unroll 1
    for (int block = 0; block < layout.blocks; ++block)
#pragma unroll
      for (int c = 0; c < C; ++c)
        sums[c] += *cluster_shared(from + c * stride + i, static_cast<unsigned>(block));
    finish(i, sums);
  }
}

// `chooses`: some warps look for the least-used slots while the others form sums over slots.
// `padded`: the lanes of two rows meet different banks.
template <class A>
Layout make_layout(const Sizes& s, bool vectors, int blocks, bool chooses, bool padded) {
  Layout layout{};
  layout.blocks = blocks;
  // Whole pieces of 16 bytes of the weights.
  layout.share =
      static_cast<int>(blocks > 1 ? ((s.slots + blocks - 1) / blocks + 3) / 4 * 4 : s.slots);
  layout.vectors = vectors;
  layout.runs = (s.width + kColumns - 1) / kColumns;
  layout.stride = kColumns * (padded ? (layout.runs + 3) / 8 * 8 + 4 : layout.runs);
  const int tiles = (layout.share + kTileRows - 1) / kTileRows;
  layout.rows = tiles * kTileRows;
  const int warps = min(max_threads<A>(blocks > 1) / kWarp,
                        max(4, max(tiles, (layout.runs + kWarp - 1) / kWarp + 1)));
  layout.threads = warps * kWarp;
  if (chooses) layout.choosing_warps = min(warps / 2, (layout.share + 255) / 256);
  layout.groups = (layout.threads - layout.choosing_warps * kWarp) / layout.runs;
  return layout;
}

// The layout whose shared memory, given by bytes(layout), fits; else the smallest.
template <class A, class Bytes>
Layout fit_layout(const Sizes& s, bool vectors, int blocks, bool chooses, Bytes&& bytes) {
  const Layout layout = make_layout<A>(s, vectors, blocks, chooses, true);
  return bytes(layout) <= static_cast<int64_t>(max_shared_bytes())
             ? layout
             : make_layout<A>(s, vectors, blocks, chooses, false);
}

// The sums over a row's four lanes of four numbers: lane g gets that of number g.
template <class A>
__device__ __forceinline__ A sum_scattered(const A (&x)[kHeads], int lane) {
  const bool high = lane & 2, odd = lane & 1;
  A low_sum = high ? x[2] : x[0], high_sum = high ? x[3] : x[1];
  low_sum += __shfl_xor_sync(kAllLanes, high ? x[0] : x[2], 2);
  high_sum += __shfl_xor_sync(kAllLanes, high ? x[1] : x[3], 2);
  return (odd ? high_sum : low_sum) + __shfl_xor_sync(kAllLanes, odd ? low_sum : high_sum, 1);
}
// Each of a row's four lanes gets the sum over them.
template <class A>
__device__ __forceinline__ A sum_row(A x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
// Each lane gets the sum over the lanes of its head.
template <class A>
__device__ __forceinline__ A sum_head(A x) {
#pragma unroll
  for (int step = kHeads; step < kWarp; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
// The sum over warps of numbers [warps][heads]: each lane gets that of its head.
template <class A>
__device__ __forceinline__ A sum_warps(const A* numbers, int warps) {
  A sum = 0;
  for (int i = threadIdx.x % kWarp; i < warps * kHeads; i += kWarp) sum += numbers[i];
  return sum_head(sum);
}

// The head's own number, without an array that must be in local memory.
template <class T>
__device__ __forceinline__ T of_head(const T (&x)[kHeads], int r) {
  T y = x[0];
#pragma unroll
  for (int g = 1; g < kHeads; ++g) y = r == g ? x[g] : y;
  return y;
}

// Starts to bring a step's [R][W] numbers to shared memory, [R][width of rows there].
template <class A>
__device__ __forceinline__ void fetch_vectors(A* to, const A* from, const Sizes& s,
                                              const Layout& layout) {
  const int count = s.heads * s.width, threads = static_cast<int>(blockDim.x);
  if (layout.vectors) {
    for (int i = threadIdx.x * kVector<A>; i < count; i += threads * kVector<A>)
      async_copy16(to + i, from + i);
  } else {
    for (int i = threadIdx.x; i < count; i += threads)
      to[i / s.width * layout.width() + i % s.width] = from[i];
  }
}

// Whether a step that is still to come has a reset, left as it is in memory: to look at it would be
// to wait for it.
template <class A, class S>
__device__ __forceinline__ void fetch_reset(const Scan<A, S>& scan, int64_t t, int64_t b,
                                            unsigned char& to) {
  if (scan.reset != nullptr) to = reinterpret_cast<const unsigned char*>(scan.reset)[scan.at(t, b)];
}

// A run of a row of global memory, which may have no more than some of its columns.
template <class A, class T>
__device__ __forceinline__ void store_columns(T* row, int column, const A (&run)[kColumns],
                                              int width, bool vectors) {
  if (vectors) {
    store_run<kColumns>(row + column, run);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (column + i < width) store(row + column + i, run[i]);
  }
}
template <class A, class T>
__device__ __forceinline__ void load_columns(const T* row, int column, A (&run)[kColumns],
                                             int width, bool vectors) {
  if (vectors) {
    load_run<kColumns>(row + column, run);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      run[i] = column + i < width ? to_acc<A>(row[column + i]) : A(0);
  }
}

template <class A>
__device__ __forceinline__ void fill_zero(A* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = A{};
}

// Which of the n slots of a step a row is; -1: none.
__device__ __forceinline__ int find_slot(const unsigned (&slots)[kHeads], int row) {
  int found = -1;
#pragma unroll
  for (int k = 0; k < kHeads; ++k)
    if (slots[k] == static_cast<unsigned>(row)) found = k;
  return found;
}

// ---------------------------------------------------------------- least-used slots

constexpr unsigned kNoSlot = ~0u;

// Whole numbers in the order of usages: 0 and -0 are the same, NaN is larger than the others, and
// the largest number stands for no slot.
__device__ __forceinline__ unsigned usage_order(float usage) {
  const unsigned bits = __float_as_uint(usage + 0.0f);
  return usage != usage ? ~1u : bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ unsigned long long usage_order(double usage) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(usage + 0.0));
  return usage != usage ? ~1ull : bits >> 63 ? ~bits : bits | 1ull << 63;
}
template <class A>
using UsageOrder = decltype(usage_order(A{}));

__device__ __forceinline__ unsigned least_in_warp(unsigned x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_min_sync(kAllLanes, x);
#else
  for (int step = kWarp / 2; step > 0; step /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
#endif
}
__device__ __forceinline__ unsigned long long least_in_warp(unsigned long long x) {
  const unsigned high = least_in_warp(static_cast<unsigned>(x >> 32));
  const unsigned low = x >> 32 == high ? static_cast<unsigned>(x) : ~0u;
  return static_cast<unsigned long long>(high) << 32 | least_in_warp(low);
}

// A lane's least-used slots, least used first; of equal usages the lowest slot.
template <class K>
struct Least {
  K key[kHeads];
  unsigned slot[kHeads];

  __device__ Least() {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      key[i] = ~K{0};
      slot[i] = kNoSlot;
    }
  }
  // Slots must be offered in ascending order.
  __device__ void offer(K k, unsigned s) {
    bool before[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) before[i] = k < key[i];
#pragma unroll
    for (int i = kHeads - 1; i >= 0; --i) {
      const int from = i > 0 ? i - 1 : 0;
      const bool moves = i > 0 && before[from];
      key[i] = moves ? key[from] : before[i] ? k : key[i];
      slot[i] = moves ? slot[from] : before[i] ? s : slot[i];
    }
  }
  // The warp's least-used slot, which is taken out.
  __device__ void take(K* least_key, unsigned* least_slot) {
    *least_key = least_in_warp(key[0]);
    *least_slot = least_in_warp(key[0] == *least_key ? slot[0] : kNoSlot);
    const bool mine = slot[0] == *least_slot;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (!mine) continue;
      key[i] = i + 1 < kHeads ? key[i + 1 < kHeads ? i + 1 : i] : ~K{0};
      slot[i] = i + 1 < kHeads ? slot[i + 1 < kHeads ? i + 1 : i] : kNoSlot;
    }
  }
};

}  // namespace
}  // namespace mann_ext::cuda::lrua
