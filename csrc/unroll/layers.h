// Layers of the unroll engine beside dense ones, forward and backward: norms, tables, convolutions, pools, attention. Rows are
// padded to whole vectors, and what is written there stays zero.
//
// Note [Teams]
// What takes a `team` is computed by one CPU thread on SIMD vectors (cpu/alone.h), or by a CUDA block or one of its warps
// on floats, which are vectors of one lane (cuda/unroll_team.cuh). Either header comes before this one, and brings Vec, Size
// and `product`. A function is called by the whole team, and what it wrote is there for all of the team when it returns. A team
// has:
//   each(n, f)          f(i) for all i < n
//   table, cells        f(i, j), and f(b, i, j, c), over two and four indices
//   vectors(n, f)       f(i) for the first of every vector; n is a whole number of vectors
//   lanes(n, f)         f(i, lanes) likewise, where the last vector may have fewer lanes
//   grid(rows, n, f)    f(row, i, lanes) in every row
//   parts(n, f)         f(i, part) by parts of the team, of which there are kParts; part.part() is which
//   sum, largest        of what every member brings, for all
//   column_sums(rows, n, value, finish)    value(row, i, lanes, sum) adds to the sums of lanes from i on, finish(i, lanes, sum)
//   copy, zero, copy_rows
//   look_up, add_up     rows of a table to rows of values, and back: each is added in the order of the values
//   rank, sync
// Of what each, table, cells, vectors, lanes and grid do, other members know after `sync` only.
#pragma once

#include "unroll/dense.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// ---- Rows ---------------------------------------------------------------------------------------------------------------

// Rows of `count` values and zeros up to whole vectors.
template <class Team>
LOPT_TEAM void pad_rows(const Team& team, Size rows, Size count, const float* from, Size stride, float* to) {
  if (padded(count) != count) team.zero(rows * padded(count), to);
  team.copy_rows(rows, count, from, stride, to, padded(count));
}

template <class Team>
LOPT_CALLED void add(const Team& team, Size count, const float* from, float* to) {
  team.vectors(count, [&](Size i) LOPT_INLINE { store(to + i, load(to + i) + load(from + i)); });
  team.sync();
}

template <class Team>
LOPT_CALLED void multiply(const Team& team, Size count, const float* factors, float* values) {
  team.vectors(count, [&](Size i) LOPT_INLINE { store(values + i, load(values + i) * load(factors + i)); });
  team.sync();
}

// sums[j] = sum over rows of values[row, j], times factors[row, j] if there are any.
template <class Team>
LOPT_CALLED void sum_products(const Team& team, Size rows, Size width, const float* values, const float* factors,
                              float* sums) {
  const Size stride = padded(width);
  team.column_sums(
      rows, width,
      [&](Size row, Size j, int, Vec& sum) LOPT_INLINE {
        const Vec value = load(values + row * stride + j);
        sum += factors ? value * load(factors + row * stride + j) : value;
      },
      [&](Size j, int lanes, Vec sum) LOPT_INLINE { store(sums + j, sum, lanes); });
  team.sync();
}

template <class Team>
LOPT_TEAM void sum_rows_of(const Team& team, Size rows, Size width, const float* values, float* sums) {
  sum_products(team, rows, width, values, nullptr, sums);
}

// [in, padded(out)] -> [out, padded(in)]
template <class Team>
LOPT_CALLED void transpose(const Team& team, Size in, Size out, const float* from, float* to) {
  const Size in_padded = padded(in), out_padded = padded(out);
  team.table(out, in_padded,
             [&](Size j, Size i) LOPT_INLINE { to[j * in_padded + i] = i < in ? from[i * out_padded + j] : 0.0f; });
  team.sync();
}

// ---- Norms --------------------------------------------------------------------------------------------------------------

constexpr float kNormEpsilon = 1e-5f;

// Which of `lanes` are within a row.
LOPT_HD Vec mask_of(int lanes) { return lanes == kLanes ? splat(1.0f) : lane_mask(lanes); }

