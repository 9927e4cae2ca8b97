// Directions of small matrices, treated as a whole: what lopt/rule/orthogonal.py does with torch, by a team (Note [Teams] in
// unroll/layers.h). Rows are padded to whole vectors. Source: see there.
#pragma once

#include "rule/constants.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// Scratch memory for matrices of which the largest are so large.
struct OrthogonalSizes {
  Size wide = 0, tall = 0, small = 0;

  LOPT_BOTH void include(Size rows, Size columns) {
    const Size m = rows < columns ? rows : columns, n = rows < columns ? columns : rows;
    const auto at_least = [](Size& largest, Size size) { largest = largest < size ? size : largest; };
    at_least(wide, m * padded(n));
    at_least(tall, n * padded(m));
    at_least(small, m * padded(m));
  }
};

template <class Team>
struct Orthogonal {
  const Team team;
  float *x, *next, *transposed;  // [m, padded(n)], [m, padded(n)], [n, padded(m)]
  float *square, *factor;        // [m, padded(m)]

  template <class Arena>
  LOPT_BOTH Orthogonal(const Team& the_team, const OrthogonalSizes& sizes, Arena& arena)
      : team(the_team),
        x(arena.take(sizes.wide)),
        next(arena.take(sizes.wide)),
        transposed(arena.take(sizes.tall)),
        square(arena.take(sizes.small)),
        factor(arena.take(sizes.small)) {}

  // The norm of x [count].
  template <class Part>
  LOPT_TEAM static float norm(const Part& part, const float* x, Size count) {
    Vec sum{};
    part.vectors(count, [&](Size i) LOPT_INLINE { sum += load(x + i) * load(x + i); });
    return static_cast<float>(::sqrt(part.sum(sum)));
  }

  // The rows of x [m, n_padded] to one norm, about 1, or its columns; of norm `size`. scratch: [n_padded].
  LOPT_TEAM void even(float* x, Size m, Size n, bool columns, float size, float* scratch) const {
    const Size n_padded = padded(n);
    const float least = kLeastRow * size / ::sqrtf(static_cast<float>(columns ? n : m));
    const auto inverse = [&](float norm) LOPT_INLINE { return 1.0f / (norm < least ? least : norm); };
    if (columns) {
      team.column_sums(
          m, n_padded,
          [&](Size i, Size j, int, Vec& sum)
              LOPT_INLINE { sum += load(x + i * n_padded + j) * load(x + i * n_padded + j); },
          [&](Size j, int, Vec sum) LOPT_INLINE { store(scratch + j, sum); });
      team.sync();
      team.each(n_padded, [&](Size j) LOPT_INLINE { scratch[j] = inverse(::sqrtf(scratch[j])); });
      team.sync();
      team.grid(m, n_padded, [&](Size i, Size j, int) LOPT_INLINE {
        store(x + i * n_padded + j, load(x + i * n_padded + j) * load(scratch + j));
      });
    } else {
      team.parts(m, [&](Size i, const auto& part) LOPT_INLINE {
        float* const row = x + i * n_padded;
        const float factor = inverse(norm(part, row, n_padded));
        part.vectors(n_padded, [&](Size j) LOPT_INLINE { store(row + j, load(row + j) * factor); });
      });
    }
    team.sync();
  }

  // direction [rows, columns], in place, where the gate is open, and its rank, for all of the team. turned: its columns
  // belong to one output each, not its rows.
  LOPT_CALLED void run(float* direction, Size rows, Size columns, bool turned, float gate, int iterations,
                       float& rank) const {
    if (!(gate > 0)) return;
    const bool wider = rows <= columns;
    const Size m = wider ? rows : columns, n = wider ? columns : rows, n_padded = padded(n), m_padded = padded(m);
    const auto at = [&](Size i, Size j) LOPT_INLINE -> float& { return direction[wider ? i * n + j : j * m + i]; };
    team.table(m, n_padded, [&](Size i, Size j) LOPT_INLINE { x[i * n_padded + j] = j < n ? at(i, j) : 0.0f; });
    team.sync();
    float largest = 0.0f;  // squares of very small numbers would be 0
    team.each(m * n_padded, [&](Size i) LOPT_INLINE {
      const float size = ::fabsf(x[i]);
      largest = largest < size ? size : largest;
    });
    largest = team.largest(largest);
    rank = 0.0f;
    if (!(largest > 0)) return;
    const auto divide = [&](float by) LOPT_INLINE {
      team.vectors(m * n_padded, [&](Size i) LOPT_INLINE { store(x + i, load(x + i) / splat(by)); });
      team.sync();
    };
    divide(largest);
    const float size = norm(team, x, m * n_padded);
    divide(size);
    float *now = x, *then = next;
    for (int k = 0; k < iterations; ++k) {
      team.table(n, m_padded, [&](Size j, Size i) LOPT_INLINE {
        transposed[j * m_padded + i] = i < m ? now[i * n_padded + j] : 0.0f;
      });
      team.sync();
      product(team, m, m_padded, Factor{now, n_padded, 1, n}, transposed, nullptr, square);
      team.sync();
      product(team, m, m_padded, Factor{square, m_padded, 1, m}, square, nullptr, factor);
      team.sync();
      team.vectors(m * m_padded, [&](Size i) LOPT_INLINE {
        store(factor + i, load(square + i) * kNewtonSchulz3 + load(factor + i) * kNewtonSchulz5);
      });
      team.sync();
      product(team, m, n_padded, Factor{factor, m_padded, 1, m}, now, nullptr, then);
      team.sync();
      team.vectors(m * n_padded,
                   [&](Size i) LOPT_INLINE { store(then + i, load(now + i) * kNewtonSchulz1 + load(then + i)); });
      team.sync();
      float* const swapped = now;
      now = then;
      then = swapped;
    }
    const float before = norm(team, now, m * n_padded);
    rank = before * before / static_cast<float>(m);
    team.table(m, n, [&](Size i, Size j) LOPT_INLINE {
      if (at(i, j) == 0) now[i * n_padded + j] = 0.0f;  // what rests, stays
    });
    team.sync();
    const float moving = norm(team, now, m * n_padded);
    if (moving > 0) even(now, m, n, wider == turned, moving, then);
    const float whole = norm(team, now, m * n_padded);
    const float share = whole > 0 ? gate * largest * (size / whole) : 0.0f;
    team.table(
        m, n, [&](Size i, Size j) LOPT_INLINE { at(i, j) = (1.0f - gate) * at(i, j) + share * now[i * n_padded + j]; });
    team.sync();
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
