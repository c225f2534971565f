// Fixed-width vectors for the CPU kernels, on GCC/Clang vector extensions.
//
// A file that includes this header is compiled once per instruction set; everything here lives in
// namespace MANN_EXT_ISA so that the copies cannot be mixed up by the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
// GCC 12 warns of its own deliberately undefined vectors inside these headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

#define MANN_EXT_INLINE inline __attribute__((always_inline))
// An inner loop of its own. noipa, since GCC 12 otherwise took a call of such a function that
// writes its argument in place for one without effect, and left it out.
#if defined(__clang__)
#define MANN_EXT_OUTLINE inline __attribute__((noinline))
#else
#define MANN_EXT_OUTLINE inline __attribute__((noipa))
#endif

namespace MANN_EXT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

// Storage-only 16-bit types.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class A>
struct Lanes {
  static constexpr int count = kVectorBytes / static_cast<int>(sizeof(A));
  typedef A type __attribute__((vector_size(kVectorBytes), may_alias));
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Int mask __attribute__((vector_size(kVectorBytes), may_alias));
};

template <class A>
using Vec = typename Lanes<A>::type;

template <class A>
constexpr int kLanes = Lanes<A>::count;

template <class A>
MANN_EXT_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// ---- loads and stores; storage type S, arithmetic type A ----

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 0x1fu;
  uint32_t mantissa = h & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1fu) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {                        // subnormal half: let the adder round
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

inline float bfloat16_to_float(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class A, class S>
MANN_EXT_INLINE A load_scalar(const S* p) {
  if constexpr (std::is_same_v<S, BFloat16>)
    return bfloat16_to_float(p->bits);
  else if constexpr (std::is_same_v<S, Half>)
    return half_to_float(p->bits);
  else
    return static_cast<A>(*p);
}

template <class A, class S>
MANN_EXT_INLINE void store_scalar(S* p, A value) {
  if constexpr (std::is_same_v<S, BFloat16>)
    p->bits = float_to_bfloat16(value);
  else if constexpr (std::is_same_v<S, Half>)
    p->bits = float_to_half(value);
  else
    *p = static_cast<S>(value);
}

// p is aligned to the vector for S == A; any alignment otherwise.
template <class A, class S>
MANN_EXT_INLINE Vec<A> load(const S* p) {
  if constexpr (std::is_same_v<S, A>) {
    return *reinterpret_cast<const Vec<A>*>(p);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2), may_alias, aligned(2)));
    typedef uint32_t Wide __attribute__((vector_size(kVectorBytes), may_alias));
    const Narrow narrow = *reinterpret_cast<const Narrow*>(p);
    return reinterpret_cast<Vec<A>>(__builtin_convertvector(narrow, Wide) << 16);
  } else {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec<A>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<Vec<A>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = half_to_float(p[i].bits);
    return v;
#endif
  }
}

template <class A, class S>
MANN_EXT_INLINE void store(S* p, Vec<A> v) {
  if constexpr (std::is_same_v<S, A>) {
    *reinterpret_cast<Vec<A>*>(p) = v;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2), may_alias, aligned(2)));
    typedef uint32_t Wide __attribute__((vector_size(kVectorBytes), may_alias));
    const Wide bits = reinterpret_cast<Wide>(v);
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Wide quiet = (bits >> 16) | 0x40u;
    const Wide chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    *reinterpret_cast<Narrow*>(p) = __builtin_convertvector(chosen, Narrow);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<A>; ++i) p[i].bits = float_to_half(v[i]);
#endif
  }
}

// Store, and return what a later load would give: the rounded value.
template <class A, class S>
MANN_EXT_INLINE Vec<A> store_rounded(S* p, Vec<A> v) {
  store<A>(p, v);
  if constexpr (std::is_same_v<S, A>)
    return v;
  else
    return load<A>(p);
}

