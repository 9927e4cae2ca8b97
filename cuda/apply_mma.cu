// apply on the GPU, the small MLP on tensor cores (Note [MLP on tensor cores]); what it computes is in apply.cu, which is
// the oracle.
#include "apply_mma.cuh"

namespace lopt {
namespace {

// Blocks per multiprocessor, for which the compiler may use 255, 168 or 128 registers.
constexpr int resident_blocks(int columns, int width, int parts) {
  return columns < 16 && width < 32 ? 4 : columns >= 16 && width == 32 && parts == 2 ? 2 : 3;
}

template <Dtype kState, class Features, int kWidth, int kParts>
__global__ void __launch_bounds__(kThreads, resident_blocks(Features::kNumColumns, kWidth, kParts))
    apply_mma_kernel(ApplyParams params) {
  __shared__ Rule<Features, kWidth> rule;
  __shared__ StageOf<Features, kWidth, kParts> stages[kWarps];
  __shared__ LastLayer<kWidth> last_layer;
  __shared__ HiddenRows<kWidth> rows;

  const ChunkRange chunk = chunk_of_block(params.tensors, params.chunks);
  const Operands operands = operands_of(params, chunk.tensor);
  const auto read = [&](const Quad& quad, QuadValues<Features>& values) {
    load_values<kState>(operands.tensor, operands.grads, quad, values);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) values.grad[j] = clip_gradient(values.grad[j], operands.inputs.clip_limit);
  };
  apply_mma<kState, false, kParts>(params, chunk, operands, rule, stages, last_layer, rows, read);
  reduce_hidden(params, chunk, operands.tensor, rows);
}

}  // namespace

template <class Features, Dtype kState>
bool launch_apply_mma(const ApplyParams& params, int width, const Target& target) {
  return with_width(width, [&](auto width_constant) {
    constexpr int kWidth = decltype(width_constant)::value;
    const auto kernel = params.precision == kFast ? apply_mma_kernel<kState, Features, kWidth, 1>
                                                  : apply_mma_kernel<kState, Features, kWidth, 2>;
    launch_per_chunk("apply_mma", kernel, params, target);
  });
}
LOPT_INSTANTIATE(bool, launch_apply_mma, const ApplyParams&, int, const Target&)

}  // namespace lopt
