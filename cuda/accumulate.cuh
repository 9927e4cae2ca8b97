// What the kernels share that update accumulators (accumulate.cu, sweep.cu, sweep_mma.cu): the new state of a quad, and the
// statistics of a tensor. Source: moments are merged after Chan, Golub and LeVeque (1979).
#pragma once

#include "chunks.cuh"
#include "reduce.cuh"

namespace lopt {

// Note [Pivots]
// Until finish_row, means and sums of squared deviations in a thread's row of partials are sums of differences from a pivot
// and of their squares (Chan, Golub and LeVeque 1983 on shifted data). The pivots are values of its first parameter, one of
// 64 at most: however it lies to the others, the sums of squares are at most 64 times those of deviations from the mean,
// and hardly ever more than a few times.
struct Pivots {
  float param, mom, rms;
};

template <int kCount>
__device__ __forceinline__ float mean_of_first(const float (&values)[kCount][kQuad]) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum += values[k][0];
  return sum * (1.0f / kCount);
}

template <class Features>
__device__ __forceinline__ Pivots pivots_of(const QuadValues<Features>& values) {
  return {bounded(values.param[0]), mean_of_first(values.mom), mean_of_first(values.rms)};
}

__device__ __forceinline__ void add_difference(float* row, float difference) {
  row[0] += difference;
  row[1] += difference * difference;
}

// row += one parameter, but for the number of gradients that are not finite.
template <class Features>
__device__ __forceinline__ void add_one(float grad, float param, const float* mom, const float* rms,
                                        const Pivots& pivots, float* row) {
  param = bounded(param);
  row[Stat::grad_square] += grad * grad;
  row[Stat::param_square] += param * param;
  add_difference(row + Stat::param_mean, param - pivots.param);
#pragma unroll
  for (int k = 0; k < Features::kNumMom; ++k) add_difference(row + Stat::mom_mean, mom[k] - pivots.mom);
#pragma unroll
  for (int k = 0; k < Features::kNumRms; ++k) add_difference(row + Stat::rms_mean, rms[k] - pivots.rms);
  float moments[Features::kNumMoments];
  Features::moments(grad, param, mom, rms, moments);
#pragma unroll
  for (int i = 0; i < Features::kNumMoments; ++i)
    if (stat_of<Features>(i) < 0) row[kMoments + i] += moments[i];
}

// Of `count` parameters: the row as merge_column wants it.
template <class Features>
__device__ __forceinline__ void finish_row(int count, const Pivots& pivots, float* row) {
  const auto finish = [&](int mean, int values, float pivot) {
    const float difference = count > 0 ? row[mean] / static_cast<float>(count * values) : 0.0f;
    row[mean + 1] = max_of(row[mean + 1] - row[mean] * difference, 0.0f);
    row[mean] = pivot + difference;
  };
  finish(Stat::param_mean, 1, pivots.param);
  finish(Stat::mom_mean, Features::kNumMom, pivots.mom);
  finish(Stat::rms_mean, Features::kNumRms, pivots.rms);
#pragma unroll
  for (int i = 0; i < Features::kNumMoments; ++i)
    if (stat_of<Features>(i) >= 0) row[kMoments + i] = row[stat_of<Features>(i)];
}

// Column c of many rows merged into one, by one warp: row r covers weight(r) parameters and holds value(r, c).
//   a mean:        mean = sum w_r mean_r / sum w_r
//   a deviation:   sum (deviation_r + w_r (mean_r - mean)^2)
//   anything else: a sum
template <class Features, class Weight, class Value>
__device__ __forceinline__ double merge_column(int c, int64_t rows, double numel, Weight weight, Value value) {
  const bool is_mean = c == Stat::param_mean || c == Stat::mom_mean || c == Stat::rms_mean;
  const bool is_deviation = c == Stat::param_var || c == Stat::mom_var || c == Stat::rms_var;
  if (!is_mean && !is_deviation) return sum_rows(rows, [&](int64_t r) { return value(r, c); });
  const int m = is_mean ? c : c - 1;
  const double mean = sum_rows(rows, [&](int64_t r) { return weight(r) * value(r, m); }) / numel;
  if (is_mean) return mean;
  const int values = m == Stat::mom_mean   ? Features::kNumMom
                     : m == Stat::rms_mean ? Features::kNumRms
                                           : 1;  // per parameter
  return sum_rows(rows, [&](int64_t r) {
    const double delta = value(r, m) - mean;
    return value(r, c) + weight(r) * values * delta * delta;
  });
}

// Accumulators of parameter j of a quad -> the bfloat16 numbers that are stored (rounding.h).
template <int kMom, int kRms>
__device__ __forceinline__ void round_state(const RoundingWords<kMom + kRms>& words, uint32_t element, int j,
                                            float (&mom)[kMom][kQuad], float (&rms)[kRms][kQuad]) {
  const uint32_t hash = words.hash(element);
#pragma unroll
  for (int k = 0; k < kMom + kRms; ++k) {
    float& value = k < kMom ? mom[k][j] : rms[k - kMom][j];
    if (value == value) value = bits_float(rounded_bits(float_bits(value), words.bits(k, hash)));
  }
}

// How many of a chunk's parameters one thread handled.
__device__ __forceinline__ int parameters_of_thread(int count, int thread) {
  const int rounds = count / (kQuad * kThreads), rest = count % (kQuad * kThreads) - kQuad * thread;
  return kQuad * rounds + (rest < 0 ? 0 : rest < kQuad ? rest : kQuad);
}

// One row of partials per thread, transposed.
template <class Features>
using StatRows = float[kNumStats<Features>][kThreads];

