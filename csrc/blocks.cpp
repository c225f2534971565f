#include "blocks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

// From torch 2.11 on; null before. (The headers for 2.10 do not declare it.)
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace mann_ext {
namespace {

constexpr int64_t kLarge = 2 * kHugePage;
constexpr int64_t kKept = int64_t{256} << 20;

struct Block {
  void* data;
  int64_t bytes;
};

// Freed blocks, the last one first.
struct Kept {
  std::mutex mutex;
  std::list<Block> blocks;
  int64_t bytes = 0;
};

Kept& kept() {
  static Kept* const all = new Kept;  // never destroyed: tensors may be freed after everything else
  return *all;
}

// A kept block of that size, or null.
void* take(int64_t bytes) {
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  for (auto block = all.blocks.begin(); block != all.blocks.end(); ++block)
    if (block->bytes == bytes) {
      void* data = block->data;
      all.bytes -= bytes;
      all.blocks.erase(block);
      return data;
    }
  return nullptr;
}

// Gives the oldest blocks back to the C library until no more than `most` bytes are kept.
void release(int64_t most) {
  std::list<Block> oldest;
  {
    Kept& all = kept();
    const std::lock_guard lock(all.mutex);
    while (all.bytes > most) {
      all.bytes -= all.blocks.back().bytes;
      oldest.splice(oldest.end(), all.blocks, --all.blocks.end());
    }
  }
  for (const Block& block : oldest) std::free(block.data);
}

void give(void* data, int64_t bytes) {
  {
    Kept& all = kept();
    const std::lock_guard lock(all.mutex);
    all.blocks.push_front({data, bytes});
    all.bytes += bytes;
  }
  release(kKept);
}

int64_t bytes_each(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 0;
  }
}

// Asks for huge pages under a large array: touching it for the first time is mostly page faults
// otherwise.
void prefer_huge_pages([[maybe_unused]] void* array, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const int64_t start = (reinterpret_cast<int64_t>(array) + kHugePage - 1) / kHugePage * kHugePage;
  const int64_t size = reinterpret_cast<int64_t>(array) + bytes - start;
  if (size >= kHugePage)
    madvise(reinterpret_cast<void*>(start), static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
}

}  // namespace

void* allocate_block(int64_t bytes, int64_t alignment) {
  const auto ask = [&] {
    return std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(bytes));
  };
  void* data = ask();
  if (data == nullptr) {
    release(0);
    data = ask();
  }
  if (data != nullptr) prefer_huge_pages(data, bytes);
  return data;
}

std::optional<Tensor> large_tensor(const Tensor& like, const int64_t* shape, int64_t dims,
                                   ScalarType dtype) {
  if (torch_from_blob == nullptr || !like.is_cpu()) return std::nullopt;
  int64_t bytes = bytes_each(dtype);
  for (int64_t d = 0; d < dims; ++d) bytes *= shape[d];
  if (bytes < kLarge) return std::nullopt;
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  std::vector<int64_t> strides(dims, 1);
  for (int64_t d = dims - 1; d > 0; --d) strides[d - 1] = strides[d] * shape[d];

  void* data = take(bytes);
  if (data == nullptr) data = allocate_block(bytes, kHugePage);
  if (data == nullptr)
    throw std::runtime_error("mann_ext: no memory for a tensor of shape " +
                             shape_text(shape, dims) + ", " + std::to_string(bytes >> 20) +
                             " MiB; use fewer slots, narrower ones or a smaller batch");
  AtenTensorHandle tensor = nullptr;
  const auto deleter = [](void* freed, void* size) {
    give(freed, static_cast<int64_t>(reinterpret_cast<intptr_t>(size)));
  };
  const AOTITorchError error =
      torch_from_blob(data, dims, shape, strides.data(), 0,
                      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                      aoti_torch_device_type_cpu(), -1, &tensor, aoti_torch_layout_strided(),
                      nullptr, 0, deleter, reinterpret_cast<void*>(static_cast<intptr_t>(bytes)));
  if (error != 0) {
    give(data, bytes);
    return std::nullopt;
  }
  return Tensor(tensor);
}

}  // namespace mann_ext
