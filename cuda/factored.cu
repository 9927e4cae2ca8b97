// Steps of learned optimizers of others on the GPU, by the phases of api/factored.h, a launch each: a block for every tile,
// piece or tensor of all of them. Sums are float over 16 elements of a thread, then double, in a fixed order (Note [Order
// of reduction]).
#include "api/factored.h"

#include "chunks.cuh"
#include "reduce.cuh"

namespace lopt {
namespace {

constexpr int kSummed = 16;  // elements of a thread, in float

// Momenta and second moments of a tensor, as floats.
template <int kMom, int kRms>
struct Accumulators {
  const int64_t mom, rms, numel;
  const int32_t dtype;
  RoundingWords<kMom + kRms> words{};

  __device__ __forceinline__ Accumulators(const FactoredParams& params, const FactoredTensor& tensor)
      : mom(tensor.mom), rms(tensor.rms), numel(tensor.numel), dtype(params.state_dtype) {
    if (dtype == kBFloat16) words = rounding_words<kMom + kRms>(params, tensor);
  }

  // Those of an element, as they are.
  __device__ __forceinline__ void load_at(int64_t at, float* m, float* r) const {
#pragma unroll
    for (int k = 0; k < kMom; ++k) m[k] = load_state(mom, k * numel + at);
#pragma unroll
    for (int k = 0; k < kRms; ++k) r[k] = load_state(rms, k * numel + at);
  }

  // The next ones, as they are stored.
  __device__ __forceinline__ void next(int64_t at, float g, const float* mom_decay, const float* rms_decay, float* m,
                                       float* r) const {
    load_at(at, m, r);
#pragma unroll
    for (int k = 0; k < kMom; ++k) m[k] = next_accumulator(m[k], mom_decay[k], g);
#pragma unroll
    for (int k = 0; k < kRms; ++k) r[k] = next_accumulator(r[k], rms_decay[k], g * g);
    if (dtype != kBFloat16) return;
    const uint32_t hash = words.hash(static_cast<uint32_t>(at));
#pragma unroll
    for (int k = 0; k < kMom + kRms; ++k) {
      float& value = k < kMom ? m[k] : r[k - kMom];
      if (value == value) value = bits_float(rounded_bits(float_bits(value), words.bits(k, hash)));
    }
  }

  __device__ __forceinline__ void store_at(int64_t at, const float* m, const float* r) const {
#pragma unroll
    for (int k = 0; k < kMom; ++k) store_state(mom, k * numel + at, m[k]);
#pragma unroll
    for (int k = 0; k < kRms; ++k) store_state(rms, k * numel + at, r[k]);
  }

