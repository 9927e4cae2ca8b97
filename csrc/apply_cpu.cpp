// apply on the CPU: for every parameter
//   x      = clamp(columns(grad, param, mom, rms) * scale + shift, +-feature_clip)
//   o, h   = small_mlp(x)
//   param  = keep * param - step_size * o.direction * exp(magnitude_rate * o.magnitude)
// and per tensor the mean of the last hidden layer h. Compiled once per instruction set; cpu_dispatch.cpp picks.
// Sums follow Note [Order of summation] in accumulate_cpu.cpp.
#include "simd.h"
// simd.h comes first: see there.
#include "kernels.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

constexpr int kBlock = 32;  // vectors summed in float before they go into the double sum

template <class Features, int kWidth, class Param, class Grad>
void run_chunk(const ApplyParams& params, int64_t index) {
  constexpr int kColumns = Features::kNumColumns;
  const Chunk chunk = params.chunks[index];
  const int64_t t = chunk.tensor;
  const TensorEntry& tensor = params.tensors[t];
  const int64_t left = tensor.numel - chunk.begin;
  const int64_t count = left < kChunk ? left : kChunk;
  Param* param = reinterpret_cast<Param*>(tensor.param) + chunk.begin;
  const Grad* grad = reinterpret_cast<const Grad*>(params.grads[t]) + chunk.begin;
  const float* mom = reinterpret_cast<const float*>(tensor.mom) + chunk.begin;
  const float* rms = reinterpret_cast<const float*>(tensor.rms) + chunk.begin;
  const float* scale = params.scale + t * kColumns;
  const float* shift = params.shift + t * kColumns;
  const float* bias = params.bias + t * kWidth;
  const float* weights = params.weights + tensor.theta * MlpLayout<kColumns, kWidth>::kSize;
  const float limit = params.clip_limit[t], keep = params.keep[t], step_size = params.step_size[t];

  double total[kWidth]{};
  for (int64_t begin = 0; begin < count; begin += kBlock * kLanes) {
    const int64_t end = count - begin < kBlock * kLanes ? count : begin + kBlock * kLanes;
    Vec hidden_sum[kWidth]{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const int lanes = end - i < kLanes ? static_cast<int>(end - i) : kLanes;
      const Vec mask = lane_mask(lanes);
      const Vec g = clip_gradient(load(grad + i, lanes), limit), p = load(param + i, lanes);
      Vec m[Features::kNumMom], r[Features::kNumRms], x[kColumns], hidden[kWidth];
      for (int k = 0; k < Features::kNumMom; ++k) m[k] = load(mom + k * tensor.stride + i, lanes);
      for (int k = 0; k < Features::kNumRms; ++k) r[k] = load(rms + k * tensor.stride + i, lanes);
      Features::columns(g, p, m, r, x);
      LOPT_UNROLL
      for (int c = 0; c < kColumns; ++c)
        x[c] = clamp_of(x[c] * scale[c] + shift[c], -params.feature_clip, params.feature_clip);
      const MlpOutput<Vec> out = small_mlp<kColumns, kWidth>(x, weights, bias, hidden);
      store(param + i, next_param(p, out, keep, step_size, params.magnitude_rate), lanes);
      for (int j = 0; j < kWidth; ++j) hidden_sum[j] += hidden[j] * mask;
    }
    for (int j = 0; j < kWidth; ++j) total[j] += sum_lanes(hidden_sum[j]);
  }
  for (int j = 0; j < kWidth; ++j) params.partials[index * kWidth + j] = total[j];
}

template <int kWidth>
void merge_tensor(const ApplyParams& params, int64_t t) {
  const TensorEntry& tensor = params.tensors[t];
  for (int j = 0; j < kWidth; ++j) {
    double total = 0.0;
    for (int64_t begin = 0; begin < tensor.numel; begin += kChunk)
      total += params.partials[(tensor.first_chunk + begin / kChunk) * kWidth + j];
    params.hidden[t * kWidth + j] = static_cast<float>(total / static_cast<double>(tensor.numel));
  }
}

}  // namespace

bool apply(const ApplyParams& params, int feature_set, int width, int num_threads) {
  return with_kernel(feature_set, width, [&](auto features, auto width_constant) {
    using Features = decltype(features);
    constexpr int kWidth = decltype(width_constant)::value;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < params.num_chunks; ++i) {
        const TensorEntry& tensor = params.tensors[params.chunks[i].tensor];
        const bool half_param = tensor.param_dtype == kBFloat16, half_grad = tensor.grad_dtype == kBFloat16;
        if (half_param && half_grad) run_chunk<Features, kWidth, uint16_t, uint16_t>(params, i);
        if (half_param && !half_grad) run_chunk<Features, kWidth, uint16_t, float>(params, i);
        if (!half_param && half_grad) run_chunk<Features, kWidth, float, uint16_t>(params, i);
        if (!half_param && !half_grad) run_chunk<Features, kWidth, float, float>(params, i);
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < params.num_tensors; ++t) merge_tensor<kWidth>(params, t);
    }
  });
}

}  // namespace LOPT_ISA
}  // namespace lopt
