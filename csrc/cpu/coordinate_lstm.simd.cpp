// A small LSTM over the gradients of very many coordinates, its last state summed to one number.
//
// Lanes are coordinates, a block of kVectors vectors of them, so no lane is idle however small H
// is, and a weight read once serves the block. Multiply-adds a coordinate and step: 4 H (H + 3)
// forward; backward as many again for the states, made anew and so never stored, twice that for
// the gradients. A block's states and gates of all steps stay in the L2 cache.
#include "cpu/coordinate_lstm.h"

#include <algorithm>

#include "cpu/lstm_cell.h"
#include "cpu/simd.h"

namespace MANN_EXT_ISA {
namespace {

using namespace mann_ext::coordinate_lstm;

template <class A>
struct CoordinateLSTM {
  using V = Vec<A>;
  static constexpr int kVectors = kRegisters == 32 ? 4 : 2;
  static constexpr int kLanesHere = kLanes<A>;
  static constexpr int64_t kBlock = kVectors * kLanesHere;
  static constexpr int64_t kBlocks = kChunk / kBlock;
  enum { kInput, kForget, kCandidate, kOutput, kGates };

  static const A* in(const void* p) { return static_cast<const A*>(p); }
  static A* out(void* p) { return static_cast<A*>(p); }

  // The scratch memory of a block; every row is kBlock numbers.
  struct Block {
    int64_t hidden, columns, steps;
    A* inputs;    // [T + 1][padded]: h_{t-1}, the two numbers of a gradient, 1, zeros
    A* gates;     // [T][H][4]: activated, and on the way back their gradients before that
    A* cells;     // [T][H]: c_t
    A* tanh;      // [T][H]: tanh(c_t)
    A* grad_h;    // [padded]
    A* grad_c;    // [H]
    A* sums;      // [H][padded / 4][4][4], one vector each: the gradients of the weights
    A* out_sums;  // [H + 1], one vector each
    bool keep;    // all steps, for the way back

    A* input(int64_t t, int64_t row) const {
      return inputs + ((keep ? t : t % 2) * columns + row) * kBlock;
    }
    A* gate(int64_t t, int64_t unit) const {
      return gates + ((keep ? t : 0) * hidden + unit) * kGates * kBlock;
    }
    A* cell(int64_t t, int64_t unit) const {
      return cells + ((keep ? t : 0) * hidden + unit) * kBlock;
    }
    A* tanh_cell(int64_t t, int64_t unit) const {
      return tanh + ((keep ? t : 0) * hidden + unit) * kBlock;
    }
  };

  static int64_t room(int64_t steps, int64_t H, bool backward) {
    const int64_t kept = backward ? steps : 1, columns = padded(H);
    int64_t rows = (kept + 1) * columns + kept * H * (kGates + 2);
    if (!backward) return rows * kBlock;
    rows += columns + H;
    return rows * kBlock + (H * columns * kGates + H + 1) * kLanesHere;
  }

  static Block make_block(const Arguments& s, void* memory, bool backward) {
    const int64_t H = s.hidden, kept = backward ? s.steps : 1, columns = padded(H);
    A* next = out(memory);
    const auto take = [&](int64_t numbers) {
      A* part = next;
      next += numbers;
      return part;
    };
    Block b{};
    b.hidden = H, b.columns = columns, b.steps = s.steps, b.keep = backward;
    b.inputs = take((kept + 1) * columns * kBlock);
    b.gates = take(kept * H * kGates * kBlock);
    b.cells = take(kept * H * kBlock);
    b.tanh = take(kept * H * kBlock);
    std::fill_n(b.inputs, (kept + 1) * columns * kBlock, A(0));
    for (int64_t t = 0; t <= kept; ++t) std::fill_n(b.input(t, H + 2), kBlock, A(1));
    if (backward) {
      b.grad_h = take(columns * kBlock);
      b.grad_c = take(H * kBlock);
      b.sums = take(H * columns * kGates * kLanesHere);
      b.out_sums = take((H + 1) * kLanesHere);
    }
    return b;
  }

  static void pack(int64_t H, const void* weights, void* unit_weights, void* state_weights) {
    const A* w = in(weights);
    A *unit = out(unit_weights), *state = out(state_weights);
    const int64_t columns = H + kExtra;
    for (int64_t j = 0; j < H; ++j)
      for (int64_t k = 0; k < columns; ++k)
        for (int64_t gate = 0; gate < kGates; ++gate) *unit++ = w[(gate * H + j) * columns + k];
    for (int64_t k = 0; k < padded(H); k += 4)
      for (int64_t j = 0; j < H; ++j)
        for (int64_t gate = 0; gate < kGates; ++gate)
          for (int64_t i = k; i < k + 4; ++i)
            *state++ = i < H ? w[(gate * H + j) * columns + i] : A(0);
  }