 private:
  __device__ __forceinline__ float load_state(int64_t address, int64_t at) const {
    if (dtype != kBFloat16) return __ldcg(reinterpret_cast<const float*>(address) + at);
    return bits_float(uint32_t{__ldcg(reinterpret_cast<const uint16_t*>(address) + at)} << 16);
  }
  __device__ __forceinline__ void store_state(int64_t address, int64_t at, float value) const {
    if (dtype != kBFloat16)
      __stcg(reinterpret_cast<float*>(address) + at, value);
    else
      __stcg(reinterpret_cast<uint16_t*>(address) + at, static_cast<uint16_t>(float_bits(value) >> 16));
  }
};

// How a block's threads go over a tile: neighbours over the elements of a line, and groups of neighbours over its lines.
struct Threads {
  int width = 1, column, group, groups;
  __device__ __forceinline__ explicit Threads(const Extent& extent) {
    while (width < kThreads && width < extent.width) width *= 2;
    column = static_cast<int>(threadIdx.x) % width;
    group = static_cast<int>(threadIdx.x) / width;
    groups = kThreads / width;
  }
};

// A sum in float over kSummed values, in double beyond.
struct Sum {
  double total = 0.0;
  float part = 0.0f;
  int count = 0;
  __device__ __forceinline__ void add(float value) {
    part += value;
    if (++count == kSummed) {
      total += part;
      part = 0.0f;
      count = 0;
    }
  }
  __device__ __forceinline__ double value() const { return total + part; }
};

// The sum of each thread's values, column by column: total(c) of rows [kColumns][kThreads], by warps.
template <int kColumns, class Finish>
__device__ __forceinline__ void reduce_columns(const double (&rows)[kColumns][kThreads], const Finish& finish) {
  for (int c = warp_index(); c < kColumns; c += kWarps) {
    const double sum = sum_rows(kThreads, [&](int64_t thread) { return rows[c][thread]; });
    if (lane_index() == 0) finish(c, sum);
  }
}

// ---- measure -----------------------------------------------------------------------------------------------------------

// 1 / count in double by two steps of Newton's method: a division would be a call.
__device__ __forceinline__ double inverse_of(int64_t count) {
  const double number = static_cast<double>(count);
  double inverse = reciprocal_of(static_cast<float>(count));
  for (int step = 0; step < 2; ++step) inverse *= 2.0 - number * inverse;
  return inverse;
}

// Means of what the rule's LSTM sees, value(at, x) of an element, and sums of squared deviations from them.
template <class Value>
__device__ __forceinline__ void measure_seen(const Tile& tile, const Lines& lines, const Extent& extent,
                                             const Threads& threads, double* measures, const Value& value) {
  __shared__ double rows[kSeenThings][kThreads], means[kSeenThings];
  const auto sum_of_thread = [&](const auto& of_value) {
    Sum sums[kSeenThings];
    for (int64_t first = 0; first < extent.lines; first += threads.groups)  // the same for all threads
      for (int64_t begin = 0; begin < extent.width; begin += threads.width) {
        const int64_t line = first + threads.group, c = begin + threads.column;
        if (line >= extent.lines || c >= extent.width) continue;
        float x[kSeenThings];
        value((tile.line + line) * lines.size() + tile.begin + c, x);
        unrolled<kSeenThings>([&](auto k) { sums[k].add(of_value(k, x[k])); });
      }
    unrolled<kSeenThings>([&](auto k) { rows[k][threadIdx.x] = sums[k].value(); });
  };
  sum_of_thread([](int, float x) { return x; });
  __syncthreads();
  reduce_columns<kSeenThings>(
      rows, [&](int k, double sum) { means[k] = measures[Measure::mean0 + k] = sum * inverse_of(extent.count()); });
  __syncthreads();
  float mean[kSeenThings];
#pragma unroll
  for (int k = 0; k < kSeenThings; ++k) mean[k] = static_cast<float>(means[k]);
  sum_of_thread([&](int k, float x) { return (x - mean[k]) * (x - mean[k]); });
  __syncthreads();
  reduce_columns<kSeenThings>(rows, [&](int k, double sum) { measures[Measure::var0 + k] = sum; });
}

template <class Columns>
__global__ void __launch_bounds__(kThreads) measure_kernel(FactoredParams params) {
  constexpr int kSums = Columns::kSees == Sees::kStep ? 3 : 2;  // nonfinite, param_square, grad_size
  __shared__ double across[kThreads], rows[kSums][kThreads];
  __shared__ struct {
    int64_t along, across, stride;
  } places;  // of sums
  const Tile tile = params.tiles[blockIdx.x];
  const FactoredTensor tensor = params.tensors[tile.tensor];
  const int64_t grads = params.grads[tile.tensor];
  const Lines lines{tensor};
  if (threadIdx.x == 0) {  // 64-bit divisions are calls: here, where few registers are in use
    places.along = lines.along_sums(tile.line, tile.begin);
    places.across = lines.across_sums(tile.line, tile.begin);
    places.stride = lines.wide() * lines.per_line();
  }
  __syncthreads();
  const Extent extent(tensor, tile);
  const Threads threads(extent);
  const int64_t size = lines.size();
  double* const measures = params.measures + int64_t{blockIdx.x} * Measure::kCount;
  const auto square_at = [&](int64_t line, int64_t c) {
    const float g = load_value(grads, tensor.grad_dtype, (tile.line + line) * size + tile.begin + c);
    const float clipped = clip_gradient(g, Columns::kGradientBound);
    return clipped * clipped;
  };
  double nonfinite = 0.0, param_square = 0.0, grad_size = 0.0;
  for (int64_t first = 0; first < extent.width; first += threads.width) {
    const int64_t c = first + threads.column;
    Sum sum, squares, sizes;
    if (c < extent.width)
      for (int64_t line = threads.group; line < extent.lines; line += threads.groups) {
        const int64_t at = (tile.line + line) * size + tile.begin + c;
        const float p = bounded(load_value(tensor.param, tensor.param_dtype, at));
        const float raw = load_value(grads, tensor.grad_dtype, at), g = clip_gradient(raw, Columns::kGradientBound);
        nonfinite += raw - raw == 0.0f ? 0.0 : 1.0;
        squares.add(p * p);
        if constexpr (Columns::kSees == Sees::kStep) sizes.add(abs_of(g));
        sum.add(g * g);
      }
    param_square += squares.value();
    grad_size += sizes.value();
    if (!lines.factored()) continue;
    across[threadIdx.x] = sum.value();
    __syncthreads();
    if (threads.group == 0 && c < extent.width) {
      double total = 0.0;
      for (int group = 0; group < threads.groups; ++group) total += across[group * threads.width + threads.column];
      params.sums[places.across + c] = total;
    }
    __syncthreads();
  }
  rows[Measure::nonfinite][threadIdx.x] = nonfinite;
  rows[Measure::param_square][threadIdx.x] = param_square;
  if constexpr (kSums > Measure::grad_size) rows[Measure::grad_size][threadIdx.x] = grad_size;
  __syncthreads();
  reduce_columns<kSums>(rows, [&](int c, double sum) { measures[c] = sum; });
  const Accumulators<Columns::kNumMom, Columns::kNumRms> state(params, tensor);
  if constexpr (Columns::kSees == Sees::kBefore) {
    measure_seen(tile, lines, extent, threads, measures, [&](int64_t at, float* x) { state.load_at(at, x, x + 3); });
  } else if constexpr (Columns::kSees == Sees::kStep) {
    const float* const control = params.controls + tensor.row * AdamControl::kCount;
    measure_seen(tile, lines, extent, threads, measures, [&](int64_t at, float* x) {
      x[0] = clip_gradient(load_value(grads, tensor.grad_dtype, at), Columns::kGradientBound);
      x[1] = seen_param(load_value(tensor.param, tensor.param_dtype, at));
      state.next(at, x[0], control + AdamControl::mom_decay, control + AdamControl::rms_decay, x + 2, x + 3);
    });
  }
  if (!lines.factored()) return;
  // Along lines, a warp for each: its squares are in a cache.
  const int per_line = static_cast<int>(lines.per_line()), inner = static_cast<int>(tensor.inner);
  const int period = static_cast<int>(tensor.length) * inner, begin = static_cast<int>(tile.begin);
  const int end = begin + static_cast<int>(extent.width);
  for (int64_t line = warp_index(); line < extent.lines; line += kWarps) {
    double* const along = params.sums + places.along + line * places.stride;
    if (per_line == 1) {
      const double sum = sum_rows(extent.width, [&](int64_t c) { return static_cast<double>(square_at(line, c)); });
      if (lane_index() == 0) *along = sum;
      continue;
    }
    for (int entry = lane_index(); entry < per_line; entry += 32) {
      // Its elements of the line are first, first + inner, ..
      const int first = entry / inner * period + entry % inner, last = first + period;
      const int skipped = begin > first ? (begin - first + inner - 1) / inner : 0;
      Sum sum;
      for (int at = first + skipped * inner; at < last && at < end; at += inner) sum.add(square_at(line, at - begin));
      along[entry] = sum.value();
    }
  }
}

// ---- Of tensors and their rows and columns -----------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) begin_kernel(FactoredParams params) {
  const FactoredTensor tensor = params.tensors[blockIdx.x];
  const double* const measures = params.measures + tensor.first_tile * Measure::kCount;
  const double numel = static_cast<double>(tensor.numel);
  float* const stats = params.stats + tensor.row * Measure::kCount;
  const auto total = [&](const auto& of_tile) {
    return sum_rows(tensor.num_tiles, [&](int64_t tile) {
      const double count = static_cast<double>(Extent(tensor, params.tiles[tensor.first_tile + tile]).count());
      return of_tile(measures + tile * Measure::kCount, count);
    });
  };
  for (int c = warp_index(); c < Measure::var0; c += kWarps) {
    const bool is_mean = c >= Measure::mean0;
    const double sum =
        total([&](const double* tile, double count) { return is_mean ? tile[c] * (count / numel) : tile[c]; });
    if (lane_index() == 0) stats[c] = static_cast<float>(is_mean || c == Measure::nonfinite ? sum : sum / numel);
    if (!is_mean) continue;
    const int variance = c + kSeenThings;
    const double squares = total([&](const double* tile, double count) {
      return (tile[variance] + count * (tile[c] - sum) * (tile[c] - sum)) / numel;
    });
    if (lane_index() == 0) stats[variance] = static_cast<float>(squares);
  }
}

__global__ void __launch_bounds__(kThreads) moments_kernel(FactoredParams params) {
  const Piece piece = params.pieces[blockIdx.x];
  const FactoredTensor tensor = params.tensors[piece.tensor];
  if (rests(params, tensor)) return;
  const Lines lines{tensor};
  const int64_t count = piece.is_along ? lines.num_along() : lines.num_across();
  float* const moments = reinterpret_cast<float*>(piece.is_along ? tensor.along : tensor.across);
  for (int64_t i = piece.begin + threadIdx.x; i < min_of(piece.begin + kPiece, count); i += kThreads)
    next_moments(params, moments, count, i, mean_square(params, lines, piece.is_along, i));
}

// Inverse roots of the means along or across lines, and the factors of those that are columns.
__device__ __forceinline__ void find_roots(const Lines& lines, bool is_along, float* to) {
  const int64_t count = is_along ? lines.num_along() : lines.num_across();
  const float* const moments = reinterpret_cast<const float*>(is_along ? lines.tensor.along : lines.tensor.across);
  const bool is_row = is_along == (lines.tensor.along_is_row != 0);
  for (int64_t i = threadIdx.x; i < kFactoredDecays * count; i += kThreads) {
    const float moment = moments[i];
    to[i] = inverse_root(moment);
    if (!is_row) to[kFactoredDecays * count + i] = safe_inverse_root(moment);
  }
}

__global__ void __launch_bounds__(kThreads) factors_kernel(FactoredParams params) {
  const FactoredTensor tensor = params.tensors[blockIdx.x];
  const Lines lines{tensor};
  if (!lines.factored() || rests(params, tensor)) return;
  float *const along = params.factors + lines.along_factors(), *const across =
                                                                   params.factors + lines.across_factors(params.width);
  find_roots(lines, true, along);
  find_roots(lines, false, across);
  const bool is_along = tensor.along_is_row != 0;
  const int64_t count = is_along ? lines.num_along() : lines.num_across(), rows = lines.num_whole();
  const float* const moments = reinterpret_cast<const float*>(is_along ? tensor.along : tensor.across);
  float* const factors = (is_along ? along : across) + kFactoredDecays * count;
  for (int64_t base = 0; base < kFactoredDecays * rows; base += kWarps) {  // the same for all threads
    const int64_t w = min_of(base + warp_index(), kFactoredDecays * rows - 1);
    const RowEntries row(lines, is_along, rest_of(w, rows));
    const int64_t first = quotient(w, rows) * count + row.first;
    const double sum =
        sum_rows(row.count, [&](int64_t i) { return static_cast<double>(moments[first + i * row.stride]); });
    const float factor = row_factor(sum, row.count);
    for (int64_t i = first + lane_index() * row.stride; i < first + row.count * row.stride; i += 32 * row.stride)
      factors[i] = safe_inverse_root(moments[i] * factor);
  }
}

template <class Columns, int kWidth>
__global__ void __launch_bounds__(kThreads) fold_kernel(FactoredParams params) {
  constexpr int kColumns = Columns::kNumColumns, kSize = FactoredMlp<kColumns, kWidth>::kSize;
  __shared__ float scale[kColumns], times[Columns::kNumTimes + 1];
  const FactoredTensor tensor = params.tensors[blockIdx.x];
  if (Columns::kAdam && tensor.adam) return;
  const int matrices = Columns::kWhole ? tensor.matrices : 1;
  const double numel = static_cast<double>(tensor.numel / matrices);
  for (int i = warp_index(); i < kColumns * matrices; i += kWarps) {
    const int c = i / matrices, m = i % matrices;
    const double sum =
        sum_rows(tensor.num_tiles, [&](int64_t tile) { return *square_sum(params, tensor, kColumns, tile, c, m); });
    if (lane_index() != 0) continue;
    const float value = column_scale<Columns>(sum / numel);
    if (matrices > 1)
      params.scales[tensor.scales + i] = value;
    else
      scale[c] = value;
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < Columns::kNumTimes) times[thread] = tanh_time(thread, static_cast<float>(*params.step));
  __syncthreads();
  const float* const weights = params.weights + tensor.row * params.weight_stride;
  for (int i = thread; i < kSize; i += kThreads)
    params.own_weights[tensor.row * kSize + i] =
        folded_weight<Columns, kWidth>(i, weights, matrices > 1 ? nullptr : scale, tensor.along_is_row != 0, times);
}

// ---- accumulate and apply ----------------------------------------------------------------------------------------------

// What is known of the second moments of element c of a line of a tile.
template <class Columns>
struct Spread {
  const float *along, *along_factors, *across, *across_factors;
  int64_t num_along, num_across, per_line, outer_size, lines_of_outer;

