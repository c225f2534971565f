// What the LRUA driver (lrua.cpp) and the kernels (lrua.simd.cpp, one copy an instruction set)
// share.
//
// Layout inside the kernels. Slots sit in the vector lanes: the memory of one batch element is a
// row of tiles, each [W][kTile] numbers, so that a column of 64 slots is contiguous and W needs no
// tail. Rows of per-slot numbers (weights, usage) are padded to `padded` = tiles * kTile slots.
// Tiles are grouped into blocks that stay in the L2 cache; every sum over slots is formed per block
// and the blocks are added in their order, so results depend neither on threads nor on timing.
#pragma once

#include <cstdint>

#include "lrua_sizes.h"

namespace mann_ext::lrua {

constexpr int64_t kTile = 64;
static_assert(kTile == kPadding);

enum class Storage { float32, float64, bfloat16, float16 };

struct Shape : Sizes {
  int64_t tiles;        // padded / kTile
  int64_t block_tiles;  // tiles a block
  int64_t blocks;
};

struct Options {
  double usage_decay, eps, initial_value;
  bool shared;             // least_used="shared"
  int64_t snapshot_every;  // 0: none; K: M_t is stored after every K-th step
  int64_t chunk;           // steps whose writes are deferred together; 1: none are
};

// Inputs of the scan, the same forward and backward. "acc" is double for float64, else float.
struct Inputs {
  const void* memory;  // storage type, with strides in elements
  int64_t memory_batch_stride, memory_slot_stride, memory_width_stride;
  const void* read_weights;  // acc [B][R][N]
  const void* keys;          // acc [T][B][R][W]
  const void* gates;         // acc [T][B][R]
  const void* strengths;     // acc [T][B][R] or null: 1
  const void* contents;      // acc [T][B][R][W]; the keys if not given
  const bool* reset;         // [T][B] or null
};

struct Forward {
  Shape shape;
  Options options;
  Inputs in;
  const void* usage;  // acc [B][N]
  void* reads;        // acc [T][B][R][W]
  void* memory_out;   // storage [B][N][W]
  void* weights_out;  // acc [B][R][N]
  void* usage_out;    // acc [B][N]
  // Saved for the backward pass; null where it is not wanted.
  void* weight_history;   // acc [T][B][R][padded]
  int64_t* slot_history;  // [T][B][n]
  void* erased_rows;      // storage [T][B][n][W]
  void* snapshots;        // storage [T / snapshot_every][B][tiles][W][kTile]
};

struct Backward {
  Shape shape;
  Options options;
  Inputs in;
  const void* reads;
  const void* memory_out;
  const void* weight_history;
  const int64_t* slot_history;
  const void* erased_rows;
  const void* snapshots;
  const void* grad_reads;    // acc [T][B][R][W]
  const void* grad_memory;   // storage [B][N][W] or null
  const void* grad_weights;  // acc [B][R][N] or null
  void* grad_memory_in;      // storage [B][N][W] or null
  void* grad_weights_in;     // acc [B][R][N]
  void* grad_keys;           // acc [T][B][R][W]
  void* grad_gates;          // acc [T][B][R]
  void* grad_strengths;      // acc [T][B][R] or null
  void* grad_contents;       // acc [T][B][R][W] or null: added to grad_keys
};

// One instruction set's kernels for one storage type. A "scratch" holds all that one batch element
// needs while its sequence runs. Functions that take [block, end) may run on several threads at
// once.
struct Kernels {
  int64_t (*forward_scratch_bytes)(const Forward&);
  void (*forward_begin)(const Forward&, void* scratch, int64_t b);
  void (*forward_pass)(const Forward&, void* scratch, int64_t b, int64_t t, int64_t block,
                       int64_t end);
  void (*forward_combine)(const Forward&, void* scratch, int64_t b, int64_t t);
  void (*forward_weights)(const Forward&, void* scratch, int64_t b, int64_t t, int64_t block,
                          int64_t end);
  void (*forward_select)(const Forward&, void* scratch, int64_t b, int64_t t);
  void (*forward_end)(const Forward&, void* scratch, int64_t b);

  // Deferred writes: what a chunk of `count` steps from t on replaces forward_pass by. chunk_turn
  // finishes the chunk before it, chunk_begin prepares it, the other two are done every step.
  void (*chunk_turn)(const Forward&, void* scratch, int64_t b, int64_t t, int64_t count,
                     int64_t block, int64_t end);
  void (*chunk_begin)(const Forward&, void* scratch, int64_t b, int64_t t, int64_t count);
  void (*chunk_step)(const Forward&, void* scratch, int64_t b, int64_t t);
  void (*chunk_pass)(const Forward&, void* scratch, int64_t b, int64_t t, int64_t block,
                     int64_t end);

  int64_t (*backward_scratch_bytes)(const Backward&);
  void (*backward_begin)(const Backward&, void* scratch, int64_t b);
  void (*backward_pass)(const Backward&, void* scratch, int64_t b, int64_t t, int64_t block,
                        int64_t end);
  void (*backward_combine)(const Backward&, void* scratch, int64_t b, int64_t t);
  void (*backward_end)(const Backward&, void* scratch, int64_t b);
};

}  // namespace mann_ext::lrua

// One table an instruction set; which of them exist depends on the architecture.
#define MANN_EXT_DECLARE_LRUA(ISA)                                      \
  namespace ISA {                                                       \
  const mann_ext::lrua::Kernels& lrua_kernels(mann_ext::lrua::Storage); \
  }
MANN_EXT_DECLARE_LRUA(baseline)
#if defined(__x86_64__)
MANN_EXT_DECLARE_LRUA(avx2)
MANN_EXT_DECLARE_LRUA(avx512)
#endif
