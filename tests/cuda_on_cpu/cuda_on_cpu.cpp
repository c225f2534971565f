// Runs the blocks of a launch: fibers, their order, barriers, warp functions and checks.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Bounds of the section that __shared__ variables are in, from the linker; null if there are none.
extern "C" {
extern unsigned char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
}

namespace cuda_on_cpu {

Fiber* current;
dim3 block_size, grid_size;
unsigned group_size;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kCanaryBytes = 4096;
constexpr unsigned char kPoison = 0xff;  // all bits set: a NaN in every format, -1 as an integer

int multiprocessors = [] {
  const char* text = std::getenv("MANN_EXT_CUDA_ON_CPU_SMS");
  return text ? std::atoi(text) : 3;
}();
uint64_t seed = 0;
int64_t launches = 0;
unsigned newest_cluster = 0;
std::mutex one_launch;

uint64_t random_state;
uint64_t random_number() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void shuffle(std::vector<unsigned>& order, size_t size) {
  order.resize(size);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = size; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
}

// ---------------------------------------------------------------- fibers

void (*kernel_body)(void*);
void* kernel_closure;
const char* kernel_name;
std::string failure;

// Switches from the context in `from` to the one in `to`. swapcontext would make a system call.
#if defined(__x86_64__)
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
  .text
  .local cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
void* scheduler;

void to_fiber(Fiber& fiber) { cuda_on_cpu_switch(&scheduler, fiber.context); }
void to_scheduler(Fiber& fiber) { cuda_on_cpu_switch(&fiber.context, scheduler); }

void prepare(Fiber& fiber, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;  // aligned as after a call
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  std::fill(top - 6, top, nullptr);
  fiber.context = top - 6;
}
#else
ucontext_t scheduler;

ucontext_t* context(Fiber& fiber) { return static_cast<ucontext_t*>(fiber.context); }
void to_fiber(Fiber& fiber) { swapcontext(&scheduler, context(fiber)); }
void to_scheduler(Fiber& fiber) { swapcontext(context(fiber), &scheduler); }

void prepare(Fiber& fiber, unsigned char* stack, void (*entry)()) {
  fiber.context = stack + kStackBytes - (sizeof(ucontext_t) + 63) / 64 * 64;
  getcontext(context(fiber));
  context(fiber)->uc_stack.ss_sp = stack;
  context(fiber)->uc_stack.ss_size = static_cast<unsigned char*>(fiber.context) - stack;
  makecontext(context(fiber), entry, 0);
}
#endif

void fiber_main() {
  kernel_body(kernel_closure);
  current->state = State::exited;
  to_scheduler(*current);
}

void wait(State state) {
  current->state = state;
  to_scheduler(*current);
}

// Stacks are kept between launches; only the pages that are used take memory.
class Stacks {
 public:
  unsigned char* get(size_t count) {
    if (count > count_) {
      if (memory_ != nullptr) munmap(memory_, count_ * kStackBytes);
      void* p = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      memory_ = static_cast<unsigned char*>(p);
      count_ = count;
    }
    return memory_;
  }

