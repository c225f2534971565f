// What the ntm_scan driver (ntm.cpp) and its kernels (ntm.simd.cpp) share.
//
// Layout inside the kernels, as in lrua.h: slots sit in the vector lanes, and the memory of one
// batch element is a row of tiles, each [W][kTile] numbers. Rows of per-slot numbers are padded to
// whole tiles; what is past the last slot is zero.
#pragma once

#include <cstdint>

#include "ntm_tensors.h"

namespace mann_ext::ntm {

// Arrays are float32 or float64, all the same.
struct Inputs {
  const void* memory;  // with strides in elements
  int64_t memory_batch_stride, memory_slot_stride, memory_width_stride;
  const void* weights;      // [B][H][N]
  const void* keys;         // [T][B][H][W]
  const void* strengths;    // [T][B][H]
  const void* gates;        // [T][B][H]
  const void* shifts;       // [T][B][H][3]
  const void* sharpenings;  // [T][B][H]
  const void* erases;       // [T][B][writes][W]
  const void* adds;         // [T][B][writes][W]
  const bool* reset;        // [T][B] or null
  double eps, initial_value;
  int64_t snapshot_every;  // K: M_t is saved after every K-th step
};

struct Forward {
  Sizes sizes;
  Inputs in;
  void* reads;        // [T][B][reads][W]
  void* memory_out;   // [B][N][W]
  void* weights_out;  // [B][H][N]
  // Saved for the backward pass, or null.
  void* weight_history;  // [T][B][H][padded]
  void* snapshots;       // [T / K][B][tiles][W][kTile]
};

struct Backward {
  Sizes sizes;
  Inputs in;
  const void* weight_history;
  const void* snapshots;
  const void* grad_reads;    // [T][B][reads][W] or null
  const void* grad_memory;   // [B][N][W] or null
  const void* grad_weights;  // [B][H][N] or null
  void* grad_memory_in;      // [B][N][W] or null
  void* grad_weights_in;     // [B][H][N]
  void* grad_keys;           // the others as their arguments
  void* grad_strengths;
  void* grad_gates;
  void* grad_shifts;
  void* grad_sharpenings;
  void* grad_erases;
  void* grad_adds;
};

// Each runs all steps of one batch element, at least one, in a room of so many bytes.
struct Kernels {
  int64_t (*forward_bytes)(const Forward&);
  void (*forward)(const Forward&, void* room, int64_t b);
  int64_t (*backward_bytes)(const Backward&);
  void (*backward)(const Backward&, void* room, int64_t b);
};

}  // namespace mann_ext::ntm

#define MANN_EXT_DECLARE_NTM(ISA)                          \
  namespace ISA {                                          \
  const mann_ext::ntm::Kernels& ntm_kernels(bool float64); \
  }
MANN_EXT_DECLARE_NTM(baseline)
#if defined(__x86_64__)
MANN_EXT_DECLARE_NTM(avx2)
MANN_EXT_DECLARE_NTM(avx512)
#endif
