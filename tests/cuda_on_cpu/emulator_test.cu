// Small kernels, right and wrong, that test_emulator.py runs.
#include "cuda/launch.h"

namespace mann_ext::test {
namespace {

using namespace mann_ext::cuda;

// Sums over warps, blocks and the grid's blocks, by every means there is.
__global__ __launch_bounds__(96) void sums(const float* in, int64_t n, float* out) {
  __shared__ float room[kWarp];
  float* tile = shared_memory<float>();
  const int64_t i = blockIdx.x * int64_t{96} + threadIdx.x;
  tile[threadIdx.x] = i < n ? __ldg(in + i) : 0.0f;
  __syncthreads();
  const float reversed = tile[95 - threadIdx.x];
  const float total = block_sum(reversed, room);
  if (threadIdx.x == 0) atomicAdd(out, total);
  const unsigned odd = __ballot_sync(kAllLanes, threadIdx.x & 1);
  const int above = __shfl_down_sync(kAllLanes, int(threadIdx.x), 1);
  const int largest = __reduce_max_sync(kAllLanes, int(threadIdx.x));
  const int count = __syncthreads_count(threadIdx.x < 10);
  if (threadIdx.x == 33)
    out[1] = (odd == 0xaaaaaaaau) + 2 * (above == 34) + 4 * (largest == 63) + 8 * (count == 10);
}

__global__ void cooperative(float* out) {
  __shared__ float mine;
  mine = float(blockIdx.x);  // every thread the same
  out[blockIdx.x] = mine;
  grid_barrier();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += out[b];
  grid_barrier();
  if (threadIdx.x == 0) out[blockIdx.x] = sum + 100 * mine;
}

__global__ void clusters(float* out) {
  float* mine = shared_memory<float>();
  const unsigned i = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  mine[i] = float(blockIdx.x * 16 + i);
  cluster_barrier();
  out[blockIdx.x * 16 + i] = *cluster_shared(mine + i, cluster_rank() ^ 1);
  cluster_barrier();
}

__global__ void missing_barrier(float* out) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = tile[(threadIdx.x + 40) % blockDim.x];
}
__global__ void missing_warp_barrier(float* out) {
  float* tile = shared_memory<float>();
  tile[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}
__global__ void uninitialised(float* out) {
  __shared__ float zeros[8];
  out[threadIdx.x] = shared_memory<float>()[threadIdx.x] + zeros[threadIdx.x % 8];
}
__global__ void out_of_bounds(float*) { shared_memory<float>()[threadIdx.x + 1] = 1.0f; }
__global__ void divergent_barrier(float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}
__global__ void divergent_shuffle(float* out) {
  if (threadIdx.x % 32 < 30) out[threadIdx.x] = warp_sum(1.0f);
}
__global__ void inactive_source(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}
__global__ void blocks_in_order(float* out) {
  if (threadIdx.x == 0) out[0] = float(blockIdx.x);  // the last block to run wins
}

Tensor run(int64_t which, Tensor in) {
  const OnDevice device(in);
  Tensor out = torch::stable::fill_(new_tensor(in, {64}, ScalarType::Float), 0.0);
  float* p = static_cast<float*>(out.mutable_data_ptr());
  const auto* x = static_cast<const float*>(in.const_data_ptr());
  const Launch two_warps{
      .grid = 1, .block = 64, .stream = device.stream(), .shared_bytes = 64 * sizeof(float)};
  const int64_t n = in.numel();
  switch (which) {
    case 0:
      launch<sums>({.grid = static_cast<unsigned>((n + 95) / 96),
                    .block = 96,
                    .stream = device.stream(),
                    .shared_bytes = 96 * sizeof(float)},
                   x, n, p);
      break;
    case 1: launch<cooperative>({.grid = 4, .block = 40, .cooperative = true}, p); break;
    case 2:
      launch<clusters>({.grid = 4, .block = {4, 2, 2}, .shared_bytes = 64, .cluster = 2}, p);
      break;
    case 3: launch<missing_barrier>(two_warps, p); break;
    case 4: launch<missing_warp_barrier>(two_warps, p); break;
    case 5: launch<uninitialised>(two_warps, p); break;
    case 6: launch<out_of_bounds>(two_warps, p); break;
    case 7: launch<divergent_barrier>(two_warps, p); break;
    case 8: launch<divergent_shuffle>(two_warps, p); break;
    case 9: launch<inactive_source>(two_warps, p); break;
    case 10: launch<blocks_in_order>({.grid = 8, .block = 32}, p); break;
    case 11: launch<uninitialised>({.grid = 1, .block = 1025}, p); break;
    case 12:
      launch<uninitialised>({.grid = 1, .block = 32, .shared_bytes = max_shared_bytes() + 1}, p);
      break;
  }
  return out;
}

}  // namespace
}  // namespace mann_ext::test

STABLE_TORCH_LIBRARY(mann_ext_emulator_test, m) { m.def("run(int which, Tensor input) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(mann_ext_emulator_test, MANN_EXT_CUDA_KEY, m) {
  m.impl("run", TORCH_BOX(&mann_ext::test::run));
}