 private:
  unsigned char* memory_ = nullptr;
  size_t count_ = 0;
};
Stacks stacks;

[[noreturn]] void error(const std::string& what) {
  throw std::runtime_error("CUDA on CPU: " + what + "; kernel: " + kernel_name);
}

std::string place(const Block& block) {
  return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
         std::to_string(block.index.z) + ")";
}

// ---------------------------------------------------------------- blocks

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct RunningBlock : Block {
  std::vector<Fiber> fibers;
  std::vector<std::vector<std::vector<Copy>>> copies;  // [thread][group], the last group still open
  std::vector<unsigned char> memory;                   // dynamic shared memory between two canaries
  std::vector<unsigned char> statics;  // __shared__ variables while another block runs
  unsigned char* stack_canary;
  bool done;
};

size_t statics_size() {
  return __start_cuda_shared ? size_t(__stop_cuda_shared - __start_cuda_shared) : 0;
}

void start(RunningBlock& block, uint64_t index, unsigned rank, size_t shared_bytes,
           unsigned char* stack) {
  block.index = {unsigned(index % grid_size.x), unsigned(index / grid_size.x % grid_size.y),
                 unsigned(index / grid_size.x / grid_size.y)};
  block.rank = rank;
  block.done = false;
  block.memory.assign(shared_bytes + 2 * kCanaryBytes + 1024, kPoison);
  const auto first = reinterpret_cast<uintptr_t>(block.memory.data()) + kCanaryBytes;
  block.dynamic = reinterpret_cast<unsigned char*>((first + 1023) / 1024 * 1024);
  block.statics.assign(statics_size(), kPoison);
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  block.fibers.resize(threads);
  block.copies.assign(threads, {{}});
  block.stack_canary = stack;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.thread = {i % block_size.x, i / block_size.x % block_size.y,
                    i / block_size.x / block_size.y};
    fiber.index = int(i);
    fiber.block = &block;
    fiber.state = State::ready;
    std::memset(stack + i * kStackBytes, kPoison, 64);
    prepare(fiber, stack + i * kStackBytes, fiber_main);
  }
}

void check_memory(const RunningBlock& block, size_t shared_bytes) {
  const unsigned char* begin = block.memory.data();
  const auto poisoned = [](const unsigned char* from, const unsigned char* to) {
    return std::all_of(from, to, [](unsigned char c) { return c == kPoison; });
  };
  if (!poisoned(begin, block.dynamic))
    error(place(block) + " wrote in front of its dynamic shared memory");
  if (!poisoned(block.dynamic + shared_bytes, begin + block.memory.size()))
    error(place(block) + " wrote past its " + std::to_string(shared_bytes) +
          " bytes of dynamic shared memory");
  for (size_t i = 0; i < block.fibers.size(); ++i)
    if (!poisoned(block.stack_canary + i * kStackBytes, block.stack_canary + i * kStackBytes + 64))
      error("a thread used more than 64 KiB of stack");
}

// Runs a warp until each of its threads has exited or waits for other warps.
void run_warp(RunningBlock& block, unsigned warp) {
  const unsigned first = warp * 32;
  const unsigned lanes = std::min<unsigned>(32, unsigned(block.fibers.size()) - first);
  for (bool moved = true; moved;) {
    moved = false;
    // Every lane comes before every other one in some of these orders.
    const uint64_t order = random_number();
    for (unsigned i = 0; i < 32; ++i) {
      const unsigned lane = (i ^ unsigned(order & 31)) * unsigned((order >> 5 & 15) * 2 + 1) & 31;
      if (lane >= lanes || block.fibers[first + lane].state != State::ready) continue;
      current = &block.fibers[first + lane];
      to_fiber(*current);
      if (!failure.empty()) error(failure + " in " + place(block));
      moved = true;
    }
  }
  for (unsigned lane = 0; lane < lanes; ++lane)
    if (block.fibers[first + lane].state == State::at_warp) {
      unsigned waiting = 0;
      for (unsigned i = 0; i < lanes; ++i)
        waiting |= unsigned(block.fibers[first + i].state == State::at_warp) << i;
      char text[160];
      std::snprintf(text, sizeof text,
                    "lanes %08x of warp %u wait in a warp function of mask %08x that its other "
                    "lanes do not reach",
                    waiting, warp, block.fibers[first + lane].mask);
      error(text + (" in " + place(block)));
    }
}

