// The instruction set that the CPU kernels use, chosen once per process.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mann_ext {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

// The best instruction set that this CPU and operating system offer.
inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

// detect_isa(), capped by the environment variable MANN_EXT_CPU_ISA=baseline|avx2|avx512.
inline Isa choose_isa() {
  const Isa best = detect_isa();
  const char* text = std::getenv("MANN_EXT_CPU_ISA");
  if (text == nullptr || *text == '\0') return best;
  for (const Isa cap : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::string(text) == isa_name(cap)) return cap < best ? cap : best;
  }
  throw std::invalid_argument(std::string("MANN_EXT_CPU_ISA=") + text +
                              ": expected baseline, avx2 or avx512");
}

// The choice of the first call, for every later one. If that throws, the next call tries again.
inline Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace mann_ext

// function(argument) of the copy that is compiled for the instruction set in use; each copy is in a
// namespace of its set's name.
#if defined(__x86_64__)
#define MANN_EXT_CALL_BEST(function, argument)                                   \
  (mann_ext::current_isa() == mann_ext::Isa::avx512 ? avx512::function(argument) \
   : mann_ext::current_isa() == mann_ext::Isa::avx2 ? avx2::function(argument)   \
                                                    : baseline::function(argument))
#else
#define MANN_EXT_CALL_BEST(function, argument) baseline::function(argument)
#endif
