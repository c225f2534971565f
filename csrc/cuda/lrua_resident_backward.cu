// The backward pass of lrua_scan in resident form: see lrua_resident.h.
//
// The memory and its gradient stay in shared memory. A step is two pieces of work with a barrier
// after each: rows (gradients of scores, weights and memory), then columns (sums over slots for
// keys and contents; the memory a step back) and what the step before needs. Gradients of keys and
// contents are finished with the rows of the step before, whose vectors arrive meanwhile.
#include "cuda/lrua_resident.h"

namespace mann_ext::cuda::lrua {
namespace {

template <class A, class S>
struct BackwardScan : Backward<A, S> {
  Layout layout;
  bool ahead;  // every M_t is saved, and M_{t-1} is on its way while step t is worked on

  // Rows of read weights in shared memory, 8 banks apart.
  __host__ __device__ static int64_t weight_stride(const Layout& layout) {
    return (layout.share + 63) / 64 * 64 + 8;
  }
  __device__ int64_t weight_stride() const { return weight_stride(layout); }
};

template <class A>
struct BackwardMemory {
  A* memory;                               // [1 or 2][rows][stride]: of step t in half t % 2
  A* grad;                                 // [rows][stride]
  A* weights;                              // [3][heads][weight_stride]: w_t in third (t + 1) % 3
  A* weights_grad;                         // [rows][heads]: dL/dw_t from later steps
  A *keys, *contents, *grads, *reads;      // [2][heads][width], of step t in half t % 2
  A *length, *strength, *gate, *expected;  // [2][heads]
  unsigned* slots;                         // [2][heads]
  int64_t bytes_of_state;                  // up to here numbers that are not there are zero
  A *x, *write;                            // [rows][heads]: dL/d(k . m), and w_w
  A* partial;                              // [groups][2][heads][width]: for keys, for contents
  A* sums;                                 // [kSums][blocks][warps][heads]
  A* own;                                  // [2][heads][W]: for keys, for contents, of this block
  int64_t bytes;