// n = (x - mean) scale, scale = 1 / sqrt(mean((x - mean)^2) + epsilon), y = n gain + bias; without `centred` the mean is 0, and
// without a bias that.
template <class Team>
LOPT_CALLED void norm_forward(const Team& team, bool centred, Size rows, Size width, const float* all_x,
                              const float* gain, const float* bias, float* all_normed, float* scales, float* all_y) {
  const Size stride = padded(width);
  team.parts(rows, [&](Size row, const auto& part) LOPT_INLINE {
    const float* const x = all_x + row * stride;
    float *const normed = all_normed + row * stride, *const y = all_y + row * stride;
    float mean = 0.0f;
    if (centred) {
      Vec sum{};
      part.lanes(width, [&](Size j, int) LOPT_INLINE { sum += load(x + j); });  // zeros beyond the width
      mean = static_cast<float>(part.sum(sum) / static_cast<double>(width));
    }
    Vec squares{};
    part.lanes(width, [&](Size j, int lanes) LOPT_INLINE {
      const Vec value = (load(x + j) - mean) * mask_of(lanes);
      store(normed + j, value);
      squares += value * value;
    });
    const float variance = static_cast<float>(part.sum(squares) / static_cast<double>(width));
    const float scale = 1.0f / ::sqrtf(variance + kNormEpsilon);
    if (part.rank() == 0) scales[row] = scale;
    part.lanes(width, [&](Size j, int) LOPT_INLINE {
      const Vec value = load(normed + j) * scale;
      store(normed + j, value);
      store(y + j, kLanes > 1 || bias ? value * load(gain + j) + load(bias + j) : value * load(gain + j));
    });
  });
  team.sync();
}

// With e = y' gain: x' = scale (e - mean(e) - n mean(e n)), without `centred` the first mean is 0.
template <class Team>
LOPT_CALLED void norm_backward(const Team& team, bool centred, Size rows, Size width, const float* all_y,
                               const float* gain, const float* all_normed, const float* scales, float* all_x) {
  const Size stride = padded(width);
  team.parts(rows, [&](Size row, const auto& part) LOPT_INLINE {
    const float *const y = all_y + row * stride, *const normed = all_normed + row * stride;
    float* const x = all_x + row * stride;
    Vec sum{}, along{};
    part.lanes(width, [&](Size j, int) LOPT_INLINE {
      const Vec e = load(y + j) * load(gain + j);
      sum += e;
      along += e * load(normed + j);
    });
    const float mean = centred ? static_cast<float>(part.sum(sum) / static_cast<double>(width)) : 0.0f;
    const float share = static_cast<float>(part.sum(along) / static_cast<double>(width)), scale = scales[row];
    part.lanes(width, [&](Size j, int lanes) LOPT_INLINE {
      const Vec e = load(y + j) * load(gain + j);
      store(x + j, scale * (e - mean - load(normed + j) * share) * mask_of(lanes));
    });
  });
  team.sync();
}

// ---- Tables -------------------------------------------------------------------------------------------------------------

// y[row] += table[row % places]
template <class Team>
LOPT_CALLED void positions_forward(const Team& team, Size batch, Size places, Size width, const float* table,
                                   float* y) {
  const Size stride = padded(width);
  team.parts(batch * places, [&](Size row, const auto& part) LOPT_INLINE {
    const float* from = table + row % places * width;
    part.lanes(width, [&](Size j, int lanes) LOPT_INLINE {
      store(y + row * stride + j, load(y + row * stride + j) + load(from + j, lanes));
    });
  });
  team.sync();
}

template <class Team>
LOPT_CALLED void positions_backward(const Team& team, Size batch, Size places, Size width, const float* y,
                                    float* grad) {
  const Size stride = padded(width);
  team.grid(places, width, [&](Size place, Size j, int lanes) LOPT_INLINE {
    Vec sum{};
    for (Size b = 0; b < batch; ++b) sum += load(y + (b * places + place) * stride + j);
    store(grad + place * width + j, sum, lanes);
  });
  team.sync();
}

// ---- Convolutions over squares of places --------------------------------------------------------------------------------

LOPT_HD Size side_of(Size places) {
  Size side = 1;
  while (side * side < places) ++side;
  return side;
}

LOPT_HD Size planes_size(Size batch, Size places, Size channels) {
  const Size side = side_of(places) + 2;
  return batch * side * side * channels;
}

// Images [batch * places, padded(channels)] with a margin of zeros: [batch, side + 2, side + 2, channels].
template <class Team>
LOPT_CALLED void fill_planes(const Team& team, Size batch, Size places, Size channels, const float* x, float* planes) {
  const Size side = side_of(places), row = (side + 2) * channels, stride = padded(channels);
  team.zero(planes_size(batch, places, channels), planes);
  team.sync();
  team.cells(batch, side, side, channels, [&](Size b, Size i, Size j, Size c) LOPT_INLINE {
    planes[(b * (side + 2) + i + 1) * row + (j + 1) * channels + c] = x[((b * side + i) * side + j) * stride + c];
  });
  team.sync();
}

