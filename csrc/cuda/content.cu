// content_read on the GPU.
//
// A row of keys (and of values) is loaded once, into the registers of a few lanes of one warp, for
// four queries at a time; these lanes share its dot products with warp shuffles, and each keeps the
// sums over slots of its own columns. A second kernel adds the sums of the blocks, always in the
// same order. Sums are shifted by the largest score that their lanes have met, or by the strength,
// which bounds the scores of a cosine.
//
// Bytes a slot, beside the weights' 12 Q: the key and the value once for every four queries; in the
// backward pass their gradients as well.
#include <cmath>
#include <limits>
#include <tuple>

#include "cuda/content.h"
#include "cuda/softmax.h"

namespace mann_ext::content {
namespace {

constexpr int64_t kFinishSlots = 2048;  // slots whose weights one block of read_finish writes
// Up to this strength exp(score - strength) is far from the smallest number: no maximum is needed.
constexpr float kBoundedStrength = 16;

// Scores of a slab's slots, and its sums of exp(score) and exp(score) * value.
template <class A, class S, int G, bool Vectors>
__global__ __launch_bounds__(kThreads, 2) void read_pass(const Read<A, S> p) {
  __shared__ A room[G * kWarp * kColumns];
  __shared__ Queries<A, G> queries;
  __shared__ A warp_tops[G][kWarps], warp_totals[G][kWarps];
  const Split& split = p.split;
  const Part part(split, (p.queries + G - 1) / G);
  const int64_t q0 = part.group * G, first_query = part.b * p.queries + q0;
  const int count = static_cast<int>(p.queries - q0 < G ? p.queries - q0 : G);
  const A* query = p.query + first_query * p.key_width;
  const int warp = threadIdx.x / kWarp, lane_of_warp = threadIdx.x % kWarp;
  if (warp < G) {
    const int g = warp < count ? warp : 0;
    const A length = p.cosine ? length_by_warp(query + g * p.key_width, p.key_width) : A(0);
    if (lane_of_warp == 0) {
      queries.length[warp] = length;
      queries.strength[warp] = p.strengths ? p.strengths[first_query + g] : A(1);
    }
  }
  __syncthreads();

  A top[G], total[G] = {}, sums[G][kColumns] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const A bound = queries.strength[g] < 0 ? -queries.strength[g] : queries.strength[g];
    top[g] = p.cosine && bound <= A(kBoundedStrength) ? ceil(bound * A(1.5)) : kMinusInfinity<A>;
  }
  const Rows<Vectors, A, S> keys{p.keys, p.key_width, shared_memory<Vector<S>>()};
  const Rows<Vectors, A, S> values{p.values, p.value_width, keys.room + kRoom<S>};
  Lane<S> lane(split, part.chunk);
  Walk now(split, part, p.slots), ahead = now;
  const auto fetch = [&] {
    lane.chunk = ahead.chunk();
    if (ahead.present()) {
      keys.fetch(lane, ahead.row(), ahead.stage);
      if (p.values_given && ahead.last()) values.fetch(lane, ahead.row(), ahead.stage);
    }
    async_commit();
    ahead.advance();
  };
  for (int i = 0; i < kAhead; ++i) fetch();
#pragma unroll 1
  for (; __any_sync(kAllLanes, now.present()); now.advance()) {
    A numbers[kColumns], dots[G] = {}, square[1] = {};
#pragma unroll 1
    for (;; now.advance()) {
      async_wait<kAhead - 1>();
      lane.chunk = now.chunk();
      keys.load(lane, now.present(), now.row(), now.stage, numbers);
      add_dots<G, Vectors>(lane, numbers, query, p.key_width, count, dots);
#pragma unroll
      for (const A number : numbers) square[0] += number * number;
      if (now.last()) break;
      fetch();
    }
    sum_over_lanes(dots, 1, split.lanes);
    sum_over_lanes(square, 1, split.lanes);
    if (p.values_given) values.load(lane, now.present(), now.row(), now.stage, numbers);
    fetch();
    const bool present = now.present();
    const int64_t slot = now.slot;
    const A length = square_root(square[0]);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      A score = queries.strength[g] * dots[g];
      if (p.cosine) score /= queries.length[g] * length + p.eps;
      if (!present || g >= count ||
          (p.mask != nullptr &&
           !p.mask[(part.b * p.mask_queries + (p.mask_queries > 1 ? q0 + g : 0)) * p.slots + slot]))
        score = kMinusInfinity<A>;
      if (present && g < count && part.chunk == 0 && lane.index == g % split.lanes)
        p.weights[(first_query + g) * p.slots + slot] = score;
      const Exponential<A> e = exponential(score);
      if (e.power > top[g]) {
        const A scale = power_of_two(top[g] - e.power);
        top[g] = e.power;
        total[g] *= scale;
#pragma unroll
        for (A& sum : sums[g]) sum *= scale;
      }
      const A weight = e.shifted_by(top[g]);
      total[g] += weight;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[g][i] += weight * numbers[i];
    }
  }

  lane.chunk = part.chunk;

