// What the CPU drivers of all operator families share: scratch memory, storage types, threading.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>

#include "blocks.h"
#include "cpu/lrua.h"
#include "cpu/threads.h"

namespace mann_ext::lrua {

// Below this many numbers a batch element is not worth splitting between threads.
constexpr int64_t kSplitNumbers = int64_t{1} << 18;

inline Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: throw std::invalid_argument("memory must be float32, float64, bfloat16 or float16");
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<void, Free>;

inline Scratch allocate(int64_t bytes) {
  const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  const int64_t size = (bytes / alignment + 1) * alignment;
  void* p = allocate_block(size, alignment);
  if (p == nullptr)
    throw std::runtime_error("mann_ext: no memory for " + std::to_string(size >> 20) +
                             " MiB to work in; use fewer slots, a smaller batch or fewer "
                             "threads");
  return Scratch(p);
}

// The scratch memory of one call. Up to kKept bytes stay with the thread for its next call: fresh
// pages cost more than a third of what the kernels take.
class Workspace {
 public:
  explicit Workspace(std::initializer_list<int64_t> parts) {
    int64_t bytes = 0;
    for (const int64_t part : parts) bytes += rounded(part);
    thread_local Scratch kept;
    thread_local int64_t kept_bytes = 0;
    if (bytes > kKept) {
      own_ = allocate(bytes);
    } else if (bytes > kept_bytes) {
      kept_bytes = 0;
      kept.reset();
      kept = allocate(bytes);
      kept_bytes = bytes;
    }
    next_ = static_cast<char*>(own_ ? own_.get() : kept.get());
  }

  // The parts one after the other, in the order and of the sizes given.
  void* take(int64_t bytes) {
    void* part = next_;
    next_ += rounded(bytes);
    return part;
  }

 private:
  static constexpr int64_t kKept = int64_t{32} << 20;
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  Scratch own_;
  char* next_;
};

// body(first, end) over rows, shared between the threads in whole tiles.
template <class Body>
void parallel_rows(int64_t rows, const Body& body) {
  constexpr int64_t kTile = 8;
  parallel((rows + kTile - 1) / kTile,
           [&](int64_t begin, int64_t end) { body(begin * kTile, std::min(rows, end * kTile)); });
}

// Runs sequence(b, each_block) for every batch element: whole elements on each thread or, where
// there are fewer of them than threads and they are large, one after the other with each_block
// sharing its blocks between the threads.
template <class Sequence>
void for_each_element(int64_t batch, int64_t blocks, int64_t numbers, const Sequence& sequence) {
  if (batch < max_threads() && blocks > 1 && numbers >= kSplitNumbers) {
    const FlushDenormals flush;
    for (int64_t b = 0; b < batch; ++b)
      sequence(b, [&](const auto& body) { parallel(blocks, body); });
  } else {
    parallel(batch, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) sequence(b, [&](const auto& body) { body(0, blocks); });
    });
  }
}

}  // namespace mann_ext::lrua
