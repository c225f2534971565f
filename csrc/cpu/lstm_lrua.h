// What the lstm_lrua_scan driver (lstm_lrua.cpp) and its kernels (lstm_lrua.simd.cpp) share: the
// LSTM's half of a step. The memory's half is lrua_scan's kernels.
#pragma once

#include <cstdint>

#include "cpu/lstm.h"
#include "lstm_lrua_sizes.h"

namespace mann_ext::lstm_lrua {

using lstm::panels;

// Arrays are float32 or float64, all the same; the LSTM's gates in the order i, f, g, o.
struct Forward {
  Sizes sizes;
  const void* x;                 // [T][B][I]
  const void* h;                 // [B][H]
  const void* c;                 // [B][H]
  const void* reads;             // [B][R W]
  const void* weight_ih;         // [4H][I + R W]
  const void* weight_hh;         // [4H][H]
  const void* bias_ih;           // [4H]
  const void* bias_hh;           // [4H]
  const void* interface_weight;  // [P][H]
  const void* interface_bias;    // [P]
  const void* strengths;         // [R] or null
  const bool* reset;             // [T][B] or null
  void* input_panels;            // the transposed weights, packed: of x_t,
  void* state_panels;            // of h_{t-1},
  void* read_panels;             // of r_{t-1},
  void* interface_panels;        // and of the interface
  void* hidden_out;              // [T][B][H]
  const void* all_reads;         // [T][B][R W], which the memory writes
  void* c_out;                   // [B][H]
  void* gates;           // [T][B][4H]: the share of x, then, if `cells` are saved, activated
  void* cells;           // [T][B][H] or null
  void* keys;            // [T][B][R W]
  void* write_gates;     // [T][B][R]
  void* step_strengths;  // [T][B][R] or null
  void* contents;        // [T][B][R W] or null
};

struct Backward {
  Sizes sizes;
  const void* grad_hidden;  // [T][B][H] or null
  const void* grad_reads;   // [T][B][R W] or null
  const void* grad_c_out;   // [B][H] or null
  const void* x;
  const void* h;
  const void* c;
  const void* reads;
  const void* weight_ih;
  const void* weight_hh;
  const void* interface_weight;
  const bool* reset;
  const void* hidden_out;
  const void* all_reads;
  const void* gates;
  const void* cells;
  const void* keys;
  const void* write_gates;
  const void* step_strengths;
  const void* contents;
  void* state_panels;               // the weights, packed: of h_{t-1},
  void* read_panels;                // of r_{t-1},
  void* interface_panels;           // of the interface,
  void* input_panels;               // and of x_t, if grad_x is wanted
  void* x_panels;                   // x, packed
  void* previous_h_panels;          // h_{t-1} of every step, packed
  void* previous_reads_panels;      // r_{t-1} of every step, packed
  void* hidden_panels;              // h_t of every step, packed
  void* total_reads;                // [T][B][R W]: dL/dr_t, which the memory is given
  const void* grad_keys;            // [T][B][R W], which the memory writes, and these:
  const void* grad_write_gates;     // [T][B][R]
  const void* grad_step_strengths;  // [T][B][R] or null
  const void* grad_contents;        // [T][B][R W] or null
  void* grad_interface;             // [T][B][P], before the activation
  void* grad_gates;                 // [T][B][4H], before the activation
  void* grad_x;                     // [T][B][I] or null
  void* grad_h;                     // [B][H]
  void* grad_c;                     // [B][H]
  void* grad_reads_in;              // [B][R W]
  void* grad_weight_ih;             // [4H][I + R W]
  void* grad_weight_hh;             // [4H][H]
  void* grad_bias;                  // [4H]
  void* grad_interface_weight;      // [P][H]
  void* grad_interface_bias;        // [P]
  void* grad_strengths;             // [R] or null
};

// Functions do their part of the work: panels, rows of a product, rows of T B, or rows of the batch
// from `first` to `end`, whose state is in `room`.
struct Kernels {
  int64_t width;  // columns of a panel
  int64_t bytes;  // of a number

  void (*pack)(const Forward&, int64_t first, int64_t end);
  void (*project)(const Forward&, int64_t first, int64_t end);
  int64_t (*room_bytes)(const Sizes&, int64_t rows);
  void (*begin)(const Forward&, void* room, int64_t first, int64_t end);
  void (*step)(const Forward&, void* room, int64_t t, int64_t first, int64_t end);
  void (*finish)(const Forward&, void* room, int64_t first, int64_t end);

  // A step back: reads_gradient, then the memory, then step_backward.
  void (*pack_backward)(const Backward&, int64_t first, int64_t end);
  void (*pack_previous)(const Backward&, int64_t first, int64_t end);
  void (*begin_backward)(const Backward&, void* room, int64_t first, int64_t end);
  void (*reads_gradient)(const Backward&, void* room, int64_t t, int64_t first, int64_t end);
  void (*step_backward)(const Backward&, void* room, int64_t t, int64_t first, int64_t end);
  void (*end_backward)(const Backward&, void* room, int64_t first, int64_t end);
  void (*weight_gradients)(const Backward&, int64_t first, int64_t end);
  void (*interface_gradients)(const Backward&, int64_t first, int64_t end);
  void (*input_gradients)(const Backward&, int64_t first, int64_t end);
};

}  // namespace mann_ext::lstm_lrua

#define MANN_EXT_DECLARE_LSTM_LRUA(ISA)                                \
  namespace ISA {                                                      \
  const mann_ext::lstm_lrua::Kernels& lstm_lrua_kernels(bool float64); \
  }
MANN_EXT_DECLARE_LSTM_LRUA(baseline)
#if defined(__x86_64__)
MANN_EXT_DECLARE_LSTM_LRUA(avx2)
MANN_EXT_DECLARE_LSTM_LRUA(avx512)
#endif