  __device__ __forceinline__ Spread(const FactoredParams& params, const Lines& lines)
      : along(reinterpret_cast<const float*>(lines.tensor.along)),
        along_factors(params.factors + lines.along_factors()),
        across(reinterpret_cast<const float*>(lines.tensor.across)),
        across_factors(params.factors + lines.across_factors(params.width)),
        num_along(lines.num_along()),
        num_across(lines.num_across()),
        per_line(lines.per_line()),
        outer_size(lines.size()),
        lines_of_outer(lines.tensor.lines) {}

  __device__ __forceinline__ Factors<float> at(const Lines& lines, int64_t line, int64_t at) const {
    float a[kFactorPlanes], b[kFactorPlanes];
    const int64_t i = per_line == 1 ? line : line * per_line + lines.entry(at);
    const int64_t j = quotient(line, lines_of_outer) * outer_size + at;
#pragma unroll
    for (int k = 0; k < kFactoredDecays; ++k) {
      a[k] = along[k * num_along + i];
      b[k] = across[k * num_across + j];
    }
#pragma unroll
    for (int k = 0; k < 2 * kFactoredDecays; ++k) {
      a[kFactoredDecays + k] = along_factors[k * num_along + i];
      b[kFactoredDecays + k] = across_factors[k * num_across + j];
    }
    return Factors<float>::of(a, b);
  }
};

// What a block works on: a tile, whose lines its threads go over, and what is known of an element.
template <class Columns>
struct Work {
  const Tile tile;
  const FactoredTensor& tensor;
  const int64_t grads;
  const Lines lines;
  const Extent extent;
  const Spread<Columns> spread;

