// lstm_lrua_scan on the CPU: allocation, choice of instruction set, and who computes what on which
// thread. A step of the memory is lrua_scan's.
#include "cpu/lstm_lrua.h"

#include <algorithm>
#include <tuple>

#include "cpu/lrua_driver.h"
#include "lstm_lrua_tensors.h"

namespace mann_ext::lstm_lrua {
namespace {

const Kernels& kernels(ScalarType acc) {
  return MANN_EXT_CALL_BEST(lstm_lrua_kernels, acc == ScalarType::Double);
}

int64_t panel_bytes(const Kernels& k, int64_t columns, int64_t depth) {
  return panels(columns, k.width) * k.width * depth * k.bytes;
}

// Rows of the batch that take each step together: each pass over the weights serves so many.
constexpr int64_t kGroup = 16;
// Bytes that their memories may have together: those of large memories matter more than weights.
constexpr int64_t kGroupBytes = int64_t{8} << 20;

// Runs sequence(first, end, each_block) for groups of the batch: whole groups on each thread or,
// where there are fewer rows than threads and their memories are large, one after the other with
// each_block sharing a memory's blocks between the threads.
template <class Sequence>
void for_each_group(const lrua::Shape& s, int64_t scratch_bytes, const Sequence& sequence) {
  if (s.batch == 0) return;
  const int64_t most = std::clamp<int64_t>(kGroupBytes / scratch_bytes, 1, kGroup);
  const int64_t wanted = std::max((s.batch + most - 1) / most, std::min(s.batch, max_threads()));
  const int64_t size = (s.batch + wanted - 1) / wanted, groups = (s.batch + size - 1) / size;
  const auto run = [&](int64_t group, const auto& each_block) {
    sequence(group * size, std::min(s.batch, (group + 1) * size), each_block);
  };
  if (s.batch < max_threads() && s.blocks > 1 && s.slots * s.width >= lrua::kSplitNumbers) {
    const FlushDenormals flush;
    for (int64_t group = 0; group < groups; ++group)
      run(group, [&](const auto& body) { parallel(s.blocks, body); });
  } else {
    parallel(groups, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group)
        run(group, [&](const auto& body) { body(0, s.blocks); });
    });
  }
}

// Scratch memory of each row of a group for its memory, and of the group for the LSTM.
class Room {
 public:
  Room(const Kernels& k, const Sizes& n, int64_t rows, int64_t scratch_bytes)
      : stride_((scratch_bytes + 63) / 64 * 64),
        memories_(lrua::allocate(rows * stride_)),
        lstm_(lrua::allocate(k.room_bytes(n, rows))) {}
  void* memory(int64_t row) const { return static_cast<char*>(memories_.get()) + row * stride_; }
  void* lstm() const { return lstm_.get(); }

