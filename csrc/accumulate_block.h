// accumulate for a run of parameters, the loop that accumulate_cpu.cpp and unroll_cpu.cpp share:
//   grad  = clamp(grad, +-limit)
//   mom_k = d_k mom_k + (1 - d_k) grad,  rms_k = d_k rms_k + (1 - d_k) grad^2
// and a row of partial statistics (stats.h).
//
// Note [Order of summation]
// A run is summed in blocks: float within a block, double between blocks. accumulate_cpu.cpp merges the chunks of a
// tensor in their order. Results therefore do not depend on the number of threads.
#pragma once

#include "simd.h"
// simd.h comes first: see there.
#include "kernels.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

constexpr int kBlock = 32 * kLanes;  // parameters per block, summed in float

template <class Features>
struct Accumulator {
  const float* mom_decay;
  const float* rms_decay;
  const float limit;
  const int64_t stride;
  Numbers param, grad;
  float* mom;  // [kNumMom, stride]
  float* rms;  // [kNumRms, stride]

  // The first `count` parameters (at least one) -> a row of partials.
  void run(int64_t count, double* total) const {
    alignas(64) float param_buffer[kBlock], grad_buffer[kBlock];
    double part[kNumStats<Features>];
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t size = count - begin < kBlock ? count - begin : kBlock;
      const float* p = param.read(begin, size, param_buffer);
      const float* g = grad.read(begin, size, grad_buffer);
      double* row = begin ? part : total;
      sums(p, g, mom + begin, rms + begin, size, row);
      deviations(p, mom + begin, rms + begin, size, row);
      if (begin) merge_partials<Features, double>(total, static_cast<double>(begin), part, static_cast<double>(size));
    }
  }

  // Updates mom and rms of one block and sums what needs no mean.
  void sums(const float* p_at, const float* g_at, float* mom_at, float* rms_at, int64_t count, double* part) const {
    constexpr int kMom = Features::kNumMom, kRms = Features::kNumRms;
    Vec moment_sum[Features::kNumMoments]{}, grad_square{}, param_square{}, nonfinite{};
    Vec param_sum{}, mom_sum{}, rms_sum{};
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      const Vec raw = load(g_at + i, lanes), p = load(p_at + i, lanes), g = clip_gradient(raw, limit);
      nonfinite += raw - raw == Vec{} ? Vec{} : splat(1.0f);
      Vec m[kMom], r[kRms], q[Features::kNumMoments];
      LOPT_UNROLL
      for (int k = 0; k < kMom; ++k) {
        float* address = mom_at + k * stride + i;
        m[k] = next_accumulator(load(address, lanes), mom_decay[k], g);
        store(address, m[k], lanes);
        mom_sum += m[k];
      }
      LOPT_UNROLL
      for (int k = 0; k < kRms; ++k) {
        float* address = rms_at + k * stride + i;
        r[k] = next_accumulator(load(address, lanes), rms_decay[k], g * g);
        store(address, r[k], lanes);
        rms_sum += r[k];
      }
      grad_square += g * g;
      param_square += p * p;
      param_sum += p;
      Features::moments(g, p, m, r, q);
      const Vec mask = lane_mask(lanes);
      LOPT_UNROLL
      for (int j = 0; j < Features::kNumMoments; ++j) moment_sum[j] += q[j] * mask;
    });
    const double n = static_cast<double>(count);
    part[kGradSquare] = sum_lanes(grad_square);
    part[kParamSquare] = sum_lanes(param_square);
    part[kNonfinite] = sum_lanes(nonfinite);
    part[kParamMean] = sum_lanes(param_sum) / n;
    part[kMomMean] = sum_lanes(mom_sum) / (n * kMom);
    part[kRmsMean] = sum_lanes(rms_sum) / (n * kRms);
    for (int j = 0; j < Features::kNumMoments; ++j) part[kMoments + j] = sum_lanes(moment_sum[j]);
  }

  // Sums of squared deviations from the block's means; the block is still in the first-level cache.
  void deviations(const float* p_at, const float* mom_at, const float* rms_at, int64_t count, double* part) const {
    const float param_mean = static_cast<float>(part[kParamMean]), mom_mean = static_cast<float>(part[kMomMean]);
    const float rms_mean = static_cast<float>(part[kRmsMean]);
    Vec param_squares{}, mom_squares{}, rms_squares{};
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      const Vec mask = lane_mask(lanes);
      const Vec d = (load(p_at + i, lanes) - param_mean) * mask;
      param_squares += d * d;
      LOPT_UNROLL
      for (int k = 0; k < Features::kNumMom; ++k) {
        const Vec e = (load(mom_at + k * stride + i, lanes) - mom_mean) * mask;
        mom_squares += e * e;
      }
      LOPT_UNROLL
      for (int k = 0; k < Features::kNumRms; ++k) {
        const Vec e = (load(rms_at + k * stride + i, lanes) - rms_mean) * mask;
        rms_squares += e * e;
      }
    });
    part[kParamVar] = sum_lanes(param_squares);
    part[kMomVar] = sum_lanes(mom_squares);
    part[kRmsVar] = sum_lanes(rms_squares);
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
