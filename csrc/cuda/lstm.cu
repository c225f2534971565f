// lstm_scan on the GPU, in one of two ways; products over all steps are PyTorch's in both.
//
// Resident: all steps are one launch, and W_hh lies in registers. A cluster of 1, 2, 4 or 8 blocks
// takes a few elements of the batch through all steps; each block has up to 32 hidden units, and
// gives what it makes of a step to the shared memory of the others: h_t forward, the gradients of
// the gates backward. So there is one cluster barrier a step.
// 16 threads have a unit. Forward four of them share each gate's row of W_hh; backward all share
// the unit's column of it. Floor: 4 H^2 multiply-adds a step and element, and a step's chain of
// loads, sums, two activations and a barrier.
//
// Streaming: launches for each step (lstm_steps.h), where there are more units than that or no
// clusters, or MANN_EXT_CUDA_REGIME says so: see regime().
#include "lstm_tensors.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <type_traits>

#include "cuda/lstm_steps.h"

namespace mann_ext::cuda::lstm {
namespace {

namespace tensors = mann_ext::lstm;
namespace streaming = cuda::lstm_lrua;
using cuda::lrua::hyperbolic_tangent;
using cuda::lrua::load_run;
using cuda::lrua::sigmoid;
using streaming::copy_or_zero;
using streaming::pointer;
using tensors::Sizes;

constexpr int kUnits = 32;        // of a block, at most
constexpr int kLanes = 16;        // that share a unit
constexpr int kQuarter = 4;       // of them, that share a gate
constexpr int kRun = 4;           // numbers of a lane, one after the other
constexpr int kMaxElements = 32;  // of the batch, for a cluster: the bits of a number
constexpr int kThreads = kUnits * kLanes;
static_assert(kMaxCluster <= kLanes);

struct Layout {
  int steps, batch, hidden;
  int units, blocks, elements;  // units of a block; elements of the batch of a cluster
};

template <class A>
struct Forward {
  Layout layout;
  const A *h, *c, *weight_hh, *bias_ih, *bias_hh;
  const unsigned char* reset;  // [T][B] or null
  A *hidden, *h_out, *c_out;
  A* gates;  // [T][B][4H]: the share of x, then activated
  A* cells;  // [T][B][H] or null
};

template <class A>
struct Backward {
  Layout layout;
  const A *c, *state_columns;  // W_hh^T, [H][4H]
  const unsigned char* reset;
  const A *grad_hidden, *grad_h_out, *grad_c_out;  // null: zero
  const A *gates, *cells;
  A *grad_gates, *grad_h, *grad_c;
};

// What this thread works on.
struct Part {
  int rank, unit_here, unit, lane, gate, quarter;
  int b0, count;  // the first of the cluster's elements, and how many there are
  bool present;   // there is such a unit