  template <class S>
  __host__ __device__ BackwardMemory(const BackwardScan<A, S>& p, const Layout& layout,
                                     unsigned char* base) {
    Arena arena(base);
    const int64_t vectors = int64_t{kHeads} * layout.width();
    const int64_t numbers = int64_t{layout.rows} * layout.stride;
    memory = arena.take<A>(p.ahead ? 2 * numbers : numbers);
    grad = arena.take<A>(numbers);
    weights = arena.take<A>(3 * kHeads * p.weight_stride(layout));
    weights_grad = arena.take<A>(int64_t{layout.rows} * kHeads);
    keys = arena.take<A>(2 * vectors);
    grads = arena.take<A>(2 * vectors);
    reads = arena.take<A>(2 * vectors);
    contents = p.scan.contents != p.scan.keys ? arena.take<A>(2 * vectors) : keys;
    length = arena.take<A>(2 * kHeads);
    strength = arena.take<A>(2 * kHeads);
    gate = arena.take<A>(2 * kHeads);
    expected = arena.take<A>(2 * kHeads);
    slots = arena.take<unsigned>(2 * kHeads);
    bytes_of_state = arena.used();
    x = arena.take<A>(int64_t{layout.rows} * kHeads);
    write = arena.take<A>(int64_t{layout.rows} * kHeads);
    partial = arena.take<A>(layout.groups * 2 * vectors);
    sums = arena.take<A>(kSums * layout.blocks * kMaxWarps * kHeads);
    own = arena.take<A>(layout.blocks > 1 ? 2 * vectors : 0);
    bytes = arena.used();
  }
};

struct Step {
  int64_t t, b;
  bool reset;
  unsigned slots[kHeads];  // rows erased and written
};

// From G = dL/dM_{t+1} as it came back to dL/dM_t, and to dL/dw_{t-1}.
template <bool Clustered, class A, class S>
__device__ __forceinline__ void backward_rows(const BackwardScan<A, S>& p,
                                              const BackwardMemory<A>& room,
                                              const Part<Clustered>& part, const A* memory,
                                              const Step& step) {
  const Sizes& s = p.scan.sizes;
  const Layout& layout = p.layout;
  const int half = static_cast<int>(step.t & 1), slots = part.slots;
  const int lane_of_warp = threadIdx.x % kWarp, lane = lane_of_warp % kHeads;
  const int warp = threadIdx.x / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const int width = layout.width();
  const bool apart = room.contents != room.keys, has_head = lane < s.heads;
  const A* keys = room.keys + half * kHeads * width;
  const A* contents = room.contents + half * kHeads * width;
  const A* grads = room.grads + half * kHeads * width;
  const A length = room.length[half * kHeads + lane],
          strength = room.strength[half * kHeads + lane];
  const A gate = room.gate[half * kHeads + lane], expected = room.expected[half * kHeads + lane];
  const int64_t of_weights = kHeads * p.weight_stride(), of_head = lane * p.weight_stride();
  const A* weights = room.weights + (step.t + 1) % 3 * of_weights + of_head;
  const A* before = room.weights + step.t % 3 * of_weights + of_head;
  A sums[kSums] = {};
#pragma unroll 1
  for (int tile = warp * kTileRows; tile < layout.rows; tile += warps * kTileRows) {
    const int row0 = tile + lane_of_warp / kHeads;
    A x[kRows], d[kRows], w[kRows], own[kRows];
    {
      A key_dots[kRows][kHeads] = {}, grad_dots[kRows][kHeads] = {}, square[kRows] = {};
#pragma unroll 1
      for (int column = lane * kColumns; column < width; column += kHeads * kColumns) {
        A run[kRows][kColumns];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          load_run<kColumns>(memory + (row0 + j * kRowStep) * layout.stride + column, run[j]);
          add_dot<kColumns>(square[j], run[j], run[j]);
        }
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
          A vector[kColumns];
          load_run<kColumns>(keys + g * width + column, vector);
#pragma unroll
          for (int j = 0; j < kRows; ++j) add_dot<kColumns>(key_dots[j][g], run[j], vector);
          load_run<kColumns>(grads + g * width + column, vector);
#pragma unroll
          for (int j = 0; j < kRows; ++j) add_dot<kColumns>(grad_dots[j][g], run[j], vector);
        }
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int row = row0 + j * kRowStep;
        const A norm = square_root(sum_row(square[j]));
        const A key_dot = sum_scattered(key_dots[j], lane);
        const A grad_dot = sum_scattered(grad_dots[j], lane);
        A factor = 0;
        x[j] = w[j] = 0;
        if (has_head && row < slots) {
          w[j] = weights[row];
          const A inverse_norm = norm > 0 ? A(1) / norm : A(0);
          const A inverse = A(1) / (length * norm + p.scan.eps);
          const A cosine = key_dot * inverse;
          const A score_grad =
              w[j] * (grad_dot + room.weights_grad[row * kHeads + lane] - expected);
          x[j] = score_grad * strength * inverse;
          sums[strength_sum] += score_grad * cosine;
          sums[own_sum] += x[j] * cosine * norm;
          factor = -x[j] * cosine * length * inverse_norm;
        }
        own[j] = sum_row(factor);
        room.x[row * kHeads + lane] = x[j];
      }
    }
    A x_of[kRows][kHeads], w_of[kRows][kHeads], dots[kRows][kHeads] = {};
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        x_of[j][g] = __shfl_sync(kAllLanes, x[j], g, kHeads);
        w_of[j][g] = __shfl_sync(kAllLanes, w[j], g, kHeads);
      }
#pragma unroll 1
    for (int column = lane * kColumns; column < width; column += kHeads * kColumns) {
      A run[kRows][kColumns], vectors[kHeads][kColumns];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int at = (row0 + j * kRowStep) * layout.stride + column;
        A m[kColumns];
        load_run<kColumns>(room.grad + at, run[j]);
        load_run<kColumns>(memory + at, m);
        add_scaled<kColumns>(run[j], own[j], m);
      }
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        A vector[kColumns];
        load_run<kColumns>(grads + g * width + column, vector);
        load_run<kColumns>(keys + g * width + column, vectors[g]);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          add_scaled<kColumns>(run[j], w_of[j][g], vector);
          add_scaled<kColumns>(run[j], x_of[j][g], vectors[g]);
        }
      }
      if (apart)
