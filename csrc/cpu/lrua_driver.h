// How an LRUA driver on the CPU calls the kernels: their table, the tiles, and their arguments.
#pragma once

#include <algorithm>

#include "cpu/driver.h"
#include "cpu/isa.h"
#include "cpu/lrua.h"
#include "lrua_tensors.h"

namespace mann_ext::lrua {

inline const Kernels& kernels(Storage storage) { return MANN_EXT_CALL_BEST(lrua_kernels, storage); }

// As many tiles as keep the memory and its gradient within a 1 MB second-level cache.
inline int64_t tiles_a_block(int64_t width, int64_t acc_bytes) {
  const int64_t bytes = std::max<int64_t>(1, width) * kTile * acc_bytes;
  return std::clamp<int64_t>((320 << 10) / bytes, 1, 32);
}

inline Shape make_shape(const Sizes& sizes, ScalarType acc) {
  Shape s{sizes, sizes.padded / kTile, 0, 0};
  s.block_tiles = tiles_a_block(s.width, acc == ScalarType::Double ? 8 : 4);
  s.blocks = (s.tiles + s.block_tiles - 1) / s.block_tiles;
  return s;
}

inline Inputs make_inputs(const Given& in) {
  return {in.memory.const_data_ptr(),
          in.memory.stride(0),
          in.memory.stride(1),
          in.memory.stride(2),
          in.read_weights.const_data_ptr(),
          in.keys.const_data_ptr(),
          in.gates.const_data_ptr(),
          data(in.strengths),
          in.contents.has_value() ? in.contents->const_data_ptr() : in.keys.const_data_ptr(),
          static_cast<const bool*>(data(in.reset))};
}

inline Forward make_forward(const Given& in, const Shape& shape, const Options& options,
                            const Tensor& usage, const Outputs& out, bool save) {
  Forward p{};
  p.shape = shape;
  p.options = options;
  p.in = make_inputs(in);
  p.usage = usage.const_data_ptr();
  p.reads = out.reads.mutable_data_ptr();
  p.memory_out = out.memory.mutable_data_ptr();
  p.weights_out = out.weights.mutable_data_ptr();
  p.usage_out = out.usage.mutable_data_ptr();
  if (save) {
    p.weight_history = out.weight_history.mutable_data_ptr();
    p.slot_history = out.slot_history.mutable_data_ptr<int64_t>();
    if (options.snapshot_every != 1) p.erased_rows = out.erased_rows.mutable_data_ptr();
    if (options.snapshot_every > 0) p.snapshots = out.snapshots.mutable_data_ptr();
  }
  return p;
}

inline Backward make_backward(const Given& in, const Shape& shape, const Options& options,
                              const Saved& saved, const Gradients& out) {
  Backward p{};
  p.shape = shape;
  p.options = options;
  p.in = make_inputs(in);
  p.reads = saved.reads.const_data_ptr();
  p.memory_out = saved.memory_out.const_data_ptr();
  p.weight_history = saved.weight_history.const_data_ptr();
  p.slot_history = saved.slot_history.const_data_ptr<int64_t>();
  p.erased_rows = saved.erased_rows.const_data_ptr();
  p.snapshots = saved.snapshots.const_data_ptr();
  p.grad_reads = saved.grad_reads.const_data_ptr();
  p.grad_memory = data(saved.grad_memory);
  p.grad_weights = data(saved.grad_read_weights);
  p.grad_memory_in = out.memory.dim() == 3 ? out.memory.mutable_data_ptr() : nullptr;
  p.grad_weights_in = out.read_weights.mutable_data_ptr();
  p.grad_keys = out.keys.mutable_data_ptr();
  p.grad_gates = out.gates.mutable_data_ptr();
  p.grad_strengths = in.strengths.has_value() ? out.strengths.mutable_data_ptr() : nullptr;
  p.grad_contents = in.contents.has_value() ? out.contents.mutable_data_ptr() : nullptr;
  return p;
}

}  // namespace mann_ext::lrua
