// What all CUDA kernels share: launching, streams, and small device functions.
//
// nvcc and g++ (with tests/cuda_on_cpu/cuda_on_cpu.h, which runs the threads on the CPU) both
// compile the .cu files, so these write launch<kernel>(...) instead of kernel<<<...>>>(...), and
// shared_memory<T>() instead of an extern __shared__ array.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "ops.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Weak: a torch without CUDA does not have it, and must still be able to load the library.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// Operators register themselves with STABLE_TORCH_LIBRARY_IMPL(mann_ext, MANN_EXT_CUDA_KEY, m).
#define MANN_EXT_CUDA_KEY CUDA
#else
#define MANN_EXT_CUDA_KEY CPU
#endif

namespace mann_ext::cuda {

// ---------------------------------------------------------------- host

// Makes a tensor's device the current one as long as it lives.
class OnDevice {
 public:
#if defined(__CUDACC__)
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#else
  explicit OnDevice(const Tensor&) {}
#endif
  // PyTorch's current stream.
  cudaStream_t stream() const { return stream_; }

 private:
#if defined(__CUDACC__)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

inline void check(cudaError_t status, std::string_view what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error("mann_ext: " + std::string(what) + ": " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline size_t max_shared_bytes() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// How kernels that have several ways to run choose: empty, by size; streaming, nothing stays on a
// multiprocessor from step to step; block, only what one of them holds; cluster, whatever is held
// is shared out between kMaxCluster. Read at each call.
inline std::string_view regime() {
  const char* value = std::getenv("MANN_EXT_CUDA_REGIME");
  return value == nullptr ? "" : value;
}
constexpr int kMaxCluster = 8;  // blocks, that every device with clusters has

struct Launch {
  dim3 grid, block;
  cudaStream_t stream = nullptr;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks a cluster, along x; more than 1 needs sm_90
  bool cooperative = false;  // all blocks run at once, so that grid_barrier() can be used
};

template <auto Kernel>
std::string kernel_name() {
  const std::string_view text = __PRETTY_FUNCTION__;  // "... [with auto Kernel = NAME; ...]"
  const size_t begin = text.find("Kernel = ");
  if (begin == text.npos) return std::string(text);
  return std::string(text.substr(begin + 9, text.find_first_of(";]", begin) - begin - 9));
}

namespace detail {

// More dynamic shared memory than every kernel may have must be asked for.
template <auto Kernel>
void allow_shared_bytes(size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t status = cudaFuncSetAttribute(
      Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess)  // no name is formed for a launch that succeeds
    check(status,
          kernel_name<Kernel>() + " asks for " + std::to_string(bytes) + " bytes of shared memory");
}

}  // namespace detail

// Starts Kernel(args...); returns before it has run. Raises std::runtime_error with its name.
template <auto Kernel, class... Args>
void launch(const Launch& how, Args&&... args) {
#if defined(__CUDACC__)
  detail::allow_shared_bytes<Kernel>(how.shared_bytes);
  if (how.cluster > 8)
    check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          kernel_name<Kernel>());
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {how.cluster, 1, 1};
  }
  if (how.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  const cudaError_t status = cudaLaunchKernelEx(&config, Kernel, std::forward<Args>(args)...);
  if (status != cudaSuccess) check(status, "launch of " + kernel_name<Kernel>());
#else
  auto body = [&] { Kernel(args...); };
  cuda_on_cpu::run(
      kernel_name<Kernel>().c_str(),
      {how.grid, how.block, how.shared_bytes, how.cluster, how.cooperative},
      [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body);
#endif
}

// Whether Kernel can be launched in clusters: the device has them, and what it runs was compiled
// for them, not made from the PTX of an older architecture.
template <auto Kernel>
bool has_clusters() {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, Kernel), kernel_name<Kernel>());
  return attributes.ptxVersion >= 90;
#else
  return true;
#endif
}

// Blocks of Kernel that one multiprocessor holds at a time.
template <auto Kernel>
int blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  detail::allow_shared_bytes<Kernel>(shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, Kernel, threads, shared_bytes),
        kernel_name<Kernel>());
  return blocks;
}

// Calls f(accumulation number, storage number) with the types that a memory of this dtype has.
template <class F>
decltype(auto) for_storage(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(float{}, __nv_bfloat16{});
    case ScalarType::Half: return f(float{}, __half{});
    default: throw std::invalid_argument("memory must be float32, float64, bfloat16 or float16");
  }
}

