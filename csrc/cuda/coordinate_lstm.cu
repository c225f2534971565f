// coordinate_lstm on the GPU. A block takes kCoordinates coordinates through all steps, then
// others.
//
// Lanes are coordinates, 8 bytes of them each; a warp has kUnits hidden units of all of them, with
// the sums of their gates in registers, so that a weight read once from shared memory serves a few
// coordinates and a number of h many gates. h lies in shared memory, as [unit][coordinate].
// The backward pass saves h and c of the steps of the tiles being worked on, and makes the gates
// again. For the weights' gradients each thread has the four gates of a unit and kColumns columns,
// summed over a tile in registers, over a block's tiles in float64, and over blocks in their order.
// Multiply-adds a coordinate and step: 4 H (H + 3) forward; backward four times as many.
//
// H = kKnown is known to the compiler. Other sizes read the weights from global memory, and where
// shared memory is too small (more than 100 units backward on sm_90) all the rest lies there too;
// MANN_EXT_CUDA_REGIME=streaming does that for all sizes.
#include <algorithm>
#include <tuple>

#include "coordinate_lstm_tensors.h"
#include "cuda/lrua.h"

namespace mann_ext::cuda::coordinate_lstm {
namespace {

namespace tensors = mann_ext::coordinate_lstm;
using cuda::lrua::Arena;
using cuda::lrua::hyperbolic_tangent;
using cuda::lrua::pointer;
using cuda::lrua::sigmoid;
using tensors::Sizes;

constexpr int kExtra = static_cast<int>(tensors::kExtra);
constexpr int kGates = 4;  // i, f, g, o
constexpr int kKnown = 20;
constexpr int kUnits = 5;  // of a warp at a time
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kColumns = 4;  // of the weights' gradients, of a thread
constexpr int kShare = kGates * kColumns;
constexpr int64_t kMaxHidden = 16'000;  // the weights are indexed with 32 bits

template <class A>
constexpr int kOfLane = 8 / static_cast<int>(sizeof(A));
template <class A>
constexpr int kCoordinates = kWarp * kOfLane<A>;
// A row of shared memory of which several rows are read at once: vectors of neighbouring rows are
// in other banks.
template <class A>
constexpr int kRow = kCoordinates<A> + kVector<A>;

// Blocks of a multiprocessor that registers are left for: as many as it has without spilling.
template <class A, int Known>
constexpr int kBlocks = Known != 0 && sizeof(A) == 4 ? 4 : 3;

template <class A>
struct alignas(16) Gates {
  A of[kGates];
};

template <class A>
struct alignas(8) Lane {
  A x[kOfLane<A>];
};
template <class A>
__device__ __forceinline__ Lane<A>& lane_of(A* row) {
  return reinterpret_cast<Lane<A>*>(row)[threadIdx.x % kWarp];
}

// Threads share the weights' gradients in pieces of a unit and every pieces_of_unit-th column.
__host__ __device__ __forceinline__ int pieces_of_unit(int hidden) {
  return (hidden + kExtra + kColumns - 1) / kColumns;
}
// Numbers a block adds up: [gate][column of the piece][piece][unit], and [H + 1] of the output.
__host__ __device__ __forceinline__ int64_t partial_size(int hidden) {
  return int64_t{kShare} * pieces_of_unit(hidden) * hidden + hidden + 1;
}

template <class A>
struct Arguments {
  int64_t steps, coordinates;
  int hidden;
  const A* gradients;       // [T][P]
  const Gates<A>* weights;  // [H + 3][H]: of a column and a unit
  const A* output;          // [H + 1], the bias last
  const A* grad_out;        // [P]
  A* out;                   // [P]
  A* states;                // [blocks][T - 1][2][H][kCoordinates]: h and c after each step but one
  double* partial;          // [blocks][partial_size]
  unsigned char* room;      // [blocks][room_bytes], or null: shared memory
  int64_t room_bytes;
};

// The room of a block. Known: the number of hidden units, or 0.
template <class A, int Known>
struct Room {
  int units;
  Gates<A>* shared_weights;
  A* inputs;      // [2][H + 3][kRow]: h_{t-1}, a gradient's two numbers and 1; t even, t odd
  A* cells;       // [H][kCoordinates]: c; on the way back its gradient
  A* grad_gates;  // [4][H][kRow]
  A* grad_h;      // [H][kCoordinates]
  int64_t bytes;

