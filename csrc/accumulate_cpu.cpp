// accumulate on the CPU: for every parameter
//   grad  = clamp(grad, +-limit)
//   mom_k = d_k mom_k + (1 - d_k) grad,  rms_k = d_k rms_k + (1 - d_k) grad^2
// and per tensor the statistics of stats.h. Compiled once per instruction set; cpu_dispatch.cpp picks.
//
// Note [Order of summation]
// A chunk is summed in blocks of kBlock vectors: float within a block, double between blocks, and chunks of a tensor are
// merged in their order. Results therefore do not depend on the number of threads.
#include "simd.h"
// simd.h comes first: see there.
#include "kernels.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

constexpr int kBlock = 32;                    // vectors per block
constexpr int64_t kStride = kBlock * kLanes;  // parameters per block

template <class Features, class Param, class Grad>
struct ChunkAccumulator {
  const AccumulateParams& params;
  const float limit;
  const int64_t stride;
  const Param* param;
  const Grad* grad;
  float* mom;  // [kNumMom, stride], at the chunk's first parameter
  float* rms;

  // Sums over one block into a row of partials.
  void block(int64_t begin, int count, double* part) const {
    constexpr int kMom = Features::kNumMom, kRms = Features::kNumRms;
    Vec moment_sum[Features::kNumMoments]{}, grad_square{}, param_square{}, nonfinite{};
    Vec param_sum{}, mom_sum{}, rms_sum{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const int lanes = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
      const Vec mask = lane_mask(lanes);
      const Vec raw = load(grad + begin + i, lanes), p = load(param + begin + i, lanes);
      const Vec g = clip_gradient(raw, limit);
      nonfinite += raw - raw == Vec{} ? Vec{} : splat(1.0f);
      Vec m[kMom], r[kRms], q[Features::kNumMoments];
      for (int k = 0; k < kMom; ++k) {
        float* address = mom + k * stride + begin + i;
        m[k] = next_accumulator(load(address, lanes), params.mom_decay[k], g);
        store(address, m[k], lanes);
        mom_sum += m[k];
      }
      for (int k = 0; k < kRms; ++k) {
        float* address = rms + k * stride + begin + i;
        r[k] = next_accumulator(load(address, lanes), params.rms_decay[k], g * g);
        store(address, r[k], lanes);
        rms_sum += r[k];
      }
      grad_square += g * g;
      param_square += p * p;
      param_sum += p;
      Features::moments(g, p, m, r, q);
      LOPT_UNROLL
      for (int j = 0; j < Features::kNumMoments; ++j) moment_sum[j] += q[j] * mask;
    }
    part[kGradSquare] = sum_lanes(grad_square);
    part[kParamSquare] = sum_lanes(param_square);
    part[kNonfinite] = sum_lanes(nonfinite);
    part[kParamMean] = sum_lanes(param_sum) / count;
    part[kMomMean] = sum_lanes(mom_sum) / (double(count) * kMom);
    part[kRmsMean] = sum_lanes(rms_sum) / (double(count) * kRms);
    for (int j = 0; j < Features::kNumMoments; ++j) part[kMoments + j] = sum_lanes(moment_sum[j]);
    deviations(begin, count, part);
  }

  // Sums of squared deviations from the block's means; the block is still in the first-level cache.
  void deviations(int64_t begin, int count, double* part) const {
    const float param_mean = static_cast<float>(part[kParamMean]), mom_mean = static_cast<float>(part[kMomMean]);
    const float rms_mean = static_cast<float>(part[kRmsMean]);
    Vec param_squares{}, mom_squares{}, rms_squares{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const int lanes = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
      const Vec mask = lane_mask(lanes);
      const Vec d = (load(param + begin + i, lanes) - param_mean) * mask;
      param_squares += d * d;
      for (int k = 0; k < Features::kNumMom; ++k) {
        const Vec e = (load(mom + k * stride + begin + i, lanes) - mom_mean) * mask;
        mom_squares += e * e;
      }
      for (int k = 0; k < Features::kNumRms; ++k) {
        const Vec e = (load(rms + k * stride + begin + i, lanes) - rms_mean) * mask;
        rms_squares += e * e;
      }
    }
    part[kParamVar] = sum_lanes(param_squares);
    part[kMomVar] = sum_lanes(mom_squares);
    part[kRmsVar] = sum_lanes(rms_squares);
  }

  void chunk(int64_t count, double* total) const {
    double part[kNumStats<Features>];
    block(0, static_cast<int>(count < kStride ? count : kStride), total);
    for (int64_t begin = kStride; begin < count; begin += kStride) {
      const int64_t size = count - begin < kStride ? count - begin : kStride;
      block(begin, static_cast<int>(size), part);
      merge_partials<Features, double>(total, static_cast<double>(begin), part, static_cast<double>(size));
    }
  }
};

template <class Features, class Param, class Grad>
void run_chunk(const AccumulateParams& params, int64_t index) {
  const Chunk chunk = params.chunks[index];
  const TensorEntry& tensor = params.tensors[chunk.tensor];
  const int64_t left = tensor.numel - chunk.begin;
  const ChunkAccumulator<Features, Param, Grad> accumulator{
      params,
      params.clip_limit[chunk.tensor],
      tensor.stride,
      reinterpret_cast<const Param*>(tensor.param) + chunk.begin,
      reinterpret_cast<const Grad*>(params.grads[chunk.tensor]) + chunk.begin,
      reinterpret_cast<float*>(tensor.mom) + chunk.begin,
      reinterpret_cast<float*>(tensor.rms) + chunk.begin,
  };
  accumulator.chunk(left < kChunk ? left : kChunk, params.partials + index * kNumStats<Features>);
}

template <class Features>
void merge_tensor(const AccumulateParams& params, int64_t t) {
  const TensorEntry& tensor = params.tensors[t];
  double* total = params.partials + tensor.first_chunk * kNumStats<Features>;
  for (int64_t begin = kChunk; begin < tensor.numel; begin += kChunk) {
    const int64_t left = tensor.numel - begin;
    merge_partials<Features, double>(total, static_cast<double>(begin), total + begin / kChunk * kNumStats<Features>,
                                     static_cast<double>(left < kChunk ? left : kChunk));
  }
  finish_stats<Features, double>(total, static_cast<double>(tensor.numel), params.stats + t * kNumStats<Features>);
}

}  // namespace

bool accumulate(const AccumulateParams& params, int feature_set, int num_threads) {
  return with_feature_set(feature_set, [&](auto features) {
    using Features = decltype(features);
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < params.num_chunks; ++i) {
        const TensorEntry& tensor = params.tensors[params.chunks[i].tensor];
        const bool half_param = tensor.param_dtype == kBFloat16, half_grad = tensor.grad_dtype == kBFloat16;
        if (half_param && half_grad) run_chunk<Features, uint16_t, uint16_t>(params, i);
        if (half_param && !half_grad) run_chunk<Features, uint16_t, float>(params, i);
        if (!half_param && half_grad) run_chunk<Features, float, uint16_t>(params, i);
        if (!half_param && !half_grad) run_chunk<Features, float, float>(params, i);
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < params.num_tensors; ++t) merge_tensor<Features>(params, t);
    }
  });
}

}  // namespace LOPT_ISA
}  // namespace lopt
