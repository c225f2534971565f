// Sums of exp(score) * something, when the largest score is not known beforehand.
#pragma once

#include <limits>

#include "cuda/launch.h"

namespace mann_ext::cuda {

template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

// 2^x for whole x <= 0; 0 for NaN.
__device__ __forceinline__ float power_of_two(float x) {
  return x >= -126 ? __int_as_float((static_cast<int>(x) + 127) << 23) : 0.0f;
}
__device__ __forceinline__ double power_of_two(double x) {
  return x >= -1022 ? __longlong_as_double((static_cast<long long>(x) + 1023) << 52) : 0.0;
}

// exp(x) = factor * 2^power, where the power is a whole number. Sums are shifted by powers of 2,
// which is exact: so the weights, which are made when the largest score is known, agree to the last
// bit with what was added up for the reads before. (Else softmax's gradient suffers: it subtracts
// two sums that are nearly the same where a weight is nearly 1.)
template <class A>
struct Exponential {
  A factor, power;
  __device__ A shifted_by(A top) const { return factor * power_of_two(power - top); }
};
__device__ __forceinline__ Exponential<float> exponential(float x) {
  if (x == kMinusInfinity<float>) return {0.0f, x};
  const float power = rintf(x * 1.44269504f);
  // ln 2 in two parts, the first with zeros at its end.
  return {expf(fmaf(power, -1.42860677e-6f, fmaf(power, -0.693145752f, x))), power};
}
__device__ __forceinline__ Exponential<double> exponential(double x) {
  if (x == kMinusInfinity<double>) return {0.0, x};
  const double power = rint(x * 1.4426950408889634);
  return {exp(fma(power, -1.90821492927058770e-10, fma(power, -0.693147180369123816, x))), power};
}
}  // namespace mann_ext::cuda