// y [batch * places, padded(out)] = bias + sum over 3 x 3 neighbours; weight [3, 3, in, padded(out)]. The neighbours of one
// row of the kernel, three times `in` numbers, lie one after the other.
template <class Team>
LOPT_CALLED void convolve(const Team& team, Size batch, Size places, Size in, Size out, const float* planes,
                          const float* weight, const float* bias, float* y) {
  const Size side = side_of(places), row = (side + 2) * in, out_padded = padded(out);
  team.parts(batch * side, [&](Size line, const auto& part) LOPT_INLINE {
    const Factor neighbours{planes + (line / side * (side + 2) + line % side) * row, in, 1, 3 * in, 3, row};
    product(part, side, out_padded, neighbours, weight, bias, y + line * side * out_padded);
  });
  team.sync();
}

// grad [3, 3, in, padded(out)] = sum over all places of neighbours times y
template <class Team>
LOPT_CALLED void kernel_gradient(const Team& team, Size batch, Size places, Size in, Size out, const float* planes,
                                 const float* y, float* grad) {
  const Size side = side_of(places), row = (side + 2) * in, out_padded = padded(out);
  team.zero(9 * in * out_padded, grad);
  team.sync();
  for (Size b = 0; b < batch; ++b)
    for (Size k = 0; k < 3; ++k) {  // numbers belong to the same members in all products
      const Factor pixels{planes + (b * (side + 2) + k) * row, 1, in, side, side, row};
      product<true>(team, 3 * in, out_padded, pixels, y + b * places * out_padded, nullptr,
                    grad + k * 3 * in * out_padded);
    }
  team.sync();
}

// [out, in, 3, 3] -> [3, 3, in, padded(out)]; the padding stays as it is.
template <class Team>
LOPT_CALLED void pack_kernel(const Team& team, Size in, Size out, const float* kernel, float* weight) {
  const Size out_padded = padded(out);
  team.cells(1, out, in, 9, [&](Size, Size j, Size i, Size k) LOPT_INLINE {
    weight[(k * in + i) * out_padded + j] = kernel[(j * in + i) * 9 + k];
  });
  team.sync();
}

template <class Team>
LOPT_CALLED void unpack_kernel(const Team& team, Size in, Size out, const float* weight, float* kernel) {
  const Size out_padded = padded(out);
  team.cells(1, out, in, 9, [&](Size, Size j, Size i, Size k) LOPT_INLINE {
    kernel[(j * in + i) * 9 + k] = weight[(k * in + i) * out_padded + j];
  });
  team.sync();
}

// [3, 3, in, padded(out)] -> [3, 3, out, padded(in)] with both sides of the kernel reversed: the gradient of what a
// convolution is given is a convolution by this.
template <class Team>
LOPT_CALLED void turn_kernel(const Team& team, Size in, Size out, const float* weight, float* turned) {
  const Size in_padded = padded(in), out_padded = padded(out);
  team.cells(1, 9, out, in_padded, [&](Size, Size k, Size j, Size i) LOPT_INLINE {
    turned[(k * out + j) * in_padded + i] = i < in ? weight[((8 - k) * in + i) * out_padded + j] : 0.0f;
  });
  team.sync();
}

// ---- Pools --------------------------------------------------------------------------------------------------------------

// f(vector of a place, that of the first of its four places before) for all places of all images; `places` is that before.
template <class Team, class Function>
LOPT_TEAM void for_pools(const Team& team, Size batch, Size places, Size stride, const Function& f) {
  const Size side = side_of(places), half = side / 2;
  team.cells(batch, half, half, stride / kLanes, [&](Size b, Size i, Size j, Size v) LOPT_INLINE {
    f(((b * half + i) * half + j) * stride + v * kLanes, (b * places + 2 * i * side + 2 * j) * stride + v * kLanes);
  });
  team.sync();
}

// `chosen`: which of the four is the largest, the first of equal ones.
template <class Team>
LOPT_CALLED void pool_forward(const Team& team, bool largest, Size batch, Size places, Size channels, const float* x,
                              float* y, float* chosen) {
  const Size stride = padded(channels), line = side_of(places) * stride;
  for_pools(team, batch, places, stride, [&](Size place, Size first) LOPT_INLINE {
    Vec value = load(x + first), which{};
    LOPT_UNROLL
    for (int k = 1; k < 4; ++k) {
      const Vec other = load(x + first + k % 2 * stride + k / 2 * line);
      if (largest) {
        which = other > value ? splat(static_cast<float>(k)) : which;
        value = max_of(value, other);
      } else {
        value += other;
      }
    }
    store(y + place, largest ? value : 0.25f * value);
    store(chosen + place, which);
  });
}