  __device__ __forceinline__ Work(const FactoredParams& params, const Tile& the_tile, const FactoredTensor& the_tensor)
      : tile(the_tile),
        tensor(the_tensor),
        grads(params.grads[the_tile.tensor]),
        lines{the_tensor},
        extent(the_tensor, the_tile),
        spread(params, lines) {}

  __device__ __forceinline__ int64_t place(int64_t line, int64_t c) const {
    return (tile.line + line) * lines.size() + tile.begin + c;
  }

  // f(line, c) for the elements of this thread.
  template <class Function>
  __device__ __forceinline__ void each(const Function& f) const {
    const Threads threads(extent);
    for (int64_t line = threads.group; line < extent.lines; line += threads.groups)
      for (int64_t c = threads.column; c < extent.width; c += threads.width) f(line, c);
  }

  // f(line, c) for the elements of matrix `matrix`, of this thread number `thread` of `threads`.
  template <class Function>
  __device__ __forceinline__ void each_of(const Matrices& matrices, uint32_t matrix, int thread, int threads,
                                          const Function& f) const {
    for (int64_t line = 0; line < extent.lines; ++line) {
      const int64_t begin = place(line, 0), end = begin + extent.width;
      if (matrices.stride == 1) {  // matrix, matrix + count, ..
        int64_t at = begin + (matrix + matrices.count - static_cast<uint32_t>(begin) % matrices.count) % matrices.count;
        for (at += int64_t{matrices.count} * thread; at < end; at += int64_t{matrices.count} * threads)
          f(line, at - begin);
      } else {
        const int64_t first = int64_t{matrix} * matrices.stride, last = min_of(first + matrices.stride, end);
        for (int64_t at = (first > begin ? first : begin) + thread; at < last; at += threads) f(line, at - begin);
      }
    }
  }

