// Sizes of lstm_lrua_scan, and how the interface's numbers are laid out; the same on every device.
#pragma once

#include <cstdint>

namespace mann_ext::lstm_lrua {

struct Sizes {
  int64_t steps, batch, inputs, hidden, heads, width;
  bool tanh_keys, write_content, strength_per_step;

  // Numbers that are read a step.
  constexpr int64_t reads() const { return heads * width; }
  // Columns of the weight of x_t and r_{t-1}.
  constexpr int64_t columns() const { return inputs + reads(); }
  // A row of the interface: keys, contents if any, gates, strengths if any.
  constexpr int64_t vectors() const { return reads() * (write_content ? 2 : 1); }
  constexpr int64_t numbers() const { return vectors() + heads * (strength_per_step ? 2 : 1); }
};

// softplus(x) is x from here on, as PyTorch has it.
constexpr double kSoftplusThreshold = 20;

}  // namespace mann_ext::lstm_lrua