// Runs a block until all of its threads have exited or wait for the group's other blocks.
void run_block(RunningBlock& block) {
  static std::vector<unsigned> order;
  if (statics_size()) std::memcpy(__start_cuda_shared, block.statics.data(), statics_size());
  for (;;) {
    shuffle(order, (block.fibers.size() + 31) / 32);
    for (const unsigned warp : order) run_warp(block, warp);
    size_t at_block = 0, at_group = 0;
    for (const Fiber& fiber : block.fibers) {
      at_block += fiber.state == State::at_block;
      at_group += fiber.state == State::at_group;
    }
    const size_t threads = block.fibers.size();
    if (std::max(at_block, at_group) == 0) block.done = true;
    if (block.done || at_group == threads) break;
    if (at_block != threads)
      error(std::to_string(std::max(at_block, at_group)) + " of " + std::to_string(threads) +
            " threads wait at a barrier that the others do not reach, in " + place(block));
    block.count = 0;
    for (Fiber& fiber : block.fibers) {
      block.count += fiber.operand;
      fiber.state = State::ready;
    }
  }
  if (statics_size()) std::memcpy(block.statics.data(), __start_cuda_shared, statics_size());
}

// Runs the blocks of a cluster or a cooperative grid, or one block, to the end.
void run_group(std::vector<RunningBlock>& blocks) {
  std::vector<unsigned> order;
  for (;;) {
    shuffle(order, blocks.size());
    size_t done = 0;
    for (const unsigned i : order) {
      if (!blocks[i].done) run_block(blocks[i]);
      done += blocks[i].done;
    }
    if (done == blocks.size()) return;
    if (done > 0)
      error("some blocks wait at a cluster's or grid's barrier after others have exited");
    for (RunningBlock& block : blocks)
      for (Fiber& fiber : block.fibers) fiber.state = State::ready;
  }
}

}  // namespace

void fail(const char* what) {
  failure = what;
  to_scheduler(*current);
  std::abort();  // a failed fiber is never resumed
}

int block_barrier(bool predicate) {
  current->operand = predicate;
  wait(State::at_block);
  return current->block->count;
}

void group_barrier() { wait(State::at_group); }

unsigned char* group_shared(void* address, unsigned rank) {
  if (rank >= group_size) fail("a rank outside the cluster");
  auto* own = static_cast<RunningBlock*>(current->block);
  return (own - own->rank + rank)->dynamic + (static_cast<unsigned char*>(address) - own->dynamic);
}

void async_copy(void* to, const void* from, size_t bytes) {
  if ((uintptr_t(to) | uintptr_t(from)) % bytes) fail("an asynchronous copy is not aligned");
  std::memset(to, kPoison, bytes);
  static_cast<RunningBlock*>(current->block)
      ->copies[current->index]
      .back()
      .push_back({to, from, bytes});
}

void async_commit() {
  static_cast<RunningBlock*>(current->block)->copies[current->index].emplace_back();
}

