// Layers of the unroll engine beside dense ones, forward and backward: norms, tables, convolutions, pools, attention. Rows are
// padded to whole vectors, and what is written there stays zero.
#pragma once

#include <algorithm>
#include <cmath>

#include "unroll/dense.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// ---- Rows ---------------------------------------------------------------------------------------------------------------

// `count` values and zeros up to whole vectors; zeros only, where there are no values.
inline void pad(const float* values, int64_t count, float* to) {
  std::fill_n(to, padded(count), 0.0f);
  if (values) std::memcpy(to, values, count * sizeof(float));
}

inline void add(int64_t count, const float* from, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(to + i) + load(from + i));
}

inline void multiply(int64_t count, const float* factors, float* values) {
  for (int64_t i = 0; i < count; i += kLanes) store(values + i, load(values + i) * load(factors + i));
}

// sums[j] = sum over rows of values[row, j], times factors[row, j] if there are any.
inline void sum_products(int64_t rows, int64_t width, const float* values, const float* factors, float* sums) {
  const int64_t stride = padded(width);
  for_vectors(width, [&](int64_t j, int lanes) {
    Vec sum{};
    for (int64_t row = 0; row < rows; ++row) {
      const Vec value = load(values + row * stride + j);
      sum += factors ? value * load(factors + row * stride + j) : value;
    }
    store(sums + j, sum, lanes);
  });
}

inline void sum_rows(int64_t rows, int64_t width, const float* values, float* sums) {
  sum_products(rows, width, values, nullptr, sums);
}

// [in, padded(out)] -> [out, padded(in)]
inline void transpose(int64_t in, int64_t out, const float* from, float* to) {
  const int64_t in_padded = padded(in), out_padded = padded(out);
  for (int64_t j = 0; j < out; ++j)
    for (int64_t i = 0; i < in_padded; ++i) to[j * in_padded + i] = i < in ? from[i * out_padded + j] : 0.0f;
}

// ---- Norms --------------------------------------------------------------------------------------------------------------

constexpr float kNormEpsilon = 1e-5f;

// f(j, mask of the lanes within the width) for all vectors of a row
template <class Function>
void for_row(int64_t width, const Function& f) {
  for_vectors(width, [&](int64_t j, int lanes) { f(j, lanes == kLanes ? splat(1.0f) : lane_mask(lanes)); });
}

// n = (x - mean) scale, scale = 1 / sqrt(mean((x - mean)^2) + epsilon), y = n gain + bias; without `centred` the mean is 0.
inline void norm_forward(bool centred, int64_t rows, int64_t width, const float* x, const float* gain,
                         const float* bias, float* normed, float* scales, float* y) {
  const int64_t stride = padded(width);
  for (int64_t row = 0; row < rows; ++row, x += stride, normed += stride, y += stride) {
    float mean = 0.0f;
    if (centred) {
      Vec sum{};
      for_row(width, [&](int64_t j, Vec) { sum += load(x + j); });  // zeros beyond the width
      mean = static_cast<float>(sum_lanes(sum) / static_cast<double>(width));
    }
    Vec squares{};
    for_row(width, [&](int64_t j, Vec mask) {
      const Vec value = (load(x + j) - mean) * mask;
      store(normed + j, value);
      squares += value * value;
    });
    const float variance = static_cast<float>(sum_lanes(squares) / static_cast<double>(width));
    const float scale = scales[row] = 1.0f / std::sqrt(variance + kNormEpsilon);
    for_row(width, [&](int64_t j, Vec) {
      const Vec value = load(normed + j) * scale;
      store(normed + j, value);
      store(y + j, value * load(gain + j) + load(bias + j));
    });
  }
}

// With e = y' gain: x' = scale (e - mean(e) - n mean(e n)), without `centred` the first mean is 0.
inline void norm_backward(bool centred, int64_t rows, int64_t width, const float* y, const float* gain,
                          const float* normed, const float* scales, float* x) {
  const int64_t stride = padded(width);
  for (int64_t row = 0; row < rows; ++row, x += stride, normed += stride, y += stride) {
    Vec sum{}, along{};
    for_row(width, [&](int64_t j, Vec) {
      const Vec e = load(y + j) * load(gain + j);
      sum += e;
      along += e * load(normed + j);
    });
    const float mean = centred ? static_cast<float>(sum_lanes(sum) / static_cast<double>(width)) : 0.0f;
    const float share = static_cast<float>(sum_lanes(along) / static_cast<double>(width)), scale = scales[row];
    for_row(width, [&](int64_t j, Vec mask) {
      const Vec e = load(y + j) * load(gain + j);
      store(x + j, scale * (e - mean - load(normed + j) * share) * mask);
    });
  }
}

