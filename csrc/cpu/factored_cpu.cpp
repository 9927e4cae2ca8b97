// Steps of learned optimizers of others on the CPU, by the phases of api/factored.h: all tensors, in tiles over threads.
// Compiled once per instruction set; cpu_dispatch.cpp picks. Order of summation: float within a run of 32 vectors, or 16
// lines, double between them, and tiles in their order: results do not depend on the number of threads.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/numbers.h"
// It includes simd.h, which comes first: see there.
#include "api/factored.h"
#include "cpu/threads.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

constexpr int64_t kRun = 32 * kLanes;  // elements that are read and summed at once
constexpr int64_t kSummedLines = 16;   // in float

// f(at, count) for runs of contiguous elements of a tile, from element `at` of the tensor on.
template <class Function>
void for_runs(const Lines& lines, const Tile& tile, const Function& f) {
  const Extent extent(lines.tensor, tile);
  const int64_t size = lines.size();
  const bool together = extent.width == size;  // its lines follow each other
  const int64_t count = together ? extent.lines * size : extent.width;
  for (int64_t line = 0; line < (together ? 1 : extent.lines); ++line) {
    const int64_t first = (tile.line + line) * size + tile.begin;
    for (int64_t begin = 0; begin < count; begin += kRun) f(first + begin, std::min(kRun, count - begin));
  }
}

// The first `lanes` lanes of x, 0 in the others.
LOPT_HD Vec masked(Vec x, int lanes) { return lanes < kLanes ? x * lane_mask(lanes) : x; }

// Momenta and second moments of a run, as floats: read, the next ones made, and written.
template <int kMom, int kRms>
struct Accumulators {
  static constexpr int kAll = kMom + kRms;
  const Planes<MomCode, kMom, kRun> mom;
  const Planes<RmsCode, kRms, kRun> rms;
  const bool narrow;
  const RoundingWords<kAll> words;
  alignas(64) float mom_buffer[kMom * kRun], rms_buffer[(kRms ? kRms : 1) * kRun];
  float *mom_at = nullptr, *rms_at = nullptr;
  int64_t first = 0;

  Accumulators(const FactoredParams& params, const FactoredTensor& tensor)
      : mom{Numbers::at(tensor.mom, params.state_dtype, 0), tensor.numel},
        rms{Numbers::at(tensor.rms, params.state_dtype, 0), tensor.numel},
        narrow(params.state_dtype == kBFloat16),
        words(rounding_words<kAll>(params, tensor)) {}

  void read(int64_t at, int64_t count) {
    first = at;
    mom_at = mom.read(at, count, mom_buffer);
    rms_at = rms.read(at, count, rms_buffer);
  }

  // The accumulators of `lanes` elements of the run, as they are.
  LOPT_INLINE void load_at(int64_t i, int lanes, Vec* m, Vec* r) const {
    LOPT_UNROLL
    for (int k = 0; k < kMom; ++k) m[k] = load(mom_at + k * mom.step() + i, lanes);
    LOPT_UNROLL
    for (int k = 0; k < kRms; ++k) r[k] = load(rms_at + k * rms.step() + i, lanes);
  }

  // The next ones, as they are stored.
  LOPT_INLINE void next(int64_t i, int lanes, Vec g, const float* mom_decay, const float* rms_decay, Vec* m,
                        Vec* r) const {
    const Bits hash = narrow ? words.hash(count_from(static_cast<uint32_t>(first + i))) : Bits{};
    const auto rounded = [&](Vec value, int k) LOPT_INLINE {
      if (!narrow) return value;
      const Vec result = (Vec)rounded_bits((Bits)value, words.bits(k, hash));
      return value == value ? result : value;
    };
    load_at(i, lanes, m, r);
    LOPT_UNROLL
    for (int k = 0; k < kMom; ++k) m[k] = rounded(next_accumulator(m[k], mom_decay[k], g), k);
    LOPT_UNROLL
    for (int k = 0; k < kRms; ++k) r[k] = rounded(next_accumulator(r[k], rms_decay[k], g * g), kMom + k);
  }

  LOPT_INLINE void store_at(int64_t i, int lanes, const Vec* m, const Vec* r) const {
    LOPT_UNROLL
    for (int k = 0; k < kMom; ++k) store(mom_at + k * mom.step() + i, m[k], lanes);
    LOPT_UNROLL
    for (int k = 0; k < kRms; ++k) store(rms_at + k * rms.step() + i, r[k], lanes);
  }

  void write(int64_t count) const {
    mom.write(first, count, mom_at);
    rms.write(first, count, rms_at);
  }
};

// ---- measure -----------------------------------------------------------------------------------------------------------

