// write on the GPU: for every parameter of a matrix whose direction was treated as a whole
//   param  = keep * param - step_size * direction
// One block per chunk, as the other kernels; what is not such a matrix was written by apply.
#include "chunks.cuh"

namespace lopt {
namespace {

__global__ void __launch_bounds__(kThreads) write_kernel(ApplyParams params) {
  const ChunkRange chunk = chunk_of_block(params.tensors, params.chunks);
  const TensorEntry tensor = params.tensors[chunk.tensor];
  const float step_size = params.step_size[tensor.row], keep = params.keep[tensor.row];
  if (!is_whole(params, tensor) || !moves(step_size, keep)) return;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < chunk.count; i += kThreads) {
    const int64_t at = chunk.begin + i;
    const float param = load_value(tensor.param, tensor.param_dtype, at);
    const float direction = load_value(tensor.direction, direction_dtype(params.state_dtype), at);
    store_value(tensor.param, tensor.param_dtype, at, next_param(param, direction, step_size, keep));
  }
}

}  // namespace

#if LOPT_WITH_LAUNCHERS
bool write_cuda(const ApplyParams& params, bool orthogonalised, const Target& target) {
  if (params.newton_schulz == 0) return true;
  if (!orthogonalised) return false;
  launch_per_chunk("write", write_kernel, params, target);
  return true;
}
#endif

}  // namespace lopt
