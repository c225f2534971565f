// Parallel loops on PyTorch's threads, with denormals flushed while a kernel runs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mann_ext {

// Denormal operands cost over a hundred cycles each on many CPUs, and softmax weights of a sharp
// read are full of them. The caller's mode is restored.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

inline int64_t max_threads() { return torch::stable::get_num_threads(); }

// body(begin, end) over [0, count), shared between the threads. What it throws is thrown here:
// PyTorch's loop would leave nothing of it but that it failed.
template <class Body>
void parallel(int64_t count, const Body& body) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace mann_ext