#pragma unroll
        for (int g = 0; g < kHeads; ++g)
          load_run<kColumns>(contents + g * width + column, vectors[g]);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        store_run<kColumns>(room.grad + (row0 + j * kRowStep) * layout.stride + column, run[j]);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) add_dot<kColumns>(dots[j][g], run[j], vectors[g]);
      }
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int row = row0 + j * kRowStep;
      d[j] = sum_scattered(dots[j], lane);
      A written = 0, next = 0;
      if (has_head && row < slots) {
        const int mark = find_slot(step.slots, row);
        const A previous = step.reset ? A(part.first + row == 0) : before[row];
        written = p.scan.write_weight(gate, previous, lane, mark);
        if (!step.reset) next = gate * d[j];
        sums[previous_sum] += d[j] * previous;
        if (p.scan.writes(lane, mark)) sums[chosen_sum] += d[j];
        if (step.t == 0)
          p.grad_weights_in[(step.b * s.heads + lane) * s.slots + part.first + row] = next;
      }
      room.weights_grad[row * kHeads + lane] = next;
      room.write[row * kHeads + lane] = written;
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int at = (i * layout.blocks + static_cast<int>(part.rank)) * warps + warp;
    give_heads<Clustered>(room.sums + at * kHeads, sum_head(sums[i]), layout);
  }
}

// M_{t-1} from its episode's start, as the forward pass made it: one run of columns of each of a
// thread's rows.
template <bool Clustered, class A, class S>
__device__ __forceinline__ void replay(const BackwardScan<A, S>& p, const Part<Clustered>& part,
                                       A* memory, const Step& step, int group, int column) {
  const Sizes& s = p.scan.sizes;
  const Layout& layout = p.layout;
  const int64_t start = p.scan.episode_start(step.t - 1, step.b);
  const bool given = !p.scan.resets(start, step.b);
#pragma unroll 1
  for (int64_t t = start; t < step.t; ++t) {
    const bool reset = p.scan.resets(t, step.b);
    const int64_t at = p.scan.at(t, step.b);
    const A* previous = t > 0 ? p.history.weights + p.scan.at(t - 1, step.b) * s.heads * s.padded
                              : p.scan.read_weights + step.b * s.heads * s.slots;
    const int64_t stride = t > 0 ? s.padded : s.slots;
    A contents[kHeads][kColumns] = {}, gate[kHeads] = {};
    unsigned chosen[kHeads];
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      chosen[g] = g < s.chosen
                      ? part.row_of(static_cast<unsigned>(p.history.slots[at * s.chosen + g]))
                      : kNoSlot;
      if (g >= s.heads) continue;
      gate[g] = p.scan.gate(t, step.b, g);
      load_columns(p.scan.content(t, step.b) + g * s.width, column, contents[g], s.width,
                   layout.vectors);
    }
#pragma unroll 1
    for (int row = group; row < part.slots; row += layout.groups) {
      const int slot = part.first + row;
      A run[kColumns];
      if (t > start) {
        load_run<kColumns>(memory + row * layout.stride + column, run);
      } else {
        const S* from = p.scan.memory + step.b * p.scan.batch_stride + slot * p.scan.slot_stride;
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
          run[i] = column + i >= s.width ? A(0)
                   : given               ? to_acc<A>(from[(column + i) * p.scan.width_stride])
                                         : to_acc<A>(p.scan.initial);
      }
      const int mark = find_slot(chosen, row);
      if (mark >= 0)
#pragma unroll
        for (A& number : run) number = 0;
#pragma unroll
      for (int g = 0; g < kHeads; ++g)
        if (g < s.heads) {
          const A w = reset ? A(slot == 0) : previous[g * stride + slot];
          add_scaled<kColumns>(run, p.scan.write_weight(gate[g], w, g, mark), contents[g]);
        }
      round_run<S, kColumns>(run);
      store_run<kColumns>(memory + row * layout.stride + column, run);
    }
  }
}

