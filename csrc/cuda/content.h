// What content_read and its backward pass share: how they go through a memory, row by row, what
// they do with a row, and their arguments.
//
// A row is held by a few lanes of one warp, each of which has some of its columns. A block takes a
// run of slots, a "slab".
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/launch.h"

namespace mann_ext::content {

using namespace mann_ext::cuda;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Queries at a time; one if there is only one.
template <class A>
constexpr int kGroup = sizeof(A) == 8 ? 2 : 4;
static_assert(kGroup<float> <= kWarps);  // a warp prepares a query
constexpr int kAhead = 6;                // steps that loads are started before they are needed
constexpr int64_t kSlabSlots = 256;      // at least, so that adding the slabs costs little
constexpr int kBlocksPerProcessor = 4;   // beyond which no more slabs are made

// A lane holds kColumns of a row's columns, in runs of 16 bytes that the row's lanes take in turn:
// lane l has run l, l + lanes, ... Rows of more than `lanes` * kColumns columns are taken in
// chunks.
constexpr int kColumns = 8;
template <class S>
constexpr int kRun = kVector<S>;
template <class S>
constexpr int kRuns = kColumns / kRun<S>;

// How the work is divided.
struct Split {
  int lanes;   // that share a row: 1, 2, 4 ... 32
  int chunks;  // of columns; each block makes the sums of one
  int64_t slabs, slab_slots;
};

// What this thread's lane holds of a row.
template <class S>
struct Lane {
  int lanes, index;  // of the row's lanes
  int chunk;

  __device__ Lane(const Split& split, int chunk)
      : lanes(split.lanes), index(static_cast<int>(threadIdx.x) % split.lanes), chunk(chunk) {}
  // The first column of a run, within the chunk and within the row.
  __device__ int in_chunk(int run) const { return (run * lanes + index) * kRun<S>; }
  __device__ int column(int run) const { return chunk * lanes * kColumns + in_chunk(run); }
};

// A run of a row of `width` columns; zeros past its end. Vectors: the rows are aligned.
template <bool Vectors, int Run, class A, class T>
__device__ __forceinline__ void load_run(const T* row, int column, int width, A* to) {
  if constexpr (Vectors) {
#pragma unroll
    for (int i = 0; i < Run; i += kVector<T>) {
      A part[kVector<T>] = {};
      if (column < width) load_vector<A>(row + column + i, part);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) to[i + j] = part[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < Run; ++i) to[i] = column + i < width ? to_acc<A>(row[column + i]) : A(0);
  }
}

template <bool Vectors, int Run, class A, class T>
__device__ __forceinline__ void store_run(T* row, int column, int width, const A* from) {
  if constexpr (Vectors) {
#pragma unroll
    for (int i = 0; i < Run; i += kVector<T>) {
      A part[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) part[j] = from[i + j];
      if (column < width) store_vector<A>(row + column + i, part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Run; ++i)
      if (column + i < width) store(row + column + i, from[i]);
  }
}

// Pieces in shared memory for the loads of one matrix that are on their way.
template <class S>
constexpr int kRoom = kAhead * kRuns<S> * kThreads;

// A matrix whose rows a thread loads its part of, kAhead steps ahead of their use if they are
// aligned: these loads wait in shared memory that no other thread uses, so nothing is synchronised.
template <bool Vectors, class A, class S>
struct Rows {
  const S* rows;
  int width;
  Vector<S>* room;  // kRoom: [kAhead][kRuns][kThreads]

  __device__ Vector<S>* place(int stage, int run) const {
    return room + (stage * kRuns<S> + run) * kThreads + threadIdx.x;
  }
  __device__ __forceinline__ void fetch(const Lane<S>& lane, int64_t row, int stage) const {
    if constexpr (Vectors) {
#pragma unroll
      for (int run = 0; run < kRuns<S>; ++run)
        if (lane.column(run) < width)
          async_copy16(place(stage, run), rows + row * width + lane.column(run));
    }
  }
  __device__ __forceinline__ void load(const Lane<S>& lane, bool present, int64_t row, int stage,
                                       A (&to)[kColumns]) const {
#pragma unroll
    for (int run = 0; run < kRuns<S>; ++run) {
      const int column = present ? lane.column(run) : width;
      if constexpr (Vectors) {
        const Vector<S> v = *place(stage, run);
#pragma unroll
        for (int i = 0; i < kRun<S>; ++i)
          to[run * kRun<S> + i] = column < width ? to_acc<A>(v.x[i]) : A(0);
      } else {
        load_run<Vectors, kRun<S>>(rows + row * width, column, width, to + run * kRun<S>);
      }
    }
  }
};

// Adds the products of a row with each of `count` vectors, which follow each other in memory.
template <int G, bool Vectors, class A, class S>
__device__ __forceinline__ void add_dots(const Lane<S>& lane, const A (&row)[kColumns],
                                         const A* vectors, int width, int count, A (&dots)[G]) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const A* vector = vectors + (g < count ? g : 0) * width;
#pragma unroll
    for (int run = 0; run < kRuns<S>; ++run) {
      A v[kRun<S>];
      load_run<Vectors, kRun<S>>(vector, lane.column(run), width, v);
#pragma unroll
      for (int i = 0; i < kRun<S>; ++i) dots[g] += row[run * kRun<S> + i] * v[i];
    }
  }
}

