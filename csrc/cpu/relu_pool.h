// What the relu_pool driver (relu_pool.cpp) and its kernels share.
#pragma once

#include "relu_pool_tensors.h"

namespace mann_ext::relu_pool {

// Arrays are float32 or float64, all the same.
struct Arguments {
  Sizes sizes;
  const void* parts[kParts];  // [planes][H][W]; null: not there
  void* out;                  // [planes][h][w]
  uint8_t* where;             // [planes][h][w]
};

struct BackwardArguments {
  Sizes sizes;
  const void* grad;      // [planes][h][w]
  const uint8_t* where;  // [planes][h][w]
  void* parts[kParts];   // [planes][H][W]; null: not there
};

struct Kernels {
  // The planes from `first` to `end`.
  void (*forward)(const Arguments&, int64_t first, int64_t end);
  void (*backward)(const BackwardArguments&, int64_t first, int64_t end);
};

}  // namespace mann_ext::relu_pool

#define MANN_EXT_DECLARE_RELU_POOL(ISA)                                \
  namespace ISA {                                                      \
  const mann_ext::relu_pool::Kernels& relu_pool_kernels(bool float64); \
  }
MANN_EXT_DECLARE_RELU_POOL(baseline)
#if defined(__x86_64__)
MANN_EXT_DECLARE_RELU_POOL(avx2)
MANN_EXT_DECLARE_RELU_POOL(avx512)
#endif
