// What the lstm_lrua_scan driver (lstm_lrua.cpp) and its kernels (lstm_lrua.simd.cpp) share: the
// LSTM's half of a step. The memory's half is lrua_scan's kernels.
#pragma once

#include <cstdint>

#include "lstm_lrua_sizes.h"

namespace mann_ext::lstm_lrua {

// Arrays are float32 or float64, all the same; the LSTM's gates in the order i, f, g, o.
struct Forward {
  Sizes sizes;
  const void* projected;         // [T][B][4H]
  const void* h;                 // [B][H]
  const void* c;                 // [B][H]
  const void* reads;             // [B][R W]
  const void* weight;            // [4H][H + R W]
  const void* interface_weight;  // [P][H]
  const void* interface_bias;    // [P]
  const void* strengths;         // [R] or null
  const bool* reset;             // [T][B] or null
  void* state_panels;            // W^T, packed
  void* interface_panels;        // W_interface^T, packed
  void* hidden;                  // [T][B][H]
  const void* all_reads;         // [T][B][R W], which the memory writes
  void* c_out;                   // [B][H]
  void* gates;                   // [T][B][4H], activated, or null
  void* cells;                   // [T][B][H] or null
  void* keys;                    // [T][B][R W]
  void* write_gates;             // [T][B][R]
  void* step_strengths;          // [T][B][R] or null
  void* contents;                // [T][B][R W] or null
};

struct Backward {
  Sizes sizes;
  const void* grad_hidden;  // [T][B][H] or null
  const void* grad_reads;   // [T][B][R W] or null
  const void* grad_c;       // [B][H] or null
  const void* h;
  const void* c;
  const void* reads;
  const void* weight;
  const void* interface_weight;
  const bool* reset;
  const void* hidden;
  const void* all_reads;
  const void* gates;
  const void* cells;
  const void* keys;
  const void* write_gates;
  const void* step_strengths;
  const void* contents;
  void* state_panels;               // W, packed
  void* interface_panels;           // W_interface, packed
  void* previous_panels;            // [h_{t-1}, r_{t-1}] of every step, packed
  void* hidden_panels;              // h_t of every step, packed
  void* total_reads;                // [T][B][R W]: dL/dr_t, which the memory is given
  const void* grad_keys;            // [T][B][R W], which the memory writes, and these:
  const void* grad_write_gates;     // [T][B][R]
  const void* grad_step_strengths;  // [T][B][R] or null
  const void* grad_contents;        // [T][B][R W] or null
  void* grad_interface;             // [T][B][P]
  void* grad_projected;             // [T][B][4H]
  void* grad_h;                     // [B][H]
  void* grad_c_in;                  // [B][H]
  void* grad_reads_in;              // [B][R W]
  void* grad_weight;                // [4H][H + R W]
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
  int64_t (*room_bytes)(const Sizes&, int64_t rows);
  void (*begin)(const Forward&, void* room, int64_t first, int64_t end);
  void (*step)(const Forward&, void* room, int64_t t, int64_t first, int64_t end);
  void (*end)(const Forward&, void* room, int64_t first, int64_t end);

  // A step back: reads_gradient, then the memory, then step_backward.
  void (*pack_backward)(const Backward&, int64_t first, int64_t end);
  void (*pack_previous)(const Backward&, int64_t first, int64_t end);
  void (*begin_backward)(const Backward&, void* room, int64_t first, int64_t end);
  void (*reads_gradient)(const Backward&, void* room, int64_t t, int64_t first, int64_t end);
  void (*step_backward)(const Backward&, void* room, int64_t t, int64_t first, int64_t end);
  void (*end_backward)(const Backward&, void* room, int64_t first, int64_t end);
  void (*weight_gradients)(const Backward&, int64_t first, int64_t end);
  void (*interface_gradients)(const Backward&, int64_t first, int64_t end);
};

inline int64_t panels(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

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
