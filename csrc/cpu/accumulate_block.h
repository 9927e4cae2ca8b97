// accumulate for a run of parameters, the loop that accumulate_cpu.cpp and unroll_cpu.cpp share:
//   grad  = clamp(grad, +-limit)
//   mom_k = d_k mom_k + (1 - d_k) grad,  rms_k = d_k rms_k + (1 - d_k) grad^2
// and a row of partial statistics (stats.h). A state in bfloat16 or 8 bits is rounded at once (rounding.h, codes.h): everything
// that follows sees the accumulators that the next step will see.
//
// Note [Order of summation]
// A run is summed in blocks: float within a block, double between blocks. accumulate_cpu.cpp merges the chunks of a
// tensor in their order. Results therefore do not depend on the number of threads.
#pragma once

#include "cpu/numbers.h"
// It includes simd.h, which comes first: see there.
#include "api/kernels.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

constexpr int kBlock = 32 * kLanes;  // parameters per block, summed in float

template <class Features, Dtype kState = kFloat32>
struct Accumulator {
  static constexpr int kMom = Features::kNumMom, kRms = Features::kNumRms;
  const float* mom_decay;
  const float* rms_decay;
  const float limit;
  Numbers param, grad;
  Planes<MomCode, kMom, kBlock> mom;
  Planes<RmsCode, kRms, kBlock> rms;
  RoundingWords<kMom + kRms> words{};  // of a state that is rounded,
  uint32_t first = 0;                  // with the tensor's element where the run begins