// What is not finite, squares of parameters, and the size of gradients.
template <class Columns>
void measure_elements(const FactoredParams& params, const Tile& tile, const Lines& lines, double* measures) {
  alignas(64) float param_buffer[kRun], grad_buffer[kRun];
  const Numbers param = Numbers::at(lines.tensor.param, lines.tensor.param_dtype, 0);
  const Numbers grad = Numbers::at(params.grads[tile.tensor], lines.tensor.grad_dtype, 0);
  std::fill_n(measures, int{Measure::kCount}, 0.0);
  for_runs(lines, tile, [&](int64_t at, int64_t count) {
    const float *p_at = param.read(at, count, param_buffer), *g_at = grad.read(at, count, grad_buffer);
    Vec nonfinite{}, square{}, size{};
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      const Vec raw = load(g_at + i, lanes), p = bounded(load(p_at + i, lanes));
      nonfinite += raw - raw == Vec{} ? Vec{} : splat(1.0f);
      square += p * p;
      if (Columns::kSees == Sees::kStep) size += abs_of(clip_gradient(raw, Columns::kGradientBound));
    });
    measures[Measure::nonfinite] += sum_lanes(nonfinite);
    measures[Measure::param_square] += sum_lanes(square);
    measures[Measure::grad_size] += sum_lanes(size);
  });
}

// Means of what the rule's LSTM sees, and sums of squared deviations from them. value(at, i, lanes, k): vectors of a run.
template <class Value>
void measure_seen(const Tile& tile, const Lines& lines, double* measures, const Value& value) {
  double *const mean = measures + Measure::mean0, *const squares = measures + Measure::var0;
  double seen = 0.0;
  for_runs(lines, tile, [&](int64_t at, int64_t count) {
    Vec sum[kSeenThings]{}, deviation[kSeenThings]{};
    float center[kSeenThings];
    double of_run[kSeenThings];
    const auto value_at = value(at, count);
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      Vec x[kSeenThings];
      value_at(i, lanes, x);
      LOPT_UNROLL
      for (int k = 0; k < kSeenThings; ++k) sum[k] += x[k];
    });
    for (int k = 0; k < kSeenThings; ++k)
      center[k] = static_cast<float>(of_run[k] = sum_lanes(sum[k]) / static_cast<double>(count));
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      Vec x[kSeenThings];
      value_at(i, lanes, x);
      LOPT_UNROLL
      for (int k = 0; k < kSeenThings; ++k) {
        const Vec d = masked(x[k] - center[k], lanes);
        deviation[k] += d * d;
      }
    });
    for (int k = 0; k < kSeenThings; ++k) {
      const double of_deviation = sum_lanes(deviation[k]);
      if (seen == 0.0) {
        mean[k] = of_run[k], squares[k] = of_deviation;
      } else {
        merge_moments(mean[k], squares[k], seen, of_run[k], of_deviation, static_cast<double>(count));
      }
    }
    seen += static_cast<double>(count);
  });
}

template <class Columns>
void measure_moments(const FactoredParams& params, const Tile& tile, const Lines& lines, double* measures) {
  const FactoredTensor& tensor = lines.tensor;
  Accumulators<Columns::kNumMom, Columns::kNumRms> state(params, tensor);
  if constexpr (Columns::kSees == Sees::kBefore) {
    measure_seen(tile, lines, measures, [&](int64_t at, int64_t count) {
      state.read(at, count);
      return [&state](int64_t i, int lanes, Vec* x) LOPT_INLINE { state.load_at(i, lanes, x, x + 3); };
    });
  } else if constexpr (Columns::kSees == Sees::kStep) {
    alignas(64) float param_buffer[kRun], grad_buffer[kRun];
    const float* const control = params.controls + tensor.row * AdamControl::kCount;
    const Numbers param = Numbers::at(tensor.param, tensor.param_dtype, 0);
    const Numbers grad = Numbers::at(params.grads[tile.tensor], tensor.grad_dtype, 0);
    measure_seen(tile, lines, measures, [&](int64_t at, int64_t count) {
      const float *const p_at = param.read(at, count, param_buffer), *const g_at = grad.read(at, count, grad_buffer);
      state.read(at, count);
      return [=, &state](int64_t i, int lanes, Vec* x) LOPT_INLINE {
        x[0] = clip_gradient(load(g_at + i, lanes), Columns::kGradientBound);
        x[1] = seen_param(load(p_at + i, lanes));
        state.next(i, lanes, x[0], control + AdamControl::mom_decay, control + AdamControl::rms_decay, x + 2, x + 3);
      };
    });
  }
}

// sums[(first + i) % period] += values[i] for i < count. Sixteen vectors and less of one phase are summed in float.
inline void sum_periods(const float* values, int64_t period, int64_t first, int64_t count, double* sums) {
  constexpr int64_t kMost = 32;  // vectors, of which a whole number has a whole number of periods
  int64_t i = 0;
  if (period <= kMost) {
    const int64_t step = period * kLanes;
    while (i + step <= count) {
      Vec part[kMost]{};
      for (int summed = 0; summed < kSummedLines && i + step <= count; ++summed, i += step)
        for (int64_t v = 0; v < period; ++v) part[v] += load(values + i + v * kLanes);
      for (int64_t v = 0; v < period; ++v)
        for (int lane = 0; lane < kLanes; ++lane) sums[(first + v * kLanes + lane) % period] += part[v][lane];
    }
  }
  int64_t entry = (first + i) % period;
  for (; i < count; ++i) {
    sums[entry] += values[i];
    if (++entry == period) entry = 0;
  }
}