  __host__ __device__ Room(int hidden, bool backward, unsigned char* start)
      : units(hidden), shared_weights(nullptr), grad_gates(nullptr), grad_h(nullptr) {
    Arena arena(start);
    if (Known != 0) shared_weights = arena.take<Gates<A>>((Known + kExtra) * Known);
    inputs = arena.take<A>(2 * (hidden + kExtra) * kRow<A>);
    cells = arena.take<A>(hidden * kCoordinates<A>);
    if (backward) {
      grad_gates = arena.take<A>(kGates * hidden * kRow<A>);
      grad_h = arena.take<A>(hidden * kCoordinates<A>);
    }
    bytes = arena.used();
  }
  __device__ __forceinline__ int hidden() const { return Known != 0 ? Known : units; }
  __device__ __forceinline__ A* input(int64_t t, int column) const {
    return inputs + (static_cast<int>(t & 1) * (hidden() + kExtra) + column) * kRow<A>;
  }
  __device__ __forceinline__ A* cell(int unit) const { return cells + unit * kCoordinates<A>; }
  __device__ __forceinline__ A* grad_state(int unit) const {
    return grad_h + unit * kCoordinates<A>;
  }
  __device__ __forceinline__ A* grad_gate(int gate, int unit) const {
    return grad_gates + (gate * hidden() + unit) * kRow<A>;
  }
  // A unit past the last counts as the last: what it gives is not stored.
  __device__ __forceinline__ bool has(int unit) const {
    return (Known != 0 && Known % kUnits == 0) || unit < units;
  }
  __device__ __forceinline__ int present(int unit) const { return has(unit) ? unit : units - 1; }
};

template <class A, int Known>
__device__ __forceinline__ Room<A, Known> make_room(const Arguments<A>& p, bool backward) {
  unsigned char* start = Known != 0 || p.room == nullptr ? shared_memory<unsigned char>()
                                                         : p.room + blockIdx.x * p.room_bytes;
  const Room<A, Known> room(Known != 0 ? Known : p.hidden, backward, start);
  if constexpr (Known != 0) {
    for (int i = threadIdx.x; i < (Known + kExtra) * Known; i += kThreads)
      room.shared_weights[i] = p.weights[i];
  }
  for (int i = threadIdx.x; i < 2 * kCoordinates<A>; i += kThreads)
    room.input(i / kCoordinates<A>, room.hidden() + 2)[i % kCoordinates<A>] = 1;
  return room;
}

// Calls f(first) for each kUnits units of this thread's warp.
template <class F>
__device__ __forceinline__ void for_units(int hidden, F&& f) {
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / kWarp * kUnits; first < hidden;
       first += kWarps * kUnits)
    f(first);
}

template <class A, int Known>
__device__ __forceinline__ const Gates<A>* weights_of(const Arguments<A>& p,
                                                      const Room<A, Known>& room, int column) {
  return (Known != 0 ? room.shared_weights : p.weights) + column * room.hidden();
}

// (log|g| / 7, sign g), or (-1, e^7 g) where |g| < e^-7, of step t of the coordinates from `first`.
template <class A, int Known>
__device__ __forceinline__ void load_gradients(const Arguments<A>& p, const Room<A, Known>& room,
                                               int64_t t, int64_t first) {
  const int i = threadIdx.x;
  if (i >= kCoordinates<A>) return;
  const A g = first + i < p.coordinates ? p.gradients[t * p.coordinates + first + i] : A(0);
  A size = lrua::magnitude(g), sign = g * A(tensors::kLargest);
  size = size < A(tensors::kSmallest) ? A(tensors::kSmallest) : size;
  sign = sign > A(1) ? A(1) : sign;
  room.input(t, room.hidden())[i] = lrua::logarithm(size) * A(1.0 / 7);
  room.input(t, room.hidden() + 1)[i] = sign < A(-1) ? A(-1) : sign;
}

// The gates of kUnits units at step t before their activation.
template <class A, int Known>
__device__ __forceinline__ void sum_gates(const Arguments<A>& p, const Room<A, Known>& room,
                                          int64_t t, int first,
                                          A (&sums)[kUnits][kOfLane<A>][kGates]) {
  const int H = room.hidden();
  const Gates<A>* biases = weights_of(p, room, H + 2);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const Gates<A> bias = biases[room.present(first + u)];
#pragma unroll
    for (int i = 0; i < kOfLane<A>; ++i)
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) sums[u][i][gate] = bias.of[gate];
  }
