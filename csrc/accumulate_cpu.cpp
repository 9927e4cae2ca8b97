// accumulate on the CPU: all tensors, in chunks over threads; the formulas are in accumulate_block.h. Compiled once per
// instruction set; cpu_dispatch.cpp picks.
#include "accumulate_block.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

template <class Features>
void run_chunk(const AccumulateParams& params, int64_t index) {
  const Chunk chunk = params.chunks[index];
  const TensorEntry& tensor = params.tensors[chunk.tensor];
  const int64_t left = tensor.numel - chunk.begin;
  const Accumulator<Features> accumulator{
      params.mom_decay,
      params.rms_decay,
      params.clip_limit[chunk.tensor],
      tensor.stride,
      Numbers::at(tensor.param, tensor.param_dtype == kBFloat16, chunk.begin),
      Numbers::at(params.grads[chunk.tensor], tensor.grad_dtype == kBFloat16, chunk.begin),
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
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < params.num_chunks; ++i) run_chunk<Features>(params, i);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < params.num_tensors; ++t) merge_tensor<Features>(params, t);
    }
  });
}

}  // namespace LOPT_ISA
}  // namespace lopt