// Squares of gradients, summed along the lines of a tile and across them.
void measure_squares(const FactoredParams& params, const Tile& tile, const Lines& lines, float bound) {
  static thread_local std::vector<float> squares, values, sums;
  const FactoredTensor& tensor = lines.tensor;
  const Extent extent(tensor, tile);
  const int64_t width = extent.width, size = lines.size(), per_line = lines.per_line();
  for (std::vector<float>* buffer : {&squares, &values, &sums})
    buffer->resize(std::max(buffer->size(), static_cast<size_t>(width)));
  const Numbers grad = Numbers::at(params.grads[tile.tensor], tensor.grad_dtype, 0);
  double* const across = params.sums + lines.across_sums(tile.line, tile.begin);
  std::fill_n(across, width, 0.0);
  for (int64_t first = 0; first < extent.lines; first += kSummedLines) {
    const int64_t end = std::min(first + kSummedLines, extent.lines);
    std::fill_n(sums.data(), width, 0.0f);
    for (int64_t line = tile.line + first; line < tile.line + end; ++line) {
      double* const along = params.sums + lines.along_sums(line, tile.begin);
      std::fill_n(along, per_line, 0.0);
      const float* const values_at = grad.read(line * size + tile.begin, width, values.data());
      for (int64_t begin = 0; begin < width; begin += kRun) {
        Vec total{};
        for_vectors(std::min(kRun, width - begin), [&](int64_t i, int lanes) LOPT_INLINE {
          const Vec g = clip_gradient(load(values_at + begin + i, lanes), bound), square = g * g;
          total += square;
          store(squares.data() + begin + i, square, lanes);
          store(sums.data() + begin + i, load(sums.data() + begin + i, lanes) + square, lanes);
        });
        if (per_line == 1) along[0] += sum_lanes(total);
      }
      if (per_line == 1) continue;
      const int64_t period = tensor.length * tensor.inner;
      for (int64_t i = 0; i < width;) {
        const int64_t at = (tile.begin + i) % period, count = std::min(width - i, period - at);
        sum_periods(squares.data() + i, tensor.inner, at % tensor.inner, count,
                    along + (tile.begin + i) / period * tensor.inner);
        i += count;
      }
    }
    for (int64_t i = 0; i < width; ++i) across[i] += sums[static_cast<size_t>(i)];
  }
}

// ---- Of tensors and their rows and columns -----------------------------------------------------------------------------

void begin_tensor(const FactoredParams& params, const FactoredTensor& tensor) {
  double total[Measure::kCount]{}, numel = static_cast<double>(tensor.numel);
  const auto each_tile = [&](const auto& f) {
    for (int64_t i = tensor.first_tile; i < tensor.first_tile + tensor.num_tiles; ++i)
      f(params.measures + i * Measure::kCount, static_cast<double>(Extent(tensor, params.tiles[i]).count()));
  };
  each_tile([&](const double* of_tile, double count) {
    for (int c = 0; c < Measure::mean0; ++c) total[c] += of_tile[c];
    for (int c = Measure::mean0; c < Measure::var0; ++c) total[c] += of_tile[c] * (count / numel);
  });
  each_tile([&](const double* of_tile, double count) {
    for (int k = 0; k < kSeenThings; ++k) {
      const double away = of_tile[Measure::mean0 + k] - total[Measure::mean0 + k];
      total[Measure::var0 + k] += (of_tile[Measure::var0 + k] + count * away * away) / numel;
    }
  });
  for (int c : {Measure::param_square, Measure::grad_size}) total[c] /= numel;
  float* stats = params.stats + tensor.row * Measure::kCount;
  for (int c = 0; c < Measure::kCount; ++c) stats[c] = static_cast<float>(total[c]);
}

void update_piece(const FactoredParams& params, const Piece& piece) {
  const FactoredTensor& tensor = params.tensors[piece.tensor];
  if (rests(params, tensor)) return;
  const Lines lines{tensor};
  const int64_t count = piece.is_along ? lines.num_along() : lines.num_across();
  float* const moments = reinterpret_cast<float*>(piece.is_along ? tensor.along : tensor.across);
  for (int64_t i = piece.begin; i < std::min(piece.begin + kPiece, count); ++i)
    next_moments(params, moments, count, i, mean_square(params, lines, piece.is_along, i));
}

// Inverse roots of means, and factors: of a column mean c that is c^(-1/2), of a row mean r it is (r / mean of r)^(-1/2).
void find_factors(const FactoredParams& params, const FactoredTensor& tensor) {
  const Lines lines{tensor};
  if (!lines.factored() || rests(params, tensor)) return;
  for (const bool is_along : {true, false}) {
    const int64_t count = is_along ? lines.num_along() : lines.num_across();
    const float* const moments = reinterpret_cast<const float*>(is_along ? tensor.along : tensor.across);
    float* const to = params.factors + (is_along ? lines.along_factors() : lines.across_factors(params.width));
    const bool is_row = is_along == (tensor.along_is_row != 0);
    for (int k = 0; k < kFactoredDecays; ++k) {
      const float* const from = moments + k * count;
      float *const root = to + k * count, *const factor = to + (kFactoredDecays + k) * count;
      for (int64_t i = 0; i < count; ++i) root[i] = inverse_root(from[i]);
      if (!is_row) {
        for (int64_t i = 0; i < count; ++i) factor[i] = safe_inverse_root(from[i]);
        continue;
      }
      for (int64_t w = 0; w < lines.num_whole(); ++w) {
        const RowEntries row(lines, is_along, w);
        double sum = 0.0;
        for (int64_t i = 0; i < row.count; ++i) sum += from[row.first + i * row.stride];
        const float factor_of_row = row_factor(sum, row.count);
        for (int64_t i = 0; i < row.count; ++i) {
          const int64_t at = row.first + i * row.stride;
          factor[at] = safe_inverse_root(from[at] * factor_of_row);
        }
      }
    }
  }
}

