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
    for (int j = 0; j < kQuad; ++j) values.grad[j] = clip_gradient(values.grad[j], operands.limit);
  };
  apply_mma<kState, false, kParts>(params, chunk, operands, rule, stages, last_layer, rows, read);
  reduce_hidden(params, chunk, rows);
}

}  // namespace

bool apply_mma_cuda(const ApplyParams& params, int feature_set, int width, const Target& target) {
  return with_kernel(feature_set, width, [&](auto features, auto width_constant) {
    using Features = decltype(features);
    constexpr int kWidth = decltype(width_constant)::value;
    const auto launch = [&](auto kernel) { launch_per_chunk("apply_mma", kernel, params, target); };
    if (params.state_dtype == kFloat32)
      launch(params.precision == kFast ? apply_mma_kernel<kFloat32, Features, kWidth, 1>
                                       : apply_mma_kernel<kFloat32, Features, kWidth, 2>);
    else
      launch(params.precision == kFast ? apply_mma_kernel<kBFloat16, Features, kWidth, 1>
                                       : apply_mma_kernel<kBFloat16, Features, kWidth, 2>);
  });
}

}  // namespace lopt
