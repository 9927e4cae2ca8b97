// accumulate on the GPU: for every parameter
//   grad  = clamp(grad, +-limit)
//   mom_k = d_k mom_k + (1 - d_k) grad,  rms_k = d_k rms_k + (1 - d_k) grad^2
// and per tensor the statistics of stats.h. One block per chunk, one thread per parameter and round.
// Source: arXiv:2009.11243; moments are merged after Chan, Golub and LeVeque (1979). See Note [Order of reduction].
#include "chunks.cuh"
#include "reduce.cuh"

namespace lopt {
namespace {

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
  one[kGradSquare] = grad * grad;
  one[kParamSquare] = param * param;
  one[kNonfinite] = raw_grad - raw_grad == 0.0f ? 0.0f : 1.0f;
  one[kParamMean] = param;
  one[kParamVar] = 0.0f;
  moments_of<Features::kNumMom>(mom, one[kMomMean], one[kMomVar]);
  moments_of<Features::kNumRms>(rms, one[kRmsMean], one[kRmsVar]);
  Features::moments(grad, param, mom, rms, one + kMoments);
}

// Column c of many rows merged into one, by one warp: row r covers weight(r) parameters and holds value(r, c).
//   a mean:        mean = sum w_r mean_r / sum w_r
//   a deviation:   sum (deviation_r + w_r (mean_r - mean)^2)
//   anything else: a sum
template <class Features, class Weight, class Value>
__device__ __forceinline__ double merge_column(int c, int64_t rows, double numel, Weight weight, Value value) {
  const bool is_mean = c == kParamMean || c == kMomMean || c == kRmsMean;
  const bool is_deviation = c == kParamVar || c == kMomVar || c == kRmsVar;
  if (!is_mean && !is_deviation) return sum_rows(rows, [&](int64_t r) { return value(r, c); });
  const int m = is_mean ? c : c - 1;
  const double mean = sum_rows(rows, [&](int64_t r) { return weight(r) * value(r, m); }) / numel;
  if (is_mean) return mean;
  const int values = m == kMomMean ? Features::kNumMom : m == kRmsMean ? Features::kNumRms : 1;  // per parameter
  return sum_rows(rows, [&](int64_t r) {
    const double delta = value(r, m) - mean;
    return value(r, c) + weight(r) * values * delta * delta;
  });
}

// Four blocks per multiprocessor leave 128 registers: enough loads in flight, and nothing spills.
template <class Features>
__global__ void __launch_bounds__(kThreads, 4) accumulate_kernel(AccumulateParams params) {
  constexpr int kStats = kNumStats<Features>;
  __shared__ float rows[kStats][kThreads];  // one row of partials per thread, transposed
  __shared__ double total[kStats];

  const ChunkRange chunk = chunk_of_block(params.tensors, params.chunks);
  const TensorEntry tensor = params.tensors[chunk.tensor];
  const int64_t grads = params.grads[chunk.tensor];
  const float limit = params.clip_limit[chunk.tensor];

  float row[kStats] = {};
  float seen = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < chunk.count; i += kThreads) {
    const int64_t at = chunk.begin + i;
    float* mom_at = reinterpret_cast<float*>(tensor.mom) + at;
    float* rms_at = reinterpret_cast<float*>(tensor.rms) + at;
    const float param = load_value(tensor.param, tensor.param_dtype, at);
    const float raw_grad = load_value(grads, tensor.grad_dtype, at);
    const float grad = clip_gradient(raw_grad, limit);
    float mom[Features::kNumMom], rms[Features::kNumRms];
#pragma unroll
    for (int k = 0; k < Features::kNumMom; ++k) mom[k] = mom_at[k * tensor.stride];
#pragma unroll
    for (int k = 0; k < Features::kNumRms; ++k) rms[k] = rms_at[k * tensor.stride];
#pragma unroll
    for (int k = 0; k < Features::kNumMom; ++k)
      mom_at[k * tensor.stride] = mom[k] = next_accumulator(mom[k], params.mom_decay[k], grad);
#pragma unroll
    for (int k = 0; k < Features::kNumRms; ++k)
      rms_at[k * tensor.stride] = rms[k] = next_accumulator(rms[k], params.rms_decay[k], grad * grad);

    float one[kStats];
    partials_of_one<Features>(raw_grad, grad, param, mom, rms, one);
    merge_partials<Features, float>(row, seen, one, 1.0f);
    seen += 1.0f;
  }

  // Threads -> chunk.
#pragma unroll
  for (int c = 0; c < kStats; ++c) rows[c][threadIdx.x] = row[c];
  __syncthreads();
  for (int c = warp_index(); c < kStats; c += kWarps) {
    const double merged = merge_column<Features>(
        c, kThreads, chunk.count,
        [&](int64_t thread) -> double { return (chunk.count - static_cast<int>(thread) + kThreads - 1) / kThreads; },
        [&](int64_t thread, int column) -> double { return rows[column][thread]; });
    if (lane_index() == 0) params.partials[int64_t{blockIdx.x} * kStats + c] = merged;
  }
  if (!last_of_tensor(params.finished + chunk.tensor, chunk.of_tensor)) return;

  // Chunks -> tensor.
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
  if (threadIdx.x == 0) finish_stats<Features, double>(total, numel, params.stats + chunk.tensor * kStats);
}

}  // namespace

bool accumulate_cuda(const AccumulateParams& params, int feature_set, int device, uint64_t stream) {
  return with_feature_set(feature_set, [&](auto features) {
    launch_per_chunk("accumulate", accumulate_kernel<decltype(features)>, params, device, stream);
  });
}

}  // namespace lopt