// Of all entries of `along` or `across`: sums of squares of means and inverse roots, and what the units of the first layer
// have from them. weights: of their columns, in a tensor's own row.
struct Entries {
  int64_t count;
  const float *means, *roots;
  float* units;

  Entries(const FactoredParams& params, const Lines& lines, bool is_along)
      : count(is_along ? lines.num_along() : lines.num_across()),
        means(reinterpret_cast<const float*>(is_along ? lines.tensor.along : lines.tensor.across)) {
    float* const factors = params.factors + (is_along ? lines.along_factors() : lines.across_factors(params.width));
    roots = factors;
    units = factors + 2 * kFactoredDecays * count;
  }

  double mean_square(const float* plane) const {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(plane[i]) * plane[i];
    return sum / static_cast<double>(count);
  }

  template <int kWidth>
  void find_units(const float* bias, const float* of_means, const float* of_roots) const {
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      Vec x[2 * kFactoredDecays];
      for (int k = 0; k < kFactoredDecays; ++k) {
        x[k] = load(means + k * count + i, lanes);
        x[kFactoredDecays + k] = load(roots + k * count + i, lanes);
      }
      for (int j = 0; j < kWidth; ++j) {
        Vec sum = splat(bias ? bias[j] : 0.0f);
        for (int k = 0; k < kFactoredDecays; ++k)
          sum += x[k] * of_means[k * kWidth + j] + x[kFactoredDecays + k] * of_roots[k * kWidth + j];
        store(units + j * count + i, sum, lanes);
      }
    });
  }
};

template <class Columns, int kWidth>
void fold_tensor(const FactoredParams& params, const FactoredTensor& tensor) {
  constexpr int kColumns = Columns::kNumColumns;
  using Layout = FactoredMlp<kColumns, kWidth>;
  if (Columns::kAdam && tensor.adam) return;
  const Lines lines{tensor};
  const bool several = tensor.matrices > 1, factored = lines.factored() && !several;
  float scale[kColumns];
  for (int c = 0; c < kColumns; ++c)
    for (int64_t m = 0; m < tensor.matrices; ++m) {
      double total = 0.0;
      for (int64_t i = 0; i < tensor.num_tiles; ++i) total += *square_sum(params, tensor, kColumns, i, c, m);
      const double mean = total / static_cast<double>(tensor.numel / tensor.matrices);
      float& to = several ? params.scales[tensor.scales + c * tensor.matrices + m] : scale[c];
      to = column_scale<Columns>(mean);
    }
  if constexpr (Columns::kFactored) {
    for (const bool is_along : {true, false}) {
      if (!factored) break;
      const Entries entries(params, lines, is_along);
      const int side = is_along ? 0 : kFactoredDecays;
      for (int k = 0; k < kFactoredDecays; ++k) {
        scale[Columns::along0 + side + k] =
            column_scale<Columns>(entries.mean_square(entries.means + k * entries.count));
        scale[Columns::rsqrt_along0 + side + k] =
            column_scale<Columns>(entries.mean_square(entries.roots + k * entries.count));
      }
    }
  }
  float times[Columns::kNumTimes + 1];
  for (int i = 0; i < Columns::kNumTimes; ++i) times[i] = tanh_time(i, static_cast<float>(*params.step));
  const float* const weights = params.weights + tensor.row * params.weight_stride;
  float* const own = params.own_weights + tensor.row * Layout::kSize;
  for (int i = 0; i < Layout::kSize; ++i)
    own[i] = folded_weight<Columns, kWidth>(i, weights, several ? nullptr : scale, tensor.along_is_row != 0, times);
  if constexpr (Columns::kFactored) {
    if (!factored) return;
    const float *const of_means = own + Columns::along0 * kWidth, *const of_roots =
                                                                      own + Columns::rsqrt_along0 * kWidth;
    constexpr int kSide = kFactoredDecays * kWidth;
    Entries(params, lines, true).find_units<kWidth>(own + Layout::kB1, of_means, of_roots);
    Entries(params, lines, false).find_units<kWidth>(nullptr, of_means + kSide, of_roots + kSide);
  }
}

// ---- accumulate and apply ----------------------------------------------------------------------------------------------

// to[i] = values[(first + i) % period] for i < count.
inline void repeat(const float* values, int64_t period, int64_t first, int64_t count, float* to) {
  int64_t done = std::min(period, count);
  for (int64_t i = 0; i < done; ++i) to[i] = values[first + i < period ? first + i : first + i - period];
  for (; done < count; done *= 2) std::copy_n(to, std::min(done, count - done), to + done);
}

