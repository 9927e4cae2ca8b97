// accumulate on the GPU: for every parameter
//   grad  = clamp(grad, +-limit)
//   mom_k = d_k mom_k + (1 - d_k) grad,  rms_k = d_k rms_k + (1 - d_k) grad^2
// (a bfloat16 state rounded at once, rounding.h) and per tensor the statistics of stats.h. One block per chunk, four
// parameters per thread and round (Note [Quads]).
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

// row (of `seen` parameters) += one (of one parameter), as merge_partials does, with one division in place of three.
template <class Features>
__device__ __forceinline__ void add_partials(float* row, float seen, const float* one) {
  const float share = 1.0f / (seen + 1.0f);
#pragma unroll
  for (int c = 0; c < kNumStats<Features>; ++c) {
    if (c == kParamVar || c == kMomVar || c == kRmsVar) continue;
    if (c != kParamMean && c != kMomMean && c != kRmsMean) {
      row[c] += one[c];
      continue;
    }
    const int values = c == kMomMean ? Features::kNumMom : c == kRmsMean ? Features::kNumRms : 1;  // per parameter
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

// Three or four blocks per multiprocessor leave 168 or 128 registers: enough loads in flight, and nothing spills.
template <Dtype kState, class Features>
__global__ void __launch_bounds__(kThreads, Features::kNumMom + Features::kNumRms > 5 ? 3 : 4)
    accumulate_kernel(AccumulateParams params) {
  constexpr int kStats = kNumStats<Features>;
  __shared__ float rows[kStats][kThreads];  // one row of partials per thread, transposed
  __shared__ double total[kStats];

  const ChunkRange chunk = chunk_of_block(params.tensors, params.chunks);
  const TensorEntry tensor = params.tensors[chunk.tensor];
  const int64_t grads = params.grads[chunk.tensor];
  const float limit = params.clip_limit[chunk.tensor];

  constexpr int kMom = Features::kNumMom, kRms = Features::kNumRms, kPairs = (kMom + kRms + 1) / 2;
  __shared__ RoundingWords<kPairs> words;
  if (kState == kBFloat16) {
    if (threadIdx.x == 0)
      words = RoundingWords<kPairs>::of(
          rounding_key(static_cast<uint64_t>(params.seed), static_cast<uint64_t>(*params.step),
                       static_cast<uint64_t>(chunk.tensor)),
          chunk.begin);
    __syncthreads();
  }

  const bool aligned = aligned_quads<kState>(tensor, grads);
  float row[kStats] = {};
  float seen = 0.0f;
  for (int i = kQuad * static_cast<int>(threadIdx.x); i < chunk.count; i += kQuad * kThreads) {
    const Quad quad = quad_at(chunk, i, aligned);
    const RawQuad raw_param = load_raw(tensor.param, tensor.param_dtype, quad);
    const RawQuad raw_grad = load_raw(grads, tensor.grad_dtype, quad);
    float mom[kMom][kQuad], rms[kRms][kQuad];
    load_planes<kState>(tensor.mom, tensor.stride, quad, mom);
    load_planes<kState>(tensor.rms, tensor.stride, quad, rms);
    float param[kQuad], unclipped[kQuad], grad[kQuad];
    decode(raw_param, tensor.param_dtype, param);
    decode(raw_grad, tensor.grad_dtype, unclipped);
    decode_planes<kState>(mom);
    decode_planes<kState>(rms);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      grad[j] = clip_gradient(unclipped[j], limit);
#pragma unroll
      for (int k = 0; k < Features::kNumMom; ++k) mom[k][j] = next_accumulator(mom[k][j], params.mom_decay[k], grad[j]);
#pragma unroll
      for (int k = 0; k < Features::kNumRms; ++k)
        rms[k][j] = next_accumulator(rms[k][j], params.rms_decay[k], grad[j] * grad[j]);
      if (kState == kBFloat16) round_state(words, static_cast<uint32_t>(quad.at + j), j, mom, rms);
    }
    store_planes<kState>(tensor.mom, tensor.stride, quad, mom);
    store_planes<kState>(tensor.rms, tensor.stride, quad, rms);

#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (j >= quad.count) break;
      float mom_of_one[Features::kNumMom], rms_of_one[Features::kNumRms], one[kStats];
#pragma unroll
      for (int k = 0; k < Features::kNumMom; ++k) mom_of_one[k] = mom[k][j];
#pragma unroll
      for (int k = 0; k < Features::kNumRms; ++k) rms_of_one[k] = rms[k][j];
      partials_of_one<Features>(unclipped[j], grad[j], param[j], mom_of_one, rms_of_one, one);
      add_partials<Features>(row, seen, one);
      seen += 1.0f;
    }
  }

  // Threads -> chunk.
#pragma unroll
  for (int c = 0; c < kStats; ++c) rows[c][threadIdx.x] = row[c];
  __syncthreads();
  for (int c = warp_index(); c < kStats; c += kWarps) {
    const double merged = merge_column<Features>(
        c, kThreads, chunk.count,
        [&](int64_t thread) -> double { return parameters_of_thread(chunk.count, static_cast<int>(thread)); },
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
    using Features = decltype(features);
    const auto kernel =
        params.state_dtype == kFloat32 ? accumulate_kernel<kFloat32, Features> : accumulate_kernel<kBFloat16, Features>;
    launch_per_chunk("accumulate", kernel, params, device, stream);
  });
}

}  // namespace lopt