template <class Team>
LOPT_CALLED void pool_backward(const Team& team, bool largest, Size batch, Size places, Size channels, const float* y,
                               const float* chosen, float* x) {
  const Size stride = padded(channels), line = side_of(places) * stride;
  for_pools(team, batch, places, stride, [&](Size place, Size first) LOPT_INLINE {
    const Vec value = load(y + place), which = load(chosen + place);
    LOPT_UNROLL
    for (int k = 0; k < 4; ++k)
      store(x + first + k % 2 * stride + k / 2 * line,
            largest ? (which == static_cast<float>(k) ? value : Vec{}) : 0.25f * value);
  });
}

template <class Team>
LOPT_CALLED void mean_forward(const Team& team, Size batch, Size places, Size width, const float* x, float* y) {
  const Size stride = padded(width);
  const float share = 1.0f / static_cast<float>(places);
  team.grid(batch, stride, [&](Size b, Size j, int) LOPT_INLINE {
    Vec sum{};
    for (Size place = 0; place < places; ++place) sum += load(x + (b * places + place) * stride + j);
    store(y + b * stride + j, share * sum);
  });
  team.sync();
}

template <class Team>
LOPT_CALLED void mean_backward(const Team& team, Size batch, Size places, Size width, const float* y, float* x) {
  const Size stride = padded(width);
  const float share = 1.0f / static_cast<float>(places);
  team.cells(1, batch, places, stride / kLanes, [&](Size, Size b, Size place, Size v) LOPT_INLINE {
    store(x + (b * places + place) * stride + v * kLanes, share * load(y + b * stride + v * kLanes));
  });
  team.sync();
}

// [batch * places, padded(channels)] -> [batch, padded(channels * places)], channel by channel
template <class Team>
LOPT_CALLED void flatten_forward(const Team& team, Size batch, Size places, Size channels, const float* x, float* y) {
  const Size from = padded(channels), to = padded(channels * places);
  team.cells(1, batch, places, channels, [&](Size, Size b, Size place, Size c) LOPT_INLINE {
    y[b * to + c * places + place] = x[(b * places + place) * from + c];
  });
  team.sync();
}

template <class Team>
LOPT_CALLED void flatten_backward(const Team& team, Size batch, Size places, Size channels, const float* y, float* x) {
  const Size from = padded(channels), to = padded(channels * places);
  team.cells(1, batch, places, channels, [&](Size, Size b, Size place, Size c) LOPT_INLINE {
    x[(b * places + place) * from + c] = y[b * to + c * places + place];
  });
  team.sync();
}

// ---- Attention ----------------------------------------------------------------------------------------------------------

// The first `seen` of a padded row become their softmax, the others zero.
template <class Team>
LOPT_TEAM void softmax(const Team& team, Size seen, Size row_padded, float scale, float* row) {
  float highest = row[0];
  team.each(seen, [&](Size j) LOPT_INLINE { highest = highest < row[j] ? row[j] : highest; });
  highest = team.largest(highest);
  team.sync();
  double sum = 0.0;
  team.vectors(row_padded, [&](Size j) LOPT_INLINE {
    const Size left = seen - j;
    const Vec mask = left >= kLanes ? splat(1.0f) : left > 0 ? lane_mask(static_cast<int>(left)) : Vec{};
    const Vec e = exp_of(min_of((load(row + j) - highest) * scale, Vec{})) * mask;
    store(row + j, e);
    sum += sum_lanes(e);
  });
  const float share = static_cast<float>(1.0 / team.sum(sum));
  team.vectors(row_padded, [&](Size j) LOPT_INLINE { store(row + j, load(row + j) * share); });
}

// Causal attention; memory of every part of the team for one head of one sequence.
struct AttentionScratch {
  Size places = 0, head = 0;                 // largest
  float *query, *key, *value, *output;       // [places, padded(head)]
  float *key_transposed, *value_transposed;  // [head, padded(places)]
  float* score;                              // [places, padded(places)]

  LOPT_BOTH void require(Size some_places, Size some_head) {
    places = places < some_places ? some_places : places;
    head = head < some_head ? some_head : head;
  }

  template <class Arena>
  LOPT_BOTH void take(Size parts, Arena& arena) {
    query = arena.take(parts * places * padded(head));
    key = arena.take(parts * places * padded(head));
    value = arena.take(parts * places * padded(head));
    output = arena.take(parts * places * padded(head));
    key_transposed = arena.take(parts * head * padded(places));
    value_transposed = arena.take(parts * head * padded(places));
    score = arena.take(parts * places * padded(places));
  }