// sums [matrices] += values of the elements from `at` on, by the matrix that they are in.
inline void sum_matrices(const Matrices& matrices, const float* values, int64_t at, int64_t count, double* sums) {
  if (matrices.stride == 1) return sum_periods(values, matrices.count, at % matrices.count, count, sums);
  for (int64_t i = 0; i < count;) {
    const int64_t end = std::min(count, i + matrices.stride - (at + i) % matrices.stride);
    double& sum = sums[matrices.of(at + i)];
    for (; i < end; ++i) sum += values[i];
  }
}

// to[i]: that of the matrix of the element at + i, of values [matrices].
inline void repeat_matrices(const Matrices& matrices, const float* values, int64_t at, int64_t count, float* to) {
  if (matrices.stride == 1) return repeat(values, matrices.count, at % matrices.count, count, to);
  for (int64_t i = 0; i < count;) {
    const int64_t end = std::min(count, i + matrices.stride - (at + i) % matrices.stride);
    const float value = values[matrices.of(at + i)];
    for (; i < end; ++i) to[i] = value;
  }
}

// Factors, and what kUnits units of the first layer have, of the elements of a run: each plane from an address on, along
// and across. kSame: all elements of the run have one entry along.
template <int kUnits, bool kSame>
struct Spread {
  static constexpr bool kFactored = true, kScaled = false;
  static constexpr int kPlanes = kFactoredDecays + kUnits;
  const float *along[kPlanes], *across[kPlanes];

  Vec load_along(int plane, int64_t i, int lanes) const {
    return kSame ? splat(*along[plane]) : load(along[plane] + i, lanes);
  }
  Factors<Vec> at(int64_t i, int lanes) const {
    Vec a[kFactoredDecays], b[kFactoredDecays];
    LOPT_UNROLL
    for (int k = 0; k < kFactoredDecays; ++k) {
      a[k] = load_along(k, i, lanes);
      b[k] = load(across[k] + i, lanes);
    }
    return own_factors(a, b);
  }
  Vec unit(int j, int64_t i, int lanes) const {
    return load_along(kFactoredDecays + j, i, lanes) + load(across[kFactoredDecays + j] + i, lanes);
  }
};

// Of a run in several matrices all that is known of second moments, and what its columns are multiplied by: planes of kRun.
struct Scaled {
  static constexpr bool kFactored = false, kScaled = true;
  const float *along, *across, *scales;

  Factors<Vec> at(int64_t i, int lanes) const {
    Vec a[kFactorPlanes], b[kFactorPlanes];
    LOPT_UNROLL
    for (int k = 0; k < kFactorPlanes; ++k) {
      a[k] = load(along + k * kRun + i, lanes);
      b[k] = load(across + k * kRun + i, lanes);
    }
    return Factors<Vec>::of(a, b);
  }
  Vec scale(int column, int64_t i, int lanes) const { return load(scales + column * kRun + i, lanes); }
};

// The same, made for runs that may go over the ends of lines. kUnits, or kScaledUnits: Scaled.
constexpr int kScaledUnits = -1;
template <int kUnits>
struct Spreads {
  static constexpr bool kScaled = kUnits == kScaledUnits;
  static constexpr int kPlanes = kScaled ? kFactorPlanes : kFactoredDecays + kUnits;
  const FactoredParams& params;
  const Lines lines;
  alignas(64) float along_buffer[kPlanes * kRun], across_buffer[kPlanes * kRun];

  const float* plane(bool is_along, int j) const {
    const int64_t count = is_along ? lines.num_along() : lines.num_across();
    const int64_t first = is_along ? lines.along_factors() : lines.across_factors(params.width);
    if (kScaled && j < kFactoredDecays)
      return reinterpret_cast<const float*>(is_along ? lines.tensor.along : lines.tensor.across) + j * count;
    return params.factors + first + (kScaled ? j - kFactoredDecays : kFactoredDecays + j) * count;
  }

  bool same(int64_t at, int64_t count) const {
    return lines.per_line() == 1 && at % lines.size() + count <= lines.size();
  }

  Spread<kUnits, true> of_line(int64_t at) const {
    Spread<kUnits, true> spread;
    const int64_t size = lines.size(), line = at / size;
    for (int j = 0; j < kPlanes; ++j) {
      spread.along[j] = plane(true, j) + line;
      spread.across[j] = plane(false, j) + line / lines.tensor.lines * size + at % size;
    }
    return spread;
  }