// row += sum_g factors[g] * vectors[g]
template <int G, bool Vectors, class A, class S>
__device__ __forceinline__ void add_scaled(const Lane<S>& lane, const A (&factors)[G],
                                           const A* vectors, int width, int count,
                                           A (&row)[kColumns]) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const A* vector = vectors + (g < count ? g : 0) * width;
#pragma unroll
    for (int run = 0; run < kRuns<S>; ++run) {
      A v[kRun<S>];
      load_run<Vectors, kRun<S>>(vector, lane.column(run), width, v);
#pragma unroll
      for (int i = 0; i < kRun<S>; ++i) row[run * kRun<S> + i] += factors[g] * v[i];
    }
  }
}

template <int G, class A>
__device__ __forceinline__ void sum_over_lanes(A (&x)[G], int from, int to) {
#pragma unroll 1
  for (int lanes = from; lanes < to; lanes *= 2)
#pragma unroll
    for (int g = 0; g < G; ++g) x[g] += __shfl_xor_sync(kAllLanes, x[g], lanes);
}

// Which part of the work a block has: those that share rows are neighbours in the grid.
struct Part {
  int64_t b, slab, group;
  int chunk;
  __device__ Part(const Split& split, int64_t groups) {
    int64_t x = blockIdx.x;
    chunk = static_cast<int>(x % split.chunks);
    x /= split.chunks;
    group = x % groups;
    x /= groups;
    slab = x % split.slabs;
    b = x / split.slabs;
  }
};

// A thread's way through its slab: all chunks of a row, the block's own last, then the next row.
struct Walk {
  int chunks, own, stride;
  int64_t end, first_row, slot;
  int step = 0, stage = 0;

  __device__ Walk(const Split& split, const Part& part, int64_t slots)
      : chunks(split.chunks),
        own(part.chunk),
        stride(kThreads / split.lanes),
        end(min(slots, (part.slab + 1) * split.slab_slots)),
        first_row(part.b * slots),
        slot(part.slab * split.slab_slots + threadIdx.x / split.lanes) {}
  // Whether the slot is in the slab: false for some lanes of a warp at its end.
  __device__ bool present() const { return slot < end; }
  __device__ int64_t row() const { return first_row + (present() ? slot : 0); }
  __device__ int chunk() const {
    const int chunk = own + 1 + step;
    return chunk < chunks ? chunk : chunk - chunks;
  }
  __device__ bool last() const { return step == chunks - 1; }
  __device__ void advance() {
    if (++step == chunks) {
      step = 0;
      slot += stride;
    }
    stage = stage == kAhead - 1 ? 0 : stage + 1;
  }
};

// room[g][column in the chunk] = the sum of every thread's sums, warp after warp.
template <int G, class A, class S>
__device__ void sum_over_block(const Lane<S>& lane, A (&sums)[G][kColumns], A* room) {
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int g = 0; g < G; ++g) sum_over_lanes(sums[g], lane.lanes, kWarp);
#pragma unroll 1
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn && static_cast<int>(threadIdx.x) % kWarp < lane.lanes) {
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          A& sum = room[g * kWarp * kColumns + lane.in_chunk(i / kRun<S>) + i % kRun<S>];
          sum = turn == 0 ? sums[g][i] : sum + sums[g][i];
        }
    }
    __syncthreads();
  }
}

// Writes the block's sums of a group of vectors where their slab's are: [Q][slabs][width].
template <class A, class S>
__device__ void write_sums(const Split& split, const Part& part, const A* room, int64_t first,
                           int count, int64_t width, A* to) {
  const int columns = split.lanes * kColumns;
  for (int i = threadIdx.x; i < count * columns; i += kThreads) {
    const int g = i / columns, in_chunk = i % columns;
    const int column = part.chunk * columns + in_chunk;
    if (column < width)
      to[((first + g) * split.slabs + part.slab) * width + column] =
          room[g * kWarp * kColumns + in_chunk];
  }
}

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// Numbers of a group's queries that every thread needs.
template <class A, int G>
struct Queries {
  A length[G], strength[G], expected[G];
};

template <class A>
__device__ __forceinline__ A length_by_warp(const A* vector, int width) {
  A sum = 0;
  for (int j = threadIdx.x % kWarp; j < width; j += kWarp) sum += vector[j] * vector[j];
  return square_root(warp_sum(sum));
}

// sum over slabs of from[slab][column] * factor(slab), for 32 columns at a time, which threads with
// threadIdx.x < 32 get.
template <class A, class Factor>
__device__ __forceinline__ double sum_over_slabs(const A* from, int64_t slabs, int64_t width,
                                                 int64_t column, double* room,
                                                 const Factor& factor) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double sum = 0;
  if (column < width)
    for (int64_t s = warp; s < slabs; s += kWarps)
      sum += static_cast<double>(from[s * width + column]) * factor(s);
  __syncthreads();  // `room` may still be read from the call before
  room[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0)
    for (int w = 1; w < kWarps; ++w) sum += room[w * kWarp + lane];
  return sum;
}

