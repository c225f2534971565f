// What the CUDA kernels of lrua_scan share: their arguments, tiles of rows in shared memory, the
// write weights and the choice of the least-used slots.
//
// A tile is a few rows of the memory of one batch element, in shared memory. It is worked on twice:
// first `lanes` threads share a row (write, dot products), then each thread has one run of columns
// of every few rows (sums over slots, store). Between the two, numbers of one row and head lie in
// shared memory as [row][head].
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>

#include "cuda/launch.h"
#include "lrua_sizes.h"

namespace mann_ext::cuda::lrua {

constexpr int kMaxHeads = mann_ext::lrua::kMaxHeads;
// Heads at a time, whose sums over slots are in registers.
constexpr int kGroup = 4;
using mann_ext::lrua::kReplayed;
using mann_ext::lrua::kUnshifted;

struct Sizes {
  int64_t steps, batch, slots, padded;
  int width, heads;
  int chosen;  // n = min(heads, slots): slots erased and written a step
};

// Arguments of the scan, the same forward and backward. A: the type of sums, S: of the memory.
template <class A, class S>
struct Scan {
  Sizes sizes;
  bool shared;  // least_used="shared"
  A eps;
  S initial;               // value of the memory after a reset
  int64_t snapshot_every;  // 0: none; K: M_t is stored after every K-th step
  const S* memory;         // strides in elements
  int64_t batch_stride, slot_stride, width_stride;
  bool packed;            // rows follow each other, aligned to 16 bytes
  const A* read_weights;  // [B][R][N]
  const A* keys;          // [T][B][R][W]
  const A* gates;         // [T][B][R]
  const A* strengths;     // [T][B][R] or null: 1
  const A* contents;      // [T][B][R][W]; the keys if not given
  const bool* reset;      // [T][B] or null

  __device__ int64_t at(int64_t t, int64_t b) const { return t * sizes.batch + b; }
  __device__ bool resets(int64_t t, int64_t b) const { return reset != nullptr && reset[at(t, b)]; }
  __device__ const A* key(int64_t t, int64_t b) const {
    return keys + at(t, b) * sizes.heads * sizes.width;
  }
  __device__ const A* content(int64_t t, int64_t b) const {
    return contents + at(t, b) * sizes.heads * sizes.width;
  }
  __device__ A gate(int64_t t, int64_t b, int r) const { return gates[at(t, b) * sizes.heads + r]; }
  __device__ A strength(int64_t t, int64_t b, int r) const {
    return strengths == nullptr ? A(1) : strengths[at(t, b) * sizes.heads + r];
  }
  __device__ bool has_snapshot(int64_t t) const {
    return snapshot_every > 0 && (t + 1) % snapshot_every == 0;
  }
  __device__ int64_t snapshot_at(int64_t t, int64_t b) const {
    return at(t / snapshot_every, b) * sizes.padded * sizes.width;
  }
  // Whether M_t is one of the first made after its episode's start.
  __device__ bool near_start(int64_t t, int64_t b) const {
    if (t < kReplayed) return true;
    if (reset == nullptr) return false;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kReplayed; ++i) found |= reset[at(t - i, b)];  // one wait for all of them
    return found;
  }
  __device__ int64_t episode_start(int64_t t, int64_t b) const {
    while (t > 0 && !resets(t, b)) --t;
    return t;
  }
  // Whether head r writes to the k-th least-used slot beyond its read weight; k = -1: to others.
  __device__ bool writes(int r, int k) const { return k >= 0 && (shared || r % sizes.chosen == k); }
  // w_w = g w_{t-1} + (1 - g) lu (eq. 22)
  __device__ A write_weight(A gate, A previous, int r, int k) const {
    const A weight = gate * previous;
    return writes(r, k) ? weight + (A(1) - gate) : weight;
  }
};

// What the forward pass gives and saves; the backward pass reads it.
template <class A, class S>
struct History {
  A* reads;        // [T][B][R][W]
  S* memory_out;   // [B][N][W]
  A* weights;      // [T][B][R][padded] or null
  int64_t* slots;  // [T][B][n] or null
  S* erased_rows;  // [T][B][n][W] or null
  S* snapshots;    // [T / snapshot_every][B][padded][W] or null
};

