// Matrix products for the CPU kernels: C[m][n] (+)= sum_k A[m * a_row + k * a_column] * B[k][n].
//
// B is packed beforehand into panels of two vectors' width, each [depth][width], the missing
// columns zero. Every number of C is a chain of multiply-adds over at most kDepth k, and the chains
// are added in order, so results depend neither on the threads nor on how rows are grouped.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace MANN_EXT_ISA {

// A block of a panel (64 or 128 bytes a k) stays in the L1 cache while all rows pass it.
constexpr int64_t kDepth = 256;
// Rows of A that stay in the L2 cache while all panels pass them.
constexpr int64_t kRowsInCache = 128;
// Rows of C in registers, two vectors each: with B's two vectors and one of A they must fit.
constexpr int kTileRows = kRegisters == 32 ? 8 : 4;

template <class A>
constexpr int64_t kPanelWidth = 2 * kLanes<A>;

// The first `count` numbers of a vector, the others zero.
template <class A>
MANN_EXT_INLINE Vec<A> load_part(const A* p, int64_t count) {
  if (count >= kLanes<A>) return load_unaligned<A>(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return reinterpret_cast<Vec<A>>(
        _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
  else
    return reinterpret_cast<Vec<A>>(
        _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p));
#else
  Vec<A> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

template <class A>
MANN_EXT_INLINE void store_part(A* p, Vec<A> v, int64_t count) {
  if (count >= kLanes<A>) {
    std::memcpy(p, &v, sizeof(v));
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1),
                          reinterpret_cast<__m512>(v));
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1),
                          reinterpret_cast<__m512d>(v));
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// One row of a panel; `row` null: zeros.
template <class A>
MANN_EXT_INLINE void pack_row(const A* row, int64_t columns, A* packed) {
  for (int v = 0; v < 2; ++v) {
    const int64_t count = columns - v * kLanes<A>;
    store<A>(packed + v * kLanes<A>,
             row != nullptr && count > 0 ? load_part<A>(row + v * kLanes<A>, count) : Vec<A>{});
  }
}

// Panel number `index` of B[k * row + n * column], into its place in `panels`.
template <class A>
void pack_panel(const A* b, int64_t row, int64_t column, int64_t depth, int64_t columns,
                int64_t index, A* panels) {
  constexpr int64_t width = kPanelWidth<A>;
  A* panel = panels + index * depth * width;
  b += index * width * column;
  columns = std::min(width, columns - index * width);
  if (column == 1) {
    for (int64_t k = 0; k < depth; ++k) pack_row<A>(b + k * row, columns, panel + k * width);
    return;
  }
  constexpr int64_t kTogether = 64;  // rows of the panel that stay in the L1 cache meanwhile
  for (int64_t top = 0; top < depth; top += kTogether)
    for (int64_t n = 0; n < width; ++n)
      for (int64_t k = top; k < std::min(depth, top + kTogether); ++k)
        panel[k * width + n] = n < columns ? b[k * row + n * column] : A(0);
}

template <class A>
struct Product {
  int64_t columns, depth;
  const A* a;
  int64_t a_row, a_column;
  const A* panels;
  A* c;
  int64_t c_row;
};

// R rows and V vectors of C, over `depth` k of one panel.
template <class A, int R, int V>
inline void product_tile(const A* a, int64_t a_row, int64_t a_column, const A* panel, int64_t depth,
                         A* c, int64_t c_row, int64_t columns, bool add) {
  Vec<A> sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> right[V];
    for (int v = 0; v < V; ++v) right[v] = load<A>(panel + v * kLanes<A>);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * a_row] * right[v];
    a += a_column;
    panel += kPanelWidth<A>;
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      A* p = c + r * c_row + v * kLanes<A>;
      const int64_t count = columns - v * kLanes<A>;
      store_part<A>(p, add ? load_part<A>(p, count) + sum[r][v] : sum[r][v], count);
    }
}

template <class A, int R = kTileRows>
MANN_EXT_INLINE void product_rows(int64_t rows, const A* a, int64_t a_row, int64_t a_column,
                                  const A* panel, int64_t depth, A* c, int64_t c_row,
                                  int64_t columns, bool add) {
  if constexpr (R > 1) {
    if (rows < R) {
      product_rows<A, R - 1>(rows, a, a_row, a_column, panel, depth, c, c_row, columns, add);
      return;
    }
  }
  if (columns > kLanes<A>)
    product_tile<A, R, 2>(a, a_row, a_column, panel, depth, c, c_row, columns, add);
  else
    product_tile<A, R, 1>(a, a_row, a_column, panel, depth, c, c_row, columns, add);
}

// Rows [first, end) of C; `add`: to what is there.
template <class A>
void multiply(const Product<A>& p, int64_t first, int64_t end, bool add) {
  constexpr int64_t width = kPanelWidth<A>;
  const int64_t blocks = std::max<int64_t>(1, (p.depth + kDepth - 1) / kDepth);
  const int64_t block = std::max<int64_t>(1, (p.depth + blocks - 1) / blocks);
  for (int64_t top = first; top < end; top += kRowsInCache) {
    const int64_t bottom = std::min(end, top + kRowsInCache);
    for (int64_t k = 0; k == 0 || k < p.depth; k += block) {  // once even for an empty sum
      const int64_t depth = std::min(block, p.depth - k);
      for (int64_t n = 0; n < p.columns; n += width)
        for (int64_t m = top; m < bottom; m += kTileRows)
          product_rows<A>(std::min<int64_t>(kTileRows, bottom - m),
                          p.a + m * p.a_row + k * p.a_column, p.a_row, p.a_column,
                          p.panels + n * p.depth + k * width, depth, p.c + m * p.c_row + n, p.c_row,
                          p.columns - n, add || k > 0);
    }
  }
}

}  // namespace MANN_EXT_ISA