  __device__ __forceinline__ float grad(int64_t at) const {
    return clip_gradient(load_value(grads, tensor.grad_dtype, at), Columns::kGradientBound);
  }

  // moment(k): of a tensor that is not factored.
  template <class Moment>
  __device__ __forceinline__ Factors<float> factors(int64_t line, int64_t c, const Moment& moment) const {
    if constexpr (!Columns::kFactored) {
      return {};
    } else {
      if (lines.factored()) return spread.at(lines, tile.line + line, tile.begin + c);
      float d[kFactoredDecays];
#pragma unroll
      for (int k = 0; k < kFactoredDecays; ++k) d[k] = moment(k);
      return Columns::not_factored(d);
    }
  }
};

// With three blocks asked for, ptxas takes the registers that there are: left to itself it spills on sm_90.
template <class Columns>
__global__ void __launch_bounds__(kThreads, 3) accumulate_factored_kernel(FactoredParams params) {
  constexpr int kColumns = Columns::kNumColumns;
  __shared__ double rows[kColumns][kThreads];
  const Tile tile = params.tiles[blockIdx.x];
  const FactoredTensor tensor = params.tensors[tile.tensor];
  if (rests(params, tensor) || (Columns::kAdam && tensor.adam)) return;
  const Work<Columns> work(params, tile, tensor);
  const Accumulators<Columns::kNumMom, Columns::kNumRms> state(params, tensor);
  float* const moments = reinterpret_cast<float*>(tensor.along);
  const int64_t number = int64_t{blockIdx.x} - tensor.first_tile;
  float part[kColumns] = {};
  int summed = 0;
  const auto clear = [&] {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) rows[c][threadIdx.x] = 0.0;
  };
  const auto flush = [&] {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      rows[c][threadIdx.x] += part[c];
      part[c] = 0.0f;
    }
    summed = 0;
  };
  const auto visit = [&](int64_t line, int64_t c) {
    const int64_t at = work.place(line, c);
    const float g = work.grad(at), p = seen_param(load_value(tensor.param, tensor.param_dtype, at));
    float m[Columns::kNumMom], r[Columns::kNumRms + 1], x[kColumns];
    state.next(at, g, params.mom_decay, params.rms_decay, m, r);
    state.store_at(at, m, r);
    const Factors<float> factors = work.factors(line, c, [&](int k) {
      float* const address = moments + k * tensor.numel + at;
      const float d = next_accumulator(__ldcg(address), params.factored_decay[k], g * g + 1e-30f);
      __stcg(address, d);
      return d;
    });
    Columns::columns(g, p, m, r, factors, x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) part[i] += x[i] * x[i];
    if (++summed == kSummed) flush();
  };
  clear();
  if constexpr (Columns::kWhole) {
    if (tensor.matrices > 1) {
      // A group of threads for each matrix, or thread by thread as many matrices as there are threads.
      const Matrices matrices(tensor);
      const int count = tensor.matrices, together = count < kThreads ? count : kThreads, groups = kThreads / together;
      const int group = static_cast<int>(threadIdx.x) / together, own = static_cast<int>(threadIdx.x) % together;
      for (int first = 0; first < count; first += together) {
        const int m = first + own;
        if (m < count && group < groups) work.each_of(matrices, static_cast<uint32_t>(m), group, groups, visit);
        flush();
        __syncthreads();
        if (m < count && group == 0) {
#pragma unroll 1
          for (int c = 0; c < kColumns; ++c) {
            double sum = 0.0;
            for (int i = 0; i < groups; ++i) sum += rows[c][i * together + own];
            *square_sum(params, tensor, kColumns, number, c, m) = sum;
          }
        }
        __syncthreads();
        clear();
      }
      return;
    }
  }
  work.each(visit);
  flush();
  __syncthreads();
  reduce_columns<kColumns>(rows, [&](int c, double sum) { *square_sum(params, tensor, kColumns, number, c, 0) = sum; });
}