  __device__ explicit Part(const Layout& n, bool clustered) {
    const auto blocks = static_cast<unsigned>(n.blocks);
    rank = clustered ? static_cast<int>(cluster_rank()) : 0;
    unit_here = static_cast<int>(threadIdx.x) / kLanes;
    unit = rank * n.units + unit_here;
    lane = static_cast<int>(threadIdx.x) % kLanes;
    gate = lane / kQuarter;
    quarter = lane % kQuarter;
    b0 = static_cast<int>(blockIdx.x / blocks) * n.elements;
    count = min(n.elements, n.batch - b0);
    present = unit_here < n.units && unit < n.hidden;
  }
};

// The products of this lane's numbers of a row with x, of which lane i has the runs i, i + lanes...
template <int Runs, class A>
__device__ __forceinline__ A dot(const A (&weights)[Runs][kRun], const A* x, int lane, int lanes) {
  A sums[kRun] = {};
#pragma unroll
  for (int j = 0; j < Runs; ++j) {
    A run[kRun];
    load_run<kRun>(x + (lane + lanes * j) * kRun, run);
#pragma unroll
    for (int i = 0; i < kRun; ++i) sums[i] += weights[j][i] * run[i];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same numbers of a row of `count`; zero beyond them.
template <int Runs, class A>
__device__ __forceinline__ void load_weights(A (&weights)[Runs][kRun], const A* row, int count,
                                             int lane, int lanes, bool present) {
#pragma unroll
  for (int j = 0; j < Runs; ++j)
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int k = (lane + lanes * j) * kRun + i;
      weights[j][i] = present && k < count ? row[k] : A(0);
    }
}

// Each of `Lanes` neighbouring lanes gets the sum over them.
template <int Lanes, class A>
__device__ __forceinline__ A sum_lanes(A x) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <class A>
__device__ __forceinline__ A of_lane(A x, int lane) {
  return __shfl_sync(kAllLanes, x, lane, kLanes);
}

// ---------------------------------------------------------------- forward

// Numbers of shared memory: h_{t-1} in half t % 2, [elements][padded], and c, [elements][units].
constexpr int forward_room(int elements, int padded) { return elements * (2 * padded + kUnits); }

template <class A, int Runs, bool Clustered>
__global__ __launch_bounds__(kThreads, 1) void forward_scan(const Forward<A> p) {
  if constexpr (Clustered && !kClusters) return;
  constexpr int kPadded = Runs * kQuarter * kRun;
  const Layout& n = p.layout;
  const Part part(n, Clustered);
  const int H = n.hidden, row = part.gate * H + part.unit;
  A* h = shared_memory<A>();
  A* c = h + 2 * n.elements * kPadded + part.unit_here;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * n.elements * kPadded;
       i += static_cast<int>(blockDim.x)) {
    const int element = i / kPadded, k = i % kPadded;
    h[i] = element < part.count && k < H ? p.h[int64_t{part.b0 + element} * H + k] : A(0);
  }
  if (part.present && part.lane == 0)
    for (int e = 0; e < part.count; ++e) c[e * kUnits] = p.c[int64_t{part.b0 + e} * H + part.unit];
  A weights[Runs][kRun];
  load_weights(weights, p.weight_hh + row * H, H, part.quarter, kQuarter, part.present);
  const A bias = part.present ? p.bias_ih[row] + p.bias_hh[row] : A(0);
  // What the next step needs from global memory is asked for one step early, and left as it comes:
  // to look at it would be to wait for it.
  A share = 0;
  unsigned char fresh = 0;
  const auto fetch = [&](int t, int e) {
    const int at = t * n.batch + part.b0 + e;
    share = part.present ? p.gates[int64_t{at} * (4 * H) + row] : A(0);
    if (p.reset != nullptr) fresh = p.reset[at];
  };
  fetch(0, 0);
  barrier<Clustered>();
#pragma unroll 1
  for (int t = 0; t < n.steps; ++t) {
    const bool more = t + 1 < n.steps;
    const A* before = h + (t & 1) * n.elements * kPadded;
    A* after = h + (~t & 1) * n.elements * kPadded;
#pragma unroll 1
    for (int e = 0; e < part.count; ++e) {
      const int at = t * n.batch + part.b0 + e;
      const int64_t of_unit = int64_t{at} * H + part.unit;
      const A of_x = share + bias;
      const bool starts = fresh != 0, last = e + 1 == part.count;
      if (!last || more) fetch(last ? t + 1 : t, last ? 0 : e + 1);
      const A product =
          sum_lanes<kQuarter>(dot(weights, before + e * kPadded, part.quarter, kQuarter));
      const A sum = of_x + (starts ? A(0) : product);
      const A gate = part.gate == 2 ? hyperbolic_tangent(sum) : sigmoid(sum);
      const A i = of_lane(gate, 0), f = of_lane(gate, kQuarter);
      const A g = of_lane(gate, 2 * kQuarter), o = of_lane(gate, 3 * kQuarter);
      A& kept = c[e * kUnits];
      const A cell = f * (starts ? A(0) : kept) + i * g;
      const A made = o * hyperbolic_tangent(cell);
      __syncwarp();  // all lanes have read c
      if (!part.present) continue;
      if (more && part.lane < n.blocks) {
        A* to = after + e * kPadded + part.unit;
        *(Clustered ? cluster_shared(to, static_cast<unsigned>(part.lane)) : to) = made;
      }
      if (p.cells != nullptr && part.quarter == 0) p.gates[int64_t{at} * (4 * H) + row] = gate;
      if (part.lane != 0) continue;
      kept = cell;
      p.hidden[of_unit] = made;
      if (p.cells != nullptr) p.cells[of_unit] = cell;
      if (more) continue;
      p.h_out[int64_t{part.b0 + e} * H + part.unit] = made;
      p.c_out[int64_t{part.b0 + e} * H + part.unit] = cell;
    }
    // After the last step no block writes to another, so any of them may end.
    if (more) barrier<Clustered>();
  }
}

// ---------------------------------------------------------------- backward

// Numbers of shared memory: the gradients of the gates in half t % 2, [elements][padded], and of h
// and c, [elements][units].
constexpr int backward_room(int elements, int padded) {
  return elements * (2 * padded + 2 * kUnits);
}

template <class A, int Runs, bool Clustered>
__global__ __launch_bounds__(kThreads, 1) void backward_scan(const Backward<A> p) {
  if constexpr (Clustered && !kClusters) return;
  constexpr int kPadded = Runs * kLanes * kRun;
  const Layout& n = p.layout;
  const Part part(n, Clustered);
  const int H = n.hidden, row = part.gate * H + part.unit;
  A* grads = shared_memory<A>();
  A* grad_h = grads + 2 * n.elements * kPadded + part.unit_here;
  A* grad_c = grad_h + n.elements * kUnits;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * n.elements * kPadded;
       i += static_cast<int>(blockDim.x))
    grads[i] = 0;
  if (part.present && part.lane == 0)
    for (int e = 0; e < part.count; ++e) {
      const int64_t at = int64_t{part.b0 + e} * H + part.unit;
      grad_h[e * kUnits] = p.grad_h_out == nullptr ? A(0) : p.grad_h_out[at];
      grad_c[e * kUnits] = p.grad_c_out == nullptr ? A(0) : p.grad_c_out[at];
    }
  A weights[Runs][kRun];
  load_weights(weights, p.state_columns + part.unit * 4 * H, 4 * H, part.lane, kLanes,
               part.present);
  // What a step needs from global memory, one number for each lane: the gates, c_t, c_{t-1} and the
  // gradient of h_t; and, for all, whether the state before was zeroed.
  enum { kCell = 4, kBefore, kGradient, kNumbers };
  const A* from = part.lane < kCell        ? p.gates + part.lane * H
                  : part.lane == kGradient ? p.grad_hidden
                                           : p.cells;
  const int stride = part.lane < kCell ? 4 * H : H;
  unsigned char ended = 0;
  const auto fetch = [&](int t, int e) {
    const int at = t * n.batch + part.b0 + e;
    if (p.reset != nullptr) ended = p.reset[at];
    const bool before = part.lane == kBefore;
    const A* numbers = before && t == 0 ? p.c : from;
    const int row_there = before && t > 0 ? at - n.batch : at;
    const bool wanted = part.present && part.lane < kNumbers && numbers != nullptr;
    return wanted ? numbers[int64_t{row_there} * stride + part.unit] : A(0);
  };
  A next = fetch(n.steps - 1, 0);
  barrier<Clustered>();
#pragma unroll 1
  for (int t = n.steps - 1; t >= 0; --t) {
    A* of_step = grads + (t & 1) * n.elements * kPadded;
    unsigned fresh = 0;  // bit e: the state before the step of element e was zeroed
#pragma unroll 1
    for (int e = 0; e < part.count; ++e) {
      const A given = next;
      const bool starts = ended != 0, last = e + 1 == part.count;
      if (!last || t > 0) next = fetch(last ? t - 1 : t, last ? 0 : e + 1);
      const A i = of_lane(given, 0), f = of_lane(given, 1), g = of_lane(given, 2);
      const A o = of_lane(given, 3), cell = of_lane(given, kCell);
      const A kept = of_lane(given, kBefore), before = starts ? A(0) : kept;
      const A outside = of_lane(given, kGradient);
      if (starts) fresh |= 1u << e;
      const A dh = grad_h[e * kUnits] + outside, squashed = hyperbolic_tangent(cell);
      const A dc = grad_c[e * kUnits] + dh * o * (A(1) - squashed * squashed);
      const A made = part.gate == 0   ? dc * g * (i * (A(1) - i))
                     : part.gate == 1 ? dc * before * (f * (A(1) - f))
                     : part.gate == 2 ? dc * i * (A(1) - g * g)
                                      : dh * squashed * (o * (A(1) - o));
      __syncwarp();  // all lanes have read the gradient of c
      if (!part.present) continue;
      A* to = of_step + e * kPadded + row;
#pragma unroll
      for (int i = 0; i < kMaxCluster / kQuarter; ++i)
        if (const int block = part.quarter + i * kQuarter; block < n.blocks)
          *(Clustered ? cluster_shared(to, static_cast<unsigned>(block)) : to) = made;
      if (part.quarter == 0)
        p.grad_gates[int64_t{t * n.batch + part.b0 + e} * (4 * H) + row] = made;
      if (part.lane == 0) grad_c[e * kUnits] = starts ? A(0) : dc * f;
    }
    barrier<Clustered>();
#pragma unroll 1
    for (int e = 0; e < part.count; ++e) {
      const A product = sum_lanes<kLanes>(dot(weights, of_step + e * kPadded, part.lane, kLanes));
      if (part.present && part.lane == 0) grad_h[e * kUnits] = fresh >> e & 1 ? A(0) : product;
    }
    __syncwarp();
  }
  if (!part.present || part.lane != 0) return;
  for (int e = 0; e < part.count; ++e) {
    p.grad_h[int64_t{part.b0 + e} * H + part.unit] = grad_h[e * kUnits];
    p.grad_c[int64_t{part.b0 + e} * H + part.unit] = grad_c[e * kUnits];
  }
}

// ---------------------------------------------------------------- host

template <class A>
constexpr int kMaxHidden = sizeof(A) == 4 ? 256 : 128;  // whose weights fit in registers

// Blocks of a cluster, or 0: streaming.
template <class A>
int resident_blocks(int64_t hidden) {
  const std::string_view chosen = regime();
  if (chosen == "streaming" || hidden > kMaxHidden<A>) return 0;
  int blocks = chosen == "cluster" ? kMaxCluster : 1;
  while (blocks * kUnits < hidden) blocks *= 2;
  if (blocks > 1 && (chosen == "block" || !has_clusters<forward_scan<A, 4, true>>())) return 0;
  return blocks;
}

// Calls f(runs, clustered) with the runs that a lane has of a row, as types.
template <class A, class F>
void for_runs(int64_t hidden, int blocks, F&& f) {
  const auto runs = [&]<int Runs>() {
    return f(std::integral_constant<int, Runs>{}, std::true_type{});
  };
  if (blocks == 1) return f(std::integral_constant<int, 2>{}, std::false_type{});
  if (hidden <= 64) return runs.template operator()<4>();
  if (hidden <= 128) return runs.template operator()<8>();
  if constexpr (kMaxHidden<A> > 128) {
    if (hidden <= 208) return runs.template operator()<13>();
    return runs.template operator()<16>();
  }
}

// Launches Kernel(p); `room` numbers of shared memory for each element.
template <auto Kernel, class A, class Arguments>
void launch_resident(const OnDevice& device, const Sizes& n, int blocks, int room, Arguments& p) {
  require(n.steps * n.batch <= std::numeric_limits<int32_t>::max(),
          "lstm_scan: T B must be less than 2^31");
  const int64_t at_once = std::max(1, multiprocessors() / blocks);
  const auto fitting = static_cast<int64_t>(max_shared_bytes() / (room * sizeof(A)));
  const int64_t elements =
      std::min({(n.batch + at_once - 1) / at_once, fitting, int64_t{kMaxElements}});
  const auto hidden = static_cast<int>(n.hidden), units = (hidden + blocks - 1) / blocks;
  p.layout = {static_cast<int>(n.steps), static_cast<int>(n.batch), hidden, units, blocks,
              static_cast<int>(elements)};
  launch<Kernel>(
      {.grid = lrua::grid_size((n.batch + elements - 1) / elements * blocks),
       .block = static_cast<unsigned>((units + 1) / 2 * 2 * kLanes),
       .stream = device.stream(),
       .shared_bytes = static_cast<size_t>(elements) * static_cast<size_t>(room) * sizeof(A),
       .cluster = static_cast<unsigned>(blocks)},
      p);
}

// Of an LSTM that reads no memory.
streaming::Sizes without_reads(const Sizes& n) {
  return {n.steps, n.batch, n.inputs, n.hidden, 0, 0, false, false, false};
}

template <class F>
void for_dtype(ScalarType dtype, F&& f) {
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_scan(Tensor x, Tensor h, Tensor c,
                                                             Tensor weight_ih, Tensor weight_hh,
                                                             Tensor bias_ih, Tensor bias_hh,
                                                             std::optional<Tensor> reset,
                                                             bool save_for_backward) {
  const tensors::Given in{x, h, c, weight_ih, weight_hh, reset};
  const Sizes n = check_forward("lstm_scan", in, bias_ih, bias_hh);
  const OnDevice device(x);
  tensors::Outputs out = make_outputs(in, n, save_for_backward);
  const Tensor rows = streaming::rows_of(x, n.steps * n.batch, n.inputs);
  const Tensor gates =
      torch::stable::view(torch::stable::matmul(rows, streaming::transposed(weight_ih)),
                          {n.steps, n.batch, 4 * n.hidden});
  if (n.steps == 0) {
    torch::stable::copy_(out.h, h);
    torch::stable::copy_(out.c, c);
  } else if (n.batch > 0) {
    for_dtype(in.dtype(), [&](auto number) {
      using A = decltype(number);
      A* cells = save_for_backward ? pointer<A>(out.cells) : nullptr;
      const auto* ended = static_cast<const unsigned char*>(data(reset));
      if (const int blocks = resident_blocks<A>(n.hidden); blocks > 0) {
        Forward<A> p{{},
                     pointer<A>(h),
                     pointer<A>(c),
                     pointer<A>(weight_hh),
                     pointer<A>(bias_ih),
                     pointer<A>(bias_hh),
                     ended,
                     pointer<A>(out.hidden),
                     pointer<A>(out.h),
                     pointer<A>(out.c),
                     pointer<A>(gates),
                     cells};
        for_runs<A>(n.hidden, blocks, [&](auto runs, auto clustered) {
          launch_resident<forward_scan<A, runs(), clustered()>, A>(
              device, n, blocks, forward_room(1, runs() * kQuarter * kRun), p);
        });
        return;
      }
      torch::stable::copy_(out.c, c);
      streaming::Forward<A> p{};
      p.sizes = without_reads(n);
      p.h = pointer<A>(h);
      p.weight_hh = pointer<A>(weight_hh);
      p.bias_ih = pointer<A>(bias_ih);
      p.bias_hh = pointer<A>(bias_hh);
      p.reset = static_cast<const bool*>(data(reset));
      p.hidden = pointer<A>(out.hidden);
      p.c_now = pointer<A>(out.c);
      p.gates = pointer<A>(gates);
      p.cells = cells;
      for (int64_t t = 0; t < n.steps; ++t)
        streaming::launch_products<streaming::lstm_step<A>>(device, streaming::kOutputs * n.hidden,
                                                            p, t);
      const Tensor last = torch::stable::narrow(out.hidden, 0, n.steps - 1, 1);
      torch::stable::copy_(out.h, torch::stable::view(last, {n.batch, n.hidden}));
    });
  }
  return {out.hidden, out.h, out.c, save_for_backward ? gates : new_tensor(x, {0}, in.dtype()),
          out.cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_scan_backward(
    std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_h_out,
    std::optional<Tensor> grad_c_out, Tensor x, Tensor h, Tensor c, Tensor weight_ih,
    Tensor weight_hh, std::optional<Tensor> reset, Tensor hidden, Tensor gates, Tensor cells,
    bool need_x_grad) {
  const tensors::Given in{x, h, c, weight_ih, weight_hh, reset};
  const Sizes n = check_backward("lstm_scan_backward", in,
                                 {grad_hidden, grad_h_out, grad_c_out, hidden, gates, cells});
  const OnDevice device(x);
  const Tensor grad_h = new_tensor(x, {n.batch, n.hidden}, in.dtype());
  const Tensor grad_c = new_tensor(x, {n.batch, n.hidden}, in.dtype());
  const int64_t all = n.steps * n.batch;
  const Tensor grad_gates = new_tensor(x, {all, 4 * n.hidden}, in.dtype());
  const Tensor state = new_tensor(x, {all, n.hidden}, in.dtype());
  if (n.steps == 0) {
    copy_or_zero(grad_h, grad_h_out);
    copy_or_zero(grad_c, grad_c_out);
  } else if (n.batch > 0) {
    const Tensor state_columns = torch::stable::contiguous(streaming::transposed(weight_hh));
    for_dtype(in.dtype(), [&](auto number) {
      using A = decltype(number);
      const auto* ended = static_cast<const unsigned char*>(data(reset));
      if (const int blocks = resident_blocks<A>(n.hidden); blocks > 0) {
        Backward<A> p{{},
                      pointer<A>(c),
                      pointer<A>(state_columns),
                      ended,
                      pointer<A>(grad_hidden),
                      pointer<A>(grad_h_out),
                      pointer<A>(grad_c_out),
                      pointer<A>(gates),
                      pointer<A>(cells),
                      pointer<A>(grad_gates),
                      pointer<A>(grad_h),
                      pointer<A>(grad_c)};
        for_runs<A>(n.hidden, blocks, [&](auto runs, auto clustered) {
          launch_resident<backward_scan<A, runs(), clustered()>, A>(
              device, n, blocks, backward_room(1, runs() * kLanes * kRun), p);
        });
      } else {
        copy_or_zero(grad_h, grad_h_out);
        copy_or_zero(grad_c, grad_c_out);
        streaming::Backward<A> p{};
        p.sizes = without_reads(n);
        p.c = pointer<A>(c);
        p.state_columns = pointer<A>(state_columns);
        p.reset = static_cast<const bool*>(data(reset));
        p.grad_hidden = pointer<A>(grad_hidden);
        p.gates = pointer<A>(gates);
        p.cells = pointer<A>(cells);
        p.grad_gates = pointer<A>(grad_gates);
        p.grad_h = pointer<A>(grad_h);
        p.grad_c = pointer<A>(grad_c);
        for (int64_t t = n.steps - 1; t >= 0; --t) {
          streaming::launch_products<streaming::lstm_step_backward<A>>(device, n.hidden, p, t);
          streaming::launch_products<streaming::state_backward<A>>(device, n.hidden, p, t);
        }
      }
      launch<streaming::gather_state<A>>(
          {.grid = lrua::grid_size(all), .block = streaming::kThreads, .stream = device.stream()},
          without_reads(n), pointer<const A>(h), static_cast<const A*>(nullptr),
          pointer<const A>(hidden), static_cast<const A*>(nullptr),
          static_cast<const bool*>(data(reset)), pointer<A>(state));
    });
  }
  // The weights' gradients: one product for all steps.
  const Tensor of_gates = streaming::transposed(grad_gates);
  const Tensor grad_x = need_x_grad
                            ? torch::stable::view(torch::stable::matmul(grad_gates, weight_ih),
                                                  {n.steps, n.batch, n.inputs})
                            : new_tensor(x, {0}, in.dtype());
  return {grad_x,
          grad_h,
          grad_c,
          torch::stable::matmul(of_gates, streaming::rows_of(x, all, n.inputs)),
          torch::stable::matmul(of_gates, state),
          streaming::column_sums(grad_gates)};
}

}  // namespace
}  // namespace mann_ext::cuda::lstm

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("lstm_scan", TORCH_BOX(&mann_ext::cuda::lstm::lstm_scan));
  m.impl("lstm_scan_backward", TORCH_BOX(&mann_ext::cuda::lstm::lstm_scan_backward));
}
