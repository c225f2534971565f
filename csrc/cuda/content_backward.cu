// The gradient of content_read on the GPU.
//
// One kernel goes through the rows as the forward pass does, for four queries at a time: it writes
// the rows' gradients and adds up its slab's part of the queries'; another adds the slabs. Bytes a
// slot for every four queries: the key and the value, and their gradients (twice, if there are more
// queries to come).
#include <tuple>

#include "cuda/content.h"

namespace mann_ext::content {
namespace {

template <class A, class S>
struct ReadBackward {
  Read<A, S> forward;       // reads and weights are inputs here
  int64_t first_query;      // of the group
  const A* grad_reads;      // [B][Q][V]
  const A* grad_weights;    // [B][Q][N] or null
  double* weight_products;  // [B][Q][slabs], sums of grad_weights * weights, if these are given
  // Gradients of the rows: what groups before this one gave (null: none), and their sum with this
  // group's, which is rounded to the storage type (grad_keys) after the last group only.
  const A *keys_before, *values_before;
  A *keys_after, *values_after;
  S *grad_keys, *grad_values;
  A* slab_queries;    // [B][Q][slabs][K]
  A* slab_strengths;  // [B][Q][slabs]
  A* slab_own;        // [B][Q][slabs], the cosine's own term
  A* grad_query;      // [B][Q][K]
  A* grad_strengths;  // [B][Q] or null
};

// Sums of grad_weights * weights over a slab.
template <class A, class S>
__global__ __launch_bounds__(kThreads) void read_weight_products(const ReadBackward<A, S> p) {
  __shared__ double room[kWarp];
  const Split& split = p.forward.split;
  const int64_t slab = blockIdx.x % split.slabs, query = blockIdx.x / split.slabs;
  const int64_t end = min(p.forward.slots, (slab + 1) * split.slab_slots);
  double sum = 0;
  for (int64_t slot = slab * split.slab_slots + threadIdx.x; slot < end; slot += kThreads) {
    const int64_t i = query * p.forward.slots + slot;
    sum += static_cast<double>(p.grad_weights[i]) * p.forward.weights[i];
  }
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) p.weight_products[blockIdx.x] = sum;
}

// The gradient that reaches a query's weights on average: what softmax subtracts. In float64, for
// where one weight is nearly 1 the rest of its gradient is small.
template <class A, class S>
__device__ A expected_gradient_by_warp(const ReadBackward<A, S>& p, int64_t query) {
  const int width = p.forward.value_width;
  const int64_t slabs = p.forward.split.slabs;
  double sum = 0;
  for (int j = threadIdx.x % kWarp; j < width; j += kWarp)
    sum +=
        static_cast<double>(p.grad_reads[query * width + j]) * p.forward.reads[query * width + j];
  if (p.grad_weights != nullptr)
    for (int64_t s = threadIdx.x % kWarp; s < slabs; s += kWarp)
      sum += p.weight_products[query * slabs + s];
  return static_cast<A>(warp_sum(sum));
}

// Gradients of a slab's rows from one group of queries, and the slab's part of these queries' own.
template <class A, class S, int G, bool Vectors>
__global__ __launch_bounds__(kThreads, 2) void read_backward_pass(const ReadBackward<A, S> p) {
  __shared__ A room[G * kWarp * kColumns];
  __shared__ Queries<A, G> queries;
  __shared__ A warp_sums[2][G][kWarps];
  const Read<A, S>& f = p.forward;
  const Split& split = f.split;
  const Part part(split, 1);
  const int64_t first_query = part.b * f.queries + p.first_query;
  const int count = static_cast<int>(f.queries - p.first_query < G ? f.queries - p.first_query : G);
  const A* query = f.query + first_query * f.key_width;
  const A* grad_reads = p.grad_reads + first_query * f.value_width;
  const int warp = threadIdx.x / kWarp, lane_of_warp = threadIdx.x % kWarp;
  if (warp < G) {
    const int g = warp < count ? warp : 0;
    const A length = length_by_warp(query + g * f.key_width, f.key_width);
    const A expected = expected_gradient_by_warp(p, first_query + g);
    if (lane_of_warp == 0) {
      queries.length[warp] = length;
      queries.expected[warp] = expected;
      queries.strength[warp] = f.strengths ? f.strengths[first_query + g] : A(1);
    }
  }
  __syncthreads();

  A sums[G][kColumns] = {}, strength_sums[G] = {}, own_sums[G] = {};
  const Rows<Vectors, A, S> keys{f.keys, f.key_width, shared_memory<Vector<S>>()};
  const Rows<Vectors, A, S> values{f.values, f.value_width,
                                   keys.room + (f.values_given ? kRoom<S> : 0)};
  Lane<S> lane(split, part.chunk);
  Walk now(split, part, f.slots), ahead = now;
  const auto fetch = [&] {
    lane.chunk = ahead.chunk();
    if (ahead.present()) {
      keys.fetch(lane, ahead.row(), ahead.stage);
      if (f.values_given) values.fetch(lane, ahead.row(), ahead.stage);
    }
    async_commit();
    ahead.advance();
  };
  for (int i = 0; i < kAhead; ++i) fetch();
#pragma unroll 1
  for (; __any_sync(kAllLanes, now.present()); now.advance()) {
    A key[kColumns], dots[G] = {}, grad_dots[G] = {}, square[1] = {};
#pragma unroll 1
    for (;; now.advance()) {
      async_wait<kAhead - 1>();
      lane.chunk = now.chunk();
      values.load(lane, now.present(), now.row(), now.stage, key);
      add_dots<G, Vectors>(lane, key, grad_reads, f.value_width, count, grad_dots);
      if (f.values_given) keys.load(lane, now.present(), now.row(), now.stage, key);
      add_dots<G, Vectors>(lane, key, query, f.key_width, count, dots);
#pragma unroll
      for (const A number : key) square[0] += number * number;
      if (now.last()) break;
      fetch();
    }
    fetch();
    lane.chunk = part.chunk;
    sum_over_lanes(dots, 1, split.lanes);
    sum_over_lanes(grad_dots, 1, split.lanes);
    sum_over_lanes(square, 1, split.lanes);
    const bool present = now.present();
    const int64_t slot = now.slot, row = now.row();

    // dots becomes the gradient of the products q . k.
    A weights[G], self = 0;
    const A length = square_root(square[0]);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int64_t i = (first_query + g) * f.slots + slot;
      weights[g] = present && g < count ? f.weights[i] : A(0);
      A product_grad = 0;
      if (weights[g] != 0) {
        const A given = p.grad_weights != nullptr ? p.grad_weights[i] : A(0);
        const A score_grad = weights[g] * (grad_dots[g] + given - queries.expected[g]);
        product_grad = score_grad * queries.strength[g];
        if (f.cosine) {
          const A inverse = 1 / (queries.length[g] * length + f.eps);
          const A cosine = dots[g] * inverse;
          product_grad *= inverse;
          strength_sums[g] += score_grad * cosine;
          own_sums[g] += product_grad * cosine * length;
          if (length > 0) self -= product_grad * cosine * queries.length[g] / length;
        } else {
          strength_sums[g] += score_grad * dots[g];
        }
      }
      dots[g] = product_grad;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[g][j] += dots[g] * key[j];
    }

#pragma unroll
    for (A& number : key) number *= self;
    add_scaled<G, Vectors>(lane, dots, query, f.key_width, count, key);
    if (!f.values_given)
      add_scaled<G, Vectors>(lane, weights, grad_reads, f.value_width, count, key);
    const auto write = [&](int width, const A* before, A* after, S* last) {
#pragma unroll
      for (int run = 0; run < kRuns<S>; ++run) {
        const int column = present ? lane.column(run) : width;
        A* numbers = key + run * kRun<S>;
        if (before != nullptr) {
          A sum[kRun<S>];
          load_run<Vectors, kRun<S>>(before + row * width, column, width, sum);
#pragma unroll
          for (int i = 0; i < kRun<S>; ++i) numbers[i] += sum[i];
        }
        if (after != nullptr)
          store_run<Vectors, kRun<S>>(after + row * width, column, width, numbers);
        else
          store_run<Vectors, kRun<S>>(last + row * width, column, width, numbers);
      }
    };
    write(f.key_width, p.keys_before, p.keys_after, p.grad_keys);
    if (f.values_given) {
#pragma unroll
      for (A& number : key) number = 0;
      add_scaled<G, Vectors>(lane, weights, grad_reads, f.value_width, count, key);
      write(f.value_width, p.values_before, p.values_after, p.grad_values);
    }
  }