#pragma unroll 4
  for (int k = t == 0 ? H : 0; k < H + 2; ++k) {  // h_0 = 0
    const Lane<A> x = lane_of(room.input(t, k));
    const Gates<A>* weights = weights_of(p, room, k);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const Gates<A> weight = weights[room.present(first + u)];
#pragma unroll
      for (int i = 0; i < kOfLane<A>; ++i)
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) sums[u][i][gate] += x.x[i] * weight.of[gate];
    }
  }
}

template <class A>
struct Activated {
  A input, forget, candidate, output, cell, squashed;

  __device__ __forceinline__ Activated(const A (&sums)[kGates], A before)
      : input(sigmoid(sums[0])),
        forget(sigmoid(sums[1])),
        candidate(hyperbolic_tangent(sums[2])),
        output(sigmoid(sums[3])),
        cell(forget * before + input * candidate),
        squashed(hyperbolic_tangent(cell)) {}
};

// h (of 0) or c (1) of a unit after step t, in a tile that this block works on.
template <class A>
__device__ __forceinline__ Lane<A>& saved(const Arguments<A>& p, int64_t t, int of, int hidden,
                                          int unit) {
  const int64_t step = blockIdx.x * (p.steps - 1) + t;
  return lane_of(p.states + ((step * 2 + of) * hidden + unit) * kCoordinates<A>);
}

// All steps of the coordinates from `first`; h_T is in input(T).
template <bool Save, class A, int Known>
__device__ __forceinline__ void run_steps(const Arguments<A>& p, const Room<A, Known>& room,
                                          int64_t first_coordinate) {
  const int H = room.hidden();
  __syncthreads();  // the tile before may still be read
  for_units(H, [&](int first) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      if (room.has(first + u)) lane_of(room.input(0, first + u)) = {};
  });
  if (p.steps > 0) load_gradients(p, room, 0, first_coordinate);
  __syncthreads();
#pragma unroll 1
  for (int64_t t = 0; t < p.steps; ++t) {
    for_units(H, [&](int first) {
      A sums[kUnits][kOfLane<A>][kGates];
      sum_gates(p, room, t, first, sums);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = first + u;
        if (!room.has(unit)) break;
        Lane<A> c{}, h;
        if (t > 0) c = lane_of(room.cell(unit));
#pragma unroll
        for (int i = 0; i < kOfLane<A>; ++i) {
          const Activated<A> x(sums[u][i], c.x[i]);
          c.x[i] = x.cell;
          h.x[i] = x.output * x.squashed;
        }
        lane_of(room.cell(unit)) = c;
        lane_of(room.input(t + 1, unit)) = h;
        if (Save && t + 1 < p.steps) {
          saved(p, t, 0, H, unit) = h;
          saved(p, t, 1, H, unit) = c;
        }
      }
    });
    if (t + 1 < p.steps) load_gradients(p, room, t + 1, first_coordinate);
    __syncthreads();
  }
}

template <class A, int Known>
__global__ __launch_bounds__(kThreads, kBlocks<A, Known>) void forward(const Arguments<A> p) {
  const Room<A, Known> room = make_room<A, Known>(p, false);
  const int H = room.hidden(), i = threadIdx.x;
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * kCoordinates<A>; first < p.coordinates;
       first += int64_t{gridDim.x} * kCoordinates<A>) {
    run_steps<false>(p, room, first);
    if (i >= kCoordinates<A> || first + i >= p.coordinates) continue;
    A sum = p.output[H];
#pragma unroll 4
    for (int j = 0; j < H; ++j) sum += p.output[j] * room.input(p.steps, j)[i];
    p.out[first + i] = sum;
  }
}

