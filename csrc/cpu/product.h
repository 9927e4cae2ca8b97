// Products of small matrices on SIMD vectors. Rows are padded to whole vectors, so no loop has a tail.
#pragma once

#include "cpu/simd.h"
// simd.h comes first: see there.
#include "cpu/lstm_cell.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// A factor of a product: element [m, k] lies at m row_stride + k column_stride; k goes over `segments` pieces of `depth`
// that are segment_stride apart.
struct Factor {
  const float* at;
  int64_t row_stride, column_stride;
  int64_t depth, segments = 1, segment_stride = 0;
};

// kRows rows and kVectors vectors from n on of c[m, n] = start + sum_k a[m, k] b[k, n]; it starts with bias[n], or 0, or with
// kAdd with what is there.
template <int kRows, int kVectors, bool kAdd>
void product_block(int64_t n_padded, int64_t n, const Factor& a, const float* b, const float* bias, float* c) {
  Vec sum[kRows][kVectors];
  LOPT_UNROLL
  for (int r = 0; r < kRows; ++r) LOPT_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = n + v * kLanes;
    sum[r][v] = kAdd ? load(c + r * n_padded + at) : bias ? load(bias + at) : Vec{};
  }
  b += n;
  for (int64_t s = 0; s < a.segments; ++s) {
    const float* element = a.at + s * a.segment_stride;
    for (int64_t k = 0; k < a.depth; ++k, element += a.column_stride, b += n_padded) {
      Vec row[kVectors];
      LOPT_UNROLL
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes);
      LOPT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float value = element[r * a.row_stride];
        LOPT_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] += value * row[v];
      }
    }
  }
  LOPT_UNROLL
  for (int r = 0; r < kRows; ++r) LOPT_UNROLL
  for (int v = 0; v < kVectors; ++v) store(c + r * n_padded + n + v * kLanes, sum[r][v]);
}

template <int kRows, bool kAdd>
void product_rows(int64_t n_padded, const Factor& a, const float* b, const float* bias, float* c) {
  constexpr int kVectors = kRows * 2 < kRegisters - 4 ? 2 : 1;
  int64_t n = 0;
  for (; n + kVectors * kLanes <= n_padded; n += kVectors * kLanes)
    product_block<kRows, kVectors, kAdd>(n_padded, n, a, b, bias, c);
  for (; n < n_padded; n += kLanes) product_block<kRows, 1, kAdd>(n_padded, n, a, b, bias, c);
}

// c [rows, n_padded]; b [segments * depth, n_padded]; bias [n_padded] or null.
template <bool kAdd = false>
void product(int64_t rows, int64_t n_padded, Factor a, const float* b, const float* bias, float* c) {
  const auto next = [&](int64_t count) {
    a.at += count * a.row_stride;
    c += count * n_padded;
    rows -= count;
  };
  for (; rows >= 8; next(8)) product_rows<8, kAdd>(n_padded, a, b, bias, c);
  for (; rows >= 2; next(2)) product_rows<2, kAdd>(n_padded, a, b, bias, c);
  for (; rows >= 1; next(1)) product_rows<1, kAdd>(n_padded, a, b, bias, c);
}

inline void product(int64_t rows, int64_t n_padded, int64_t depth, const float* a, int64_t row_stride,
                    int64_t column_stride, const float* b, const float* bias, float* c) {
  product(rows, n_padded, Factor{a, row_stride, column_stride, depth}, b, bias, c);
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