// Adam's step of a tile: accumulators and, where they move, parameters.
template <class Columns>
__device__ __forceinline__ void step_by_adam(const FactoredParams& params, const Tile& tile,
                                             const FactoredTensor& tensor, float step_size, float keep) {
  const Work<Columns> work(params, tile, tensor);
  const float* const control = params.controls + tensor.row * AdamControl::kCount;
  const bool moving = moves(step_size, keep);
  const Accumulators<1, 1> state(params, tensor);
  work.each([&](int64_t line, int64_t c) {
    const int64_t at = work.place(line, c);
    const float g = work.grad(at), p = load_value(tensor.param, tensor.param_dtype, at);
    float m, r;
    state.next(at, g, control + AdamControl::mom_decay, control + AdamControl::rms_decay, &m, &r);
    state.store_at(at, &m, &r);
    if (moving)
      store_value(tensor.param, tensor.param_dtype, at, next_param(p, adam_direction(m, r, control), step_size, keep));
  });
}

template <class Columns>
__global__ void __launch_bounds__(kThreads) adam_kernel(FactoredParams params) {
  const Tile tile = params.tiles[blockIdx.x];
  const FactoredTensor tensor = params.tensors[tile.tensor];
  if (!rests(params, tensor))
    step_by_adam<Columns>(params, tile, tensor, params.step_size[tensor.row], params.keep[tensor.row]);
}

