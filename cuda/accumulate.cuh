// What the kernels share that update accumulators (accumulate.cu, sweep.cu, sweep_mma.cu): the new state of a quad, and the
// statistics of a tensor. Source: moments are merged after Chan, Golub and LeVeque (1979).
#pragma once

#include "chunks.cuh"
#include "reduce.cuh"

namespace lopt {

// Mean and sum of squared deviations of few values.
template <int kCount>
__device__ __forceinline__ void moments_of(const float* values, float& mean, float& squares) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum += values[k];
  mean = sum * (1.0f / kCount);
  squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kCount; ++k) squares += (values[k] - mean) * (values[k] - mean);
}

// One parameter as a row of partials.
template <class Features>
__device__ __forceinline__ void partials_of_one(float raw_grad, float grad, float param, const float* mom,
                                                const float* rms, float* one) {
  param = bounded(param);
  one[Stat::grad_square] = grad * grad;
  one[Stat::param_square] = param * param;
  one[Stat::nonfinite] = raw_grad - raw_grad == 0.0f ? 0.0f : 1.0f;
  one[Stat::param_mean] = param;
  one[Stat::param_var] = 0.0f;
  moments_of<Features::kNumMom>(mom, one[Stat::mom_mean], one[Stat::mom_var]);
  moments_of<Features::kNumRms>(rms, one[Stat::rms_mean], one[Stat::rms_var]);
  Features::moments(grad, param, mom, rms, one + kMoments);
}

// row (of `seen` parameters) += one (of one parameter), as merge_partials does, with one division in place of three.
template <class Features>
__device__ __forceinline__ void add_partials(float* row, float seen, const float* one) {
  const float share = 1.0f / (seen + 1.0f);
#pragma unroll
  for (int c = 0; c < kNumStats<Features>; ++c) {
    if (c == Stat::param_var || c == Stat::mom_var || c == Stat::rms_var) continue;
    if (c != Stat::param_mean && c != Stat::mom_mean && c != Stat::rms_mean) {
      row[c] += one[c];
      continue;
    }
    const int values = c == Stat::mom_mean   ? Features::kNumMom
                       : c == Stat::rms_mean ? Features::kNumRms
                                             : 1;  // per parameter
    const float delta = one[c] - row[c];
    row[c] += delta * share;
    row[c + 1] += one[c + 1] + delta * delta * (seen * share * values);
  }
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
template <int kPairs, int kMom, int kRms>
__device__ __forceinline__ void round_state(const RoundingWords<kPairs>& words, uint32_t element, int j,
                                            float (&mom)[kMom][kQuad], float (&rms)[kRms][kQuad]) {
  uint32_t random[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) random[pair] = words.bits(pair, element);
#pragma unroll
  for (int k = 0; k < kMom + kRms; ++k) {
    float& value = k < kMom ? mom[k][j] : rms[k - kMom][j];
    if (value == value) value = bits_float(rounded_bits(float_bits(value), random[k / 2], k));
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

// Rounding words of the accumulators of one parameter, for a bfloat16 state.
template <class Features>
using WordsOf = RoundingWords<(Features::kNumMom + Features::kNumRms + 1) / 2>;

// By one thread of the block.
template <class Features>
__device__ __forceinline__ WordsOf<Features> words_of(const AccumulateParams& params, const TensorEntry& tensor,
                                                      const ChunkRange& chunk) {
  const uint64_t key = rounding_key(static_cast<uint64_t>(params.seed), static_cast<uint64_t>(*params.step),
                                    static_cast<uint64_t>(tensor.row));
  return WordsOf<Features>::of(key, tensor.offset + chunk.begin);
}

// Clips the gradients of a quad, updates and stores its accumulators, and adds it to `row` (of `seen` parameters).
template <Dtype kState, class Features>
__device__ __forceinline__ void accumulate_quad(const AccumulateParams& params, const TensorEntry& tensor, float limit,
                                                const WordsOf<Features>& words, const Quad& quad,
                                                QuadValues<Features>& values, float (&row)[kNumStats<Features>],
                                                float& seen) {
  auto& [param, grad, mom, rms] = values;
  float unclipped[kQuad];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    unclipped[j] = grad[j];
    grad[j] = clip_gradient(unclipped[j], limit);
#pragma unroll
    for (int k = 0; k < Features::kNumMom; ++k) mom[k][j] = next_accumulator(mom[k][j], params.mom_decay[k], grad[j]);
#pragma unroll
    for (int k = 0; k < Features::kNumRms; ++k)
      rms[k][j] = next_accumulator(rms[k][j], params.rms_decay[k], grad[j] * grad[j]);
    if (kState == kBFloat16) round_state(words, static_cast<uint32_t>(tensor.offset + quad.at + j), j, mom, rms);
  }
  store_planes<kState>(tensor.mom, tensor.stride, quad, mom);
  store_planes<kState>(tensor.rms, tensor.stride, quad, rms);

#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (j >= quad.count) break;
    float mom_of_one[Features::kNumMom], rms_of_one[Features::kNumRms], one[kNumStats<Features>];
#pragma unroll
    for (int k = 0; k < Features::kNumMom; ++k) mom_of_one[k] = mom[k][j];
#pragma unroll
    for (int k = 0; k < Features::kNumRms; ++k) rms_of_one[k] = rms[k][j];
    partials_of_one<Features>(unclipped[j], grad[j], param[j], mom_of_one, rms_of_one, one);
    add_partials<Features>(row, seen, one);
    seen += 1.0f;
  }
}

// Rows of partials -> the chunk's. After a barrier.
template <class Features>
__device__ __forceinline__ void stats_of_chunk(const AccumulateParams& params, const ChunkRange& chunk,
                                               const StatRows<Features>& rows) {
  constexpr int kStats = kNumStats<Features>;
  for (int c = warp_index(); c < kStats; c += kWarps) {
    const double merged = merge_column<Features>(
        c, kThreads, chunk.count,
        [&](int64_t thread) -> double { return parameters_of_thread(chunk.count, static_cast<int>(thread)); },
        [&](int64_t thread, int column) -> double { return rows[column][thread]; });
    if (lane_index() == 0) params.partials[int64_t{blockIdx.x} * kStats + c] = merged;
  }
}

// Partials of its chunks -> the tensor's statistics, by the last of its blocks.
template <class Features>
__device__ __forceinline__ void stats_of_tensor(const AccumulateParams& params, const ChunkRange& chunk,
                                                const TensorEntry& tensor) {
  constexpr int kStats = kNumStats<Features>;
  __shared__ double total[kStats];
  const double* partials = params.partials + tensor.first_chunk * kStats;  // [chunks of the tensor, kStats]
  const double numel = static_cast<double>(tensor.numel);
  for (int c = warp_index(); c < kStats; c += kWarps) {
    const double merged = merge_column<Features>(
        c, chunk.of_tensor, numel,
        [&](int64_t r) -> double { return static_cast<double>(min_of(tensor.numel - r * kChunk, kChunk)); },
        [&](int64_t r, int column) { return partials[r * kStats + column]; });
    if (lane_index() == 0) total[c] = merged;
  }
  __syncthreads();
  if (threadIdx.x == 0) finish_stats<Features, double>(total, numel, params.stats + tensor.row * kStats);
}

}  // namespace lopt