// ---------------------------------------------------------------- backward

// The gradients of h_T, of c_T beyond h_T, and of the output's weights.
template <class A, int Known>
__device__ __forceinline__ void start_back(const Arguments<A>& p, const Room<A, Known>& room,
                                           int64_t first_coordinate, double* output_sums) {
  const int H = room.hidden(), lane = threadIdx.x % kWarp;
  Lane<A> grad;
#pragma unroll
  for (int i = 0; i < kOfLane<A>; ++i) {
    const int64_t at = first_coordinate + lane * kOfLane<A> + i;
    grad.x[i] = at < p.coordinates ? p.grad_out[at] : A(0);
  }
  for_units(H, [&](int first) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = first + u;
      if (!room.has(unit)) break;
      const A weight = p.output[unit];
      Lane<A> grad_h;
#pragma unroll
      for (int i = 0; i < kOfLane<A>; ++i) grad_h.x[i] = grad.x[i] * weight;
      lane_of(room.grad_state(unit)) = grad_h;
      lane_of(room.cell(unit)) = {};
    }
  });
#pragma unroll 1
  for (int j = static_cast<int>(threadIdx.x) / kWarp; j <= H; j += kWarps) {
    const Lane<A> x = lane_of(room.input(p.steps, j < H ? j : H + 2));
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kOfLane<A>; ++i) sum += grad.x[i] * x.x[i];
    sum = warp_sum(sum);
    if (lane == 0) output_sums[j] += sum;
  }
}

// From the gradients of h_t and c_t to those of the gates before their activation and of c_{t-1}.
template <class A, int Known>
__device__ __forceinline__ void differentiate_gates(const Arguments<A>& p,
                                                    const Room<A, Known>& room, int64_t t) {
  const int H = room.hidden();
  for_units(H, [&](int first) {
    A sums[kUnits][kOfLane<A>][kGates];
    sum_gates(p, room, t, first, sums);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = first + u;
      if (!room.has(unit)) break;
      Lane<A> before{}, grad_c = lane_of(room.cell(unit)), grads[kGates];
      if (t > 0) before = saved(p, t - 1, 1, H, unit);
      const Lane<A> grad_h = lane_of(room.grad_state(unit));
#pragma unroll
      for (int i = 0; i < kOfLane<A>; ++i) {
        const Activated<A> x(sums[u][i], before.x[i]);
        const A grad = grad_h.x[i];
        const A cell = grad_c.x[i] + grad * x.output * (A(1) - x.squashed * x.squashed);
        grads[0].x[i] = cell * x.candidate * x.input * (A(1) - x.input);
        grads[1].x[i] = cell * before.x[i] * x.forget * (A(1) - x.forget);
        grads[2].x[i] = cell * x.input * (A(1) - x.candidate * x.candidate);
        grads[3].x[i] = grad * x.squashed * x.output * (A(1) - x.output);
        grad_c.x[i] = cell * x.forget;
      }
      lane_of(room.cell(unit)) = grad_c;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) lane_of(room.grad_gate(gate, unit)) = grads[gate];
    }
  });
}

// grad_h_{t-1} = W_hh^T times the gradients of the gates.
template <class A, int Known>
__device__ __forceinline__ void differentiate_state(const Arguments<A>& p,
                                                    const Room<A, Known>& room) {
  const int H = room.hidden();
  for_units(H, [&](int first) {
    A sums[kUnits][kOfLane<A>] = {};
#pragma unroll 4
    for (int j = 0; j < H; ++j) {
      Lane<A> grads[kGates];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) grads[gate] = lane_of(room.grad_gate(gate, j));
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const Gates<A> weight = weights_of(p, room, room.present(first + u))[j];
#pragma unroll
        for (int i = 0; i < kOfLane<A>; ++i)
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate)
            sums[u][i] += weight.of[gate] * grads[gate].x[i];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!room.has(first + u)) break;
      Lane<A>& grad_h = lane_of(room.grad_state(first + u));
#pragma unroll
      for (int i = 0; i < kOfLane<A>; ++i) grad_h.x[i] = sums[u][i];
    }
  });
}

