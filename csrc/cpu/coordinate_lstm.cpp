// coordinate_lstm on the CPU: allocation, choice of instruction set, and threads.
#include "cpu/coordinate_lstm.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/driver.h"
#include "cpu/isa.h"
#include "ops.h"

namespace mann_ext::coordinate_lstm {
namespace {

using lrua::Workspace;

const Kernels& kernels(ScalarType dtype) {
  return MANN_EXT_CALL_BEST(coordinate_lstm_kernels, dtype == ScalarType::Double);
}

// The weights as the kernels read them, and room for the sums of the chunks.
struct Packed {
  Packed(const Kernels& k, int64_t hidden, const Tensor& weights, int64_t partial_bytes)
      : of_units(weight_gradients(hidden) * k.bytes),
        of_state(4 * hidden * padded(hidden) * k.bytes),
        workspace({of_units, of_state, partial_bytes}) {
    units = workspace.take(of_units);
    state = workspace.take(of_state);
    partial = static_cast<double*>(workspace.take(partial_bytes));
    k.pack(hidden, weights.const_data_ptr(), units, state);
  }
  int64_t of_units, of_state;
  Workspace workspace;
  void *units, *state;
  double* partial;
};

// What both directions are given; each adds what is its own.
Arguments arguments(const Sizes& n, const Tensor& gradients, const Packed& packed,
                    const Tensor& output) {
  Arguments s{};
  s.steps = n.steps;
  s.coordinates = n.coordinates;
  s.hidden = n.hidden;
  s.gradients = gradients.const_data_ptr();
  s.unit_weights = packed.units;
  s.state_weights = packed.state;
  s.output = output.const_data_ptr();
  return s;
}

Tensor coordinate_lstm(Tensor gradients, Tensor weights, Tensor output) {
  const Sizes n = check_arguments("coordinate_lstm", gradients, weights, output);
  Tensor out = new_tensor(gradients, {n.coordinates}, gradients.scalar_type());
  const Kernels& k = kernels(gradients.scalar_type());
  const Packed packed(k, n.hidden, weights, 0);
  Arguments s = arguments(n, gradients, packed, output);
  s.out = out.mutable_data_ptr();
  parallel((n.coordinates + kChunk - 1) / kChunk, [&](int64_t first, int64_t end) {
    const lrua::Scratch room = lrua::allocate(k.room(n.steps, n.hidden, false) * k.bytes);
    k.forward(s, room.get(), first, end);
  });
  return out;
}

std::tuple<Tensor, Tensor> coordinate_lstm_backward(Tensor grad_out, Tensor gradients,
                                                    Tensor weights, Tensor output) {
  const Sizes n = check_backward("coordinate_lstm_backward", grad_out, gradients, weights, output);
  const int64_t H = n.hidden;
  const ScalarType dtype = gradients.scalar_type();
  Tensor grad_weights = new_tensor(gradients, {4 * H, H + kExtra}, dtype);
  Tensor grad_output = new_tensor(gradients, {H + 1}, dtype);
  const Kernels& k = kernels(dtype);
  const int64_t chunks = (n.coordinates + kChunk - 1) / kChunk, size = partial_size(H);
  const Packed packed(k, H, weights, chunks * size * static_cast<int64_t>(sizeof(double)));
  Arguments s = arguments(n, gradients, packed, output);
  s.grad_out = grad_out.const_data_ptr();
  s.partial = packed.partial;
  parallel(chunks, [&](int64_t first, int64_t end) {
    const lrua::Scratch room = lrua::allocate(k.room(n.steps, H, true) * k.bytes);
    k.backward(s, room.get(), first, end);
  });
  // In the order of the chunks, so that the sums do not depend on the threads.
  std::vector<double> sums(static_cast<size_t>(size), 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i)
      sums[static_cast<size_t>(i)] += packed.partial[chunk * size + i];
  const auto split = sums.begin() + weight_gradients(H);
  if (dtype == ScalarType::Double) {
    std::copy(sums.begin(), split, static_cast<double*>(grad_weights.mutable_data_ptr()));
    std::copy(split, sums.end(), static_cast<double*>(grad_output.mutable_data_ptr()));
  } else {
    std::copy(sums.begin(), split, static_cast<float*>(grad_weights.mutable_data_ptr()));
    std::copy(split, sums.end(), static_cast<float*>(grad_output.mutable_data_ptr()));
  }
  return {grad_weights, grad_output};
}

}  // namespace
}  // namespace mann_ext::coordinate_lstm

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("coordinate_lstm", TORCH_BOX(&mann_ext::coordinate_lstm::coordinate_lstm));
  m.impl("coordinate_lstm_backward",
         TORCH_BOX(&mann_ext::coordinate_lstm::coordinate_lstm_backward));
}
