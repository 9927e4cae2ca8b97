// apply for a run of parameters, the loop that apply_cpu.cpp and unroll_cpu.cpp share:
//   x      = clamp(columns(grad, param, mom, rms) * scale + shift, +-feature_clip)
//   o, h   = small_mlp(x)
//   param  = keep * param - step_size * active(rms) * o.direction * exp(magnitude_rate * o.magnitude)
// or, for a matrix that is treated as a whole, only the direction, written to a place of its own;
// and the sum of the last hidden layer h, in the order of Note [Order of summation] (accumulate_block.h).
#pragma once

#include "cpu/numbers.h"
// It includes simd.h, which comes first: see there.
#include "api/kernels.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

template <class Features, int kWidth>
struct Applier {
  static constexpr int kColumns = Features::kNumColumns;
  static constexpr int kBlock = 32 * kLanes;  // parameters per block, hidden layers summed in float
  // Vectors: two share the loads of weights, where the inputs and a layer of one do not stay in registers.
  static constexpr int kAtOnce = kColumns + kWidth <= kRegisters - 8 ? 1 : 2;
  static constexpr int kSums = kWidth < kRegisters / 2 ? kWidth : kRegisters / 2;  // of a layer, in registers
  Numbers param, grad, written;                                                    // written: param, or the direction
  Planes<MomCode, Features::kNumMom, kBlock> mom;
  Planes<RmsCode, Features::kNumRms, kBlock> rms;
  const TensorInputs inputs;
  const float* weights;  // MlpLayout
  const float magnitude_rate, feature_clip;

  // The first `count` parameters; total[width] is the sum of their last hidden layers.
  void run(int64_t count, double* total) const {
    alignas(64) float param_buffer[kBlock], grad_buffer[kBlock], written_buffer[kBlock];
    alignas(64) float mom_buffer[Features::kNumMom * kBlock], rms_buffer[Features::kNumRms * kBlock];
    for (int j = 0; j < kWidth; ++j) total[j] = 0.0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t size = count - begin < kBlock ? count - begin : kBlock;
      float* p = param.read(begin, size, param_buffer);
      float* to = inputs.whole ? written.place(begin, written_buffer) : p;
      const float* g = grad.read(begin, size, grad_buffer);
      block(p, to, g, mom.read(begin, size, mom_buffer), rms.read(begin, size, rms_buffer), size, total);
      if (inputs.moves()) written.write(begin, size, to);
    }
  }

  void block(const float* p, float* to, const float* g, const float* m, const float* r, int64_t count,
             double* total) const {
    Vec hidden_sum[kWidth]{};
    int64_t i = 0;
    for (; i + kAtOnce * kLanes <= count; i += kAtOnce * kLanes)
      rows<kAtOnce>(p + i, to + i, g + i, m + i, r + i, kLanes, hidden_sum);
    for (; i < count; i += kLanes)
      rows<1>(p + i, to + i, g + i, m + i, r + i, count - i < kLanes ? static_cast<int>(count - i) : kLanes,
              hidden_sum);
    for (int j = 0; j < kWidth; ++j) total[j] += sum_lanes(hidden_sum[j]);
  }

  // kVectors vectors of `lanes` parameters each, which share the loads of weights.
  template <int kVectors>
  LOPT_INLINE void rows(const float* p_at, float* to, const float* g_at, const float* mom_at, const float* rms_at,
                        int lanes, Vec* hidden_sum) const {
    const int64_t mom_step = mom.step(), rms_step = rms.step();
    Vec p[kVectors], active[kVectors], x[kColumns * kVectors], hidden[kWidth * kVectors];
    LOPT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int i = v * kLanes;
      const Vec g = clip_gradient(load(g_at + i, lanes), inputs.clip_limit);
      p[v] = load(p_at + i, lanes);
      Vec m[Features::kNumMom], r[Features::kNumRms], raw[kColumns];
      LOPT_UNROLL
      for (int k = 0; k < Features::kNumMom; ++k) m[k] = load(mom_at + k * mom_step + i, lanes);
      LOPT_UNROLL
      for (int k = 0; k < Features::kNumRms; ++k) r[k] = load(rms_at + k * rms_step + i, lanes);
      Features::columns(g, p[v], m, r, raw);
      active[v] = Features::active(r);
      LOPT_UNROLL
      for (int c = 0; c < kColumns; ++c)
        x[c * kVectors + v] = clamp_of(raw[c] * inputs.scale[c] + inputs.shift[c], feature_clip);
    }
    MlpOutput<Vec> out[kVectors];
    small_mlp_rows<kColumns, kWidth, kVectors, kSums / kVectors>(x, weights, inputs.bias, hidden, out);
    if (inputs.moves())
      for (int v = 0; v < kVectors; ++v)
        store(to + v * kLanes, next_param(p[v], out[v], inputs, active[v], magnitude_rate), lanes);
    const Vec mask = lane_mask(lanes);
    for (int j = 0; j < kWidth; ++j) {
      LOPT_UNROLL
      for (int v = 0; v < kVectors; ++v) hidden_sum[j] += hidden[j * kVectors + v] * mask;
    }
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
