// Steps of learned optimizers of others on the GPU, by the phases of api/factored.h, a launch each: a block for every tile,
// piece or tensor of all of them. Sums are float over 16 elements of a thread, then double, in a fixed order (Note [Order
// of reduction]).
#include "api/factored.h"

#include "chunks.cuh"
#include "reduce.cuh"

namespace lopt {
namespace {

constexpr int kSummed = 16;  // elements of a thread, in float

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

// Means of the accumulators before the step, and sums of squared deviations from them.
__device__ __forceinline__ void measure_moments(const Tile& tile, const Lines& lines, const Extent& extent,
                                                const Threads& threads, double* measures) {
  __shared__ double rows[kSeenMoments][kThreads], means[kSeenMoments];
  const FactoredTensor& tensor = lines.tensor;
  const auto sum_of_thread = [&](int k, const auto& of_value) {
    const float* const values = k < 3 ? reinterpret_cast<const float*>(tensor.mom) + k * tensor.numel
                                      : reinterpret_cast<const float*>(tensor.rms);
    Sum sum;
    for (int64_t line = threads.group; line < extent.lines; line += threads.groups)
      for (int64_t c = threads.column; c < extent.width; c += threads.width)
        sum.add(of_value(__ldcg(values + (tile.line + line) * lines.size() + tile.begin + c)));
    rows[k][threadIdx.x] = sum.value();
  };
  for (int k = 0; k < kSeenMoments; ++k) sum_of_thread(k, [](float x) { return x; });
  __syncthreads();
  reduce_columns<kSeenMoments>(rows, [&](int k, double sum) {
    means[k] = measures[Measure::mom0_mean + k] = sum / static_cast<double>(extent.count());
  });
  __syncthreads();
  for (int k = 0; k < kSeenMoments; ++k) {
    const float mean = static_cast<float>(means[k]);
    sum_of_thread(k, [mean](float x) { return (x - mean) * (x - mean); });
  }
  __syncthreads();
  reduce_columns<kSeenMoments>(rows, [&](int k, double sum) { measures[Measure::mom0_var + k] = sum; });
}

template <class Columns>
__global__ void __launch_bounds__(kThreads) measure_kernel(FactoredParams params) {
  constexpr int kSums = 2;  // nonfinite, param_square
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
  double nonfinite = 0.0, param_square = 0.0;
  for (int64_t first = 0; first < extent.width; first += threads.width) {
    const int64_t c = first + threads.column;
    Sum sum, squares;
    if (c < extent.width)
      for (int64_t line = threads.group; line < extent.lines; line += threads.groups) {
        const int64_t at = (tile.line + line) * size + tile.begin + c;
        const float p = bounded(load_value(tensor.param, tensor.param_dtype, at));
        const float raw = load_value(grads, tensor.grad_dtype, at), g = clip_gradient(raw, Columns::kGradientBound);
        nonfinite += raw - raw == 0.0f ? 0.0 : 1.0;
        squares.add(p * p);
        sum.add(g * g);
      }
    param_square += squares.value();
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
  __syncthreads();
  reduce_columns<kSums>(rows, [&](int c, double sum) { measures[c] = sum; });
  if constexpr (Columns::kSeesMoments) measure_moments(tile, lines, extent, threads, measures);
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
  for (int c = warp_index(); c < Measure::mom0_var; c += kWarps) {
    const bool is_mean = c >= Measure::mom0_mean;
    const double sum =
        total([&](const double* tile, double count) { return is_mean ? tile[c] * (count / numel) : tile[c]; });
    if (lane_index() == 0) stats[c] = static_cast<float>(c == Measure::param_square ? sum / numel : sum);
    if (!is_mean) continue;
    const int variance = c + kSeenMoments;
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

__global__ void __launch_bounds__(kThreads) factors_kernel(FactoredParams params) {
  const FactoredTensor tensor = params.tensors[blockIdx.x];
  const Lines lines{tensor};
  if (!lines.factored() || rests(params, tensor)) return;
  for (int side = 0; side < 2; ++side) {
    const bool is_along = side == 0, is_row = is_along == (tensor.along_is_row != 0);
    const int64_t count = is_along ? lines.num_along() : lines.num_across();
    const float* const moments = reinterpret_cast<const float*>(is_along ? tensor.along : tensor.across);
    float* const to = params.factors + (is_along ? lines.along_factors() : lines.across_factors(params.width));
    for (int k = 0; k < kFactoredDecays; ++k) {
      const float* const from = moments + k * count;
      float *const root = to + k * count, *const factor = to + (kFactoredDecays + k) * count;
      for (int64_t i = threadIdx.x; i < count; i += kThreads) {
        root[i] = inverse_root(from[i]);
        if (!is_row) factor[i] = safe_inverse_root(from[i]);
      }
      if (!is_row) continue;
      for (int64_t w = warp_index(); w < lines.num_whole(); w += kWarps) {
        const RowEntries row(lines, is_along, w);
        const double sum =
            sum_rows(row.count, [&](int64_t i) { return static_cast<double>(from[row.first + i * row.stride]); });
        const float share = 1.0f / row_mean(sum, row.count);
        for (int64_t i = lane_index(); i < row.count; i += 32) {
          const int64_t at = row.first + i * row.stride;
          factor[at] = safe_inverse_root(from[at] * share);
        }
      }
    }
  }
}

template <class Columns, int kWidth>
__global__ void __launch_bounds__(kThreads) fold_kernel(FactoredParams params) {
  constexpr int kColumns = Columns::kNumColumns, kSize = FactoredMlp<kColumns, kWidth>::kSize;
  __shared__ float scale[kColumns], times[Columns::kNumTimes + 1];
  const FactoredTensor tensor = params.tensors[blockIdx.x];
  const double* const squares = params.squares + tensor.first_tile * kColumns;
  for (int c = warp_index(); c < kColumns; c += kWarps) {
    const double sum = sum_rows(tensor.num_tiles, [&](int64_t tile) { return squares[tile * kColumns + c]; });
    if (lane_index() == 0) scale[c] = column_scale(sum / static_cast<double>(tensor.numel));
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < Columns::kNumTimes) times[thread] = tanh_time(thread, static_cast<float>(*params.step));
  __syncthreads();
  const float* const weights = params.weights + tensor.row * params.weight_stride;
  for (int i = thread; i < kSize; i += kThreads)
    params.own_weights[tensor.row * kSize + i] =
        folded_weight<Columns, kWidth>(i, weights, scale, tensor.along_is_row != 0, times);
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
    const int64_t j = line / lines_of_outer * outer_size + at;
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

template <class Columns>
__global__ void __launch_bounds__(kThreads) accumulate_factored_kernel(FactoredParams params) {
  constexpr int kColumns = Columns::kNumColumns;
  __shared__ double rows[kColumns][kThreads];
  const Tile tile = params.tiles[blockIdx.x];
  const FactoredTensor tensor = params.tensors[tile.tensor];
  if (rests(params, tensor)) return;
  const int64_t grads = params.grads[tile.tensor];
  const Lines lines{tensor};
  const Extent extent(tensor, tile);
  const Threads threads(extent);
  const Spread<Columns> spread(params, lines);
  const bool factored = lines.factored();
  float *const mom = reinterpret_cast<float*>(tensor.mom), *const rms = reinterpret_cast<float*>(tensor.rms);
  float* const moments = reinterpret_cast<float*>(tensor.along);
  float part[kColumns] = {};
#pragma unroll
  for (int c = 0; c < kColumns; ++c) rows[c][threadIdx.x] = 0.0;
  int summed = 0;
  const auto flush = [&] {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      rows[c][threadIdx.x] += part[c];
      part[c] = 0.0f;
    }
    summed = 0;
  };
  for (int64_t line = threads.group; line < extent.lines; line += threads.groups)
    for (int64_t c = threads.column; c < extent.width; c += threads.width) {
      const int64_t at = (tile.line + line) * lines.size() + tile.begin + c;
      const float g = clip_gradient(load_value(grads, tensor.grad_dtype, at), Columns::kGradientBound);
      const float p = seen_param(load_value(tensor.param, tensor.param_dtype, at));
      float m[Columns::kNumMom], r[Columns::kNumRms + 1], x[kColumns];
#pragma unroll
      for (int k = 0; k < Columns::kNumMom; ++k) {
        m[k] = next_accumulator(__ldcg(mom + k * tensor.numel + at), params.mom_decay[k], g);
        __stcg(mom + k * tensor.numel + at, m[k]);
      }
#pragma unroll
      for (int k = 0; k < Columns::kNumRms; ++k) {
        r[k] = next_accumulator(__ldcg(rms + k * tensor.numel + at), params.rms_decay[k], g * g);
        __stcg(rms + k * tensor.numel + at, r[k]);
      }
      Factors<float> factors{};
      if (factored) {
        factors = spread.at(lines, tile.line + line, tile.begin + c);
      } else if constexpr (Columns::kFactored) {
        float d[kFactoredDecays];
#pragma unroll
        for (int k = 0; k < kFactoredDecays; ++k) {
          float* const address = moments + k * tensor.numel + at;
          d[k] = next_accumulator(__ldcg(address), params.factored_decay[k], g * g + 1e-30f);
          __stcg(address, d[k]);
        }
        factors = Columns::not_factored(d);
      }
      Columns::columns(g, p, m, r, factors, x);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) part[i] += x[i] * x[i];
      if (++summed == kSummed) flush();
    }
  flush();
  __syncthreads();
  reduce_columns<kColumns>(rows, [&](int c, double sum) { params.squares[int64_t{blockIdx.x} * kColumns + c] = sum; });
}

template <class Columns, int kWidth>
__global__ void __launch_bounds__(kThreads) apply_factored_kernel(FactoredParams params) {
  constexpr int kColumns = Columns::kNumColumns, kSize = FactoredMlp<kColumns, kWidth>::kSize;
  constexpr int kBias = FactoredMlp<kColumns, kWidth>::kB1;
  alignas(16) __shared__ float weights[kSize];
  const Tile tile = params.tiles[blockIdx.x];
  const FactoredTensor tensor = params.tensors[tile.tensor];
  const float step_size = params.step_size[tensor.row], keep = params.keep[tensor.row];
  if (rests(params, tensor) || !moves(step_size, keep)) return;
  for (int i = static_cast<int>(threadIdx.x); i < kSize; i += kThreads)
    weights[i] = params.own_weights[tensor.row * kSize + i];
  __syncthreads();
  const int64_t grads = params.grads[tile.tensor];
  const Lines lines{tensor};
  const Extent extent(tensor, tile);
  const Threads threads(extent);
  const Spread<Columns> spread(params, lines);
  const bool factored = lines.factored();
  const float *const mom = reinterpret_cast<const float*>(tensor.mom), *const rms =
                                                                           reinterpret_cast<float*>(tensor.rms);
  const float* const moments = reinterpret_cast<const float*>(tensor.along);
  for (int64_t line = threads.group; line < extent.lines; line += threads.groups)
    for (int64_t c = threads.column; c < extent.width; c += threads.width) {
      const int64_t at = (tile.line + line) * lines.size() + tile.begin + c;
      const float g = clip_gradient(load_value(grads, tensor.grad_dtype, at), Columns::kGradientBound);
      const float p = load_value(tensor.param, tensor.param_dtype, at);
      float m[Columns::kNumMom], r[Columns::kNumRms + 1], x[kColumns], direction[1];
#pragma unroll
      for (int k = 0; k < Columns::kNumMom; ++k) m[k] = __ldcg(mom + k * tensor.numel + at);
#pragma unroll
      for (int k = 0; k < Columns::kNumRms; ++k) r[k] = __ldcg(rms + k * tensor.numel + at);
      Factors<float> factors{};
      if (factored) {
        factors = spread.at(lines, tile.line + line, tile.begin + c);
      } else if constexpr (Columns::kFactored) {
        float d[kFactoredDecays];
#pragma unroll
        for (int k = 0; k < kFactoredDecays; ++k) d[k] = __ldcg(moments + k * tensor.numel + at);
        factors = Columns::not_factored(d);
      }
      Columns::columns(g, seen_param(p), m, r, factors, x);
      factored_direction<Columns, kColumns, kWidth, 1, kWidth <= 16 ? kWidth : 16>(
          x, weights, params.magnitude_rate, [&](int j, int) { return weights[kBias + j]; }, direction);
      store_value(tensor.param, tensor.param_dtype, at, next_param(p, direction[0], step_size, keep));
    }
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
    launch_blocks("moments", moments_kernel, params.num_pieces, params, target);
    launch_blocks("factors", factors_kernel, params.num_tensors, params, target);
    launch_blocks("accumulate", accumulate_factored_kernel<Columns>, params.num_tiles, params, target);
  });
}

bool apply_factored(const FactoredParams& params, const Target& target) {
  const DeviceGuard guard(target.device);
  return with_factored(params.rule, params.width, [&](auto columns, auto width_constant) {
    using Columns = decltype(columns);
    constexpr int kWidth = decltype(width_constant)::value;
    launch_blocks("fold", fold_kernel<Columns, kWidth>, params.num_tensors, params, target);
    launch_blocks("apply", apply_factored_kernel<Columns, kWidth>, params.num_tiles, params, target);
  });
}

}  // namespace

const FactoredKernels& cuda_factored() {
  static constexpr FactoredKernels kernels{accumulate_factored, apply_factored};
  return kernels;
}

}  // namespace lopt
