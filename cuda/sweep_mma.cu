// accumulate and apply in one sweep on the GPU (Note [One sweep]), the small MLP on tensor cores (Note [MLP on tensor
// cores]); the oracle is in sweep.cu. Accumulators of all windows are updated four parameters per lane; windows whose MLP
// is computed later, in plain float, are then read a second time.
#include "apply_mma.cuh"
#include "sweep.cuh"

namespace lopt {
namespace {

// Two parameters of a quad are staged at a time, or one where the statistics leave too little of the 48 KiB for two; 512
// bytes are for totals and rounding words.
template <class Features, int kWidth, int kParts>
constexpr size_t kSharedBytes = sizeof(Rule<Features, kWidth>) + sizeof(StageOf<Features, kWidth, kParts>[kWarps]) +
                                sizeof(LastLayer<kWidth>) + sizeof(HiddenRows<kWidth>) + sizeof(StatRows<Features>);
template <class Features, int kWidth, int kParts>
constexpr int kSweepStaged = kSharedBytes<Features, kWidth, kParts> <= (48 << 10) - 512 ? 2 : 1;

// Where there are registers for the row of partials.
template <class Features, int kWidth, int kParts>
constexpr bool kRowInRegisters = Features::kNumColumns < 16 && kWidth == 8;

// Two or three blocks per multiprocessor leave 255 or 168 registers.
template <Dtype kState, class Features, int kWidth, int kParts>
__global__ void __launch_bounds__(kThreads, Features::kNumColumns >= 16 ? 2 : 3) sweep_mma_kernel(SweepParams params) {
  __shared__ Rule<Features, kWidth> rule;
  __shared__ StageOf<Features, kWidth, kParts, kSweepStaged<Features, kWidth, kParts>> stages[kWarps];
  __shared__ LastLayer<kWidth> last_layer;
  __shared__ HiddenRows<kWidth> rows;
  __shared__ StatRows<Features> stat_rows;
  __shared__ WordsOf<Features> words;

  const ChunkRange chunk = chunk_of_block(params.applying.tensors, params.applying.chunks);
  const Operands operands = operands_of(params.applying, chunk.tensor);
  Accumulator<kState, Features, kRowInRegisters<Features, kWidth, kParts>> accumulator{params.accumulating, operands,
                                                                                       words, stat_rows};
  accumulator.begin(chunk);
  const auto read = [&](const Quad& quad, QuadValues<Features>& values) { accumulator.read(quad, values); };
  apply_mma<kState, true, kParts>(params.applying, chunk, operands, rule, stages, last_layer, rows, read);
  accumulator.end(chunk);
  reduce_sweep<Features>(params, chunk, operands.tensor, stat_rows, rows);
}

}  // namespace

template <class Features, Dtype kState>
bool launch_sweep_mma(const AccumulateParams& accumulating, const ApplyParams& applying, int width,
                      const Target& target) {
  return with_width(width, [&](auto width_constant) {
    constexpr int kWidth = decltype(width_constant)::value;
    const auto kernel = applying.precision == kFast ? sweep_mma_kernel<kState, Features, kWidth, 1>
                                                    : sweep_mma_kernel<kState, Features, kWidth, 2>;
    launch_per_chunk("sweep_mma", kernel, SweepParams{accumulating, applying, applying.num_chunks}, target);
  });
}
LOPT_INSTANTIATE(bool, launch_sweep_mma, const AccumulateParams&, const ApplyParams&, int, const Target&)

}  // namespace lopt