template <class A, class S>
struct Forward {
  Scan<A, S> scan;
  History<A, S> history;
  A usage_decay;
  const A* usage;  // [B][N]
  A* weights_out;  // [B][R][N]
  A* usage_out;    // [B][N]
};

template <class A, class S>
struct Backward {
  Scan<A, S> scan;
  History<A, S> history;
  const A* grad_reads;    // [T][B][R][W]
  const S* grad_memory;   // [B][N][W] or null
  const A* grad_weights;  // [B][R][N] or null
  S* grad_memory_in;      // [B][N][W] or null
  A* grad_weights_in;     // [B][R][N]
  A* grad_keys;           // [T][B][R][W]
  A* grad_gates;          // [T][B][R]
  A* grad_strengths;      // [T][B][R] or null
  A* grad_contents;       // [T][B][R][W] or null: added to grad_keys
};

// What the backward pass sums over slots for each head, besides the gradients of key and content:
// dw_w * w_{t-1} and dw_w * lu (for the gate), ds * cosine (for the strength), and the cosine's own
// term in the gradient of |k|.
enum Sum { previous_sum, chosen_sum, strength_sum, own_sum, kSums };

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }
template <class A>
__device__ __forceinline__ A sigmoid(A x) {
  return A(1) / (A(1) + exponential(-x));
}
__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }
template <class A>
__device__ __forceinline__ A magnitude(A x) {
  return x < 0 ? -x : x;
}

// Takes aligned pieces off shared memory; with a null base it only counts.
class Arena {
 public:
  __host__ __device__ explicit Arena(unsigned char* base) : base_(base) {}
  template <class T>
  __host__ __device__ T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return p;
  }
  // Leaves out what is missing to this many bytes.
  __host__ __device__ void reach(int64_t bytes) { used_ = used_ > bytes ? used_ : bytes; }
  __host__ __device__ int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

// ---------------------------------------------------------------- runs of columns

// Columns that a thread has of a row at a time: four if the rows are aligned, else one.
template <bool Vectors>
constexpr int kRun = Vectors ? 4 : 1;

template <int Run, class A, class T>
__device__ __forceinline__ void load_run(const T* from, A (&to)[Run]) {
  constexpr int kPart = Run * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : Run;
  struct alignas(kPart * sizeof(T)) Part {
    T x[kPart];
  };
#pragma unroll
  for (int i = 0; i < Run; i += kPart) {
    const Part part = *reinterpret_cast<const Part*>(from + i);
#pragma unroll
    for (int j = 0; j < kPart; ++j) to[i + j] = to_acc<A>(part.x[j]);
  }
}

template <int Run, class A, class T>
__device__ __forceinline__ void store_run(T* to, const A (&from)[Run]) {
  constexpr int kPart = Run * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : Run;
  struct alignas(kPart * sizeof(T)) Part {
    T x[kPart];
  };
#pragma unroll
  for (int i = 0; i < Run; i += kPart) {
    Part part;
#pragma unroll
    for (int j = 0; j < kPart; ++j) store(&part.x[j], from[i + j]);
    *reinterpret_cast<Part*>(to + i) = part;
  }
}

// The numbers as they are when they have been stored.
template <class S, int Run, class A>
__device__ __forceinline__ void round_run(A (&run)[Run]) {
  if constexpr (!std::is_same_v<A, S>) {
#pragma unroll
    for (int i = 0; i < Run; ++i) {
      S stored;
      store(&stored, run[i]);
      run[i] = to_acc<A>(stored);
    }
  }
}

template <int Run, class A>
__device__ __forceinline__ void add_scaled(A (&to)[Run], A factor, const A (&run)[Run]) {
#pragma unroll
  for (int i = 0; i < Run; ++i) to[i] += factor * run[i];
}