// ---------------------------------------------------------------- device

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory, which the launch gave its size.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char mann_ext_shared_bytes[];
  return reinterpret_cast<T*>(mann_ext_shared_bytes);
#else
  return reinterpret_cast<T*>(cuda_on_cpu::current->block->dynamic);
#endif
}

template <class A>
__device__ __forceinline__ A to_acc(A x) {
  return x;
}
template <class A>
__device__ __forceinline__ A to_acc(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <class A>
__device__ __forceinline__ A to_acc(__half x) {
  return __half2float(x);
}

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half(x); }

// Numbers of type S in the 16 bytes that one instruction loads.
template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

template <class S>
struct alignas(16) Vector {
  S x[kVector<S>];
};

// 16 bytes from an address that is a multiple of 16.
template <class A, class S>
__device__ __forceinline__ void load_vector(const S* p, A (&to)[kVector<S>]) {
  const Vector<S> v = *reinterpret_cast<const Vector<S>*>(p);
#pragma unroll
  for (int i = 0; i < kVector<S>; ++i) to[i] = to_acc<A>(v.x[i]);
}
template <class A, class S>
__device__ __forceinline__ void store_vector(S* p, const A (&from)[kVector<S>]) {
  Vector<S> v;
#pragma unroll
  for (int i = 0; i < kVector<S>; ++i) store(&v.x[i], from[i]);
  *reinterpret_cast<Vector<S>*>(p) = v;
}

// Starts to copy 16 bytes from global to shared memory, without a register on the way. They have
// arrived, for this thread, after an async_wait that leaves open no group that they are in.
__device__ __forceinline__ void async_copy16(void* to, const void* from) {
#if !defined(__CUDACC__)
  cuda_on_cpu::async_copy(to, from, 16);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  *static_cast<int4*>(to) = *static_cast<const int4*>(from);
#endif
}
// Ends a group of copies.
__device__ __forceinline__ void async_commit() {
#if !defined(__CUDACC__)
  cuda_on_cpu::async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most this many groups are still on their way.
template <int GroupsLeft>
__device__ __forceinline__ void async_wait() {
#if !defined(__CUDACC__)
  cuda_on_cpu::async_wait(GroupsLeft);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#endif
}

// Each lane gets the sum over the warp; a + b == b + a, so all get the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T y = __shfl_xor_sync(kAllLanes, x, lanes);
    x = y > x ? y : x;
  }
  return x;
}

// Each thread gets the sum over the block, whose threads are whole warps along x; `room` holds 32.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* room) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = warp_sum(x);
  __syncthreads();  // `room` may still be read from the call before
  if (lane == 0) room[warp] = x;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / kWarp ? room[lane] : T(0));
}

template <class T>
__device__ __forceinline__ T block_max(T x, T* room) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = warp_max(x);
  __syncthreads();
  if (lane == 0) room[warp] = x;
  __syncthreads();
  return warp_max(room[lane < static_cast<int>(blockDim.x) / kWarp ? lane : 0]);
}

// Waits for all threads of all blocks of a cooperative launch, and makes their writes visible.
__device__ __forceinline__ void grid_barrier() {
#if defined(__CUDACC__)
  cooperative_groups::this_grid().sync();
#else
  cuda_on_cpu::group_barrier();
#endif
}

// Waits for all threads of the cluster, and makes their writes to shared memory visible.
__device__ __forceinline__ void cluster_barrier() {
#if !defined(__CUDACC__)
  cuda_on_cpu::group_barrier();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// In the machine code of older architectures the kernels of clusters are empty.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif
// Waits for all threads that work together: the cluster's, or the block's.
template <bool Clustered>
__device__ __forceinline__ void barrier() {
  if constexpr (Clustered)
    cluster_barrier();
  else
    __syncthreads();
}
__device__ __forceinline__ unsigned cluster_rank() {
#if !defined(__CUDACC__)
  return cuda_on_cpu::current->block->rank;
#elif __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// Where block `rank` of the cluster has what is at p in this block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* p, unsigned rank) {
#if !defined(__CUDACC__)
  return reinterpret_cast<T*>(cuda_on_cpu::group_shared(p, rank));
#elif __CUDA_ARCH__ >= 900
  T* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(p), "r"(rank));
  return other;
#else
  return p;
#endif
}

}  // namespace mann_ext::cuda