 private:
  int64_t stride_;
  lrua::Scratch memories_, lstm_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor, Tensor>
lstm_lrua_scan(Tensor x, Tensor h, Tensor c, Tensor reads, Tensor memory, Tensor read_weights,
               Tensor usage, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, Tensor bias_hh,
               Tensor interface_weight, Tensor interface_bias, std::optional<Tensor> strengths,
               std::optional<Tensor> reset, bool tanh_keys, bool write_content,
               bool strength_per_step, double usage_decay, bool shared, double eps,
               double initial_value, int64_t snapshot_every, bool save_for_backward) {
  constexpr const char* op = "lstm_lrua_scan";
  const Given in{x,
                 h,
                 c,
                 reads,
                 memory,
                 read_weights,
                 weight_ih,
                 weight_hh,
                 interface_weight,
                 strengths,
                 reset,
                 tanh_keys,
                 write_content,
                 strength_per_step};
  const Sizes n = check_forward(op, in, usage, bias_ih, bias_hh, interface_bias);
  const Interface made = make_interface(in, n);
  const lrua::Given given = for_memory(in, made);
  const lrua::Shape s = lrua::make_shape(check_memory(op, in, n, given), in.acc());
  lrua::check_options(snapshot_every, 1);
  Outputs out = make_outputs(in, n, save_for_backward);
  lrua::Outputs memory_out = lrua::make_outputs(given, s, snapshot_every, save_for_backward);
  const lrua::Forward of_memory =
      lrua::make_forward(given, s, {usage_decay, eps, initial_value, shared, snapshot_every, 1},
                         usage, memory_out, save_for_backward);

  const Kernels& k = kernels(in.acc());
  const int64_t H = n.hidden, P = n.numbers();
  const int64_t of_inputs = panel_bytes(k, 4 * H, n.inputs), of_state = panel_bytes(k, 4 * H, H);
  const int64_t of_reads = panel_bytes(k, 4 * H, n.reads()), of_interface = panel_bytes(k, P, H);
  lrua::Workspace workspace({of_inputs, of_state, of_reads, of_interface});
  const auto optional = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->mutable_data_ptr() : nullptr;
  };
  const Forward p{n,
                  x.const_data_ptr(),
                  h.const_data_ptr(),
                  c.const_data_ptr(),
                  reads.const_data_ptr(),
                  weight_ih.const_data_ptr(),
                  weight_hh.const_data_ptr(),
                  bias_ih.const_data_ptr(),
                  bias_hh.const_data_ptr(),
                  interface_weight.const_data_ptr(),
                  interface_bias.const_data_ptr(),
                  data(strengths),
                  of_memory.in.reset,
                  workspace.take(of_inputs),
                  workspace.take(of_state),
                  workspace.take(of_reads),
                  workspace.take(of_interface),
                  out.hidden.mutable_data_ptr(),
                  memory_out.reads.const_data_ptr(),
                  out.c.mutable_data_ptr(),
                  out.gates.mutable_data_ptr(),
                  save_for_backward ? out.cells.mutable_data_ptr() : nullptr,
                  made.keys.mutable_data_ptr(),
                  made.gates.mutable_data_ptr(),
                  optional(made.strengths),
                  optional(made.contents)};
  if (n.steps == 0) {
    lrua::pass_through(memory_out, given, usage);
    torch::stable::copy_(out.c, c);
  } else {
    const lrua::Kernels& m = lrua::kernels(lrua::storage_of(memory));
    const int64_t bytes = m.forward_scratch_bytes(of_memory);
    parallel(3 * panels(4 * H, k.width) + panels(P, k.width),
             [&](int64_t i, int64_t end) { k.pack(p, i, end); });
    lrua::parallel_rows(n.steps * n.batch, [&](int64_t i, int64_t end) { k.project(p, i, end); });
    for_each_group(s, bytes, [&](int64_t first, int64_t end, const auto& each_block) {
      const Room room(k, n, end - first, bytes);
      k.begin(p, room.lstm(), first, end);
      for (int64_t b = first; b < end; ++b) m.forward_begin(of_memory, room.memory(b - first), b);
      for (int64_t t = 0; t < n.steps; ++t) {
        k.step(p, room.lstm(), t, first, end);
        for (int64_t b = first; b < end; ++b) {
          void* scratch = room.memory(b - first);
          each_block(
              [&](int64_t i, int64_t last) { m.forward_pass(of_memory, scratch, b, t, i, last); });
          m.forward_combine(of_memory, scratch, b, t);
          each_block([&](int64_t i, int64_t last) {
            m.forward_weights(of_memory, scratch, b, t, i, last);
          });
          m.forward_select(of_memory, scratch, b, t);
        }
      }
      for (int64_t b = first; b < end; ++b) m.forward_end(of_memory, room.memory(b - first), b);
      k.finish(p, room.lstm(), first, end);
    });
  }
  return all_outputs(in, out, made, memory_out, save_for_backward);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor>
lstm_lrua_scan_backward(std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_reads,
                        std::optional<Tensor> grad_c_out, std::optional<Tensor> grad_memory,
                        std::optional<Tensor> grad_read_weights, Tensor x, Tensor h, Tensor c,
                        Tensor reads, Tensor memory, Tensor read_weights, Tensor weight_ih,
                        Tensor weight_hh, Tensor interface_weight, std::optional<Tensor> strengths,
                        std::optional<Tensor> reset, Tensor hidden, Tensor all_reads,
                        Tensor memory_out, Tensor gates, Tensor cells, Tensor keys,
                        Tensor write_gates, Tensor step_strengths, Tensor contents,
                        Tensor weight_history, Tensor slot_history, Tensor erased_rows,
                        Tensor snapshots, bool tanh_keys, bool write_content,
                        bool strength_per_step, bool shared, double eps, double initial_value,
                        int64_t snapshot_every, bool need_x_grad, bool need_memory_grad) {
  constexpr const char* op = "lstm_lrua_scan_backward";
  const Given in{x,
                 h,
                 c,
                 reads,
                 memory,
                 read_weights,
                 weight_ih,
                 weight_hh,
                 interface_weight,
                 strengths,
                 reset,
                 tanh_keys,
                 write_content,
                 strength_per_step};
  const Saved saved{grad_hidden, grad_reads, grad_c_out, hidden, gates, cells};
  const Sizes n = check_backward(op, in, saved);
  const Interface made = saved_interface(in, n, keys, write_gates, step_strengths, contents);
  const lrua::Given given = for_memory(in, made);
  const lrua::Shape s = lrua::make_shape(check_memory(op, in, n, given), in.acc());
  const Tensor total_reads = new_tensor(h, {n.steps, n.batch, n.heads, n.width}, in.acc());
  const lrua::Saved of_steps{total_reads,    grad_memory,  grad_read_weights, all_reads, memory_out,
                             weight_history, slot_history, erased_rows,       snapshots};
  lrua::check_saved(op, given, s, of_steps, snapshot_every);
  const Gradients out = make_gradients(in, n, need_x_grad);
  lrua::Gradients memory_grads = lrua::make_gradients(given, s, need_memory_grad);
  const lrua::Backward of_memory = lrua::make_backward(
      given, s, {0, eps, initial_value, shared, snapshot_every, 1}, of_steps, memory_grads);

  const Kernels& k = kernels(in.acc());
  const int64_t I = n.inputs, H = n.hidden, P = n.numbers(), all = n.steps * n.batch;
  const int64_t of_state = panel_bytes(k, H, 4 * H), of_reads = panel_bytes(k, n.reads(), 4 * H);
  const int64_t of_interface = panel_bytes(k, H, P);
  const int64_t of_inputs = need_x_grad ? panel_bytes(k, I, 4 * H) : 0;
  const int64_t of_x = panel_bytes(k, I, all), of_hidden = panel_bytes(k, H, all);
  const int64_t of_previous = panel_bytes(k, n.reads(), all);
  const int64_t of_numbers = all * P * k.bytes, of_gates = all * 4 * H * k.bytes;
  lrua::Workspace workspace({of_state, of_reads, of_interface, of_inputs, of_x, of_hidden,
                             of_previous, of_hidden, of_numbers, of_gates});
  const Backward p{n,
                   data(grad_hidden),
                   data(grad_reads),
                   data(grad_c_out),
                   x.const_data_ptr(),
                   h.const_data_ptr(),
                   c.const_data_ptr(),
                   reads.const_data_ptr(),
                   weight_ih.const_data_ptr(),
                   weight_hh.const_data_ptr(),
                   interface_weight.const_data_ptr(),
                   of_memory.in.reset,
                   hidden.const_data_ptr(),
                   all_reads.const_data_ptr(),
                   gates.const_data_ptr(),
                   cells.const_data_ptr(),
                   keys.const_data_ptr(),
                   write_gates.const_data_ptr(),
                   data(made.strengths),
                   data(made.contents),
                   workspace.take(of_state),
                   workspace.take(of_reads),
                   workspace.take(of_interface),
                   workspace.take(of_inputs),
                   workspace.take(of_x),
                   workspace.take(of_hidden),
                   workspace.take(of_previous),
                   workspace.take(of_hidden),
                   total_reads.mutable_data_ptr(),
                   of_memory.grad_keys,
                   of_memory.grad_gates,
                   of_memory.grad_strengths,
                   of_memory.grad_contents,
                   workspace.take(of_numbers),
                   workspace.take(of_gates),
                   need_x_grad ? out.x.mutable_data_ptr() : nullptr,
                   out.h.mutable_data_ptr(),
                   out.c.mutable_data_ptr(),
                   out.reads.mutable_data_ptr(),
                   out.weight_ih.mutable_data_ptr(),
                   out.weight_hh.mutable_data_ptr(),
                   out.bias.mutable_data_ptr(),
                   out.interface_weight.mutable_data_ptr(),
                   out.interface_bias.mutable_data_ptr(),
                   strengths.has_value() ? out.strengths.mutable_data_ptr() : nullptr};
  parallel(3 * panels(H, k.width) + panels(n.reads(), k.width) +
               (need_x_grad ? 2 : 1) * panels(I, k.width),
           [&](int64_t i, int64_t end) { k.pack_backward(p, i, end); });
  parallel(all, [&](int64_t i, int64_t end) { k.pack_previous(p, i, end); });
  const lrua::Kernels& m = lrua::kernels(lrua::storage_of(memory));
  const int64_t bytes = m.backward_scratch_bytes(of_memory);
  if (n.steps == 0) lrua::pass_through(memory_grads, of_steps, need_memory_grad);
  for_each_group(s, bytes, [&](int64_t first, int64_t end, const auto& each_block) {
    const Room room(k, n, end - first, bytes);
    k.begin_backward(p, room.lstm(), first, end);
    for (int64_t b = first; n.steps > 0 && b < end; ++b)
      m.backward_begin(of_memory, room.memory(b - first), b);
    for (int64_t t = n.steps - 1; t >= 0; --t) {
      k.reads_gradient(p, room.lstm(), t, first, end);
      for (int64_t b = first; b < end; ++b) {
        void* scratch = room.memory(b - first);
        each_block(
            [&](int64_t i, int64_t last) { m.backward_pass(of_memory, scratch, b, t, i, last); });
        m.backward_combine(of_memory, scratch, b, t);
      }
      k.step_backward(p, room.lstm(), t, first, end);
    }
    for (int64_t b = first; n.steps > 0 && b < end; ++b)
      m.backward_end(of_memory, room.memory(b - first), b);
    k.end_backward(p, room.lstm(), first, end);
  });
  lrua::parallel_rows(4 * H, [&](int64_t i, int64_t end) { k.weight_gradients(p, i, end); });
  lrua::parallel_rows(P, [&](int64_t i, int64_t end) { k.interface_gradients(p, i, end); });
  if (need_x_grad)
    lrua::parallel_rows(all, [&](int64_t i, int64_t end) { k.input_gradients(p, i, end); });
  return all_gradients(out, memory_grads);
}

}  // namespace
}  // namespace mann_ext::lstm_lrua

STABLE_TORCH_LIBRARY_IMPL(mann_ext, CPU, m) {
  m.impl("lstm_lrua_scan", TORCH_BOX(&mann_ext::lstm_lrua::lstm_lrua_scan));
  m.impl("lstm_lrua_scan_backward", TORCH_BOX(&mann_ext::lstm_lrua::lstm_lrua_scan_backward));
}