  lane.chunk = part.chunk;
  sum_over_lanes(strength_sums, split.lanes, kWarp);
  sum_over_lanes(own_sums, split.lanes, kWarp);
  if (lane_of_warp == 0)
#pragma unroll
    for (int g = 0; g < G; ++g) {
      warp_sums[0][g][warp] = strength_sums[g];
      warp_sums[1][g][warp] = own_sums[g];
    }
  sum_over_block<G>(lane, sums, room);
  write_sums<A, S>(split, part, room, first_query, count, f.key_width, p.slab_queries);
  if (part.chunk == 0 && threadIdx.x < 2 * G && static_cast<int>(threadIdx.x) % G < count) {
    const int g = threadIdx.x % G;
    A sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[threadIdx.x / G][g][w];
    (threadIdx.x < G ? p.slab_strengths : p.slab_own)[(first_query + g) * split.slabs + part.slab] =
        sum;
  }
}

// Adds the slabs of one query.
template <class A, class S>
__global__ __launch_bounds__(kThreads) void read_backward_finish(const ReadBackward<A, S> p) {
  __shared__ double room[kThreads];
  const Read<A, S>& f = p.forward;
  const int64_t slabs = f.split.slabs, query = blockIdx.x;
  double strength = 0, own = 0;
  for (int64_t s = threadIdx.x; s < slabs; s += kThreads) {
    strength += p.slab_strengths[query * slabs + s];
    own += p.slab_own[query * slabs + s];
  }
  strength = block_sum(strength, room);
  own = block_sum(own, room);
  if (threadIdx.x == 0 && p.grad_strengths != nullptr)
    p.grad_strengths[query] = static_cast<A>(strength);
  const A* vector = f.query + query * f.key_width;
  const A length = length_by_warp(vector, f.key_width);
  const double along = f.cosine && length > 0 ? own / length : 0;
  const int lane = threadIdx.x % kWarp;
  for (int64_t column = lane; column - lane < f.key_width; column += kWarp) {
    const double sum = sum_over_slabs(p.slab_queries + query * slabs * f.key_width, slabs,
                                      f.key_width, column, room, [](int64_t) { return A(1); });
    if (threadIdx.x < kWarp && column < f.key_width)
      p.grad_query[query * f.key_width + column] = static_cast<A>(sum - along * vector[column]);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> content_read_backward(
    Tensor grad_reads, std::optional<Tensor> grad_weights, Tensor queries, Tensor keys,
    std::optional<Tensor> values, std::optional<Tensor> strengths, Tensor reads, Tensor weights,
    bool cosine, double eps) {
  constexpr const char* op = "content_read_backward";
  const ContentSizes n = check_arguments(op, queries, keys, values, strengths, std::nullopt);
  const ScalarType dtype = keys.scalar_type();
  const ScalarType acc = accumulation_dtype(dtype);
  check_tensor(op, "grad_reads", grad_reads, {n.batch, n.queries, n.value_width}, acc);
  check_tensor(op, "grad_weights", grad_weights, {n.batch, n.queries, n.slots}, acc);
  check_tensor(op, "reads", reads, {n.batch, n.queries, n.value_width}, acc);
  check_tensor(op, "weights", weights, {n.batch, n.queries, n.slots}, acc);
  check_device(op, "grad_reads", grad_reads, keys);
  check_device(op, "grad_weights", grad_weights, keys);
  check_device(op, "reads", reads, keys);
  check_device(op, "weights", weights, keys);
  const OnDevice device(keys);
  const bool apart = values.has_value();
  Tensor grad_queries = new_tensor(keys, {n.batch, n.queries, n.key_width}, acc);
  Tensor grad_keys = new_tensor(keys, {n.batch, n.slots, n.key_width}, dtype);
  Tensor grad_values = apart ? new_tensor(keys, {n.batch, n.slots, n.value_width}, dtype)
                             : new_tensor(keys, {0}, dtype);
  Tensor grad_strengths = strengths.has_value() ? new_tensor(keys, {n.batch, n.queries}, acc)
                                                : new_tensor(keys, {0}, acc);
  if (n.batch == 0 || n.queries == 0) {
    torch::stable::zero_(grad_keys);
    torch::stable::zero_(grad_values);
    return {grad_queries, grad_keys, grad_values, grad_strengths};
  }
  for_storage(dtype, [&](auto a, auto s) {
    using A = decltype(a);
    using S = decltype(s);
    ReadBackward<A, S> p{};
    p.forward = make_read<A, S>(n, 1, queries, keys, values, strengths, std::nullopt, cosine, eps);
    Read<A, S>& f = p.forward;
    const int64_t total = n.batch * n.queries, slabs = f.split.slabs;
    f.reads = pointer<A>(reads);
    f.weights = pointer<A>(weights);
    p.grad_reads = pointer<const A>(grad_reads);
    p.grad_weights = static_cast<const A*>(data(grad_weights));
    p.grad_query = pointer<A>(grad_queries);
    p.grad_strengths = strengths.has_value() ? pointer<A>(grad_strengths) : nullptr;
    Tensor slab_queries = new_tensor(keys, {total, slabs, n.key_width}, acc);
    Tensor slab_numbers = new_tensor(keys, {2, total, slabs}, acc);
    Tensor weight_products = new_tensor(keys, {total, slabs}, ScalarType::Double);
    p.slab_queries = pointer<A>(slab_queries);
    p.slab_strengths = pointer<A>(slab_numbers);
    p.slab_own = p.slab_strengths + total * slabs;
    p.weight_products = pointer<double>(weight_products);
    // Sums over groups of queries are kept unrounded: in the outputs if these are of type A.
    const bool several = n.queries > kGroup<A>;
    A *key_sums = nullptr, *value_sums = nullptr;
    std::optional<Tensor> key_room, value_room;
    if constexpr (std::is_same_v<A, S>) {
      key_sums = pointer<A>(grad_keys);
      value_sums = pointer<A>(grad_values);
    } else if (several) {
      key_room = new_tensor(keys, {n.batch, n.slots, n.key_width}, acc);
      key_sums = pointer<A>(*key_room);
      if (apart) {
        value_room = new_tensor(keys, {n.batch, n.slots, n.value_width}, acc);
        value_sums = pointer<A>(*value_room);
      }
    }
    p.grad_keys = pointer<S>(grad_keys);
    p.grad_values = pointer<S>(grad_values);

    if (p.grad_weights != nullptr)
      launch<read_weight_products<A, S>>(
          {.grid = grid_size(total * slabs), .block = kThreads, .stream = device.stream()}, p);
    for (p.first_query = 0; p.first_query < n.queries; p.first_query += kGroup<A>) {
      const bool first = p.first_query == 0, last = p.first_query + kGroup<A> >= n.queries;
      p.keys_before = first ? nullptr : key_sums;
      p.values_before = first ? nullptr : value_sums;
      p.keys_after = last ? nullptr : key_sums;
      p.values_after = last ? nullptr : value_sums;
      for_pass<A>(n.queries == 1, vectors(f, p.grad_reads), [&](auto group, auto aligned_rows) {
        constexpr bool kVectors = decltype(aligned_rows)::value;
        launch<read_backward_pass<A, S, decltype(group)::value, kVectors>>(
            {.grid = grid_size(n.batch * f.split.chunks * slabs),
             .block = kThreads,
             .stream = device.stream(),
             .shared_bytes = pass_bytes(f, kVectors)},
            p);
      });
    }
    launch<read_backward_finish<A, S>>(
        {.grid = grid_size(total), .block = kThreads, .stream = device.stream()}, p);
  });
  return {grad_queries, grad_keys, grad_values, grad_strengths};
}

}  // namespace
}  // namespace mann_ext::content

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("content_read_backward", TORCH_BOX(&mann_ext::content::content_read_backward));
}