  // The first `count` parameters (at least one) -> a row of partials.
  void run(int64_t count, double* total) const {
    alignas(64) float param_buffer[kBlock], grad_buffer[kBlock];
    alignas(64) float mom_buffer[kMom * kBlock], rms_buffer[kRms * kBlock];
    double part[kNumStats<Features>];
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t size = count - begin < kBlock ? count - begin : kBlock;
      const float* p = param.read(begin, size, param_buffer);
      const float* g = grad.read(begin, size, grad_buffer);
      float* m = mom.read(begin, size, mom_buffer);
      float* r = rms.read(begin, size, rms_buffer);
      double* row = begin ? part : total;
      if (kState == kInt8) encode(g, m, r, begin, size);
      sums(p, g, m, r, first + static_cast<uint32_t>(begin), size, row);
      deviations(p, m, r, size, row);
      mom.write(begin, size, m);
      rms.write(begin, size, r);
      if (begin) merge_partials<Features, double>(total, static_cast<double>(begin), part, static_cast<double>(size));
    }
  }

  // One of the two values that may be stored for an accumulator.
  Vec rounded(Vec value, int accumulator, Bits hash) const {
    const Vec result = (Vec)rounded_bits((Bits)value, words.bits(accumulator, hash));
    return value == value ? result : value;
  }

  // Updates mom and rms of one block in 8 bits, whose scales come from all of it.
  void encode(const float* g_at, float* mom_at, float* rms_at, int64_t begin, int64_t count) const {
    alignas(64) uint32_t hashes[kBlock];
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      const Bits hash = words.hash(count_from(first + static_cast<uint32_t>(begin + i)));
      std::memcpy(hashes + i, &hash, sizeof hash);
      const Vec g = clip_gradient(load(g_at + i, lanes), limit);
      LOPT_UNROLL
      for (int k = 0; k < kMom; ++k) {
        float* address = mom_at + k * kBlock + i;
        store(address, next_accumulator(load(address, lanes), mom_decay[k], g), lanes);
      }
      LOPT_UNROLL
      for (int k = 0; k < kRms; ++k) {
        float* address = rms_at + k * kBlock + i;
        store(address, next_accumulator(load(address, lanes), rms_decay[k], g * g), lanes);
      }
    });
    const auto random = [&](int accumulator, int64_t i) LOPT_INLINE {
      Bits hash;
      std::memcpy(&hash, hashes + i, sizeof hash);
      return words.bits(accumulator, hash);
    };
    mom.encode(begin, count, mom_at, [&](int k, int64_t i) LOPT_INLINE { return random(k, i); });
    rms.encode(begin, count, rms_at, [&](int k, int64_t i) LOPT_INLINE { return random(kMom + k, i); });
  }

  // Updates mom and rms of one block, where `encode` has not, and sums what needs no mean.
  void sums(const float* p_at, const float* g_at, float* mom_at, float* rms_at, uint32_t element, int64_t count,
            double* part) const {
    const int64_t mom_step = mom.step(), rms_step = rms.step();
    Vec moment_sum[Features::kNumMoments]{}, grad_square{}, param_square{}, nonfinite{};
    Vec param_sum{}, mom_sum{}, rms_sum{};
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      const Vec raw = load(g_at + i, lanes), p = bounded(load(p_at + i, lanes)), g = clip_gradient(raw, limit);
      nonfinite += raw - raw == Vec{} ? Vec{} : splat(1.0f);
      Vec m[kMom], r[kRms], q[Features::kNumMoments];
      const Bits hash = kState == kBFloat16 ? words.hash(count_from(element + static_cast<uint32_t>(i))) : Bits{};
      LOPT_UNROLL
      for (int k = 0; k < kMom; ++k) {
        float* address = mom_at + k * mom_step + i;
        m[k] = load(address, lanes);
        if (kState != kInt8) {
          m[k] = next_accumulator(m[k], mom_decay[k], g);
          if (kState == kBFloat16) m[k] = rounded(m[k], k, hash);
          store(address, m[k], lanes);
        }
        mom_sum += m[k];
      }
      LOPT_UNROLL
      for (int k = 0; k < kRms; ++k) {
        float* address = rms_at + k * rms_step + i;
        r[k] = load(address, lanes);
        if (kState != kInt8) {
          r[k] = next_accumulator(r[k], rms_decay[k], g * g);
          if (kState == kBFloat16) r[k] = rounded(r[k], kMom + k, hash);
          store(address, r[k], lanes);
        }
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
    part[Stat::grad_square] = sum_lanes(grad_square);
    part[Stat::param_square] = sum_lanes(param_square);
    part[Stat::nonfinite] = sum_lanes(nonfinite);
    part[Stat::param_mean] = sum_lanes(param_sum) / n;
    part[Stat::mom_mean] = sum_lanes(mom_sum) / (n * kMom);
    part[Stat::rms_mean] = sum_lanes(rms_sum) / (n * kRms);
    for (int j = 0; j < Features::kNumMoments; ++j) part[kMoments + j] = sum_lanes(moment_sum[j]);
  }

  // Sums of squared deviations from the block's means; the block is still in the first-level cache.
  void deviations(const float* p_at, const float* mom_at, const float* rms_at, int64_t count, double* part) const {
    const float param_mean = static_cast<float>(part[Stat::param_mean]),
                mom_mean = static_cast<float>(part[Stat::mom_mean]);
    const float rms_mean = static_cast<float>(part[Stat::rms_mean]);
    const int64_t mom_step = mom.step(), rms_step = rms.step();
    Vec param_squares{}, mom_squares{}, rms_squares{};
    for_vectors(count, [&](int64_t i, int lanes) LOPT_INLINE {
      const Vec mask = lane_mask(lanes);
      const Vec d = (bounded(load(p_at + i, lanes)) - param_mean) * mask;
      param_squares += d * d;
      LOPT_UNROLL
      for (int k = 0; k < Features::kNumMom; ++k) {
        const Vec e = (load(mom_at + k * mom_step + i, lanes) - mom_mean) * mask;
        mom_squares += e * e;
      }
      LOPT_UNROLL
      for (int k = 0; k < Features::kNumRms; ++k) {
        const Vec e = (load(rms_at + k * rms_step + i, lanes) - rms_mean) * mask;
        rms_squares += e * e;
      }
    });
    part[Stat::param_var] = sum_lanes(param_squares);
    part[Stat::mom_var] = sum_lanes(mom_squares);
    part[Stat::rms_var] = sum_lanes(rms_squares);
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
