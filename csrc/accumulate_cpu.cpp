// accumulate on the CPU: all tensors, in chunks over threads; the formulas are in accumulate_block.h. Compiled once per
// instruction set; cpu_dispatch.cpp picks.
#include "accumulate_block.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

template <class Features, class Param, class Grad>
void run_chunk(const AccumulateParams& params, int64_t index) {
  const Chunk chunk = params.chunks[index];
  const TensorEntry& tensor = params.tensors[chunk.tensor];
  const int64_t left = tensor.numel - chunk.begin;
  const Accumulator<Features, Param, Grad> accumulator{
      params.mom_decay,
      params.rms_decay,
      params.clip_limit[chunk.tensor],
      tensor.stride,
      reinterpret_cast<const Param*>(tensor.param) + chunk.begin,
      reinterpret_cast<const Grad*>(params.grads[chunk.tensor]) + chunk.begin,
      reinterpret_cast<float*>(tensor.mom) + chunk.begin,
      reinterpret_cast<float*>(tensor.rms) + chunk.begin,
  };
  accumulator.run(left < kChunk ? left : kChunk, params.partials + index * kNumStats<Features>);
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