// Sums over slots of one run of columns, and M_{t-1} and dL/dM_{t-1}.
template <bool Clustered, class A, class S>
__device__ __forceinline__ void backward_columns(const BackwardScan<A, S>& p,
                                                 const BackwardMemory<A>& room,
                                                 const Part<Clustered>& part, A* memory,
                                                 const Step& step, int group, int column) {
  const Sizes& s = p.scan.sizes;
  const Layout& layout = p.layout;
  const int half = static_cast<int>(step.t & 1), slots = part.slots;
  const int width = layout.width();
  if (group >= layout.groups) return;
  const bool first = step.t == 0;
  const bool saved = !first && p.scan.has_snapshot(step.t - 1);
  const bool rolls = !first && !saved;
  const bool replays = rolls && (step.reset || p.scan.near_start(step.t - 1, step.b));
  const S* snapshot = saved ? p.history.snapshots + p.scan.snapshot_at(step.t - 1, step.b) +
                                  int64_t{part.first} * s.width
                            : nullptr;
  A contents[kHeads][kColumns], key_sums[kHeads][kColumns] = {},
                                content_sums[kHeads][kColumns] = {};
#pragma unroll
  for (int g = 0; g < kHeads; ++g)
    load_run<kColumns>(room.contents + (half * kHeads + g) * width + column, contents[g]);
#pragma unroll 1
  for (int row = group; row < slots; row += layout.groups) {
    A m[kColumns], grad[kColumns], x[kHeads], write[kHeads];
    A* numbers = memory + row * layout.stride + column;
    A* numbers_grad = room.grad + row * layout.stride + column;
    load_run<kColumns>(numbers, m);
    load_run<kColumns>(numbers_grad, grad);
    load_run<kHeads>(room.x + row * kHeads, x);
    load_run<kHeads>(room.write + row * kHeads, write);
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      add_scaled<kColumns>(key_sums[g], x[g], m);
      add_scaled<kColumns>(content_sums[g], write[g], grad);
    }
    const int mark = find_slot(step.slots, row);
    if (step.reset || mark >= 0) {
#pragma unroll
      for (A& number : grad) number = 0;
      store_run<kColumns>(numbers_grad, grad);
    }
    if (first && p.grad_memory_in != nullptr)
      store_columns(p.grad_memory_in + (step.b * s.slots + part.first + row) * s.width, column,
                    grad, s.width, layout.vectors);
    if (saved && !p.ahead) {
      load_columns(snapshot + int64_t{row} * s.width, column, m, s.width, layout.vectors);
      store_run<kColumns>(numbers, m);
    } else if (rolls && !replays) {
      if (mark >= 0) {
        load_columns(
            p.history.erased_rows + (p.scan.at(step.t, step.b) * s.chosen + mark) * s.width, column,
            m, s.width, layout.vectors);
      } else {
#pragma unroll
        for (int g = 0; g < kHeads; ++g) add_scaled<kColumns>(m, -write[g], contents[g]);
      }
      store_run<kColumns>(numbers, m);
    }
  }
  A* to = room.partial + group * 2 * kHeads * width + column;
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    store_run<kColumns>(to + g * width, key_sums[g]);
    store_run<kColumns>(to + (kHeads + g) * width, content_sums[g]);
  }
  if (replays) replay(p, part, memory, step, group, column);
}