  // The buffers, filled.
  void fill(int64_t at, int64_t count) {
    const int64_t size = lines.size(), per_line = lines.per_line(), inner = lines.tensor.inner;
    const int64_t period = lines.tensor.length * inner;
    for (int j = 0; j < kPlanes; ++j) {
      const float *const along = plane(true, j), *const across = plane(false, j);
      for (int64_t done = 0; done < count;) {
        const int64_t line = (at + done) / size, begin = (at + done) % size,
                      piece = std::min(count - done, size - begin);
        std::copy_n(across + line / lines.tensor.lines * size + begin, piece, across_buffer + j * kRun + done);
        float* const to = along_buffer + j * kRun + done;
        const float* const from = along + line * per_line;
        if (per_line == 1) {
          std::fill_n(to, piece, *from);
        } else {
          // One length * inner after the other: its entries, over and over.
          for (int64_t i = 0; i < piece;) {
            const int64_t at = (begin + i) % period, count_here = std::min(piece - i, period - at);
            repeat(from + (begin + i) / period * inner, inner, at % inner, count_here, to + i);
            i += count_here;
          }
        }
        done += piece;
      }
    }
  }

  Spread<kUnits, false> of(int64_t at, int64_t count) {
    Spread<kUnits, false> spread;
    fill(at, count);
    for (int j = 0; j < kPlanes; ++j) {
      spread.along[j] = along_buffer + j * kRun;
      spread.across[j] = across_buffer + j * kRun;
    }
    return spread;
  }
};

// Second moments of a tensor that is not factored, of the elements of a run.
template <class Columns>
struct NotFactored {
  static constexpr bool kFactored = false, kScaled = false;
  const float* moments;
  int64_t stride;

  Factors<Vec> at([[maybe_unused]] int64_t i, [[maybe_unused]] int lanes) const {
    if constexpr (Columns::kFactored) {
      Vec r[kFactoredDecays];
      LOPT_UNROLL
      for (int k = 0; k < kFactoredDecays; ++k) r[k] = load(moments + k * stride + i, lanes);
      return Columns::not_factored(r);
    } else {
      return {};
    }
  }
};

// f(at, count, factors) for the runs of a tile.
template <class Columns, int kUnits, class Function>
void for_factored_runs(const FactoredParams& params, const Tile& tile, const Function& f) {
  const FactoredTensor& tensor = params.tensors[tile.tensor];
  if constexpr (Columns::kWhole) {
    if (tensor.matrices > 1) {
      const Matrices matrices(tensor);
      Spreads<kScaledUnits> spreads{params, {tensor}, {}, {}};
      alignas(64) float scales[Columns::kNumColumns * kRun];
      for_runs(spreads.lines, tile, [&](int64_t at, int64_t count) {
        spreads.fill(at, count);
        for (int c = 0; kUnits > 0 && c < Columns::kNumColumns; ++c)
          repeat_matrices(matrices, params.scales + tensor.scales + c * tensor.matrices, at, count, scales + c * kRun);
        f(at, count, Scaled{spreads.along_buffer, spreads.across_buffer, scales});
      });
      return;
    }
  }
  Spreads<kUnits> spreads{params, {tensor}, {}, {}};
  for_runs(spreads.lines, tile, [&](int64_t at, int64_t count) {
    if (!spreads.lines.factored())
      return f(at, count, NotFactored<Columns>{reinterpret_cast<const float*>(tensor.along) + at, tensor.numel});
    if constexpr (Columns::kFactored)
      spreads.same(at, count) ? f(at, count, spreads.of_line(at)) : f(at, count, spreads.of(at, count));
  });
}

// The next value of `count` accumulators.
template <class Input>
void accumulate_run(float* values, float decay, int64_t count, const Input& input) {
  for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
    store(values + i, next_accumulator(load(values + i, lanes), decay, input(i, lanes)), lanes);
  });
}

template <class Columns>
void accumulate_tile(const FactoredParams& params, int64_t index) {
  constexpr int kColumns = Columns::kNumColumns;
  alignas(64) float param_buffer[kRun], grad_buffer[kRun];
  const Tile& tile = params.tiles[index];
  const FactoredTensor& tensor = params.tensors[tile.tensor];
  if (rests(params, tensor) || (Columns::kAdam && tensor.adam)) return;
  const Numbers param = Numbers::at(tensor.param, tensor.param_dtype, 0);
  const Numbers grad = Numbers::at(params.grads[tile.tensor], tensor.grad_dtype, 0);
  Accumulators<Columns::kNumMom, Columns::kNumRms> state(params, tensor);
  float* const moments = reinterpret_cast<float*>(tensor.along);
  const bool factored = tensor.across != 0;
  double* const total = square_sum(params, tensor, kColumns, index - tensor.first_tile, 0, 0);
  std::fill_n(total, kColumns * tensor.matrices, 0.0);
  for_factored_runs<Columns, 0>(params, tile, [&](int64_t at, int64_t count, const auto& factors) {
    // Squares of columns that entries have in common are summed over the entries, by fold.
    using Known = std::decay_t<decltype(factors)>;
    constexpr int kSquared = Known::kFactored ? element_columns<Columns>() : kColumns;
    alignas(64) float each[Known::kScaled ? kColumns * kRun : 1];
    const float *const p_at = param.read(at, count, param_buffer), *const g_at = grad.read(at, count, grad_buffer);
    state.read(at, count);
    if (Columns::kFactored && !factored)
      for (int k = 0; k < kFactoredDecays; ++k)
        accumulate_run(moments + k * tensor.numel + at, params.factored_decay[k], count,
                       [&](int64_t i, int lanes) LOPT_INLINE {
                         const Vec g = clip_gradient(load(g_at + i, lanes), Columns::kGradientBound);
                         return g * g + 1e-30f;
                       });
    Vec squares[kSquared]{};
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      const Vec g = clip_gradient(load(g_at + i, lanes), Columns::kGradientBound);
      Vec m[Columns::kNumMom], r[Columns::kNumRms + 1], x[kColumns];
      state.next(i, lanes, g, params.mom_decay, params.rms_decay, m, r);
      state.store_at(i, lanes, m, r);
      Columns::columns(g, seen_param(load(p_at + i, lanes)), m, r, factors.at(i, lanes), x);
      LOPT_UNROLL
      for (int c = 0; c < kSquared; ++c) {
        if constexpr (Known::kScaled)
          store(each + c * kRun + i, x[c] * x[c], lanes);
        else
          squares[c] += masked(x[c] * x[c], lanes);
      }
    });
    state.write(count);
    for (int c = 0; c < kSquared; ++c) {
      if constexpr (Known::kScaled)
        sum_matrices(Matrices(tensor), each + c * kRun, at, count, total + c * tensor.matrices);
      else
        total[c] += sum_lanes(squares[c]);
    }
  });
}