  // (log|g| / 7, sign g), or (-1, e^7 g) where |g| < e^-7.
  static void load_gradients(const A* gradients, int64_t count, A* size, A* sign) {
    constexpr A smallest = A(kSmallest), largest = A(kLargest);
    std::copy_n(gradients, count, sign);
    std::fill(sign + count, sign + kBlock, A(0));
    for (int64_t i = 0; i < kBlock; i += kLanesHere) {
      const V g = load<A>(sign + i);
      V magnitude = g < A(0) ? -g : g;
      magnitude = magnitude < smallest ? broadcast<A>(smallest) : magnitude;
      store<A>(size + i, logarithm<A>(magnitude) * A(1.0 / 7));
      V scaled = g * largest;
      scaled = scaled > A(1) ? broadcast<A>(A(1)) : scaled;
      store<A>(sign + i, scaled < A(-1) ? broadcast<A>(A(-1)) : scaled);
    }
  }

  // All steps of the block at `first`; h_T is in input(T).
  static void run(const Arguments& s, const Block& b, int64_t first) {
    const int64_t H = b.hidden, count = std::min(kBlock, s.coordinates - first);
    for (int64_t j = 0; j < H; ++j) std::fill_n(b.input(0, j), kBlock, A(0));
    for (int64_t t = 0; t < b.steps; ++t) {
      load_gradients(in(s.gradients) + t * s.coordinates + first, count, b.input(t, H),
                     b.input(t, H + 1));
      for (int64_t j = 0; j < H; ++j) run_unit(s, b, t, j);
    }
  }

  static void run_unit(const Arguments& s, const Block& b, int64_t t, int64_t j) {
    const int64_t H = b.hidden, columns = H + kExtra;
    const int64_t start = t == 0 ? H : 0;  // h_0 = 0
    V sums[kGates][kVectors] = {};
    const A* w = in(s.unit_weights) + (j * columns + start) * kGates;
    const A* x = b.input(t, start);
    for (int64_t k = start; k < columns; ++k, w += kGates, x += kBlock)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const V value = load<A>(x + v * kLanesHere);
#pragma GCC unroll 4
        for (int gate = 0; gate < kGates; ++gate) sums[gate][v] += value * w[gate];
      }
    A *gates = b.gate(t, j), *h = b.input(t + 1, j);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = v * kLanesHere;
      const V input = sigmoid<A>(sums[kInput][v]), forget = sigmoid<A>(sums[kForget][v]);
      const V candidate = hyperbolic_tangent<A>(sums[kCandidate][v]);
      const V output = sigmoid<A>(sums[kOutput][v]);
      const V before = t == 0 ? V{} : load<A>(b.cell(t - 1, j) + i);
      const V cell = forget * before + input * candidate, squashed = hyperbolic_tangent<A>(cell);
      store<A>(b.cell(t, j) + i, cell);
      store<A>(h + i, output * squashed);
      if (!b.keep) continue;
      store<A>(gates + kInput * kBlock + i, input);
      store<A>(gates + kForget * kBlock + i, forget);
      store<A>(gates + kCandidate * kBlock + i, candidate);
      store<A>(gates + kOutput * kBlock + i, output);
      store<A>(b.tanh_cell(t, j) + i, squashed);
    }
  }

  static void forward(const Arguments& s, void* memory, int64_t first, int64_t end) {
    const Block b = make_block(s, memory, false);
    const A* output = in(s.output);
    for (int64_t p = first * kChunk; p < std::min(end * kChunk, s.coordinates); p += kBlock) {
      run(s, b, p);
      alignas(kVectorBytes) A sums[kBlock];
      std::fill_n(sums, kBlock, output[s.hidden]);
      for (int64_t j = 0; j < s.hidden; ++j)
        for (int64_t i = 0; i < kBlock; ++i) sums[i] += output[j] * b.input(s.steps, j)[i];
      std::copy_n(sums, std::min(kBlock, s.coordinates - p), out(s.out) + p);
    }
  }

  // ---------------------------------------------------------------- backward

  static void backward(const Arguments& s, void* memory, int64_t first, int64_t end) {
    const Block b = make_block(s, memory, true);
    for (int64_t chunk = first; chunk < end; ++chunk) {
      std::fill_n(b.sums, b.hidden * b.columns * kGates * kLanesHere, A(0));
      std::fill_n(b.out_sums, (b.hidden + 1) * kLanesHere, A(0));
      for (int64_t block = 0; block < kBlocks; ++block) {
        const int64_t p = chunk * kChunk + block * kBlock;
        if (p >= s.coordinates) break;
        run(s, b, p);
        start_back(s, b, p);
        for (int64_t t = s.steps - 1; t >= 0; --t) {
          differentiate_gates(b, t);
          if (t > 0) differentiate_state(s, b, t);
        }
        for (int64_t j = 0; j < b.hidden; ++j)
          for (int64_t k = 0; k < b.columns; k += 4) add_products(b, j, k);
      }
      store_sums(b, s.partial + chunk * partial_size(b.hidden));
    }
  }

