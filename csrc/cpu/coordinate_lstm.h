// What the coordinate_lstm driver (coordinate_lstm.cpp) and its kernels share.
#pragma once

#include "coordinate_lstm_tensors.h"

namespace mann_ext::coordinate_lstm {

// Arrays are float32 or float64, all the same. Rows of `weights` are gates in the order i, f, g, o;
// columns: H of h_{t-1}, the two of a gradient, the bias.
struct Arguments {
  int64_t steps, coordinates, hidden;
  const void* gradients;      // [T][P]
  const void* unit_weights;   // packed: [H][columns][i, f, g, o]
  const void* state_weights;  // packed for the way back: [padded / 4][H][i, f, g, o][4]
  const void* output;         // [H + 1], the bias last
  const void* grad_out;       // [P], or null in the forward pass
  void* out;                  // [P], or null in the backward pass
  double* partial;            // [chunks][4H * columns + H + 1], the gradients of each chunk
};

// Columns are summed four at a time.
inline int64_t padded(int64_t hidden) { return (hidden + kExtra + 3) / 4 * 4; }
inline int64_t partial_size(int64_t hidden) { return weight_gradients(hidden) + hidden + 1; }

// Coordinates whose gradients are summed by themselves, whichever thread does it. In float64 from
// there on: a lane of a few hundred sums is as exact as pairwise sums are, one of thousands is not.
constexpr int64_t kChunk = 512;

struct Kernels {
  int64_t bytes;  // of a number
  // Numbers that the scratch memory of a thread must hold.
  int64_t (*room)(int64_t steps, int64_t hidden, bool backward);
  void (*pack)(int64_t hidden, const void* weights, void* unit_weights, void* state_weights);
  // The chunks from `first` to `end`.
  void (*forward)(const Arguments&, void* room, int64_t first, int64_t end);
  void (*backward)(const Arguments&, void* room, int64_t first, int64_t end);
};

}  // namespace mann_ext::coordinate_lstm

#define MANN_EXT_DECLARE_COORDINATE_LSTM(ISA)                                      \
  namespace ISA {                                                                  \
  const mann_ext::coordinate_lstm::Kernels& coordinate_lstm_kernels(bool float64); \
  }
MANN_EXT_DECLARE_COORDINATE_LSTM(baseline)
#if defined(__x86_64__)
MANN_EXT_DECLARE_COORDINATE_LSTM(avx2)
MANN_EXT_DECLARE_COORDINATE_LSTM(avx512)
#endif