template <class Columns, int kWidth>
struct FactoredApplier {
  static constexpr int kColumns = Columns::kNumColumns;
  static constexpr int kSums = kWidth < kRegisters / 2 ? kWidth : kRegisters / 2;  // of a layer, in registers
  Accumulators<Columns::kNumMom, Columns::kNumRms>& state;
  const float* weights;
  float magnitude_rate, step_size, keep;

  // kVectors vectors of `lanes` parameters each, which share the loads of weights.
  // directions: of the run, where they are kept.
  template <int kVectors, class F>
  LOPT_INLINE void rows(float* p_at, const float* g_at, float* directions, int64_t i, int lanes,
                        const F& factors) const {
    constexpr int kIn = F::kFactored ? element_columns<Columns>() : kColumns;
    Vec p[kVectors], x[kIn * kVectors], direction[kVectors];
    LOPT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t j = i + v * kLanes;
      Vec m[Columns::kNumMom], r[Columns::kNumRms + 1], raw[kColumns];
      p[v] = load(p_at + j, lanes);
      state.load_at(j, lanes, m, r);
      Columns::columns(clip_gradient(load(g_at + j, lanes), Columns::kGradientBound), seen_param(p[v]), m, r,
                       factors.at(j, lanes), raw);
      LOPT_UNROLL
      for (int c = 0; c < kIn; ++c) {
        if constexpr (F::kScaled)
          x[c * kVectors + v] = raw[c] * factors.scale(c, j, lanes);
        else
          x[c * kVectors + v] = raw[c];
      }
    }
    const auto start = [&](int unit, int v) LOPT_INLINE {
      if constexpr (F::kFactored)
        return factors.unit(unit, i + v * kLanes, lanes);
      else
        return splat(weights[FactoredMlp<kColumns, kWidth>::kB1 + unit]);
    };
    factored_direction<Columns, kIn, kWidth, kVectors, kSums / kVectors>(x, weights, magnitude_rate, start, direction);
    LOPT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (Columns::kWhole)
        store(directions + i + v * kLanes, direction[v], lanes);
      else
        store(p_at + i + v * kLanes, next_param(p[v], direction[v], step_size, keep), lanes);
    }
  }
};

// Adam's step of a tile: accumulators and, where they move, parameters.
void step_by_adam(const FactoredParams& params, const Tile& tile, const FactoredTensor& tensor, float bound) {
  alignas(64) float param_buffer[kRun], grad_buffer[kRun];
  const float step_size = params.step_size[tensor.row], keep = params.keep[tensor.row];
  const float* const control = params.controls + tensor.row * AdamControl::kCount;
  const bool moving = moves(step_size, keep);
  const Numbers param = Numbers::at(tensor.param, tensor.param_dtype, 0);
  const Numbers grad = Numbers::at(params.grads[tile.tensor], tensor.grad_dtype, 0);
  Accumulators<1, 1> state(params, tensor);
  for_runs({tensor}, tile, [&](int64_t at, int64_t count) {
    state.read(at, count);
    float* const p_at = param.read(at, count, param_buffer);
    const float* const g_at = grad.read(at, count, grad_buffer);
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      const Vec g = clip_gradient(load(g_at + i, lanes), bound);
      Vec m, r;
      state.next(i, lanes, g, control + AdamControl::mom_decay, control + AdamControl::rms_decay, &m, &r);
      state.store_at(i, lanes, &m, &r);
      if (moving)
        store(p_at + i, next_param(load(p_at + i, lanes), adam_direction(m, r, control), step_size, keep), lanes);
    });
    state.write(count);
    if (moving) param.write(at, count, p_at);
  });
}