template <class Columns, int kWidth>
__global__ void __launch_bounds__(kThreads) apply_factored_kernel(FactoredParams params) {
  constexpr int kColumns = Columns::kNumColumns, kSize = FactoredMlp<kColumns, kWidth>::kSize;
  constexpr int kBias = FactoredMlp<kColumns, kWidth>::kB1;
  alignas(16) __shared__ float weights[kSize];
  const Tile tile = params.tiles[blockIdx.x];
  const FactoredTensor tensor = params.tensors[tile.tensor];
  const float step_size = params.step_size[tensor.row], keep = params.keep[tensor.row];
  if (rests(params, tensor)) return;
  if constexpr (Columns::kAdam) {
    if (tensor.adam) return step_by_adam<Columns>(params, tile, tensor, step_size, keep);
  }
  if (!moves(step_size, keep)) return;
  for (int i = static_cast<int>(threadIdx.x); i < kSize; i += kThreads)
    weights[i] = params.own_weights[tensor.row * kSize + i];
  __syncthreads();
  const Work<Columns> work(params, tile, tensor);
  const Accumulators<Columns::kNumMom, Columns::kNumRms> state(params, tensor);
  const float* const moments = reinterpret_cast<const float*>(tensor.along);
  work.each([&](int64_t line, int64_t c) {
    const int64_t at = work.place(line, c);
    const float g = work.grad(at), p = load_value(tensor.param, tensor.param_dtype, at);
    float m[Columns::kNumMom], r[Columns::kNumRms + 1], x[kColumns], direction[1];
    state.load_at(at, m, r);
    const Factors<float> factors =
        work.factors(line, c, [&](int k) { return __ldcg(moments + k * tensor.numel + at); });
    Columns::columns(g, seen_param(p), m, r, factors, x);
    if constexpr (Columns::kWhole) {
      if (tensor.matrices > 1) {
        const float* const scales = params.scales + tensor.scales + Matrices(tensor).of(at);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) x[i] *= scales[i * tensor.matrices];
      }
    }
    factored_direction<Columns, kColumns, kWidth, 1, kWidth <= 16 ? kWidth : 16>(
        x, weights, params.magnitude_rate, [&](int j, int) { return weights[kBias + j]; }, direction);
    if constexpr (Columns::kWhole)
      __stcg(reinterpret_cast<float*>(tensor.direction) + at, direction[0]);
    else
      store_value(tensor.param, tensor.param_dtype, at, next_param(p, direction[0], step_size, keep));
  });
}

