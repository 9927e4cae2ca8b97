// apply on the GPU, the small MLP on tensor cores (Note [MLP on tensor cores]); what it computes is in apply.cu, which is
// the oracle.
#include "apply_mma.cuh"

namespace lopt {
namespace {

// Blocks per multiprocessor, for which the compiler may use 255, 168 or 128 registers.
constexpr int resident_blocks(Dtype state, int columns, int width, int parts) {
  const bool many = columns >= 16 && width >= (state == kInt8 ? 16 : 32) && parts == 2;
  return width > 32 || many ? 2 : columns < 16 && width < 32 ? 4 : 3;
}

template <class Features, int kWidth, int kParts>
struct ApplyMmaMemory {
  Rule<Features, kWidth> rule;
  StageOf<Features, kWidth, kParts> stages[kWarps];
  LastLayer<kWidth> last_layer;
  HiddenRows<kWidth> rows;
  FragmentsOf<Features, kWidth, kParts> fragments;
};

template <Dtype kState, class Features, int kWidth, int kParts>
__device__ __forceinline__ void apply_mma_of_block(const ApplyParams& params, Rule<Features, kWidth>& rule,
                                                   StageOf<Features, kWidth, kParts> (&stages)[kWarps],
                                                   LastLayer<kWidth>& last_layer, HiddenRows<kWidth>& rows,
                                                   FragmentsOf<Features, kWidth, kParts>& fragments) {
  const ChunkRange chunk = chunk_of_block(params.tensors, params.chunks);
  const Operands operands = operands_of(params, chunk.tensor);
  const auto read = [&](const Quad& quad, QuadValues<Features>& values) {
    load_values<kState>(operands.tensor, operands.grads, quad, values);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) values.grad[j] = clip_gradient(values.grad[j], operands.inputs.clip_limit);
  };
  apply_mma<kState, false, kParts>(params, chunk, operands, rule, stages, last_layer, rows, fragments, read);
  reduce_hidden(params, chunk, operands.tensor, rows);
}

template <Dtype kState, class Features, int kWidth, int kParts>
__global__ void __launch_bounds__(kThreads, resident_blocks(kState, Features::kNumColumns, kWidth, kParts))
    apply_mma_kernel(ApplyParams params) {
  using All = ApplyMmaMemory<Features, kWidth, kParts>;
  if constexpr (kIsStatic<All>) {
    __shared__ Rule<Features, kWidth> rule;
    __shared__ StageOf<Features, kWidth, kParts> stages[kWarps];
    __shared__ LastLayer<kWidth> last_layer;
    __shared__ HiddenRows<kWidth> rows;
    __shared__ FragmentsOf<Features, kWidth, kParts> fragments;
    apply_mma_of_block<kState, Features, kWidth, kParts>(params, rule, stages, last_layer, rows, fragments);
  } else {
    LOPT_DYNAMIC_SHARED(All, memory);
    apply_mma_of_block<kState, Features, kWidth, kParts>(params, memory->rule, memory->stages, memory->last_layer,
                                                         memory->rows, memory->fragments);
  }
}

}  // namespace

#if LOPT_WITH_LAUNCHERS
template <class Features, Dtype kState>
bool launch_apply_mma(const ApplyParams& params, int width, const Target& target) {
  return with_width(width, [&](auto width_constant) {
    constexpr int kWidth = decltype(width_constant)::value;
    if (params.precision == kFast)
      launch_per_chunk<ApplyMmaMemory<Features, kWidth, 1>>("apply_mma", apply_mma_kernel<kState, Features, kWidth, 1>,
                                                            params, target);
    else
      launch_per_chunk<ApplyMmaMemory<Features, kWidth, 2>>("apply_mma", apply_mma_kernel<kState, Features, kWidth, 2>,
                                                            params, target);
  });
}
LOPT_INSTANTIATE(bool, launch_apply_mma, const ApplyParams&, int, const Target&)
#endif

}  // namespace lopt