// ---- Tables -------------------------------------------------------------------------------------------------------------

// y[row] = the rows of `table` [*, width] that `symbols` [rows, count] name, one after the other
inline void embed_forward(int64_t rows, int64_t count, int64_t width, const float* table, const int64_t* symbols,
                          float* y) {
  const int64_t stride = padded(count * width);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(y + row * stride + i * width, table + symbols[row * count + i] * width, width * sizeof(float));
}

// Adds to grad [*, width].
inline void embed_backward(int64_t rows, int64_t count, int64_t width, const float* y, const int64_t* symbols,
                           float* grad) {
  const int64_t stride = padded(count * width);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < count; ++i) {
      float* to = grad + symbols[row * count + i] * width;
      const float* from = y + row * stride + i * width;
      for_vectors(width,
                  [&](int64_t j, int lanes) { store(to + j, load(to + j, lanes) + load(from + j, lanes), lanes); });
    }
}

// y[row] += table[row % places]
inline void positions_forward(int64_t rows, int64_t places, int64_t width, const float* table, float* y) {
  const int64_t stride = padded(width);
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = table + row % places * width;
    for_vectors(width, [&](int64_t j, int lanes) {
      store(y + row * stride + j, load(y + row * stride + j) + load(from + j, lanes));
    });
  }
}

inline void positions_backward(int64_t batch, int64_t places, int64_t width, const float* y, float* grad) {
  const int64_t stride = padded(width);
  for (int64_t place = 0; place < places; ++place)
    for_vectors(width, [&](int64_t j, int lanes) {
      Vec sum{};
      for (int64_t b = 0; b < batch; ++b) sum += load(y + (b * places + place) * stride + j);
      store(grad + place * width + j, sum, lanes);
    });
}

// ---- Convolutions over squares of places --------------------------------------------------------------------------------

inline int64_t side_of(int64_t places) {
  int64_t side = 1;
  while (side * side < places) ++side;
  return side;
}

inline int64_t planes_size(int64_t batch, int64_t places, int64_t channels) {
  const int64_t side = side_of(places) + 2;
  return batch * side * side * channels;
}

// Images [batch * places, padded(channels)] with a margin of zeros: [batch, side + 2, side + 2, channels].
inline void fill_planes(int64_t batch, int64_t places, int64_t channels, const float* x, float* planes) {
  const int64_t side = side_of(places), row = (side + 2) * channels, stride = padded(channels);
  std::fill_n(planes, planes_size(batch, places, channels), 0.0f);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < side; ++i) {
      float* to = planes + (b * (side + 2) + i + 1) * row + channels;
      for (int64_t j = 0; j < side; ++j, x += stride)
        for (int64_t c = 0; c < channels; ++c) *to++ = x[c];
    }
}

// y [batch * places, padded(out)] = bias + sum over 3 x 3 neighbours; weight [3, 3, in, padded(out)]. The neighbours of one
// row of the kernel, three times `in` numbers, lie one after the other.
inline void convolve(int64_t batch, int64_t places, int64_t in, int64_t out, const float* planes, const float* weight,
                     const float* bias, float* y) {
  const int64_t side = side_of(places), row = (side + 2) * in, out_padded = padded(out);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < side; ++i) {
      const Factor neighbours{planes + (b * (side + 2) + i) * row, in, 1, 3 * in, 3, row};
      product(side, out_padded, neighbours, weight, bias, y + (b * places + i * side) * out_padded);
    }
}

// grad [3, 3, in, padded(out)] = sum over all places of neighbours times y
inline void kernel_gradient(int64_t batch, int64_t places, int64_t in, int64_t out, const float* planes, const float* y,
                            float* grad) {
  const int64_t side = side_of(places), row = (side + 2) * in, out_padded = padded(out);
  std::fill_n(grad, 9 * in * out_padded, 0.0f);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < 3; ++k) {
      const Factor pixels{planes + (b * (side + 2) + k) * row, 1, in, side, side, row};
      product<true>(3 * in, out_padded, pixels, y + b * places * out_padded, nullptr, grad + k * 3 * in * out_padded);
    }
}

// [out, in, 3, 3] -> [3, 3, in, padded(out)]; the padding stays as it is.
inline void pack_kernel(int64_t in, int64_t out, const float* kernel, float* weight) {
  const int64_t out_padded = padded(out);
  for (int64_t j = 0; j < out; ++j)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t k = 0; k < 9; ++k) weight[(k * in + i) * out_padded + j] = kernel[(j * in + i) * 9 + k];
}