void async_wait(size_t groups_left) {
  auto& groups = static_cast<RunningBlock*>(current->block)->copies[current->index];
  while (groups.size() > groups_left + 1) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

// The last lane of the mask to arrive forms everyone's result.
void collect(Collective what, unsigned mask, int operand, int width) {
  Fiber& self = *current;
  const int lane = self.index % 32;
  auto& fibers = static_cast<RunningBlock*>(self.block)->fibers;
  const int first = self.index - lane;
  const int lanes = std::min<int>(32, int(fibers.size()) - first);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail("a lane calls a warp function whose mask leaves it out");
  if (width != 32 && width != 16 && width != 8 && width != 4 && width != 2 && width != 1)
    fail("a shuffle's width is not a power of two");
  self.collective = what;
  self.mask = mask;
  self.operand = operand;
  self.width = width;
  for (int i = 0; i < lanes; ++i) {
    const Fiber& other = fibers[first + i];
    if (i == lane || !(mask >> i & 1)) continue;
    if (other.state != State::at_warp) return wait(State::at_warp);
    if (other.mask != mask || other.collective != what)
      fail("lanes of one mask call different warp functions, or differ in the mask");
  }
  int64_t total = 0;
  if (what >= Collective::ballot) {
    bool any = false;
    for (int i = 0; i < lanes; ++i) {
      if (!(mask >> i & 1)) continue;
      const auto value = int64_t(fibers[first + i].value[0]);
      if (what == Collective::ballot)
        total |= int64_t(value & 1) << i;
      else if (what == Collective::add)
        total += value;
      else if (!any || (what == Collective::minimum ? value < total : value > total))
        total = value;
      any = true;
    }
  }
  for (int i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber& fiber = fibers[first + i];
    fiber.state = State::ready;
    const int begin = i & ~(fiber.width - 1), end = begin + fiber.width;
    int source = i;
    switch (what) {
      case Collective::sync: continue;
      case Collective::index: source = begin | (fiber.operand & (fiber.width - 1)); break;
      case Collective::up: source = i - fiber.operand < begin ? i : i - fiber.operand; break;
      case Collective::down: source = i + fiber.operand >= end ? i : i + fiber.operand; break;
      case Collective::exclusive_or:
        source = (i ^ fiber.operand) >= end ? i : i ^ fiber.operand;
        break;
      default: fiber.result[0] = uint64_t(total); continue;
    }
    if (!(mask >> source & 1)) fail("a shuffle reads from a lane that takes no part in it");
    std::memcpy(fiber.result, fibers[first + source].value, sizeof fiber.result);
  }
}

void run(const char* kernel, const Configuration& how, void (*body)(void*), void* closure) {
  const std::lock_guard lock(one_launch);
  kernel_name = kernel;
  kernel_body = body;
  kernel_closure = closure;
  failure.clear();
  ++launches;
  newest_cluster = how.cluster;
  const dim3 &g = how.grid, &b = how.block;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z, count = uint64_t(g.x) * g.y * g.z;
  if (threads < 1 || threads > 1024 || b.z > 64) error("a block must have 1 to 1024 threads");
  if (count < 1 || g.x > INT_MAX || g.y > 65535 || g.z > 65535)
    error("the grid's size is not valid");
  if (how.shared_bytes > kMaxSharedBytes) error("more than 227 KB of dynamic shared memory");
  if (how.cluster < 1 || how.cluster > 16 || g.x % how.cluster)
    error("the grid is not a whole number of clusters of 1 to 16 blocks");
  block_size = b;
  grid_size = g;
  group_size = how.cooperative ? unsigned(count) : how.cluster;
  // The same order in every launch of one seed, so that a failure can be repeated.
  random_state = seed;

  std::vector<unsigned> order;
  shuffle(order, count / group_size);
  std::vector<RunningBlock> blocks(group_size);
  unsigned char* stack = stacks.get(threads * group_size);
  for (const unsigned group : order) {
    for (unsigned i = 0; i < group_size; ++i)
      start(blocks[i], uint64_t(group) * group_size + i, i, how.shared_bytes,
            stack + i * threads * kStackBytes);
    run_group(blocks);
    for (const RunningBlock& block : blocks) check_memory(block, how.shared_bytes);
  }
  current = nullptr;
}

}  // namespace cuda_on_cpu

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_cpu::multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cuda_on_cpu::kMaxSharedBytes; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 * 1024; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
  }
  return cudaSuccess;
}

// For the tests.
extern "C" {
__attribute__((visibility("default"))) void cuda_on_cpu_set_seed(uint64_t seed) {
  cuda_on_cpu::seed = seed;
}
__attribute__((visibility("default"))) void cuda_on_cpu_set_multiprocessors(int count) {
  cuda_on_cpu::multiprocessors = count;
}
__attribute__((visibility("default"))) int64_t cuda_on_cpu_launches() {
  return cuda_on_cpu::launches;
}
// Blocks a cluster of the newest launch.
__attribute__((visibility("default"))) unsigned cuda_on_cpu_cluster() {
  return cuda_on_cpu::newest_cluster;
}
}
