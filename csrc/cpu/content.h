// What the content_read driver (content.cpp) and its kernels (content.simd.cpp) share.
#pragma once

#include <cstdint>

#include "cpu/lrua.h"

namespace mann_ext::content {

using lrua::Storage;

struct Read {
  int64_t batch, queries, slots, key_width, value_width;
  bool cosine;
  double eps;
  const void* query;      // acc [B][Q][K]
  const void* keys;       // storage [B][N][K]
  const void* values;     // storage [B][N][V]; the keys if not given
  const void* strengths;  // acc [B][Q] or null: 1
  const bool* mask;       // [B][Q or 1][N] or null
  int64_t mask_queries;   // Q or 1
  void* reads;            // acc [B][Q][V]
  void* weights;          // acc [B][Q][N]
};

struct ReadBackward {
  Read forward;  // reads and weights are inputs here
  bool values_given;
  const void* grad_reads;    // acc [B][Q][V]
  const void* grad_weights;  // acc [B][Q][N] or null
  void* grad_query;          // acc [B][Q][K]
  void* grad_keys;           // storage [B][N][K]
  void* grad_values;         // storage [B][N][V] or null: added to grad_keys
  void* grad_strengths;      // acc [B][Q] or null
};

// Slots a block: the unit of work of one thread, and of the sums over slots.
constexpr int64_t kBlock = 512;

// Each function does its part for the blocks [block, end) of batch element b; the combining
// functions add the blocks' sums in their order. `scratch` belongs to one batch element.
struct Kernels {
  int64_t (*scratch_bytes)(const Read&);
  void (*pass)(const Read&, void* scratch, int64_t b, int64_t block, int64_t end);
  void (*combine)(const Read&, void* scratch, int64_t b);
  void (*normalise)(const Read&, void* scratch, int64_t b, int64_t block, int64_t end);

  int64_t (*backward_scratch_bytes)(const ReadBackward&);
  void (*backward_begin)(const ReadBackward&, void* scratch, int64_t b);
  void (*backward_pass)(const ReadBackward&, void* scratch, int64_t b, int64_t block, int64_t end);
  void (*backward_combine)(const ReadBackward&, void* scratch, int64_t b);
};

}  // namespace mann_ext::content

#define MANN_EXT_DECLARE_CONTENT(ISA)                                         \
  namespace ISA {                                                             \
  const mann_ext::content::Kernels& content_kernels(mann_ext::lrua::Storage); \
  }
MANN_EXT_DECLARE_CONTENT(baseline)
#if defined(__x86_64__)
MANN_EXT_DECLARE_CONTENT(avx2)
MANN_EXT_DECLARE_CONTENT(avx512)
#endif