  // That of one part.
  LOPT_BOTH AttentionScratch of(Size part) const {
    AttentionScratch mine = *this;
    const Size rows = part * places * padded(head), columns = part * head * padded(places);
    mine.query += rows, mine.key += rows, mine.value += rows, mine.output += rows;
    mine.key_transposed += columns, mine.value_transposed += columns;
    mine.score += part * places * padded(places);
    return mine;
  }
};

// [count, width] at `from`, in rows of `stride` -> [width, padded(count)]
template <class Team>
LOPT_TEAM void transpose_in(const Team& team, Size count, Size width, const float* from, Size stride, float* to) {
  team.table(width, padded(count),
             [&](Size j, Size i) LOPT_INLINE { to[j * padded(count) + i] = i < count ? from[i * stride + j] : 0.0f; });
}

// x [batch * count, padded(3 width)]: queries, keys, values of all heads; `weights`: [batch, heads, count, padded(count)]
template <class Team>
LOPT_CALLED void attention_forward(const Team& team, const AttentionScratch& scratch, Size batch, Size count,
                                   Size heads, Size width, const float* x, float* all_weights, float* y) {
  const Size size = width / heads, in = padded(3 * width), out = padded(width), row = padded(count);
  const float scale = 1.0f / ::sqrtf(static_cast<float>(size));
  team.parts(batch * heads, [&](Size head, const auto& part) LOPT_INLINE {
    const AttentionScratch mine = scratch.of(part.part());
    const Size b = head / heads, h = head % heads;
    float* const weights = all_weights + head * count * row;
    const float* const q = x + b * count * in + h * size;
    transpose_in(part, count, size, q + width, in, mine.key_transposed);
    pad_rows(part, count, size, q + 2 * width, in, mine.value);
    part.sync();
    product(part, count, row, Factor{q, in, 1, size}, mine.key_transposed, nullptr, weights);
    part.sync();
    for (Size i = 0; i < count; ++i) softmax(part, i + 1, row, scale, weights + i * row);
    part.sync();
    product(part, count, padded(size), Factor{weights, row, 1, count}, mine.value, nullptr, mine.output);
    part.sync();
    part.copy_rows(count, size, mine.output, padded(size), y + b * count * out + h * size, out);
    part.sync();
  });
  team.sync();
}

template <class Team>
LOPT_CALLED void attention_backward(const Team& team, const AttentionScratch& scratch, Size batch, Size count,
                                    Size heads, Size width, const float* y, const float* all_weights, float* x) {
  const Size size = width / heads, in = padded(3 * width), out = padded(width), row = padded(count);
  const float scale = 1.0f / ::sqrtf(static_cast<float>(size));
  team.parts(batch * heads, [&](Size head, const auto& part) LOPT_INLINE {
    const AttentionScratch mine = scratch.of(part.part());
    const Size b = head / heads, h = head % heads;
    const float* const weights = all_weights + head * count * row;
    float* const q = x + b * count * in + h * size;
    float* const score = mine.score;
    pad_rows(part, count, size, q, in, mine.query);
    pad_rows(part, count, size, q + width, in, mine.key);
    transpose_in(part, count, size, q + 2 * width, in, mine.value_transposed);
    pad_rows(part, count, size, y + b * count * out + h * size, out, mine.output);
    part.sync();
    product(part, count, row, Factor{mine.output, padded(size), 1, size}, mine.value_transposed, nullptr, score);
    // gradient of the values
    product(part, count, padded(size), Factor{weights, 1, row, count}, mine.output, nullptr, mine.value);
    part.sync();
    for (Size i = 0; i < count; ++i) {
      Vec sum{};
      part.vectors(row, [&](Size j) LOPT_INLINE { sum += load(score + i * row + j) * load(weights + i * row + j); });
      const float mean = static_cast<float>(part.sum(sum));
      part.vectors(row, [&](Size j) LOPT_INLINE {
        store(score + i * row + j, scale * (load(score + i * row + j) - mean) * load(weights + i * row + j));
      });
    }
    part.copy_rows(count, size, mine.value, padded(size), q + 2 * width, in);
    part.sync();
    product(part, count, padded(size), Factor{score, row, 1, count}, mine.key, nullptr, mine.output);
    part.sync();
    part.copy_rows(count, size, mine.output, padded(size), q, in);
    part.sync();
    product(part, count, padded(size), Factor{score, 1, row, count}, mine.query, nullptr, mine.output);
    part.sync();
    part.copy_rows(count, size, mine.output, padded(size), q + width, in);
    part.sync();
  });
  team.sync();
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