// The MLP's step of a tile: parameters, or directions.
template <class Columns, int kWidth>
void apply_mlp(const FactoredParams& params, const Tile& tile, const FactoredTensor& tensor, float step_size,
               float keep) {
  using Applier = FactoredApplier<Columns, kWidth>;
  alignas(64) float param_buffer[kRun], grad_buffer[kRun];
  const Numbers param = Numbers::at(tensor.param, tensor.param_dtype, 0);
  const Numbers grad = Numbers::at(params.grads[tile.tensor], tensor.grad_dtype, 0);
  Accumulators<Columns::kNumMom, Columns::kNumRms> state(params, tensor);
  const Applier applier{state, params.own_weights + tensor.row * FactoredMlp<Columns::kNumColumns, kWidth>::kSize,
                        params.magnitude_rate, step_size, keep};
  for_factored_runs<Columns, kWidth>(params, tile, [&](int64_t at, int64_t count, const auto& factors) {
    float* const p_at = param.read(at, count, param_buffer);
    const float* const g_at = grad.read(at, count, grad_buffer);
    state.read(at, count);
    float* const directions = Columns::kWhole ? reinterpret_cast<float*>(tensor.direction) + at : nullptr;
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
      applier.template rows<2>(p_at, g_at, directions, i, kLanes, factors);
    for (; i < count; i += kLanes)
      applier.template rows<1>(p_at, g_at, directions, i, static_cast<int>(std::min<int64_t>(count - i, kLanes)),
                               factors);
    if (!Columns::kWhole) param.write(at, count, p_at);
  });
}

template <class Columns, int kWidth>
void apply_tile(const FactoredParams& params, int64_t index) {
  const Tile& tile = params.tiles[index];
  const FactoredTensor& tensor = params.tensors[tile.tensor];
  const float step_size = params.step_size[tensor.row], keep = params.keep[tensor.row];
  if (rests(params, tensor)) return;
  if (Columns::kAdam && tensor.adam) return step_by_adam(params, tile, tensor, Columns::kGradientBound);
  if (!moves(step_size, keep)) return;
  if constexpr (Columns::kMlp) apply_mlp<Columns, kWidth>(params, tile, tensor, step_size, keep);
}
// Directions that were treated as a whole to the parameters of a tile.
void write_tile(const FactoredParams& params, const Tile& tile) {
  alignas(64) float buffer[kRun];
  const FactoredTensor& tensor = params.tensors[tile.tensor];
  const float step_size = params.step_size[tensor.row], keep = params.keep[tensor.row];
  if (tensor.direction == 0 || rests(params, tensor) || !moves(step_size, keep)) return;
  const Numbers param = Numbers::at(tensor.param, tensor.param_dtype, 0);
  const float* const directions = reinterpret_cast<const float*>(tensor.direction);
  for_runs({tensor}, tile, [&](int64_t at, int64_t count) {
    float* const p_at = param.read(at, count, buffer);
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      store(p_at + i, next_param(load(p_at + i, lanes), load(directions + at + i, lanes), step_size, keep), lanes);
    });
    param.write(at, count, p_at);
  });
}

int threads_of(const FactoredParams& params, const Target& target) {
  constexpr int64_t kGrain = 8192;  // parameters
  int64_t count = 0;
  for (int64_t t = 0; t < params.num_tensors && count < target.num_threads * kGrain; ++t)
    count += params.tensors[t].numel;
  return threads_for(target.num_threads, count, kGrain);
}

}  // namespace

bool factored_accumulate(const FactoredParams& params, const Target& target) {
  return with_factored(params.rule, params.width, [&](auto columns, auto) {
    using Columns = decltype(columns);
#pragma omp parallel num_threads(threads_of(params, target))
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < params.num_tiles; ++i) {
        const Lines lines{params.tensors[params.tiles[i].tensor]};
        measure_elements<Columns>(params, params.tiles[i], lines, params.measures + i * Measure::kCount);
        measure_moments<Columns>(params, params.tiles[i], lines, params.measures + i * Measure::kCount);
        if (lines.factored()) measure_squares(params, params.tiles[i], lines, Columns::kGradientBound);
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < params.num_tensors; ++t) begin_tensor(params, params.tensors[t]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < params.num_pieces; ++i) update_piece(params, params.pieces[i]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < params.num_tensors; ++t) find_factors(params, params.tensors[t]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < params.num_tiles; ++i) {
        if constexpr (Columns::kMlp) accumulate_tile<Columns>(params, i);
      }
    }
  });
}

bool factored_apply(const FactoredParams& params, const Target& target) {
  return with_factored(params.rule, params.width, [&](auto columns, auto width_constant) {
    using Columns = decltype(columns);
    constexpr int kWidth = decltype(width_constant)::value;
#pragma omp parallel num_threads(threads_of(params, target))
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < params.num_tensors; ++t) {
        if constexpr (Columns::kMlp) fold_tensor<Columns, kWidth>(params, params.tensors[t]);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < params.num_tiles; ++i) apply_tile<Columns, kWidth>(params, params.num_tiles - 1 - i);
    }
  });
}

bool factored_write(const FactoredParams& params, const Target& target) {
  return with_factored(params.rule, params.width, [&](auto, auto) {
#pragma omp parallel for num_threads(threads_of(params, target)) schedule(dynamic, 1)
    for (int64_t i = 0; i < params.num_tiles; ++i) write_tile(params, params.tiles[i]);
  });
}

}  // namespace LOPT_ISA
}  // namespace lopt