// What was given to step t, again.
template <class A, int Known>
__device__ __forceinline__ void load_inputs(const Arguments<A>& p, const Room<A, Known>& room,
                                            int64_t t, int64_t first_coordinate) {
  const int H = room.hidden();
  for_units(H, [&](int first) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (!room.has(first + u)) break;
      Lane<A> h{};
      if (t > 0) h = saved(p, t - 1, 0, H, first + u);
      lane_of(room.input(t, first + u)) = h;
    }
  });
  load_gradients(p, room, t, first_coordinate);
}

// Adds the products of step t to a piece of the weights' gradients, summed kRun at a time: a single
// long chain would round more than the reference.
template <class A, int Known>
__device__ __forceinline__ void add_products(const Room<A, Known>& room, int64_t t, int piece,
                                             A (&sums)[kGates][kColumns]) {
  constexpr int kRun = 4 * kVector<A>;
  const int H = room.hidden(), pieces = pieces_of_unit(H), unit = piece % H;
  const A *grads = room.grad_gate(0, unit), *x[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i)  // a column past the last counts as the last, and is left out
    x[i] = room.input(t, min(piece / H + i * pieces, H + kExtra - 1));
#pragma unroll 1
  for (int run = 0; run < kCoordinates<A>; run += kRun) {
    A of_run[kGates][kColumns] = {};
#pragma unroll 1
    for (int c = run; c < run + kRun; c += kVector<A>) {
      A inputs[kColumns][kVector<A>];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) load_vector<A>(x[i] + c, inputs[i]);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        A grad[kVector<A>];
        load_vector<A>(grads + gate * H * kRow<A> + c, grad);
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
#pragma unroll
          for (int v = 0; v < kVector<A>; ++v) of_run[gate][i] += grad[v] * inputs[i][v];
      }
    }
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[gate][i] += of_run[gate][i];
  }
}

// Adds to the block's sums, which only this thread has of this piece.
template <class A>
__device__ __forceinline__ void add_sums(const A (&sums)[kGates][kColumns], int64_t all, int piece,
                                         double* partial) {
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      partial[(gate * kColumns + i) * all + piece] += sums[gate][i];
}

template <class A, int Known>
__global__ __launch_bounds__(kThreads, kBlocks<A, Known>) void backward(const Arguments<A> p) {
  const Room<A, Known> room = make_room<A, Known>(p, true);
  const int H = room.hidden(), pieces = pieces_of_unit(H) * H, thread = threadIdx.x;
  double* partial = p.partial + blockIdx.x * partial_size(H);
  for (int64_t i = thread; i < partial_size(H); i += kThreads) partial[i] = 0;
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * kCoordinates<A>; first < p.coordinates;
       first += int64_t{gridDim.x} * kCoordinates<A>) {
    run_steps<true>(p, room, first);
    start_back(p, room, first, partial + int64_t{kShare} * pieces);
    __syncthreads();
    A sums[kGates][kColumns] = {};
#pragma unroll 1
    for (int64_t t = p.steps - 1; t >= 0; --t) {
      if (t > 0) load_inputs(p, room, t - 1, first);
      differentiate_gates(p, room, t);
      __syncthreads();
      if (t > 0) differentiate_state(p, room);
      if constexpr (Known != 0) {
        static_assert((Known + kExtra + kColumns - 1) / kColumns * Known <= kThreads);
        if (thread < pieces) add_products(room, t, thread, sums);
      } else {
#pragma unroll 1
        for (int piece = thread; piece < pieces; piece += kThreads) {
          A of_step[kGates][kColumns] = {};
          add_products(room, t, piece, of_step);
          add_sums(of_step, pieces, piece, partial);
        }
      }
      __syncthreads();
    }
    if (Known != 0 && thread < pieces) add_sums(sums, pieces, thread, partial);
  }
}

