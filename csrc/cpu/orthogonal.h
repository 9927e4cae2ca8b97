// Directions of small matrices, treated as a whole: what lopt/rule/orthogonal.py does with torch. Rows are padded to whole
// vectors. Source: see there.
#pragma once

#include <algorithm>

#include "cpu/product.h"
#include "rule/constants.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// Scratch memory for matrices of which the largest are so large.
struct OrthogonalSizes {
  int64_t wide = 0, tall = 0, small = 0;

  void include(int64_t rows, int64_t columns) {
    const int64_t m = std::min(rows, columns), n = std::max(rows, columns);
    wide = std::max(wide, m * padded(n));
    tall = std::max(tall, n * padded(m));
    small = std::max(small, m * padded(m));
  }
};

struct Orthogonal {
  float *x, *next, *transposed;  // [m, padded(n)], [m, padded(n)], [n, padded(m)]
  float *square, *factor;        // [m, padded(m)]

  Orthogonal(const OrthogonalSizes& sizes, Arena& arena)
      : x(arena.take(sizes.wide)),
        next(arena.take(sizes.wide)),
        transposed(arena.take(sizes.tall)),
        square(arena.take(sizes.small)),
        factor(arena.take(sizes.small)) {}

  // The norm of x [count].
  static float norm(const float* x, int64_t count) {
    Vec sum{};
    for (int64_t i = 0; i < count; i += kLanes) sum += load(x + i) * load(x + i);
    return static_cast<float>(std::sqrt(sum_lanes(sum)));
  }

  // The rows of x [m, n_padded] to one norm, about 1, or its columns; of norm `size`. scratch: [n_padded].
  static void even(float* x, int64_t m, int64_t n, bool columns, float size, float* scratch) {
    const int64_t n_padded = padded(n);
    const float least = kLeastRow * size / std::sqrt(static_cast<float>(columns ? n : m));
    if (columns) {
      std::fill_n(scratch, n_padded, 0.0f);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n_padded; ++j) scratch[j] += x[i * n_padded + j] * x[i * n_padded + j];
      for (int64_t j = 0; j < n_padded; ++j) scratch[j] = 1.0f / std::max(std::sqrt(scratch[j]), least);
    }
    for (int64_t i = 0; i < m; ++i) {
      float* row = x + i * n_padded;
      if (!columns) std::fill_n(scratch, n_padded, 1.0f / std::max(norm(row, n_padded), least));
      for (int64_t j = 0; j < n_padded; ++j) row[j] *= scratch[j];
    }
  }

  // direction [rows, columns], in place, where the gate is open, and its rank. turned: its columns belong to one output
  // each, not its rows.
  void run(float* direction, int64_t rows, int64_t columns, bool turned, float gate, int iterations,
           float& rank) const {
    if (!(gate > 0)) return;
    const bool wider = rows <= columns;
    const int64_t m = wider ? rows : columns, n = wider ? columns : rows, n_padded = padded(n), m_padded = padded(m);
    const auto at = [&](int64_t i, int64_t j) -> float& { return direction[wider ? i * n + j : j * m + i]; };
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n_padded; ++j) x[i * n_padded + j] = j < n ? at(i, j) : 0.0f;
    float largest = 0.0f;  // squares of very small numbers would be 0
    for (int64_t i = 0; i < m * n_padded; ++i) largest = std::max(largest, std::fabs(x[i]));
    rank = 0.0f;
    if (!(largest > 0)) return;
    const auto divide = [&](float by) {
      for (int64_t i = 0; i < m * n_padded; i += kLanes) store(x + i, load(x + i) / splat(by));
    };
    divide(largest);
    const float size = norm(x, m * n_padded);
    divide(size);
    float *now = x, *then = next;
    for (int k = 0; k < iterations; ++k) {
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < m_padded; ++i) transposed[j * m_padded + i] = i < m ? now[i * n_padded + j] : 0.0f;
      product(m, m_padded, n, now, n_padded, 1, transposed, nullptr, square);
      product(m, m_padded, m, square, m_padded, 1, square, nullptr, factor);
      for (int64_t i = 0; i < m * m_padded; i += kLanes)
        store(factor + i, load(square + i) * kNewtonSchulz3 + load(factor + i) * kNewtonSchulz5);
      product(m, n_padded, m, factor, m_padded, 1, now, nullptr, then);
      for (int64_t i = 0; i < m * n_padded; i += kLanes)
        store(then + i, load(now + i) * kNewtonSchulz1 + load(then + i));
      std::swap(now, then);
    }
    const float before = norm(now, m * n_padded);
    rank = before * before / static_cast<float>(m);
    for (int64_t i = 0; i < m; ++i)  // what rests, stays
      for (int64_t j = 0; j < n; ++j)
        if (at(i, j) == 0) now[i * n_padded + j] = 0.0f;
    const float moving = norm(now, m * n_padded);
    if (moving > 0) even(now, m, n, wider == turned, moving, then);
    const float whole = norm(now, m * n_padded);
    const float share = whole > 0 ? gate * largest * (size / whole) : 0.0f;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) at(i, j) = (1.0f - gate) * at(i, j) + share * now[i * n_padded + j];
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
