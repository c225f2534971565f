// What the lstm_scan driver (lstm.cpp) and its kernels (lstm.simd.cpp) share.
#pragma once

#include <cstdint>

namespace mann_ext::lstm {

// Arrays are float32 or float64, all the same; gates in the order i, f, g, o.
struct Scan {
  int64_t steps, batch, inputs, hidden;
  const void* x;          // [T][B][I]
  const void* h;          // [B][H]
  const void* c;          // [B][H]
  const void* weight_ih;  // [4H][I]
  const void* weight_hh;  // [4H][H]
  const void* bias_ih;    // [4H]
  const void* bias_hh;    // [4H]
  const bool* reset;      // [T][B] or null
  void* input_panels;     // W_ih^T, packed
  void* state_panels;     // W_hh^T, packed
  void* hidden_out;       // [T][B][H]
  void* h_out;            // [B][H]
  void* c_out;            // [B][H]
  void* gates;            // [T][B][4H]: the share of x, then, if `cells` are saved, activated
  void* cells;            // [T][B][H] or null
};

struct ScanBackward {
  int64_t steps, batch, inputs, hidden;
  const void* grad_hidden;  // [T][B][H] or null
  const void* grad_h_out;   // [B][H] or null
  const void* grad_c_out;   // [B][H] or null
  const void* x;
  const void* h;
  const void* c;
  const void* weight_ih;
  const void* weight_hh;
  const bool* reset;
  const void* hidden_out;
  const void* gates;
  const void* cells;
  void* x_panels;         // x, packed
  void* previous_panels;  // h_{t-1} of every step, packed
  void* state_panels;     // W_hh, packed
  void* input_panels;     // W_ih, packed; null if grad_x is not wanted
  void* grad_gates;       // [T][B][4H], before the activation
  void* grad_x;           // [T][B][I] or null
  void* grad_h;           // [B][H]
  void* grad_c;           // [B][H]
  void* grad_weight_ih;   // [4H][I]
  void* grad_weight_hh;   // [4H][H]
  void* grad_bias;        // [4H]
};

// Rows of the batch that go through all steps together: each pass over W_hh serves so many.
constexpr int64_t kGroup = 8;
// Numbers a row of such a group needs for its state.
constexpr int64_t kStateParts = 2;

// Each function does its part of the work: panels, rows of a product or rows of the batch from
// `first` to `end`. `room` holds kStateParts * kGroup * H numbers.
struct Kernels {
  int64_t width;  // columns of a panel
  int64_t bytes;  // of a number

  void (*pack)(const Scan&, int64_t first, int64_t end);
  void (*project)(const Scan&, int64_t first, int64_t end);
  void (*scan)(const Scan&, void* room, int64_t first, int64_t end);

  void (*pack_backward)(const ScanBackward&, int64_t first, int64_t end);
  void (*scan_backward)(const ScanBackward&, void* room, int64_t first, int64_t end);
  void (*weight_gradients)(const ScanBackward&, int64_t first, int64_t end);
  void (*input_gradients)(const ScanBackward&, int64_t first, int64_t end);
};

inline int64_t panels(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

}  // namespace mann_ext::lstm

#define MANN_EXT_DECLARE_LSTM(ISA)                           \
  namespace ISA {                                            \
  const mann_ext::lstm::Kernels& lstm_kernels(bool float64); \
  }
MANN_EXT_DECLARE_LSTM(baseline)
#if defined(__x86_64__)
MANN_EXT_DECLARE_LSTM(avx2)
MANN_EXT_DECLARE_LSTM(avx512)
#endif
