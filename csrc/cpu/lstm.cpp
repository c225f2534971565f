// lstm_scan on the CPU: allocation, choice of instruction set, and threads.
#include "cpu/lstm.h"

#include <algorithm>
#include <tuple>

#include "cpu/driver.h"
#include "cpu/isa.h"
#include "lstm_tensors.h"

namespace mann_ext::lstm {
namespace {

using lrua::parallel_rows;
using lrua::Workspace;

const Kernels& kernels(ScalarType dtype) {
  return MANN_EXT_CALL_BEST(lstm_kernels, dtype == ScalarType::Double);
}

// body(room, first, end) over groups of the batch: few large ones, but one for every thread.
template <class Body>
void parallel_groups(const Kernels& k, int64_t batch, int64_t hidden, const Body& body) {
  if (batch == 0) return;
  const int64_t wanted = std::max((batch + kGroup - 1) / kGroup, std::min(batch, max_threads()));
  const int64_t size = (batch + wanted - 1) / wanted;
  parallel((batch + size - 1) / size, [&](int64_t begin, int64_t end) {
    const lrua::Scratch room = lrua::allocate(kStateParts * kGroup * hidden * k.bytes);
    for (int64_t group = begin; group < end; ++group)
      body(room.get(), group * size, std::min(batch, (group + 1) * size));
  });
}

int64_t panel_bytes(const Kernels& k, int64_t columns, int64_t depth) {
  return panels(columns, k.width) * k.width * depth * k.bytes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_scan(Tensor x, Tensor h, Tensor c,
                                                             Tensor weight_ih, Tensor weight_hh,
                                                             Tensor bias_ih, Tensor bias_hh,
                                                             std::optional<Tensor> reset,
                                                             bool save_for_backward) {
  const Given in{x, h, c, weight_ih, weight_hh, reset};
  const auto [T, B, I, H] = check_forward("lstm_scan", in, bias_ih, bias_hh);
  const Outputs out = make_outputs(in, {T, B, I, H}, save_for_backward);
  const Tensor gates = new_tensor(x, {T, B, 4 * H}, in.dtype());

  const Kernels& k = kernels(in.dtype());
  const int64_t of_inputs = panel_bytes(k, 4 * H, I), of_state = panel_bytes(k, 4 * H, H);
  Workspace workspace({of_inputs, of_state});
  const Scan s{T,
               B,
               I,
               H,
               x.const_data_ptr(),
               h.const_data_ptr(),
               c.const_data_ptr(),
               weight_ih.const_data_ptr(),
               weight_hh.const_data_ptr(),
               bias_ih.const_data_ptr(),
               bias_hh.const_data_ptr(),
               static_cast<const bool*>(data(reset)),
               workspace.take(of_inputs),
               workspace.take(of_state),
               out.hidden.mutable_data_ptr(),
               out.h.mutable_data_ptr(),
               out.c.mutable_data_ptr(),
               gates.mutable_data_ptr(),
               save_for_backward ? out.cells.mutable_data_ptr() : nullptr};
  if (T > 0 && B > 0) {
    parallel(2 * panels(4 * H, k.width), [&](int64_t i, int64_t end) { k.pack(s, i, end); });
    parallel_rows(T * B, [&](int64_t i, int64_t end) { k.project(s, i, end); });
  }
  parallel_groups(k, B, H, [&](void* room, int64_t i, int64_t end) { k.scan(s, room, i, end); });
  return {out.hidden, out.h, out.c, save_for_backward ? gates : new_tensor(x, {0}, in.dtype()),
          out.cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_scan_backward(
    std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_h_out,
    std::optional<Tensor> grad_c_out, Tensor x, Tensor h, Tensor c, Tensor weight_ih,
    Tensor weight_hh, std::optional<Tensor> reset, Tensor hidden, Tensor gates, Tensor cells,
    bool need_x_grad) {
  const Given in{x, h, c, weight_ih, weight_hh, reset};
  const auto [T, B, I, H] = check_backward(
      "lstm_scan_backward", in, {grad_hidden, grad_h_out, grad_c_out, hidden, gates, cells});
  const ScalarType dtype = in.dtype();
  const Tensor grad_x = need_x_grad ? new_tensor(x, {T, B, I}, dtype) : new_tensor(x, {0}, dtype);
  const Tensor grad_h = new_tensor(x, {B, H}, dtype), grad_c = new_tensor(x, {B, H}, dtype);
  const Tensor grad_weight_ih = new_tensor(x, {4 * H, I}, dtype);
  const Tensor grad_weight_hh = new_tensor(x, {4 * H, H}, dtype);
  const Tensor grad_bias = new_tensor(x, {4 * H}, dtype);

  const Kernels& k = kernels(dtype);
  const int64_t of_x = panel_bytes(k, I, T * B), of_previous = panel_bytes(k, H, T * B);
  const int64_t of_state = panel_bytes(k, H, 4 * H), of_gates = T * B * 4 * H * k.bytes;
  const int64_t of_inputs = need_x_grad ? panel_bytes(k, I, 4 * H) : 0;
  Workspace workspace({of_x, of_previous, of_state, of_inputs, of_gates});
  const ScanBackward s{T,
                       B,
                       I,
                       H,
                       data(grad_hidden),
                       data(grad_h_out),
                       data(grad_c_out),
                       x.const_data_ptr(),
                       h.const_data_ptr(),
                       c.const_data_ptr(),
                       weight_ih.const_data_ptr(),
                       weight_hh.const_data_ptr(),
                       static_cast<const bool*>(data(reset)),
                       hidden.const_data_ptr(),
                       gates.const_data_ptr(),
                       cells.const_data_ptr(),
                       workspace.take(of_x),
                       workspace.take(of_previous),
                       workspace.take(of_state),
                       workspace.take(of_inputs),
                       workspace.take(of_gates),
                       need_x_grad ? grad_x.mutable_data_ptr() : nullptr,
                       grad_h.mutable_data_ptr(),
                       grad_c.mutable_data_ptr(),
                       grad_weight_ih.mutable_data_ptr(),
                       grad_weight_hh.mutable_data_ptr(),
                       grad_bias.mutable_data_ptr()};
  const int64_t count = panels(I, k.width);
  parallel(count + panels(H, k.width) + (need_x_grad ? count : 0),
           [&](int64_t i, int64_t end) { k.pack_backward(s, i, end); });
  parallel_groups(k, B, H,
                  [&](void* room, int64_t i, int64_t end) { k.scan_backward(s, room, i, end); });
  parallel_rows(4 * H, [&](int64_t i, int64_t end) { k.weight_gradients(s, i, end); });
  if (need_x_grad)
    parallel_rows(T * B, [&](int64_t i, int64_t end) { k.input_gradients(s, i, end); });
  return {grad_x, grad_h, grad_c, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace
}  // namespace mann_ext::lstm

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("lstm_scan", TORCH_BOX(&mann_ext::lstm::lstm_scan));
  m.impl("lstm_scan_backward", TORCH_BOX(&mann_ext::lstm::lstm_scan_backward));
}