// v as it was rounded: never joined with a following addition into one operation that rounds once.
template <class V>
MANN_EXT_INLINE V apart(V v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

template <class A>
MANN_EXT_INLINE Vec<A> load_unaligned(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// As many numbers as a vector of doubles has, from any address.
template <class A>
MANN_EXT_INLINE Vec<double> widen(const A* p) {
  typedef A Narrow
      __attribute__((vector_size(kLanes<double> * sizeof(A)), may_alias, aligned(alignof(A))));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Vec<double>);
}

// ---- arithmetic ----

template <class A>
MANN_EXT_INLINE Vec<A> square_root(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return reinterpret_cast<Vec<A>>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
  else
    return reinterpret_cast<Vec<A>>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(v)));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return reinterpret_cast<Vec<A>>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
  else
    return reinterpret_cast<Vec<A>>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(v)));
#else
  for (int i = 0; i < kLanes<A>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// Sum of the lanes, in a fixed tree so that the result depends on nothing else.
template <class A>
MANN_EXT_INLINE A sum_lanes(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
  else
    return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(v));
#else
  A lanes[kLanes<A>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

// Neighbours' sums: x[0] + x[1], x[2] + x[3], ..., y[0] + y[1], ...
template <class A, int... I>
MANN_EXT_INLINE Vec<A> pair_sums(Vec<A> x, Vec<A> y, std::integer_sequence<int, I...>) {
  using Mask = typename Lanes<A>::mask;
  const Mask even = {(2 * I)...}, odd = {(2 * I + 1)...};
  return __builtin_shuffle(x, y, even) + __builtin_shuffle(x, y, odd);
}

template <class A, int count>
MANN_EXT_INLINE Vec<A> lane_sums_tree(const A* v) {
  constexpr int L = kLanes<A>;
  if constexpr (count == 1)
    return load<A>(v);
  else
    return pair_sums<A>(lane_sums_tree<A, count / 2>(v),
                        lane_sums_tree<A, count / 2>(v + count / 2 * L),
                        std::make_integer_sequence<int, L>());
}

// out[i] = the sum of the lanes of vector i. As many at a time as a vector has lanes: a third of
// the instructions of summing each by itself.
template <class A>
inline void lane_sums(const A* vectors, int64_t count, A* out) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const Vec<A> sums = lane_sums_tree<A, L>(vectors + i * L);
    std::memcpy(out + i, &sums, sizeof(sums));
  }
  for (; i < count; ++i) out[i] = sum_lanes<A>(load<A>(vectors + i * L));
}

enum class Compare {
  kNotAtLeast,  // !(v >= bound): smaller, or either one NaN
  kAbove,       // v > bound
};

// Bit i is set where v[i] compares so with the bound.
template <Compare compare, class A>
MANN_EXT_INLINE uint32_t lanes_where(Vec<A> v, A bound) {
  const Vec<A> limit = broadcast<A>(bound);
#if defined(__AVX512F__) || defined(__AVX2__)
  constexpr int predicate = compare == Compare::kAbove ? _CMP_GT_OQ : _CMP_NGE_UQ;
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(limit),
                              predicate);
  else
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), reinterpret_cast<__m512d>(limit),
                              predicate);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps(
        _mm256_cmp_ps(reinterpret_cast<__m256>(v), reinterpret_cast<__m256>(limit), predicate)));
  else
    return static_cast<uint32_t>(_mm256_movemask_pd(
        _mm256_cmp_pd(reinterpret_cast<__m256d>(v), reinterpret_cast<__m256d>(limit), predicate)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<A>; ++i)
    bits |=
        static_cast<uint32_t>(compare == Compare::kAbove ? v[i] > limit[i] : !(v[i] >= limit[i]))
        << i;
  return bits;
#endif
}