// Rounding words of the accumulators of one parameter, for a state that is rounded.
template <class Features>
using WordsOf = RoundingWords<Features::kNumMom + Features::kNumRms>;

// By one thread of the block.
template <class Features>
__device__ __forceinline__ WordsOf<Features> words_of(const AccumulateParams& params, const TensorEntry& tensor,
                                                      const ChunkRange& chunk) {
  const uint64_t key = rounding_key(static_cast<uint64_t>(params.seed), static_cast<uint64_t>(*params.step),
                                    static_cast<uint64_t>(tensor.row));
  return WordsOf<Features>::of(key, tensor.offset + chunk.begin);
}

// The gradients of a quad, as clip_gradient; how many of them are not finite. Where one is not, which is rare, all are read
// again.
__device__ __forceinline__ float clip_gradients(const TensorEntry& tensor, int64_t grads, float limit, const Quad& quad,
                                                float (&grad)[kQuad]) {
  float zero = 0.0f, nonfinite = 0.0f;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    zero += grad[j] * 0.0f;
    grad[j] = clamp_of(grad[j], limit);
  }
  if (zero == 0.0f) return nonfinite;
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (j >= quad.count) break;
    const float raw = load_value(grads, tensor.grad_dtype, quad.at + j);
    grad[j] = clip_gradient(raw, limit);
    nonfinite += abs_of(raw) <= kLargestFloat ? 0.0f : 1.0f;
  }
  return nonfinite;
}

// Clips the gradients of a quad, updates and stores its accumulators, and adds it to `row`, the first one with new pivots. A
// state of 8 bits takes all lanes of a warp at once.
template <Dtype kState, class Features>
__device__ __forceinline__ void accumulate_quad(const AccumulateParams& params, const TensorEntry& tensor,
                                                int64_t grads, float limit, const WordsOf<Features>& words,
                                                const Quad& quad, bool first, QuadValues<Features>& values,
                                                Pivots& pivots, float (&row)[kNumStats<Features>]) {
  auto& [param, grad, mom, rms] = values;
  row[Stat::nonfinite] += clip_gradients(tensor, grads, limit, quad, grad);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
#pragma unroll
    for (int k = 0; k < Features::kNumMom; ++k) mom[k][j] = next_accumulator(mom[k][j], params.mom_decay[k], grad[j]);
#pragma unroll
    for (int k = 0; k < Features::kNumRms; ++k)
      rms[k][j] = next_accumulator(rms[k][j], params.rms_decay[k], grad[j] * grad[j]);
    if (kState == kBFloat16) round_state(words, static_cast<uint32_t>(tensor.offset + quad.at + j), j, mom, rms);
  }
  const auto mom_planes = mom_of<kState, Features>(tensor);
  const auto rms_planes = rms_of<kState, Features>(tensor);
  if constexpr (kState == kInt8) {
    uint32_t hash[kQuad];
#pragma unroll
    for (int j = 0; j < kQuad; ++j) hash[j] = words.hash(static_cast<uint32_t>(tensor.offset + quad.at + j));
    mom_planes.encode(quad, words, 0, hash, mom);
    rms_planes.encode(quad, words, Features::kNumMom, hash, rms);
  } else {
    mom_planes.store(quad, mom);
    rms_planes.store(quad, rms);
  }

  if (first) pivots = pivots_of(values);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (j >= quad.count) break;
    float mom_of_one[Features::kNumMom], rms_of_one[Features::kNumRms];
#pragma unroll
    for (int k = 0; k < Features::kNumMom; ++k) mom_of_one[k] = mom[k][j];
#pragma unroll
    for (int k = 0; k < Features::kNumRms; ++k) rms_of_one[k] = rms[k][j];
    add_one<Features>(grad[j], param[j], mom_of_one, rms_of_one, pivots, row);
  }
}

// Rows of partials -> the chunk's. After a barrier.
template <class Features>
__device__ __forceinline__ void stats_of_chunk(const AccumulateParams& params, const ChunkRange& chunk,
                                               const TensorEntry& tensor, const StatRows<Features>& rows) {
  constexpr int kStats = kNumStats<Features>;
  const Partials<kStats> partials(params.partials, tensor, chunk);
  for (int c = warp_index(); c < kStats; c += kWarps) {
    const double merged = merge_column<Features>(
        c, kThreads, chunk.count,
        [&](int64_t thread) -> double { return parameters_of_thread(chunk.count, static_cast<int>(thread)); },
        [&](int64_t thread, int column) -> double { return rows[column][thread]; });
    if (lane_index() == 0) partials.own(c) = merged;
  }
}

// Partials of its chunks -> the tensor's statistics, by the last of its blocks.
template <class Features>
__device__ __forceinline__ void stats_of_tensor(const AccumulateParams& params, const ChunkRange& chunk,
                                                const TensorEntry& tensor) {
  constexpr int kStats = kNumStats<Features>;
  __shared__ double total[kStats];
  const Partials<kStats> partials(params.partials, tensor, chunk);
  const double numel = static_cast<double>(tensor.numel);
  for (int c = warp_index(); c < kStats; c += kWarps) {
    const double merged = merge_column<Features>(
        c, chunk.of_tensor, numel,
        [&](int64_t r) -> double { return static_cast<double>(min_of(tensor.numel - r * kChunk, kChunk)); },
        [&](int64_t r, int column) { return partials.at(column, r); });
    if (lane_index() == 0) total[c] = merged;
  }
  __syncthreads();
  if (threadIdx.x == 0) finish_stats<Features, double>(total, numel, params.stats + tensor.row * kStats);
}

}  // namespace lopt
