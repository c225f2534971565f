// Sizes, limits and numerical choices of the LRUA operators, the same on every device.
#pragma once

#include <cstdint>

namespace mann_ext::lrua {

constexpr int64_t kMaxHeads = 64;
constexpr int64_t kMaxChunk = 32;
// Rows of the weight history are padded to a multiple of this many slots.
constexpr int64_t kPadding = 64;

// exp(score) needs no shift while |strength| is at most this: sums over 10^9 slots stay finite.
constexpr double kUnshifted = 40;

// The memories after the first few steps of an episode are made again from its start, not rolled
// back: rows of 1e-6 would come back as rounding errors of what was added to them.
constexpr int kReplayed = 4;

struct Sizes {
  int64_t steps, batch, slots, width, heads;
  int64_t chosen;  // n = min(heads, slots): slots erased and written a step
  int64_t padded;  // slots, padded
};

}  // namespace mann_ext::lrua