// exp(x) to about one unit in the last place for x in [-700, 88 - a few]; 0 below the normal
// range, NaN stays NaN. Cody-Waite reduction, then a Taylor polynomial on |r| <= ln(2)/2.
template <class A>
MANN_EXT_INLINE Vec<A> exponential(Vec<A> x) {
  using Mask = typename Lanes<A>::mask;
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr A kLowest = kSingle ? A(-87.0) : A(-708.0);
  constexpr A kHighest = kSingle ? A(88.0) : A(709.0);
  constexpr A kMagic = kSingle ? A(12582912.0) : A(6755399441055744.0);
  constexpr A kLog2e = A(1.44269504088896340736);
  constexpr A kLn2High = kSingle ? A(0.693145751953125) : A(6.93147180369123816490e-01);
  constexpr A kLn2Low = kSingle ? A(1.42860682030941723212e-6) : A(1.90821492927058770002e-10);
  const Mask below = x < kLowest;
  x = x > kHighest ? broadcast<A>(kHighest) : x;
  x = below ? broadcast<A>(kLowest) : x;
  const Vec<A> shifted = x * kLog2e + kMagic;
  const Vec<A> n = shifted - kMagic;
  const Vec<A> r = (x - n * kLn2High) - n * kLn2Low;
  Vec<A> p;
  if constexpr (kSingle) {
    p = broadcast<A>(A(1.0 / 5040));
    p = p * r + A(1.0 / 720);
  } else {
    p = broadcast<A>(A(1.0 / 6227020800));
    p = p * r + A(1.0 / 479001600);
    p = p * r + A(1.0 / 39916800);
    p = p * r + A(1.0 / 3628800);
    p = p * r + A(1.0 / 362880);
    p = p * r + A(1.0 / 40320);
    p = p * r + A(1.0 / 5040);
    p = p * r + A(1.0 / 720);
  }
  p = p * r + A(1.0 / 120);
  p = p * r + A(1.0 / 24);
  p = p * r + A(1.0 / 6);
  p = p * r + A(0.5);
  p = p * r + A(1);
  p = p * r + A(1);
  // The low bits of `shifted` hold n; NaN gives any scale and stays NaN in the product.
  using Int = typename Lanes<A>::Int;
  constexpr int kMantissa = kSingle ? 23 : 52;
  constexpr Int kBias = kSingle ? 127 : 1023;
  const Mask exponent = (reinterpret_cast<Mask>(shifted) + kBias) << kMantissa;
  const Vec<A> result = p * reinterpret_cast<Vec<A>>(exponent);
  return below ? Vec<A>{} : result;
}

// ln(x) to about two units in the last place; minus infinity for zero and below the normal range,
// NaN for negative numbers and NaN. x = 2^n m with m around 1, ln(m) = 2 artanh((m - 1) / (m + 1)).
template <class A>
MANN_EXT_INLINE Vec<A> logarithm(Vec<A> x) {
  using Mask = typename Lanes<A>::mask;
  using Int = typename Lanes<A>::Int;
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr int kMantissa = kSingle ? 23 : 52;
  constexpr Int kRootOfHalf = kSingle ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcd);
  constexpr A kSmallest = kSingle ? A(0x1p-126) : A(0x1p-1022);
  constexpr A kLn2High = kSingle ? A(0.693145751953125) : A(6.93147180369123816490e-01);
  constexpr A kLn2Low = kSingle ? A(1.42860682030941723212e-6) : A(1.90821492927058770002e-10);
  const Mask bits = reinterpret_cast<Mask>(x);
  const Mask power = (bits - kRootOfHalf) >> kMantissa;
  const Vec<A> n = __builtin_convertvector(power, Vec<A>);
  const Vec<A> m = reinterpret_cast<Vec<A>>(bits - (power << kMantissa));
  const Vec<A> s = (m - A(1)) / (m + A(1)), z = s * s;
  constexpr int kTerms = kSingle ? 4 : 10;
  Vec<A> p = broadcast<A>(A(2) / A(2 * kTerms + 1));
#pragma GCC unroll 16
  for (int i = kTerms - 1; i > 0; --i) p = p * z + A(2) / A(2 * i + 1);
  Vec<A> result = n * kLn2High + (n * kLn2Low + (s * z * p + A(2) * s));
  result = x < kSmallest ? broadcast<A>(-std::numeric_limits<A>::infinity()) : result;
  return x >= A(0) ? result : broadcast<A>(std::numeric_limits<A>::quiet_NaN());
}

}  // namespace MANN_EXT_ISA