template <int Run, class A>
__device__ __forceinline__ void add_dot(A& to, const A (&x)[Run], const A (&y)[Run]) {
#pragma unroll
  for (int i = 0; i < Run; ++i) to += x[i] * y[i];
}

// Each of a row's lanes gets the sum over them.
template <class A>
__device__ __forceinline__ A sum_lanes(A x, int lanes) {
#pragma unroll 1
  for (int step = 1; step < lanes; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <int G, class A>
__device__ __forceinline__ void sum_lanes(A (&x)[G], int lanes) {
#pragma unroll 1
  for (int step = 1; step < lanes; step *= 2)
#pragma unroll
    for (int g = 0; g < G; ++g) x[g] += __shfl_xor_sync(kAllLanes, x[g], step);
}

// A warp gets the length of a vector.
template <class A>
__device__ __forceinline__ A length_by_warp(const A* vector, int width) {
  double sum = 0;
  for (int j = threadIdx.x % kWarp; j < width; j += kWarp)
    sum += static_cast<double>(vector[j]) * vector[j];
  return static_cast<A>(square_root(warp_sum(sum)));
}

// ---------------------------------------------------------------- tiles

// Calls f(row, piece) for the pieces of rows that this thread has; neighbours have neighbours.
template <class F>
__device__ __forceinline__ void for_pieces(int rows, int pieces, F&& f) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int row_step = threads / pieces, piece_step = threads % pieces;
  int row = thread / pieces, piece = thread % pieces;
#pragma unroll 1
  while (row < rows) {
    f(row, piece);
    row += row_step;
    piece += piece_step;
    if (piece >= pieces) {
      piece -= pieces;
      ++row;
    }
  }
}

// Brings rows to shared memory: `count` of them, then zeros up to `rows`. Where the types are the
// same and rows are aligned, the copies arrive only after an async_wait.
template <bool Vectors, class T, class From>
__device__ __forceinline__ void fetch_rows(T* to, int stride, const From* from, int width, int rows,
                                           int count) {
  if constexpr (Vectors && std::is_same_v<T, From>) {
    constexpr int kPiece = kVector<T>;
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    if (stride == width && count == rows) {
      for (int at = thread * kPiece; at < rows * width; at += threads * kPiece)
        async_copy16(to + at, from + at);
      return;
    }
    const T* source = from + thread * kPiece;
    for_pieces(rows, width / kPiece, [&](int row, int piece) {
      T* target = to + row * stride + piece * kPiece;
      if (row < count)
        async_copy16(target, source);
      else
        *reinterpret_cast<Vector<T>*>(target) = Vector<T>{};
      source += threads * kPiece;
    });
  } else {
    constexpr int kColumns = kRun<Vectors>;
    for_pieces(rows, width / kColumns, [&](int row, int piece) {
      T run[kColumns] = {};
      if constexpr (std::is_same_v<T, From>) {
        if (row < count) run[0] = from[static_cast<int64_t>(row) * width + piece];
        to[row * stride + piece] = run[0];
      } else {
        if (row < count)
          load_run<kColumns>(from + static_cast<int64_t>(row) * width + piece * kColumns, run);
        store_run<kColumns>(to + row * stride + piece * kColumns, run);
      }
    });
  }
}

// The rows that an episode of this batch element starts from: the argument, or the constant.
template <bool Vectors, class A, class S>
__device__ __forceinline__ void fetch_initial(const Scan<A, S>& scan, S* to, int stride, int64_t b,
                                              bool given, int64_t first, int rows, int count) {
  const S* from = scan.memory + b * scan.batch_stride + first * scan.slot_stride;
  if (Vectors && given && scan.packed) {
    fetch_rows<Vectors>(to, stride, from, scan.sizes.width, rows, count);
    return;
  }
  for_pieces(rows, scan.sizes.width, [&](int row, int column) {
    S value{};
    if (row < count)
      value = given ? from[row * scan.slot_stride + column * scan.width_stride] : scan.initial;
    to[row * stride + column] = value;
  });
}

// Brings numbers of `rows` slots from rows of `padded` numbers to shared memory, [heads][rows].
template <class A>
__device__ __forceinline__ void fetch_weights(A* to, const A* from, int64_t padded, int heads,
                                              int rows) {
  for_pieces(heads, rows / kVector<A>, [&](int head, int piece) {
    async_copy16(to + head * rows + piece * kVector<A>, from + head * padded + piece * kVector<A>);
  });
}

// Where among the n slots of this step a slot is; -1: it is none of them.
__device__ __forceinline__ int find_slot(const int64_t* slots, int chosen, int64_t slot) {
  int found = -1;
#pragma unroll 1
  for (int k = 0; k < chosen; ++k)
    if (slots[k] == slot) found = k;
  return found;
}

// ---------------------------------------------------------------- work on a row

// Erases a row, adds the writes, rounds it, and forms its dot products with the keys. `write` and
// `dots` are the row's; all lanes of the warp call this.
template <int G, bool Many, int Run, class A, class S>
__device__ __forceinline__ void write_and_score(S* row, int lane, int lanes, int width, int heads,
                                                bool erased, const A* write, const A* contents,
                                                const A* keys, A* dots, A* square) {
  A norm = 0, weights[G];
#pragma unroll
  for (int g = 0; g < G; ++g) weights[g] = !Many && g < heads ? write[g] : A(0);
#pragma unroll 1
  for (int first = 0; first < heads; first += G) {
    A sums[G] = {};
#pragma unroll 1
    for (int column = lane * Run; column < width; column += lanes * Run) {
      A run[Run], vector[Run];
      load_run<Run>(row + column, run);
      if (first == 0) {
        if (erased)
#pragma unroll
          for (A& number : run) number = 0;
        if constexpr (Many) {
#pragma unroll 1
          for (int r = 0; r < heads; ++r) {
            load_run<Run>(contents + r * width + column, vector);
            add_scaled<Run>(run, write[r], vector);
          }
        } else {
#pragma unroll
          for (int g = 0; g < G; ++g)
            if (g < heads) {
              load_run<Run>(contents + g * width + column, vector);
              add_scaled<Run>(run, weights[g], vector);
            }
        }
        round_run<S, Run>(run);
        store_run<Run>(row + column, run);
        add_dot<Run>(norm, run, run);
      }
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (first + g < heads) {
          load_run<Run>(keys + (first + g) * width + column, vector);
          add_dot<Run>(sums[g], run, vector);
        }
    }
    sum_lanes(sums, lanes);
    if (lane == 0)
#pragma unroll
      for (int g = 0; g < G; ++g)
        if (first + g < heads) dots[first + g] = sums[g];
    if constexpr (!Many) break;
  }
  norm = sum_lanes(norm, lanes);
  if (lane == 0) *square = norm;
}

// ---------------------------------------------------------------- least-used slots

// The n least-used slots that a warp has met, least used first, in shared memory. Of equal usages
// the lowest slot comes first; NaN is larger than any number.
template <class A>
struct LeastUsed {
  A* usage;
  int64_t* slot;
  int n;

  static __device__ bool before(A a, int64_t a_slot, A b, int64_t b_slot) {
    const bool a_nan = a != a, b_nan = b != b;
    if (a_nan || b_nan) return a_nan && b_nan ? a_slot < b_slot : b_nan;
    return a < b || (a == b && a_slot < b_slot);
  }
  __device__ void clear() const {
    for (int i = threadIdx.x % kWarp; i < n; i += kWarp) {
      usage[i] = std::numeric_limits<A>::quiet_NaN();
      slot[i] = std::numeric_limits<int64_t>::max();
    }
    __syncwarp();
  }
  // Each lane of the warp offers a slot, or none.
  __device__ void offer(bool open, A u, int64_t s) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (;;) {
      open = open && before(u, s, usage[n - 1], slot[n - 1]);
      if (!__any_sync(kAllLanes, open)) return;
      A best = open ? u : std::numeric_limits<A>::quiet_NaN();
      int64_t best_slot = open ? s : std::numeric_limits<int64_t>::max();
#pragma unroll 1
      for (int step = kWarp / 2; step > 0; step /= 2) {
        const A other = __shfl_xor_sync(kAllLanes, best, step);
        const int64_t other_slot = __shfl_xor_sync(kAllLanes, best_slot, step);
        if (before(other, other_slot, best, best_slot)) {
          best = other;
          best_slot = other_slot;
        }
      }
      if (open && s == best_slot) open = false;
      insert(lane, best, best_slot);
    }
  }
  // Each lane moves the entries lane and lane + 32 up if the new one comes before them.
  __device__ void insert(int lane, A u, int64_t s) const {
    A moved[2];
    int64_t moved_slot[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = lane + k * kWarp;
      moved[k] = u;
      moved_slot[k] = s;
      if (i >= n) continue;
      if (before(usage[i], slot[i], u, s)) {
        moved[k] = usage[i];
        moved_slot[k] = slot[i];
      } else if (i > 0 && !before(usage[i - 1], slot[i - 1], u, s)) {
        moved[k] = usage[i - 1];
        moved_slot[k] = slot[i - 1];
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = lane + k * kWarp;
      if (i >= n) continue;
      usage[i] = moved[k];
      slot[i] = moved_slot[k];
    }
    __syncwarp();
  }
  // Offers `count` entries of other lists, which follow each other.
  __device__ void offer_all(const A* usages, const int64_t* slots, int64_t count) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x % kWarp; i - threadIdx.x % kWarp < count; i += kWarp) {
      const bool present = i < count && slots[i] != std::numeric_limits<int64_t>::max();
      offer(present, present ? usages[i] : A(0), present ? slots[i] : 0);
    }
  }
};