template <class A, class S, bool Clustered>
__global__ __launch_bounds__(max_threads<A>(Clustered),
                             1) void backward_scan(const BackwardScan<A, S> p) {
  if constexpr (Clustered && !kClusters) return;
  const Sizes& s = p.scan.sizes;
  const Layout& layout = p.layout;
  unsigned char* base = shared_memory<unsigned char>();
  const BackwardMemory<A> room(p, layout, base);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane_of_warp = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const Part<Clustered> part(s, layout);
  const int slots = part.slots, width = layout.width();
  const bool apart = room.contents != room.keys;
  const int group = thread / layout.runs, column = thread % layout.runs * kColumns;
  Step step{};
  step.b = blockIdx.x / static_cast<unsigned>(Clustered ? layout.blocks : 1);

  const auto fetch_rows_to = [&](A* to, const auto* from) {
    if (layout.vectors)
      fetch_rows<true>(to, layout.stride, from, s.width, slots, slots);
    else
      fetch_rows<false>(to, layout.stride, from, s.width, slots, slots);
  };
  const auto fetch_read_weights = [&](int64_t t) {  // t = -1: what the scan was given
    A* to = room.weights + (t + 1) % 3 * kHeads * p.weight_stride();
    if (slots == 0) return;
    if (t >= 0) {
      const A* from = p.history.weights + p.scan.at(t, step.b) * s.heads * s.padded + part.first;
      const int pieces = (slots + kVector<A> - 1) / kVector<A>;
      for_pieces(s.heads, pieces, [&](int head, int piece) {
        async_copy16(to + head * p.weight_stride() + piece * kVector<A>,
                     from + head * s.padded + piece * kVector<A>);
      });
    } else {
      for_pieces(s.heads, slots, [&](int head, int row) {
        to[head * p.weight_stride() + row] =
            p.scan.read_weights[(step.b * s.heads + head) * s.slots + part.first + row];
      });
    }
  };
  // What the first threads have in registers of the coming step.
  A gate = 0, strength = 0;
  int64_t slot = 0;
  unsigned char reset = 0;
  const auto fetch = [&](int64_t t) {
    const int64_t half = (t & 1) * kHeads * width, at = p.scan.at(t, step.b);
    fetch_vectors(room.keys + half, p.scan.key(t, step.b), s, layout);
    if (apart) fetch_vectors(room.contents + half, p.scan.content(t, step.b), s, layout);
    fetch_vectors(room.grads + half, p.grad_reads + at * s.heads * s.width, s, layout);
    fetch_vectors(room.reads + half, p.history.reads + at * s.heads * s.width, s, layout);
    fetch_read_weights(t - 1);
    fetch_reset(p.scan, t, step.b, reset);
    if (thread < s.heads) {
      gate = p.scan.gate(t, step.b, thread);
      strength = p.scan.strength(t, step.b, thread);
    }
    if (thread < s.chosen) slot = p.history.slots[at * s.chosen + thread];
  };
  // When the vectors have arrived: what the rows need of a step besides. carry(r): the sum over
  // slots of w_t dL/dw_t from later steps.
  const auto prepare = [&](int64_t t, auto&& carry) {
    const int half = static_cast<int>(t & 1) * kHeads;
    if (thread < s.heads) {
      room.gate[half + thread] = gate;
      room.strength[half + thread] = strength;
    }
    if (thread < kHeads)
      room.slots[half + thread] =
          thread < s.chosen ? part.row_of(static_cast<unsigned>(slot)) : kNoSlot;
    for (int r = warps - 1 - warp; r < s.heads; r += warps) {
      const int from = (half + r) * width;
      const A length = length_by_warp(room.keys + from, width);
      double expected = 0;  // c_r of the equations: sum_i w_i dL/dw_i
      for (int j = lane_of_warp; j < s.width; j += kWarp)
        expected += static_cast<double>(room.grads[from + j]) * room.reads[from + j];
      expected = warp_sum(expected) + carry(r);
      if (lane_of_warp == 0) {
        room.length[half + r] = length;
        room.expected[half + r] = static_cast<A>(expected);
      }
    }
  };
  const auto memory_of = [&](int64_t t) {
    return room.memory + (p.ahead ? (t & 1) * layout.rows * layout.stride : 0);
  };

  fill_zero(reinterpret_cast<int4*>(base), room.bytes_of_state / 16);
  __syncthreads();
  const int64_t last = s.steps - 1, of_batch = (step.b * s.slots + part.first) * s.width;
  fetch_rows_to(memory_of(last), p.history.memory_out + of_batch);
  if (p.grad_memory != nullptr) fetch_rows_to(room.grad, p.grad_memory + of_batch);
  fetch_read_weights(last);
  fetch(last);
  async_commit();
  if (p.grad_weights != nullptr)
    for (int r = 0; r < s.heads; ++r)
      for (int row = thread; row < slots; row += threads)
        room.weights_grad[row * kHeads + r] =
            p.grad_weights[(step.b * s.heads + r) * s.slots + part.first + row];
  async_wait<0>();
  __syncthreads();
  prepare(last, [&](int r) {
    if (p.grad_weights == nullptr) return 0.0;
    const A* grads = p.grad_weights + (step.b * s.heads + r) * s.slots;
    const A* weights = p.history.weights + (p.scan.at(last, step.b) * s.heads + r) * s.padded;
    double sum = 0;
    for (int64_t i = lane_of_warp; i < s.slots; i += kWarp)
      sum += static_cast<double>(grads[i]) * weights[i];
    return warp_sum(sum);
  });
  barrier<Clustered>();  // and no block is given anything before it runs

  A along[kHeads] = {};  // what the gradient of k has along k, for each of its numbers
  const auto store_keys = [&](int64_t to, A key_sum, A content_sum) {
    if (p.grad_contents != nullptr) p.grad_contents[to] = content_sum;
    p.grad_keys[to] = p.grad_contents != nullptr ? key_sum : key_sum + content_sum;
  };
  const auto finish_keys = [&](int64_t t) {
    const int64_t to = p.scan.at(t, step.b) * s.heads * s.width;
#pragma unroll 1
    for (int i = thread; i < s.heads * s.width; i += threads) {
      const int r = i / s.width;
      const A key = p.scan.keys[to + i];  // its place in shared memory is taken
      const A* from = room.partial + r * width + i % s.width;
      A key_sum = 0, content_sum = 0;
#pragma unroll 4
      for (int k = 0; k < layout.groups; ++k) {
        key_sum += from[2 * k * kHeads * width];
        content_sum += from[(2 * k + 1) * kHeads * width];
      }
      if (part.rank == 0) key_sum -= of_head(along, r) * key;
      if constexpr (Clustered) {
        room.own[i] = key_sum;
        room.own[s.heads * s.width + i] = content_sum;
      } else {
        store_keys(to + i, key_sum, content_sum);
      }
    }
  };
  // And those of all blocks, a barrier later.
  const auto join_keys = [&](int64_t t) {
    const int64_t to = p.scan.at(t, step.b) * s.heads * s.width;
    const int count = s.heads * s.width;
    sum_blocks<2>(room.own, count, count, layout, part.rank,
                  [&](int i, const A(&sums)[2]) { store_keys(to + i, sums[0], sums[1]); });
  };
#pragma unroll 1
  for (step.t = last; step.t >= 0; --step.t) {
    const int half = static_cast<int>(step.t & 1) * kHeads;
    step.reset = reset != 0;
#pragma unroll
    for (int k = 0; k < kHeads; ++k) step.slots[k] = room.slots[half + k];
    if (step.t > 0) {
      fetch(step.t - 1);
      if (p.ahead)
        fetch_rows_to(memory_of(step.t - 1), p.history.snapshots +
                                                 p.scan.snapshot_at(step.t - 1, step.b) +
                                                 int64_t{part.first} * s.width);
    }
    async_commit();
    A* memory = memory_of(step.t);
    if (step.t < last) finish_keys(step.t + 1);
    backward_rows(p, room, part, memory, step);
    async_wait<0>();
    barrier<Clustered>();
    if (Clustered && step.t < last) join_keys(step.t + 1);

    A sums[kSums];  // of this lane's head
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      sums[i] = sum_warps(room.sums + i * layout.blocks * warps * kHeads, layout.blocks * warps);
    if (part.rank == 0 && thread < s.heads) {
      const int64_t to = p.scan.at(step.t, step.b) * s.heads + thread;
      p.grad_gates[to] = sums[previous_sum] - sums[chosen_sum];
      if (p.grad_strengths != nullptr) p.grad_strengths[to] = sums[strength_sum];
    }
    const A length = room.length[half + lane_of_warp % kHeads];
    const A own = length > 0 ? sums[own_sum] / length : A(0);
#pragma unroll
    for (int g = 0; g < kHeads; ++g) along[g] = __shfl_sync(kAllLanes, own, g);
    if (step.t > 0)
      prepare(step.t - 1, [&](int r) {
        const A previous = __shfl_sync(kAllLanes, sums[previous_sum], r);
        return step.reset ? 0.0 : static_cast<double>(room.gate[half + r]) * previous;
      });
    backward_columns(p, room, part, memory, step, group, column);
    barrier<Clustered>();
  }
  finish_keys(0);
  if constexpr (Clustered) {
    cluster_barrier();
    join_keys(0);
    cluster_barrier();  // no block ends while others read what it has
  }
}