inline void unpack_kernel(int64_t in, int64_t out, const float* weight, float* kernel) {
  const int64_t out_padded = padded(out);
  for (int64_t j = 0; j < out; ++j)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t k = 0; k < 9; ++k) kernel[(j * in + i) * 9 + k] = weight[(k * in + i) * out_padded + j];
}

// [3, 3, in, padded(out)] -> [3, 3, out, padded(in)] with both sides of the kernel reversed: the gradient of what a
// convolution is given is a convolution by this.
inline void turn_kernel(int64_t in, int64_t out, const float* weight, float* turned) {
  const int64_t size = in * padded(out), turned_size = out * padded(in);
  for (int64_t k = 0; k < 9; ++k) transpose(in, out, weight + (8 - k) * size, turned + k * turned_size);
}

// ---- Pools --------------------------------------------------------------------------------------------------------------

// f(place, first of its four places before) for all places of all images; `places` is that before.
template <class Function>
void for_pools(int64_t batch, int64_t places, const Function& f) {
  const int64_t side = side_of(places), half = side / 2;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < half; ++i)
      for (int64_t j = 0; j < half; ++j) f((b * half + i) * half + j, b * places + 2 * i * side + 2 * j);
}

// `chosen`: which of the four is the largest, the first of equal ones.
inline void pool_forward(bool largest, int64_t batch, int64_t places, int64_t channels, const float* x, float* y,
                         float* chosen) {
  const int64_t stride = padded(channels), side = side_of(places);
  const int64_t steps[4] = {0, stride, side * stride, (side + 1) * stride};
  for_pools(batch, places, [&](int64_t place, int64_t first) {
    for (int64_t c = 0; c < stride; c += kLanes) {
      const float* from = x + first * stride + c;
      Vec value = load(from), which{};
      for (int k = 1; k < 4; ++k) {
        const Vec other = load(from + steps[k]);
        if (largest) {
          which = other > value ? splat(static_cast<float>(k)) : which;
          value = max_of(value, other);
        } else {
          value += other;
        }
      }
      store(y + place * stride + c, largest ? value : 0.25f * value);
      store(chosen + place * stride + c, which);
    }
  });
}

inline void pool_backward(bool largest, int64_t batch, int64_t places, int64_t channels, const float* y,
                          const float* chosen, float* x) {
  const int64_t stride = padded(channels), side = side_of(places);
  const int64_t steps[4] = {0, stride, side * stride, (side + 1) * stride};
  for_pools(batch, places, [&](int64_t place, int64_t first) {
    for (int64_t c = 0; c < stride; c += kLanes) {
      const Vec value = load(y + place * stride + c), which = load(chosen + place * stride + c);
      for (int k = 0; k < 4; ++k)
        store(x + first * stride + c + steps[k],
              largest ? (which == static_cast<float>(k) ? value : Vec{}) : 0.25f * value);
    }
  });
}

inline void mean_forward(int64_t batch, int64_t places, int64_t width, const float* x, float* y) {
  const int64_t stride = padded(width);
  const float share = 1.0f / static_cast<float>(places);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < stride; j += kLanes) {
      Vec sum{};
      for (int64_t place = 0; place < places; ++place) sum += load(x + (b * places + place) * stride + j);
      store(y + b * stride + j, share * sum);
    }
}

inline void mean_backward(int64_t batch, int64_t places, int64_t width, const float* y, float* x) {
  const int64_t stride = padded(width);
  const float share = 1.0f / static_cast<float>(places);
  for (int64_t row = 0; row < batch * places; ++row)
    for (int64_t j = 0; j < stride; j += kLanes)
      store(x + row * stride + j, share * load(y + row / places * stride + j));
}

// [batch * places, padded(channels)] -> [batch, padded(channels * places)], channel by channel
inline void flatten_forward(int64_t batch, int64_t places, int64_t channels, const float* x, float* y) {
  const int64_t from = padded(channels), to = padded(channels * places);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t place = 0; place < places; ++place)
      for (int64_t c = 0; c < channels; ++c) y[b * to + c * places + place] = x[(b * places + place) * from + c];
}

inline void flatten_backward(int64_t batch, int64_t places, int64_t channels, const float* y, float* x) {
  const int64_t from = padded(channels), to = padded(channels * places);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t place = 0; place < places; ++place)
      for (int64_t c = 0; c < channels; ++c) x[(b * places + place) * from + c] = y[b * to + c * places + place];
}

// ---- Attention ----------------------------------------------------------------------------------------------------------

