// How a driver of the LRUA's CUDA kernels fills in their arguments and chooses between their forms.
#pragma once

#include <string>

#include "cuda/lrua.h"
#include "lrua_tensors.h"

namespace mann_ext::cuda::lrua {

namespace tensors = mann_ext::lrua;
using tensors::Given;

// The kernels count columns and heads in 32 bits.
inline Sizes narrowed(const char* op, const tensors::Sizes& s) {
  require(s.width < int64_t{1} << 30, std::string(op) + ": rows of 2^30 columns or more");
  return {s.steps,
          s.batch,
          s.slots,
          s.padded,
          static_cast<int>(s.width),
          static_cast<int>(s.heads),
          static_cast<int>(s.chosen)};
}

struct Options {
  double usage_decay;
  bool shared;
  double eps, initial_value;
  int64_t snapshot_every;
};

inline __nv_bfloat16 to_storage(double x, __nv_bfloat16) {
  return __float2bfloat16(static_cast<float>(x));
}
inline __half to_storage(double x, __half) { return __float2half(static_cast<float>(x)); }
inline float to_storage(double x, float) { return static_cast<float>(x); }
inline double to_storage(double x, double) { return x; }

template <class A, class S>
Scan<A, S> make_scan(const Sizes& s, const Given& in, const Options& options) {
  Scan<A, S> scan{};
  scan.sizes = s;
  scan.shared = options.shared;
  scan.eps = static_cast<A>(options.eps);
  scan.initial = to_storage(options.initial_value, S{});
  scan.snapshot_every = options.snapshot_every;
  scan.memory = static_cast<const S*>(in.memory.const_data_ptr());
  scan.batch_stride = in.memory.stride(0);
  scan.slot_stride = in.memory.stride(1);
  scan.width_stride = in.memory.stride(2);
  scan.packed = scan.width_stride == 1 && scan.slot_stride == s.width && aligned(scan.memory) &&
                scan.batch_stride % kVector<S> == 0;
  scan.read_weights = static_cast<const A*>(in.read_weights.const_data_ptr());
  scan.keys = static_cast<const A*>(in.keys.const_data_ptr());
  scan.gates = static_cast<const A*>(in.gates.const_data_ptr());
  scan.strengths = static_cast<const A*>(data(in.strengths));
  scan.contents =
      in.contents.has_value() ? static_cast<const A*>(in.contents->const_data_ptr()) : scan.keys;
  scan.reset = static_cast<const bool*>(data(in.reset));
  return scan;
}

// Whether every row that is loaded or stored is a whole number of aligned 16-byte pieces.
template <class A, class S>
bool aligned_rows(const Scan<A, S>& scan) {
  return scan.sizes.width % max(kRun<true>, kVector<S>) == 0 && aligned(scan.keys) &&
         aligned(scan.contents);
}

template <class A, class S>
Forward<A, S> make_forward(const Sizes& s, const Given& in, const Options& options,
                           const Tensor& usage, const tensors::Outputs& out, bool save) {
  Forward<A, S> p{};
  p.scan = make_scan<A, S>(s, in, options);
  p.usage_decay = static_cast<A>(options.usage_decay);
  p.usage = pointer<const A>(usage);
  p.weights_out = pointer<A>(out.weights);
  p.usage_out = pointer<A>(out.usage);
  p.history.reads = pointer<A>(out.reads);
  p.history.memory_out = pointer<S>(out.memory);
  if (save) {
    p.history.weights = pointer<A>(out.weight_history);
    p.history.slots = pointer<int64_t>(out.slot_history);
    if (options.snapshot_every != 1) p.history.erased_rows = pointer<S>(out.erased_rows);
    if (options.snapshot_every > 0) p.history.snapshots = pointer<S>(out.snapshots);
  }
  return p;
}

template <class A, class S>
Backward<A, S> make_backward(const Sizes& s, const Given& in, const Options& options,
                             const tensors::Saved& saved, const tensors::Gradients& out) {
  Backward<A, S> p{};
  p.scan = make_scan<A, S>(s, in, options);
  p.history = {pointer<A>(saved.reads),          pointer<S>(saved.memory_out),
               pointer<A>(saved.weight_history), pointer<int64_t>(saved.slot_history),
               pointer<S>(saved.erased_rows),    pointer<S>(saved.snapshots)};
  p.grad_reads = pointer<const A>(saved.grad_reads);
  p.grad_memory = static_cast<const S*>(data(saved.grad_memory));
  p.grad_weights = static_cast<const A*>(data(saved.grad_read_weights));
  p.grad_memory_in = out.memory.dim() == 3 ? pointer<S>(out.memory) : nullptr;
  p.grad_weights_in = pointer<A>(out.read_weights);
  p.grad_keys = pointer<A>(out.keys);
  p.grad_gates = pointer<A>(out.gates);
  p.grad_strengths = in.strengths.has_value() ? pointer<A>(out.strengths) : nullptr;
  p.grad_contents = in.contents.has_value() ? pointer<A>(out.contents) : nullptr;
  return p;
}

template <class A, class S>
bool aligned_rows(const Forward<A, S>& p) {
  return aligned_rows(p.scan) && aligned(p.history.memory_out);
}
template <class A, class S>
bool aligned_rows(const Backward<A, S>& p) {
  return aligned_rows(p.scan) && aligned(p.history.memory_out) && aligned(p.history.erased_rows) &&
         aligned(p.history.snapshots) && aligned(p.grad_reads) && aligned(p.grad_memory) &&
         aligned(p.history.reads) && aligned(p.history.weights);
}

// How a scan is computed. Resident: one launch for all steps, the memory of a batch element in the
// shared memory of one multiprocessor or, if it does not fit, of the 2, 4 or 8 of a cluster
// (compute capability 9 and above). That is wherever memory, weights, usage and room for sums fit
// there: of slots of 40 float32 numbers 1,000 a multiprocessor forward and 350 backward. Streaming:
// everything else, and there writes may be deferred. All save the same for the backward pass, which
// chooses for itself. MANN_EXT_CUDA_REGIME changes that: see regime().
//
// Returns the number of blocks, or 0: streaming.
template <class Bytes>
int resident_blocks(const Sizes& s, Bytes&& bytes) {
  const std::string_view chosen = regime();
  const auto most = static_cast<int64_t>(max_shared_bytes());
  if (chosen == "streaming" || s.heads > kGroup || s.width > kMaxResidentWidth ||
      s.slots > kMaxCluster * most)
    return 0;
  for (int blocks = chosen == "cluster" ? kMaxCluster : 1; blocks <= kMaxCluster; blocks *= 2) {
    if (blocks > 1 && (chosen == "block" || !has_clusters())) break;
    if (bytes(blocks) <= most) return blocks;
  }
  return 0;
}

}  // namespace mann_ext::cuda::lrua
