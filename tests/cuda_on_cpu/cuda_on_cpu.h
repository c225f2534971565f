// The part of CUDA that csrc/cuda uses, for g++: a block's threads run as fibers on one CPU thread.
//
// Put before the .cu file with -include. Blocks, warps and the lanes of a warp run in a shuffled
// order, one lane at a time from one barrier or warp function to the next, so what depends on an
// order differs from seed to seed. Shared memory is NaN when a block starts. Errors, which name the
// kernel: writes past the dynamic shared memory, a barrier or warp function that some of its
// threads do not reach, a shuffle from a lane that takes no part.
//
// Kernels and device functions with __shared__ variables belong in an anonymous namespace.
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define MANN_EXT_CUDA_ON_CPU 1

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("cuda_shared")))

// ---------------------------------------------------------------- vector types

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_ON_CPU_VECTORS(type, name, align1, align2)            \
  struct alignas(align1) name##2 { type x, y; };                   \
  struct alignas(align2) name##4 { type x, y, z, w; };             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
#undef CUDA_ON_CPU_VECTORS

// ---------------------------------------------------------------- threads

namespace cuda_on_cpu {

struct Block;

enum class State { ready, at_warp, at_block, at_group, exited };
enum class Collective { sync, index, up, down, exclusive_or, ballot, add, minimum, maximum };

struct Fiber {
  uint3 thread;
  int index;  // in the block
  Block* block;
  void* context;
  State state;
  Collective collective;
  unsigned mask;
  int operand, width;
  uint64_t value[2], result[2];
};

struct Block {
  uint3 index;
  unsigned rank;  // in its cluster or cooperative grid
  unsigned char* dynamic;
  int count;  // threads whose predicate was true at the last barrier
};

extern Fiber* current;
extern dim3 block_size, grid_size;
extern unsigned group_size;

[[noreturn]] void fail(const char* what);  // from inside a kernel
int block_barrier(bool predicate);
void group_barrier();
unsigned char* group_shared(void* address, unsigned rank);
void collect(Collective what, unsigned mask, int operand, int width);
// Copies that have arrived only after a wait for them; until then the target is NaN.
void async_copy(void* to, const void* from, size_t bytes);
void async_commit();
void async_wait(size_t groups_left);

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
  bool cooperative;
};
void run(const char* kernel, const Configuration& configuration, void (*body)(void*),
         void* closure);

template <class T>
T exchange(Collective what, unsigned mask, T value, int operand, int width = 32) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  std::memcpy(current->value, &value, sizeof(T));
  collect(what, mask, operand, width);
  std::memcpy(&value, current->result, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::current->thread)
#define blockIdx (::cuda_on_cpu::current->block->index)
#define blockDim (::cuda_on_cpu::block_size)
#define gridDim (::cuda_on_cpu::grid_size)
#define warpSize 32

inline void __syncthreads() { cuda_on_cpu::block_barrier(false); }
inline int __syncthreads_count(int p) { return cuda_on_cpu::block_barrier(p != 0); }
inline int __syncthreads_or(int p) { return cuda_on_cpu::block_barrier(p != 0) > 0; }
inline int __syncthreads_and(int p) { return cuda_on_cpu::block_barrier(p == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_cpu::collect(cuda_on_cpu::Collective::sync, mask, 0, 32);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Collective::index, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Collective::up, mask, value, int(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Collective::down, mask, value, int(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Collective::exclusive_or, mask, value, lanes, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Collective::ballot, mask, unsigned(predicate != 0), 0);
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p == 0) == 0; }
// The values are extended to 64 bits; a sum is taken modulo 2^32 afterwards.
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return T(cuda_on_cpu::exchange(cuda_on_cpu::Collective::add, mask, int64_t(value), 0));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return T(cuda_on_cpu::exchange(cuda_on_cpu::Collective::minimum, mask, int64_t(value), 0));
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return T(cuda_on_cpu::exchange(cuda_on_cpu::Collective::maximum, mask, int64_t(value), 0));
}

// ---------------------------------------------------------------- atomics, loads, arithmetic

// One lane runs at a time, so an ordinary read and write is atomic.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  if (value > old) *p = value;
  return old;
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  if (value < old) *p = value;
  return old;
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = value;
  return old;
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}

// Macros, for the C library has functions of some of these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __fdividef(a, b) ((a) / (b))
#define __frcp_rn(x) (1.0f / (x))
#define __fsqrt_rn(x) sqrtf(x)
#define rsqrtf(x) (1.0f / sqrtf(x))
#define rsqrt(x) (1.0 / sqrt(x))

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) || a != a ? T(b) : T(a);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) || a != a ? T(b) : T(a);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }

// ---------------------------------------------------------------- 16-bit storage

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  if (x != x) return {0x7fff};
  const unsigned bits = __float_as_uint(x);
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) { return float(__builtin_bit_cast(_Float16, x.bits)); }
inline __half __float2half(float x) { return {__builtin_bit_cast(uint16_t, _Float16(x))}; }

// ---------------------------------------------------------------- the host's side

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrL2CacheSize,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "failed" : "no error"; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads,
                                                          size_t shared_bytes) {
  const int by_shared = int(228 * 1024 / (shared_bytes + 1024));
  return *blocks = min(min(2048 / threads, by_shared), 32), cudaSuccess;
}
