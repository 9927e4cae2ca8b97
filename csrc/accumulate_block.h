// accumulate for a run of parameters, the loop that accumulate_cpu.cpp and unroll_cpu.cpp share:
//   grad  = clamp(grad, +-limit)
//   mom_k = d_k mom_k + (1 - d_k) grad,  rms_k = d_k rms_k + (1 - d_k) grad^2
// and a row of partial statistics (stats.h).
//
// Note [Order of summation]
// A run is summed in blocks of kBlock vectors: float within a block, double between blocks. accumulate_cpu.cpp merges
// the chunks of a tensor in their order. Results therefore do not depend on the number of threads.
#pragma once

#include "simd.h"
// simd.h comes first: see there.
#include "kernels.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

constexpr int kBlock = 32;  // vectors per block, summed in float

template <class Features, class Param, class Grad>
struct Accumulator {
  const float* mom_decay;
  const float* rms_decay;
  const float limit;
  const int64_t stride;
  const Param* param;
  const Grad* grad;
  float* mom;  // [kNumMom, stride]
  float* rms;  // [kNumRms, stride]

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
        m[k] = next_accumulator(load(address, lanes), mom_decay[k], g);
        store(address, m[k], lanes);
        mom_sum += m[k];
      }
      for (int k = 0; k < kRms; ++k) {
        float* address = rms + k * stride + begin + i;
        r[k] = next_accumulator(load(address, lanes), rms_decay[k], g * g);
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

  // The first `count` parameters (at least one) -> a row of partials.
  void run(int64_t count, double* total) const {
    constexpr int64_t kStride = kBlock * kLanes;
    double part[kNumStats<Features>];
    block(0, static_cast<int>(count < kStride ? count : kStride), total);
    for (int64_t begin = kStride; begin < count; begin += kStride) {
      const int64_t size = count - begin < kStride ? count - begin : kStride;
      block(begin, static_cast<int>(size), part);
      merge_partials<Features, double>(total, static_cast<double>(begin), part, static_cast<double>(size));
    }
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
