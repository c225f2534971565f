// Memory of large tensors on the CPU, kept for the next one.
#pragma once

#include <cstdint>
#include <optional>

#include "ops.h"

namespace mann_ext {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Memory for std::free, or null; where there is too little, the kept blocks are given back first.
void* allocate_block(int64_t bytes, int64_t alignment);

// A tensor as new_empty makes it, in a block that may have served another one before. None where it
// is small, not on the CPU, or this torch (2.10) cannot be told how to free the block.
//
// The C library gets large blocks from the system and gives them back when they are freed, and the
// system clears each page of a new one: a quarter of a step of the LRUA at 65,536 slots and, where
// a virtual machine has to get the pages from its host, up to ten times that step. So up to 256 MiB
// of freed blocks wait for tensors of their size.
std::optional<Tensor> large_tensor(const Tensor& like, const int64_t* shape, int64_t dims,
                                   ScalarType dtype);

}  // namespace mann_ext