// ---------------------------------------------------------------- arguments

template <class A, class S>
struct Read {
  Split split;
  int64_t batch, queries, slots;
  int key_width, value_width;
  bool cosine, values_given;
  A eps;
  const A* query;      // [B][Q][K]
  const S* keys;       // [B][N][K]
  const S* values;     // [B][N][V]; the keys if not given
  const A* strengths;  // [B][Q] or null: 1
  const bool* mask;    // [B][Q or 1][N] or null
  int64_t mask_queries;
  A* reads;        // [B][Q][V]
  A* weights;      // [B][Q][N]; scores until read_finish
  A* slab_tops;    // [B][Q][slabs], what the slab's sums have been shifted by
  A* slab_totals;  // [B][Q][slabs]
  A* slab_reads;   // [B][Q][slabs][V]
};

inline unsigned grid_size(int64_t blocks) {
  require(blocks <= std::numeric_limits<int32_t>::max(), "content_read: too large for one launch");
  return static_cast<unsigned>(blocks);
}

template <class S>
Split make_split(int64_t batch, int64_t groups, int64_t slots, int64_t width) {
  Split split{.lanes = 1};
  while (split.lanes < kWarp && split.lanes * kColumns < width) split.lanes *= 2;
  const int64_t columns = split.lanes * kColumns;
  split.chunks = static_cast<int>(max(int64_t{1}, (width + columns - 1) / columns));
  const int64_t wanted = int64_t{kBlocksPerProcessor} * multiprocessors();
  const int64_t others = batch * groups * split.chunks;
  const int64_t most = (slots + kSlabSlots - 1) / kSlabSlots;
  split.slabs = max(int64_t{1}, min(most, (wanted + others - 1) / others));
  split.slab_slots = (slots + split.slabs - 1) / split.slabs;
  split.slabs = (slots + split.slab_slots - 1) / split.slab_slots;
  return split;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The kernels count columns in 32 bits.
inline ContentSizes check_arguments(const char* op, const Tensor& queries, const Tensor& keys,
                                    const std::optional<Tensor>& values,
                                    const std::optional<Tensor>& strengths,
                                    const std::optional<Tensor>& mask) {
  const ContentSizes n = content_sizes(op, queries, keys, values, strengths, mask);
  require(max(n.key_width, n.value_width) < int64_t{1} << 30,
          std::string(op) + ": rows of 2^30 columns or more");
  return n;
}

template <class A, class S>
Read<A, S> make_read(const ContentSizes& n, int64_t groups, const Tensor& queries,
                     const Tensor& keys, const std::optional<Tensor>& values,
                     const std::optional<Tensor>& strengths, const std::optional<Tensor>& mask,
                     bool cosine, double eps) {
  Read<A, S> p{};
  p.split = make_split<S>(n.batch, groups, n.slots, max(n.key_width, n.value_width));
  p.batch = n.batch;
  p.queries = n.queries;
  p.slots = n.slots;
  p.key_width = static_cast<int>(n.key_width);
  p.value_width = static_cast<int>(n.value_width);
  p.cosine = cosine;
  p.values_given = values.has_value();
  p.eps = static_cast<A>(eps);
  p.query = static_cast<const A*>(queries.const_data_ptr());
  p.keys = static_cast<const S*>(keys.const_data_ptr());
  p.values = values.has_value() ? static_cast<const S*>(values->const_data_ptr()) : p.keys;
  p.strengths = static_cast<const A*>(data(strengths));
  p.mask = static_cast<const bool*>(data(mask));
  p.mask_queries = n.mask_queries;
  return p;
}

// Shared memory for the loads that are on their way.
template <class A, class S>
size_t pass_bytes(const Read<A, S>& p, bool vectors) {
  return vectors ? (p.values_given ? 2 : 1) * kRoom<S> * sizeof(Vector<S>) : 0;
}

// Calls f(queries at a time, whether rows are aligned), as types.
template <class A, class F>
void for_pass(bool one, bool vectors, F&& f) {
  using One = std::integral_constant<int, 1>;
  using Group = std::integral_constant<int, kGroup<A>>;
  if (one)
    vectors ? f(One{}, std::true_type{}) : f(One{}, std::false_type{});
  else
    vectors ? f(Group{}, std::true_type{}) : f(Group{}, std::false_type{});
}

// Whether every row that is loaded or stored is a whole number of aligned 16-byte pieces.
template <class A, class S>
bool vectors(const Read<A, S>& p, const void* grad_reads = nullptr) {
  return p.key_width % kVector<S> == 0 && p.value_width % kVector<S> == 0 && aligned(p.query) &&
         aligned(p.keys) && aligned(p.values) && aligned(grad_reads);
}

}  // namespace mann_ext::content