  // The gradients of h_T and of the output weights.
  static void start_back(const Arguments& s, const Block& b, int64_t first) {
    const int64_t H = b.hidden;
    alignas(kVectorBytes) A grad[kBlock] = {};
    std::copy_n(in(s.grad_out) + first, std::min(kBlock, s.coordinates - first), grad);
    std::fill_n(b.grad_c, H * kBlock, A(0));
    for (int64_t i = 0; i < kBlock; i += kLanesHere) {
      const V g = load<A>(grad + i);
      for (int64_t j = 0; j < H; ++j) {
        store<A>(b.grad_h + j * kBlock + i, g * in(s.output)[j]);
        A* sum = b.out_sums + j * kLanesHere;
        store<A>(sum, load<A>(sum) + g * load<A>(b.input(s.steps, j) + i));
      }
      A* sum = b.out_sums + H * kLanesHere;
      store<A>(sum, load<A>(sum) + g);
    }
  }

  // From the gradients of h_t and c_t to those of the gates before their activation and of c_{t-1}.
  static void differentiate_gates(const Block& b, int64_t t) {
    for (int64_t j = 0; j < b.hidden; ++j) {
      A *gates = b.gate(t, j), *grad_c = b.grad_c + j * kBlock;
      for (int64_t i = 0; i < kBlock; i += kLanesHere) {
        const V input = load<A>(gates + kInput * kBlock + i);
        const V forget = load<A>(gates + kForget * kBlock + i);
        const V candidate = load<A>(gates + kCandidate * kBlock + i);
        const V output = load<A>(gates + kOutput * kBlock + i);
        const V squashed = load<A>(b.tanh_cell(t, j) + i);
        const V grad = load<A>(b.grad_h + j * kBlock + i);
        const V cell = load<A>(grad_c + i) + grad * output * (A(1) - squashed * squashed);
        const V before = t == 0 ? V{} : load<A>(b.cell(t - 1, j) + i);
        store<A>(gates + kInput * kBlock + i, cell * candidate * input * (A(1) - input));
        store<A>(gates + kForget * kBlock + i, cell * before * forget * (A(1) - forget));
        store<A>(gates + kCandidate * kBlock + i, cell * input * (A(1) - candidate * candidate));
        store<A>(gates + kOutput * kBlock + i, grad * squashed * output * (A(1) - output));
        store<A>(grad_c + i, cell * forget);
      }
    }
  }

  // grad_h_{t-1} = W_hh^T times the gradients of the gates, four rows at a time.
  static void differentiate_state(const Arguments& s, const Block& b, int64_t t) {
    const int64_t rows = b.hidden * kGates;
    for (int64_t k = 0; k < b.hidden; k += 4) {
      V sums[4][kVectors] = {};
      const A* w = in(s.state_weights) + k * rows;
      const A* grad = b.gate(t, 0);
      for (int64_t row = 0; row < rows; ++row, w += 4, grad += kBlock)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const V value = load<A>(grad + v * kLanesHere);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sums[i][v] += value * w[i];
        }
      for (int i = 0; i < 4; ++i)
        for (int v = 0; v < kVectors; ++v)
          store<A>(b.grad_h + (k + i) * kBlock + v * kLanesHere, sums[i][v]);
    }
  }

  // The gradients of the weights of unit j and four inputs, from all steps: summed by block and
  // then over blocks, for a single long chain would round more than the reference.
  static void add_products(const Block& b, int64_t j, int64_t k) {
    A* kept = b.sums + (j * b.columns + k) * kGates * kLanesHere;
    V sums[kGates][4] = {};
    for (int64_t t = k + 4 <= b.hidden ? 1 : 0; t < b.steps; ++t) {  // h_0 = 0
      const A *grad = b.gate(t, j), *x = b.input(t, k);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v, grad += kLanesHere, x += kLanesHere) {
        V values[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) values[i] = load<A>(x + i * kBlock);
#pragma GCC unroll 4
        for (int gate = 0; gate < kGates; ++gate) {
          const V g = load<A>(grad + gate * kBlock);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sums[gate][i] += g * values[i];
        }
      }
    }
#pragma GCC unroll 4
    for (int gate = 0; gate < kGates; ++gate)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        A* sum = kept + (gate * 4 + i) * kLanesHere;
        store<A>(sum, load<A>(sum) + sums[gate][i]);
      }
  }

  static void store_sums(const Block& b, double* partial) {
    const int64_t H = b.hidden, columns = H + kExtra;
    for (int64_t j = 0; j < H; ++j)
      for (int64_t k = 0; k < columns; ++k)
        for (int64_t gate = 0; gate < kGates; ++gate) {
          const A* sum =
              b.sums + ((j * b.columns + k / 4 * 4) * kGates + gate * 4 + k % 4) * kLanesHere;
          partial[(gate * H + j) * columns + k] = sum_lanes<A>(load<A>(sum));
        }
    for (int64_t j = 0; j <= H; ++j)
      partial[weight_gradients(H) + j] = sum_lanes<A>(load<A>(b.out_sums + j * kLanesHere));
  }

  static const Kernels table;
};

template <class A>
const Kernels CoordinateLSTM<A>::table = {sizeof(A), room, pack, forward, backward};

}  // namespace

const Kernels& coordinate_lstm_kernels(bool float64) {
  return float64 ? CoordinateLSTM<double>::table : CoordinateLSTM<float>::table;
}

}  // namespace MANN_EXT_ISA