// Memory that is saved at every step is brought ahead where there is room for two.
template <class A, class S>
BackwardScan<A, S> make_backward(const Backward<A, S>& arguments, bool vectors, int blocks) {
  BackwardScan<A, S> p{};
  static_cast<Backward<A, S>&>(p) = arguments;
  const auto fit = [&] {
    p.layout = fit_layout<A>(p.scan.sizes, vectors, blocks, false, [&](const Layout& layout) {
      return BackwardMemory<A>(p, layout, nullptr).bytes;
    });
    return BackwardMemory<A>(p, p.layout, nullptr).bytes <=
           static_cast<int64_t>(max_shared_bytes());
  };
  p.ahead = p.scan.snapshot_every == 1;
  if (!fit() && p.ahead) {
    p.ahead = false;
    fit();
  }
  return p;
}

}  // namespace

template <class A, class S>
int64_t backward_resident_bytes(const Backward<A, S>& arguments, bool vectors, int blocks) {
  const BackwardScan<A, S> p = make_backward(arguments, vectors, blocks);
  return BackwardMemory<A>(p, p.layout, nullptr).bytes;
}

template <class A, class S>
void backward_resident(const Backward<A, S>& arguments, const Tensor& like, bool vectors,
                       int blocks) {
  const OnDevice device(like);
  const BackwardScan<A, S> p = make_backward(arguments, vectors, blocks);
  const Launch how{
      .grid = grid_size(p.scan.sizes.batch * blocks),
      .block = static_cast<unsigned>(p.layout.threads),
      .stream = device.stream(),
      .shared_bytes = static_cast<size_t>(BackwardMemory<A>(p, p.layout, nullptr).bytes),
      .cluster = static_cast<unsigned>(blocks)};
  blocks > 1 ? launch<backward_scan<A, S, true>>(how, p)
             : launch<backward_scan<A, S, false>>(how, p);
}

#define INSTANTIATE(A, S)                                                     \
  template int64_t backward_resident_bytes(const Backward<A, S>&, bool, int); \
  template void backward_resident(const Backward<A, S>&, const Tensor&, bool, int)
INSTANTIATE(float, float);
INSTANTIATE(double, double);
INSTANTIATE(float, __nv_bfloat16);
INSTANTIATE(float, __half);
#undef INSTANTIATE

}  // namespace mann_ext::cuda::lrua
