// accumulate on the CPU: all tensors, in chunks over threads; the formulas are in accumulate_block.h. Compiled once per
// instruction set; cpu_dispatch.cpp picks.
#include "cpu/accumulate_block.h"
#include "cpu/chunks_cpu.h"
#include "cpu/threads.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

template <class Features, Dtype kState>
void run_chunk(const AccumulateParams& params, int64_t index) {
  using AccumulatorOf = Accumulator<Features, kState>;
  const Chunk chunk = params.chunks[index];
  const TensorEntry& tensor = params.tensors[chunk.tensor];
  const int64_t left = tensor.numel - chunk.begin;
  AccumulatorOf accumulator{
      params.mom_decay,
      params.rms_decay,
      params.clip_limit[tensor.row],
      Numbers::at(tensor.param, tensor.param_dtype, chunk.begin),
      Numbers::at(params.grads[chunk.tensor], tensor.grad_dtype, chunk.begin),
      decltype(AccumulatorOf::mom)::of(tensor, tensor.mom, 0, kState, chunk.begin),
      decltype(AccumulatorOf::rms)::of(tensor, tensor.rms, AccumulatorOf::kMom, kState, chunk.begin),
  };
  if (kState != kFloat32) {
    const uint64_t key = rounding_key(static_cast<uint64_t>(params.seed), static_cast<uint64_t>(*params.step),
                                      static_cast<uint64_t>(tensor.row));
    accumulator.words = RoundingWords<AccumulatorOf::kMom + AccumulatorOf::kRms>::of(key, tensor.offset + chunk.begin);
    accumulator.first = static_cast<uint32_t>(tensor.offset + chunk.begin);
  }
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
  finish_stats<Features, double>(total, static_cast<double>(tensor.numel),
                                 params.stats + tensor.row * kNumStats<Features>);
}

}  // namespace

void accumulate_chunk(const AccumulateParams& params, int feature_set, int64_t index) {
  with_feature_set(feature_set, [&](auto features) {
    using Features = decltype(features);
    switch (params.state_dtype) {
      case kBFloat16:
        return run_chunk<Features, kBFloat16>(params, index);
      case kInt8:
        return run_chunk<Features, kInt8>(params, index);
      default:
        return run_chunk<Features, kFloat32>(params, index);
    }
  });
}

void merge_stats(const AccumulateParams& params, int feature_set, int64_t t) {
  with_feature_set(feature_set, [&](auto features) { merge_tensor<decltype(features)>(params, t); });
}

bool accumulate(const AccumulateParams& params, int feature_set, const Target& target) {
  return with_feature_set(feature_set, [&](auto) {
#pragma omp parallel num_threads(threads_over(params.tensors, params.num_tensors, target.num_threads))
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < params.num_chunks; ++i) accumulate_chunk(params, feature_set, i);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < params.num_tensors; ++t) merge_stats(params, feature_set, t);
    }
  });
}

}  // namespace LOPT_ISA
}  // namespace lopt