// Directions that were treated as a whole to parameters.
__global__ void __launch_bounds__(kThreads) write_factored_kernel(FactoredParams params) {
  const Tile tile = params.tiles[blockIdx.x];
  const FactoredTensor tensor = params.tensors[tile.tensor];
  const float step_size = params.step_size[tensor.row], keep = params.keep[tensor.row];
  if (tensor.direction == 0 || rests(params, tensor) || !moves(step_size, keep)) return;
  const float* const directions = reinterpret_cast<const float*>(tensor.direction);
  const Work<Celo2Columns> work(params, tile, tensor);
  work.each([&](int64_t line, int64_t c) {
    const int64_t at = work.place(line, c);
    const float p = load_value(tensor.param, tensor.param_dtype, at);
    store_value(tensor.param, tensor.param_dtype, at, next_param(p, __ldcg(directions + at), step_size, keep));
  });
}

// ---- Launches ----------------------------------------------------------------------------------------------------------

void launch_blocks(const char* name, void (*kernel)(FactoredParams), int64_t blocks, const FactoredParams& params,
                   const Target& target) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff)
    throw std::runtime_error(std::string(name) + ": expected at most 2^31 - 1 blocks, got " + std::to_string(blocks) +
                             "; update the tensors in several calls");
  LOPT_LAUNCH(name, kernel, static_cast<unsigned>(blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(target.stream),
              params);
  LOPT_CUDA_CHECK(cudaGetLastError());
}

bool accumulate_factored(const FactoredParams& params, const Target& target) {
  const DeviceGuard guard(target.device);
  return with_factored(params.rule, params.width, [&](auto columns, auto) {
    using Columns = decltype(columns);
    launch_blocks("measure", measure_kernel<Columns>, params.num_tiles, params, target);
    launch_blocks("begin", begin_kernel, params.num_tensors, params, target);
    if constexpr (Columns::kMlp) {
      launch_blocks("moments", moments_kernel, params.num_pieces, params, target);
      launch_blocks("factors", factors_kernel, params.num_tensors, params, target);
      launch_blocks("accumulate", accumulate_factored_kernel<Columns>, params.num_tiles, params, target);
    }
  });
}

bool apply_factored(const FactoredParams& params, const Target& target) {
  const DeviceGuard guard(target.device);
  return with_factored(params.rule, params.width, [&](auto columns, auto width_constant) {
    using Columns = decltype(columns);
    constexpr int kWidth = decltype(width_constant)::value;
    if constexpr (Columns::kMlp) {
      launch_blocks("fold", fold_kernel<Columns, kWidth>, params.num_tensors, params, target);
      launch_blocks("apply", apply_factored_kernel<Columns, kWidth>, params.num_tiles, params, target);
    } else {
      launch_blocks("adam", adam_kernel<Columns>, params.num_tiles, params, target);
    }
  });
}

bool write_factored(const FactoredParams& params, const Target& target) {
  const DeviceGuard guard(target.device);
  return with_factored(params.rule, params.width, [&](auto, auto) {
    launch_blocks("write", write_factored_kernel, params.num_tiles, params, target);
  });
}

}  // namespace

const FactoredKernels& cuda_factored() {
  static constexpr FactoredKernels kernels{accumulate_factored, apply_factored, write_factored};
  return kernels;
}

}  // namespace lopt
