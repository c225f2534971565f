// Every operator's schema, in one place. The kernels register themselves per device.
#include "ops.h"

STABLE_TORCH_LIBRARY(mann_ext, m) {
  m.def(
      "lrua_scan(Tensor memory, Tensor read_weights, Tensor usage, Tensor keys, Tensor gates, "
      "Tensor? strengths, Tensor? contents, Tensor? reset, float usage_decay, bool shared, "
      "float eps, float initial_value, int snapshot_every, int chunk, "
      "bool save_for_backward) -> "
      "(Tensor reads, Tensor memory_out, Tensor read_weights_out, Tensor usage_out, "
      "Tensor weight_history, Tensor slot_history, Tensor erased_rows, Tensor snapshots)");
  m.def(
      "lrua_scan_backward(Tensor grad_reads, Tensor? grad_memory, Tensor? grad_read_weights, "
      "Tensor memory, Tensor read_weights, Tensor keys, Tensor gates, Tensor? strengths, "
      "Tensor? contents, Tensor? reset, Tensor reads, Tensor memory_out, Tensor weight_history, "
      "Tensor slot_history, Tensor erased_rows, Tensor snapshots, bool shared, float eps, "
      "float initial_value, int snapshot_every, bool need_memory_grad) -> "
      "(Tensor grad_memory, Tensor grad_read_weights, Tensor grad_keys, Tensor grad_gates, "
      "Tensor grad_strengths, Tensor grad_contents)");
  m.def(
      "content_read(Tensor queries, Tensor keys, Tensor? values, Tensor? strengths, Tensor? mask, "
      "bool cosine, float eps) -> (Tensor reads, Tensor weights)");
  m.def(
      "content_read_backward(Tensor grad_reads, Tensor? grad_weights, Tensor queries, Tensor keys, "
      "Tensor? values, Tensor? strengths, Tensor reads, Tensor weights, bool cosine, float eps) -> "
      "(Tensor grad_queries, Tensor grad_keys, Tensor grad_values, Tensor grad_strengths)");
  m.def(
      "ntm_scan(Tensor memory, Tensor weights, Tensor keys, Tensor strengths, Tensor gates, "
      "Tensor shifts, Tensor sharpenings, Tensor erases, Tensor adds, Tensor? reset, float eps, "
      "float initial_value, int snapshot_every, bool save_for_backward) -> "
      "(Tensor reads, Tensor memory_out, Tensor weights_out, Tensor weight_history, "
      "Tensor snapshots)");
  m.def(
      "ntm_scan_backward(Tensor? grad_reads, Tensor? grad_memory, Tensor? grad_weights, "
      "Tensor memory, Tensor weights, Tensor keys, Tensor strengths, Tensor gates, Tensor shifts, "
      "Tensor sharpenings, Tensor erases, Tensor adds, Tensor? reset, Tensor weight_history, "
      "Tensor snapshots, float eps, float initial_value, int snapshot_every, "
      "bool need_memory_grad) -> "
      "(Tensor grad_memory, Tensor grad_weights, Tensor grad_keys, Tensor grad_strengths, "
      "Tensor grad_gates, Tensor grad_shifts, Tensor grad_sharpenings, Tensor grad_erases, "
      "Tensor grad_adds)");
  m.def(
      "lstm_scan(Tensor x, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, "
      "Tensor bias_ih, Tensor bias_hh, Tensor? reset, bool save_for_backward) -> "
      "(Tensor hidden, Tensor h_out, Tensor c_out, Tensor gates, Tensor cells)");
  m.def(
      "lstm_scan_backward(Tensor? grad_hidden, Tensor? grad_h_out, Tensor? grad_c_out, Tensor x, "
      "Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? reset, Tensor hidden, "
      "Tensor gates, Tensor cells, bool need_x_grad) -> "
      "(Tensor grad_x, Tensor grad_h, Tensor grad_c, Tensor grad_weight_ih, "
      "Tensor grad_weight_hh, Tensor grad_bias)");
  m.def("coordinate_lstm(Tensor gradients, Tensor weights, Tensor output) -> Tensor");
  m.def(
      "coordinate_lstm_backward(Tensor grad_out, Tensor gradients, Tensor weights, "
      "Tensor output) -> (Tensor grad_weights, Tensor grad_output)");
  m.def("relu_pool(Tensor a, Tensor? b, Tensor? c) -> (Tensor out, Tensor where)");
  m.def(
      "relu_pool_backward(Tensor grad, Tensor where, int height, int width, int parts) -> "
      "(Tensor grad_a, Tensor grad_b, Tensor grad_c)");
  m.def(
      "lstm_lrua_scan(Tensor x, Tensor h, Tensor c, Tensor reads, Tensor memory, "
      "Tensor read_weights, Tensor usage, Tensor weight_ih, Tensor weight_hh, Tensor bias_ih, "
      "Tensor bias_hh, Tensor interface_weight, Tensor interface_bias, Tensor? strengths, "
      "Tensor? reset, bool tanh_keys, bool write_content, bool strength_per_step, "
      "float usage_decay, bool shared, float eps, float initial_value, int snapshot_every, "
      "bool save_for_backward) -> "
      "(Tensor hidden, Tensor all_reads, Tensor c_out, Tensor memory_out, "
      "Tensor read_weights_out, Tensor usage_out, Tensor gates, Tensor cells, Tensor keys, "
      "Tensor write_gates, Tensor step_strengths, Tensor contents, Tensor weight_history, "
      "Tensor slot_history, Tensor erased_rows, Tensor snapshots)");
  m.def(
      "lstm_lrua_scan_backward(Tensor? grad_hidden, Tensor? grad_reads, Tensor? grad_c_out, "
      "Tensor? grad_memory, Tensor? grad_read_weights, Tensor x, Tensor h, Tensor c, "
      "Tensor reads, Tensor memory, Tensor read_weights, Tensor weight_ih, Tensor weight_hh, "
      "Tensor interface_weight, Tensor? strengths, Tensor? reset, Tensor hidden, "
      "Tensor all_reads, Tensor memory_out, Tensor gates, Tensor cells, Tensor keys, "
      "Tensor write_gates, Tensor step_strengths, Tensor contents, Tensor weight_history, "
      "Tensor slot_history, Tensor erased_rows, Tensor snapshots, bool tanh_keys, "
      "bool write_content, bool strength_per_step, bool shared, float eps, float initial_value, "
      "int snapshot_every, bool need_x_grad, bool need_memory_grad) -> "
      "(Tensor grad_x, Tensor grad_h, Tensor grad_c, Tensor grad_reads_in, Tensor grad_memory_in, "
      "Tensor grad_read_weights_in, Tensor grad_weight_ih, Tensor grad_weight_hh, "
      "Tensor grad_bias, Tensor grad_interface_weight, Tensor grad_interface_bias, "
      "Tensor grad_strengths)");
}