// Causal attention of one head after the other; memory for one head of one sequence.
struct AttentionScratch {
  int64_t places = 0, head = 0;              // largest
  float *query, *key, *value, *output;       // [places, padded(head)]
  float *key_transposed, *value_transposed;  // [head, padded(places)]
  float* score;                              // [places, padded(places)]

  void require(int64_t some_places, int64_t some_head) {
    places = std::max(places, some_places);
    head = std::max(head, some_head);
  }

  void take(Arena& arena) {
    for (float** part : {&query, &key, &value, &output}) *part = arena.take(places * padded(head));
    for (float** part : {&key_transposed, &value_transposed}) *part = arena.take(head * padded(places));
    score = arena.take(places * padded(places));
  }

  // [count, width] at `from`, in rows of `stride`, to rows that are padded.
  static void copy_in(int64_t count, int64_t width, const float* from, int64_t stride, float* to) {
    for (int64_t i = 0; i < count; ++i) pad(from + i * stride, width, to + i * padded(width));
  }

  static void copy_out(int64_t count, int64_t width, const float* from, float* to, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + i * padded(width), width * sizeof(float));
  }

  static void transpose_in(int64_t count, int64_t width, const float* from, int64_t stride, float* to) {
    for (int64_t j = 0; j < width; ++j)
      for (int64_t i = 0; i < padded(count); ++i) to[j * padded(count) + i] = i < count ? from[i * stride + j] : 0.0f;
  }

  // x [batch * count, padded(3 width)]: queries, keys, values of all heads; `weights`: [batch, heads, count, padded(count)]
  void forward(int64_t batch, int64_t count, int64_t heads, int64_t width, const float* x, float* weights, float* y) {
    const int64_t size = width / heads, in = padded(3 * width), out = padded(width), row = padded(count);
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h, weights += count * row) {
        const float* q = x + b * count * in + h * size;
        transpose_in(count, size, q + width, in, key_transposed);
        copy_in(count, size, q + 2 * width, in, value);
        product(count, row, size, q, in, 1, key_transposed, nullptr, weights);
        for (int64_t i = 0; i < count; ++i) softmax(i + 1, row, scale, weights + i * row);
        product(count, padded(size), count, weights, row, 1, value, nullptr, output);
        copy_out(count, size, output, y + b * count * out + h * size, out);
      }
  }

  void backward(int64_t batch, int64_t count, int64_t heads, int64_t width, const float* y, const float* weights,
                float* x) {
    const int64_t size = width / heads, in = padded(3 * width), out = padded(width), row = padded(count);
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h, weights += count * row) {
        float* q = x + b * count * in + h * size;
        copy_in(count, size, q, in, query);
        copy_in(count, size, q + width, in, key);
        transpose_in(count, size, q + 2 * width, in, value_transposed);
        copy_in(count, size, y + b * count * out + h * size, out, output);
        product(count, row, size, output, padded(size), 1, value_transposed, nullptr, score);
        product(count, padded(size), count, weights, 1, row, output, nullptr, value);  // gradient of the values
        for (int64_t i = 0; i < count; ++i) {
          Vec sum{};
          for (int64_t j = 0; j < row; j += kLanes) sum += load(score + i * row + j) * load(weights + i * row + j);
          const float mean = static_cast<float>(sum_lanes(sum));
          for (int64_t j = 0; j < row; j += kLanes)
            store(score + i * row + j, scale * (load(score + i * row + j) - mean) * load(weights + i * row + j));
        }
        copy_out(count, size, value, q + 2 * width, in);
        product(count, padded(size), count, score, row, 1, key, nullptr, output);
        copy_out(count, size, output, q, in);
        product(count, padded(size), count, score, 1, row, query, nullptr, output);
        copy_out(count, size, output, q + width, in);
      }
  }

  // The first `seen` of a padded row become their softmax, the others zero.
  static void softmax(int64_t seen, int64_t row_padded, float scale, float* row) {
    float highest = row[0];
    for (int64_t j = 1; j < seen; ++j) highest = highest < row[j] ? row[j] : highest;
    double sum = 0.0;
    for (int64_t j = 0; j < row_padded; j += kLanes) {
      const int64_t left = seen - j;
      const Vec mask = left >= kLanes ? splat(1.0f) : left > 0 ? lane_mask(static_cast<int>(left)) : Vec{};
      const Vec e = exp_of(min_of((load(row + j) - highest) * scale, Vec{})) * mask;
      store(row + j, e);
      sum += sum_lanes(e);
    }
    const float share = static_cast<float>(1.0 / sum);
    for (int64_t j = 0; j < row_padded; j += kLanes) store(row + j, load(row + j) * share);
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