  // One shift for the whole block.
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const A warp_top = warp_max(top[g]);
    if (lane_of_warp == 0) warp_tops[g][warp] = warp_top;
  }
  __syncthreads();
  A block_top[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    block_top[g] = warp_tops[g][0];
    for (int w = 1; w < kWarps; ++w) block_top[g] = max(block_top[g], warp_tops[g][w]);
    const A scale = power_of_two(top[g] - block_top[g]);
    total[g] *= scale;
#pragma unroll
    for (A& sum : sums[g]) sum *= scale;
  }
  sum_over_lanes(total, split.lanes, kWarp);
  if (lane_of_warp == 0)
#pragma unroll
    for (int g = 0; g < G; ++g) warp_totals[g][warp] = total[g];
  sum_over_block<G>(lane, sums, room);
  write_sums<A, S>(split, part, room, first_query, count, p.value_width, p.slab_reads);
  if (part.chunk == 0 && threadIdx.x == 0)
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (g >= count) break;
      A sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += warp_totals[g][w];
      p.slab_tops[(first_query + g) * split.slabs + part.slab] = block_top[g];
      p.slab_totals[(first_query + g) * split.slabs + part.slab] = sum;
    }
}

// Adds the slabs of one query, and turns the scores of some of its slots into weights.
template <class A, class S>
__global__ __launch_bounds__(kThreads) void read_finish(const Read<A, S> p, int64_t blocks) {
  __shared__ double room[kThreads];
  const int64_t slabs = p.split.slabs;
  const int64_t query = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const A* tops = p.slab_tops + query * slabs;
  const A* totals = p.slab_totals + query * slabs;
  A top = kMinusInfinity<A>;
  for (int64_t s = threadIdx.x; s < slabs; s += kThreads) top = tops[s] > top ? tops[s] : top;
  top = static_cast<A>(block_max(static_cast<double>(top), room));
  double total = 0;
  for (int64_t s = threadIdx.x; s < slabs; s += kThreads)
    total += static_cast<double>(totals[s]) * power_of_two(tops[s] - top);
  total = block_sum(total, room);
  const double scale = total == 0 ? 0 : 1 / total;  // 0: every slot is masked

  const int lane = threadIdx.x % kWarp;
  for (int64_t column = block * kWarp + lane; column - lane < p.value_width;
       column += blocks * kWarp) {
    const A sum =
        sum_over_slabs(p.slab_reads + query * slabs * p.value_width, slabs, p.value_width, column,
                       room, [&](int64_t s) { return power_of_two(tops[s] - top); });
    if (threadIdx.x < kWarp && column < p.value_width)
      p.reads[query * p.value_width + column] = static_cast<A>(sum * scale);
  }
  A* weights = p.weights + query * p.slots;
  const int64_t end = min(p.slots, (block + 1) * kFinishSlots);
  for (int64_t slot = block * kFinishSlots + threadIdx.x; slot < end; slot += kThreads)
    weights[slot] = exponential(weights[slot]).shifted_by(top) * static_cast<A>(scale);
}

std::tuple<Tensor, Tensor> content_read(Tensor queries, Tensor keys, std::optional<Tensor> values,
                                        std::optional<Tensor> strengths, std::optional<Tensor> mask,
                                        bool cosine, double eps) {
  const ContentSizes n = check_arguments("content_read", queries, keys, values, strengths, mask);
  const OnDevice device(keys);
  const ScalarType acc = accumulation_dtype(keys.scalar_type());
  Tensor reads = new_tensor(keys, {n.batch, n.queries, n.value_width}, acc);
  Tensor weights = new_tensor(keys, {n.batch, n.queries, n.slots}, acc);
  if (n.batch == 0 || n.queries == 0) return {reads, weights};
  for_storage(keys.scalar_type(), [&](auto a, auto s) {
    using A = decltype(a);
    using S = decltype(s);
    const int64_t groups = (n.queries + kGroup<A> - 1) / kGroup<A>;
    Read<A, S> p = make_read<A, S>(n, groups, queries, keys, values, strengths, mask, cosine, eps);
    const int64_t total = n.batch * n.queries, slabs = p.split.slabs;
    Tensor tops = new_tensor(keys, {total, slabs}, acc);
    Tensor totals = new_tensor(keys, {total, slabs}, acc);
    Tensor slab_reads = new_tensor(keys, {total, slabs, n.value_width}, acc);
    p.reads = pointer<A>(reads);
    p.weights = pointer<A>(weights);
    p.slab_tops = pointer<A>(tops);
    p.slab_totals = pointer<A>(totals);
    p.slab_reads = pointer<A>(slab_reads);

    for_pass<A>(n.queries == 1, vectors(p), [&](auto group, auto aligned_rows) {
      constexpr bool kVectors = decltype(aligned_rows)::value;
      launch<read_pass<A, S, decltype(group)::value, kVectors>>(
          {.grid = grid_size(n.batch * groups * p.split.chunks * slabs),
           .block = kThreads,
           .stream = device.stream(),
           .shared_bytes = pass_bytes(p, kVectors)},
          p);
    });
    const int64_t blocks = (n.slots + kFinishSlots - 1) / kFinishSlots;
    launch<read_finish<A, S>>(
        {.grid = grid_size(total * blocks), .block = kThreads, .stream = device.stream()}, p,
        blocks);
  });
  return {reads, weights};
}

}  // namespace
}  // namespace mann_ext::content

STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m) {
  m.impl("content_read", TORCH_BOX(&mann_ext::content::content_read));
}
