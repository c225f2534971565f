// mann_ext._C: what was built, how, and what it uses on this machine. No torch headers, nothing on
// a hot path.
#include <pybind11/pybind11.h>

#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "cpu/isa.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

// CPUs that this process may run on, which is fewer than the machine has inside most containers.
int usable_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = MANN_EXT_BUILD_VERSION;
  info["compiler"] = compiler();
  info["cxx_flags"] = MANN_EXT_BUILD_CXX_FLAGS;
  info["built_with_torch"] = MANN_EXT_BUILD_TORCH;
  info["cpu_instruction_sets"] = MANN_EXT_BUILD_ISAS;
  info["cuda_toolkit"] = MANN_EXT_BUILD_NVCC;
  info["cuda_architectures"] = MANN_EXT_BUILD_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information of mann_ext.";
  module.def("build_info", &build_info, "How the native parts were built: a dict of strings.");
  module.def(
      "cpu_instruction_set", [] { return mann_ext::isa_name(mann_ext::current_isa()); },
      "The instruction set that the CPU kernels use: baseline, avx2 or avx512.");
  module.def("usable_cpus", &usable_cpus, "The number of CPUs that this process may use.");
}