// Whether sums over the slots of this head subtract the largest score.
template <class A>
__device__ __forceinline__ bool is_shifted(A strength) {
  return !(magnitude(strength) <= A(kUnshifted));
}

// The larger, or NaN if one is.
template <class A>
__device__ __forceinline__ A larger(A top, A x) {
  return x <= top || top != top ? top : x;
}
template <class A>
__device__ __forceinline__ A largest_in_warp(A x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    x = larger(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// ---------------------------------------------------------------- host

// Each runs a whole scan, T and B at least 1, in one of two ways; `like` gives room and the device.
// The resident form is for at most kGroup heads and rows of kMaxResidentWidth columns; `blocks` of
// a cluster share the memory of a batch element, and each needs so many bytes of shared memory.
constexpr int kMaxResidentWidth = 512;
bool has_clusters();

// Launches what makes a step's keys from the step before: before the launches of that step or, on
// the way back, after those that make their gradients.
using StepHook = std::function<void(int64_t t)>;

template <class A, class S>
int64_t forward_resident_bytes(const Forward<A, S>& p, bool vectors, int blocks);
template <class A, class S>
void forward_resident(const Forward<A, S>& p, const Tensor& like, bool vectors, int blocks);
template <class A, class S>
void forward_streaming(const Forward<A, S>& p, const Tensor& like, bool vectors,
                       const StepHook& before = {});
// Streaming, with the writes of `chunk` steps deferred together, where the bytes of shared memory
// suffice.
template <class A>
int64_t forward_chunked_bytes(const Forward<A, A>& p, bool vectors, int64_t chunk);
template <class A>
void forward_chunked(const Forward<A, A>& p, const Tensor& like, bool vectors, int64_t chunk);
template <class A, class S>
int64_t backward_resident_bytes(const Backward<A, S>& p, bool vectors, int blocks);
template <class A, class S>
void backward_resident(const Backward<A, S>& p, const Tensor& like, bool vectors, int blocks);
template <class A, class S>
void backward_streaming(const Backward<A, S>& p, const Tensor& like, bool vectors,
                        const StepHook& after = {});

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline unsigned grid_size(int64_t blocks) {
  require(blocks <= std::numeric_limits<int32_t>::max(), "lrua_scan: too large for one launch");
  return static_cast<unsigned>(blocks);
}

}  // namespace mann_ext::cuda::lrua
