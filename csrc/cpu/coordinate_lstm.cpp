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

// The coordinates that the kernels are run for: those with a gradient other than 0 and, last, one
// for all that have none. Dead units leave a third of a trained network's coordinates without, and
// these all come to the same.
template <class A>
class Distinct {
 public:
  Distinct(const Sizes& n, const A* gradients) {
    std::vector<uint8_t> any(static_cast<size_t>(n.coordinates));
    for (int64_t t = 0; t < n.steps; ++t)
      for (int64_t p = 0; p < n.coordinates; ++p)
        any[static_cast<size_t>(p)] |= gradients[t * n.coordinates + p] != A(0);
    places_.resize(any.size());
    for (size_t p = 0; p < any.size(); ++p) places_[p] = any[p] ? others_++ : -1;
    gradients_.resize(static_cast<size_t>(n.steps * size()));
    for (int64_t t = 0; t < n.steps; ++t)
      each([&](int64_t p, int64_t place) {
        gradients_[static_cast<size_t>(t * size() + place)] = gradients[t * n.coordinates + p];
      });
  }

  int64_t size() const { return others_ + 1; }
  const A* gradients() const { return gradients_.data(); }

  // f(coordinate, its place among these)
  template <class F>
  void each(const F& f) const {
    for (size_t p = 0; p < places_.size(); ++p)
      f(static_cast<int64_t>(p), places_[p] < 0 ? others_ : places_[p]);
  }

 private:
  int64_t others_ = 0;
  std::vector<int64_t> places_;  // -1: all zero
  std::vector<A> gradients_;     // [T][size()]
};

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
template <class A>
Arguments arguments(const Sizes& n, const Distinct<A>& distinct, const Packed& packed,
                    const Tensor& output) {
  Arguments s{};
  s.steps = n.steps;
  s.coordinates = distinct.size();
  s.hidden = n.hidden;
  s.gradients = distinct.gradients();
  s.unit_weights = packed.units;
  s.state_weights = packed.state;
  s.output = output.const_data_ptr();
  return s;
}

int64_t chunks_of(int64_t coordinates) { return (coordinates + kChunk - 1) / kChunk; }

template <class A>
void forward(const Sizes& n, const Tensor& gradients, const Tensor& weights, const Tensor& output,
             A* out) {
  const Kernels& k = kernels(gradients.scalar_type());
  const Distinct<A> distinct(n, static_cast<const A*>(gradients.const_data_ptr()));
  const Packed packed(k, n.hidden, weights, 0);
  Arguments s = arguments(n, distinct, packed, output);
  std::vector<A> made(static_cast<size_t>(distinct.size()));
  s.out = made.data();
  parallel(chunks_of(s.coordinates), [&](int64_t first, int64_t end) {
    const lrua::Scratch room = lrua::allocate(k.room(n.steps, n.hidden, false) * k.bytes);
    k.forward(s, room.get(), first, end);
  });
  distinct.each([&](int64_t p, int64_t place) { out[p] = made[static_cast<size_t>(place)]; });
}

template <class A>
void backward(const Sizes& n, const A* grad_out, const Tensor& gradients, const Tensor& weights,
              const Tensor& output, A* grad_weights, A* grad_output) {
  const Kernels& k = kernels(gradients.scalar_type());
  const Distinct<A> distinct(n, static_cast<const A*>(gradients.const_data_ptr()));
  const int64_t chunks = chunks_of(distinct.size()), size = partial_size(n.hidden);
  const Packed packed(k, n.hidden, weights, chunks * size * static_cast<int64_t>(sizeof(double)));
  Arguments s = arguments(n, distinct, packed, output);
  std::vector<double> totals(static_cast<size_t>(distinct.size()), 0.0);
  distinct.each([&](int64_t p, int64_t place) {
    totals[static_cast<size_t>(place)] += static_cast<double>(grad_out[p]);
  });
  const std::vector<A> grads(totals.begin(), totals.end());
  s.grad_out = grads.data();
  s.partial = packed.partial;
  parallel(chunks, [&](int64_t first, int64_t end) {
    const lrua::Scratch room = lrua::allocate(k.room(n.steps, n.hidden, true) * k.bytes);
    k.backward(s, room.get(), first, end);
  });
  // In the order of the chunks, so that the sums do not depend on the threads.
  std::vector<double> sums(static_cast<size_t>(size), 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i)
      sums[static_cast<size_t>(i)] += packed.partial[chunk * size + i];
  const auto split = sums.begin() + weight_gradients(n.hidden);
  std::copy(sums.begin(), split, grad_weights);
  std::copy(split, sums.end(), grad_output);
}

Tensor coordinate_lstm(Tensor gradients, Tensor weights, Tensor output) {
  const Sizes n = check_arguments("coordinate_lstm", gradients, weights, output);
  Tensor out = new_tensor(gradients, {n.coordinates}, gradients.scalar_type());
  void* data = out.mutable_data_ptr();
  if (gradients.scalar_type() == ScalarType::Double)
    forward(n, gradients, weights, output, static_cast<double*>(data));
  else
    forward(n, gradients, weights, output, static_cast<float*>(data));
  return out;
}

std::tuple<Tensor, Tensor> coordinate_lstm_backward(Tensor grad_out, Tensor gradients,
                                                    Tensor weights, Tensor output) {
  const Sizes n = check_backward("coordinate_lstm_backward", grad_out, gradients, weights, output);
  const ScalarType dtype = gradients.scalar_type();
  Tensor grad_weights = new_tensor(gradients, {4 * n.hidden, n.hidden + kExtra}, dtype);
  Tensor grad_output = new_tensor(gradients, {n.hidden + 1}, dtype);
  const auto run = [&]<class A>(const A* grad) {
    backward(n, grad, gradients, weights, output, static_cast<A*>(grad_weights.mutable_data_ptr()),
             static_cast<A*>(grad_output.mutable_data_ptr()));
  };
  if (dtype == ScalarType::Double)
    run(static_cast<const double*>(grad_out.const_data_ptr()));
  else
    run(static_cast<const float*>(grad_out.const_data_ptr()));
  return {grad_weights, grad_output};
}

}  // namespace
}  // namespace mann_ext::coordinate_lstm

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("coordinate_lstm", TORCH_BOX(&mann_ext::coordinate_lstm::coordinate_lstm));
  m.impl("coordinate_lstm_backward",
         TORCH_BOX(&mann_ext::coordinate_lstm::coordinate_lstm_backward));
}