// Adds up the blocks' sums: each warp those of every kSumWarps-th block, of 32 numbers.
constexpr int kSumWarps = 8;
template <class A>
__global__ __launch_bounds__(kSumWarps* kWarp) void sum_blocks(const double* partial,
                                                               int64_t blocks, int hidden,
                                                               A* grad_weights, A* grad_output) {
  __shared__ double of_warps[kSumWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t size = partial_size(hidden), at = int64_t{blockIdx.x} * kWarp + lane;
  double sum = 0;
  if (at < size)
#pragma unroll 4
    for (int64_t block = warp; block < blocks; block += kSumWarps)
      sum += partial[block * size + at];
  of_warps[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || at >= size) return;
#pragma unroll
  for (int i = 1; i < kSumWarps; ++i) sum += of_warps[i][lane];
  const int64_t pieces = int64_t{pieces_of_unit(hidden)} * hidden;
  if (at >= kShare * pieces) {
    grad_output[at - kShare * pieces] = static_cast<A>(sum);
    return;
  }
  const int64_t share = at / pieces, piece = at % pieces, columns = hidden + kExtra;
  const int64_t column = piece / hidden + share % kColumns * pieces_of_unit(hidden);
  const int64_t row = share / kColumns * hidden + piece % hidden;
  if (column < columns) grad_weights[row * columns + column] = static_cast<A>(sum);
}

// ---------------------------------------------------------------- host

// How many blocks run Kernel, and with how much shared memory.
struct Grid {
  int64_t blocks;
  size_t shared_bytes;
};

// Of all blocks in global memory, unless one a multiprocessor needs more.
constexpr int64_t kScratchBytes = int64_t{1} << 29;

// As many blocks as run at once. `kept_bytes`: of a block in global memory besides its room.
template <auto Kernel, class A, int Known>
Grid plan(Arguments<A>& p, bool backward, int64_t kept_bytes) {
  p.room_bytes = Room<A, Known>(p.hidden, backward, nullptr).bytes;
  const bool fits = Known != 0 || (regime() != "streaming" &&
                                   p.room_bytes <= static_cast<int64_t>(max_shared_bytes()));
  const size_t shared_bytes = fits ? static_cast<size_t>(p.room_bytes) : 0;
  if (!fits) kept_bytes += p.room_bytes;
  const int64_t tiles = (p.coordinates + kCoordinates<A> - 1) / kCoordinates<A>;
  const int64_t processors = multiprocessors();
  const int64_t at_once = processors * blocks_per_multiprocessor<Kernel>(kThreads, shared_bytes);
  const int64_t affordable = kScratchBytes / std::max(kept_bytes, int64_t{1});
  return {std::min({tiles, at_once, std::max(processors, affordable)}), shared_bytes};
}

template <auto Kernel, class A>
void start(Arguments<A>& p, const Grid& grid, const Tensor& like, const OnDevice& device) {
  const int64_t numbers =
      grid.shared_bytes > 0 ? 0 : grid.blocks * p.room_bytes / static_cast<int64_t>(sizeof(A));
  const Tensor room = new_tensor(like, {numbers}, like.scalar_type());
  p.room = numbers > 0 ? pointer<unsigned char>(room) : nullptr;
  launch<Kernel>({.grid = static_cast<unsigned>(grid.blocks),
                  .block = kThreads,
                  .stream = device.stream(),
                  .shared_bytes = grid.shared_bytes},
                 p);
}

// Calls f with a number of the dtype and the number of hidden units if the compiler knows it, or 0.
template <class F>
void for_kind(const Tensor& like, const Sizes& n, F&& f) {
  const auto with = [&](auto number) {
    if (n.hidden == kKnown && regime() != "streaming")
      f(number, std::integral_constant<int, kKnown>{});
    else
      f(number, std::integral_constant<int, 0>{});
  };
  like.scalar_type() == ScalarType::Double ? with(double{}) : with(float{});
}

// [H + 3][H][4] of [4 H][H + 3].
Tensor by_column(const Tensor& weights, const Sizes& n) {
  const Tensor gates = torch::stable::view(weights, {kGates, n.hidden, n.hidden + kExtra});
  return torch::stable::contiguous(torch::stable::transpose(gates, 0, 2));
}

template <class A>
Arguments<A> arguments(const Sizes& n, const Tensor& gradients, const Tensor& weights,
                       const Tensor& output) {
  Arguments<A> p{};
  p.steps = n.steps;
  p.coordinates = n.coordinates;
  p.hidden = static_cast<int>(n.hidden);
  p.gradients = pointer<const A>(gradients);
  p.weights = pointer<const Gates<A>>(weights);
  p.output = pointer<const A>(output);
  return p;
}

void check_hidden(const char* op, const Sizes& n) {
  require(n.hidden <= kMaxHidden, std::string(op) + ": expected at most " +
                                      std::to_string(kMaxHidden) + " hidden units, got " +
                                      std::to_string(n.hidden));
}

Tensor coordinate_lstm(Tensor gradients, Tensor weights, Tensor output) {
  constexpr const char* op = "coordinate_lstm";
  const Sizes n = tensors::check_arguments(op, gradients, weights, output);
  check_hidden(op, n);
  const OnDevice device(gradients);
  const Tensor out = new_tensor(gradients, {n.coordinates}, gradients.scalar_type());
  if (n.coordinates == 0) return out;
  const Tensor packed = by_column(weights, n);
  for_kind(gradients, n, [&](auto number, auto known) {
    using A = decltype(number);
    constexpr auto kKernel = forward<A, known()>;
    Arguments<A> p = arguments<A>(n, gradients, packed, output);
    p.out = pointer<A>(out);
    start<kKernel>(p, plan<kKernel, A, known()>(p, false, 0), gradients, device);
  });
  return out;
}

std::tuple<Tensor, Tensor> coordinate_lstm_backward(Tensor grad_out, Tensor gradients,
                                                    Tensor weights, Tensor output) {
  constexpr const char* op = "coordinate_lstm_backward";
  const Sizes n = tensors::check_backward(op, grad_out, gradients, weights, output);
  check_hidden(op, n);
  const OnDevice device(gradients);
  const ScalarType dtype = gradients.scalar_type();
  const Tensor grad_weights = new_tensor(gradients, {4 * n.hidden, n.hidden + kExtra}, dtype);
  const Tensor grad_output = new_tensor(gradients, {n.hidden + 1}, dtype);
  const Tensor packed = by_column(weights, n);
  for_kind(gradients, n, [&](auto number, auto known) {
    using A = decltype(number);
    constexpr auto kKernel = backward<A, known()>;
    Arguments<A> p = arguments<A>(n, gradients, packed, output);
    p.grad_out = pointer<const A>(grad_out);
    const int64_t steps = std::max(n.steps - 1, int64_t{0}), size = partial_size(p.hidden);
    const int64_t of_states = steps * 2 * n.hidden * kCoordinates<A>;
    const Grid grid = plan<kKernel, A, known()>(
        p, true, of_states * int64_t{sizeof(A)} + size * int64_t{sizeof(double)});
    const Tensor states = new_tensor(gradients, {grid.blocks, of_states}, dtype);
    const Tensor partial = new_tensor(gradients, {grid.blocks, size}, ScalarType::Double);
    p.states = pointer<A>(states);
    p.partial = pointer<double>(partial);
    if (grid.blocks > 0) start<kKernel>(p, grid, gradients, device);
    launch<sum_blocks<A>>({.grid = static_cast<unsigned>((size + kWarp - 1) / kWarp),
                           .block = kSumWarps * kWarp,
                           .stream = device.stream()},
                          p.partial, grid.blocks, p.hidden, pointer<A>(grad_weights),
                          pointer<A>(grad_output));
  });
  return {grad_weights, grad_output};
}

}  // namespace
}  // namespace mann_ext::cuda::coordinate_lstm

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("coordinate_lstm", TORCH_BOX(&mann_ext::cuda::coordinate_lstm::coordinate_lstm));
  m.impl("coordinate_lstm_backward",
         TORCH_BOX(&mann_ext::cuda::coordinate_lstm::coordinate_lstm_backward));
}
