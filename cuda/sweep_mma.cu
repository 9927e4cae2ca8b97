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
constexpr int kSweepStaged = kSharedBytes<Features, kWidth, kParts> <= kStaticShared ? 2 : 1;
template <class Features, int kWidth, int kParts>
using SweepStage = StageOf<Features, kWidth, kParts, kSweepStaged<Features, kWidth, kParts>>;

template <class Features, int kWidth, int kParts>
struct SweepMmaMemory {
  Rule<Features, kWidth> rule;
  SweepStage<Features, kWidth, kParts> stages[kWarps];
  LastLayer<kWidth> last_layer;
  HiddenRows<kWidth> rows;
  StatRows<Features> stat_rows;
  WordsOf<Features> words;
  FragmentsOf<Features, kWidth, kParts> fragments;
};

// Where there are registers for the row of partials.
template <class Features, int kWidth, int kParts>
constexpr bool kRowInRegisters = Features::kNumColumns < 16 && kWidth == 8;

template <Dtype kState, class Features, int kWidth, int kParts>
__device__ __forceinline__ void sweep_mma_of_block(const SweepParams& params, Rule<Features, kWidth>& rule,
                                                   SweepStage<Features, kWidth, kParts> (&stages)[kWarps],
                                                   LastLayer<kWidth>& last_layer, HiddenRows<kWidth>& rows,
                                                   StatRows<Features>& stat_rows, WordsOf<Features>& words,
                                                   FragmentsOf<Features, kWidth, kParts>& fragments) {
  const ChunkRange chunk = chunk_of_block(params.applying.tensors, params.applying.chunks);
  const Operands operands = operands_of(params.applying, chunk.tensor);
  Accumulator<kState, Features, kRowInRegisters<Features, kWidth, kParts>> accumulator{params.accumulating, operands,
                                                                                       words, stat_rows};
  accumulator.begin(chunk);
  const auto read = [&](const Quad& quad, QuadValues<Features>& values) { accumulator.read(quad, values); };
  apply_mma<kState, true, kParts>(params.applying, chunk, operands, rule, stages, last_layer, rows, fragments, read);
  accumulator.end(chunk);
  reduce_sweep<Features>(params, chunk, operands.tensor, stat_rows, rows);
}

// Two or three blocks per multiprocessor leave 255 or 168 registers.
template <Dtype kState, class Features, int kWidth, int kParts>
__global__ void __launch_bounds__(kThreads, Features::kNumColumns >= 16 || kWidth > 32 ? 2 : 3)
    sweep_mma_kernel(SweepParams params) {
  using All = SweepMmaMemory<Features, kWidth, kParts>;
  if constexpr (kIsStatic<All>) {
    __shared__ Rule<Features, kWidth> rule;
    __shared__ SweepStage<Features, kWidth, kParts> stages[kWarps];
    __shared__ LastLayer<kWidth> last_layer;
    __shared__ HiddenRows<kWidth> rows;
    __shared__ StatRows<Features> stat_rows;
    __shared__ WordsOf<Features> words;
    __shared__ FragmentsOf<Features, kWidth, kParts> fragments;
    sweep_mma_of_block<kState, Features, kWidth, kParts>(params, rule, stages, last_layer, rows, stat_rows, words,
                                                         fragments);
  } else {
    LOPT_DYNAMIC_SHARED(All, memory);
    sweep_mma_of_block<kState, Features, kWidth, kParts>(params, memory->rule, memory->stages, memory->last_layer,
                                                         memory->rows, memory->stat_rows, memory->words,
                                                         memory->fragments);
  }
}

}  // namespace

#if LOPT_WITH_LAUNCHERS
template <class Features, Dtype kState>
bool launch_sweep_mma(const AccumulateParams& accumulating, const ApplyParams& applying, int width,
                      const Target& target) {
  if constexpr (kState == kInt8) {  // which has no kernels of one sweep
    launch_accumulate<Features, kState>(accumulating, target);
    return launch_apply_mma<Features, kState>(applying, width, target);
  } else {
    return with_width(width, [&](auto width_constant) {
      constexpr int kWidth = decltype(width_constant)::value;
      const SweepParams params{accumulating, applying, applying.num_chunks};
      if (applying.precision == kFast)
        launch_per_chunk<SweepMmaMemory<Features, kWidth, 1>>(
            "sweep_mma", sweep_mma_kernel<kState, Features, kWidth, 1>, params, target);
      else
        launch_per_chunk<SweepMmaMemory<Features, kWidth, 2>>(
            "sweep_mma", sweep_mma_kernel<kState, Features, kWidth, 2>, params, target);
    });
  }
}
LOPT_INSTANTIATE(bool, launch_sweep_mma, const AccumulateParams&, const ApplyParams&, int, const Target&)
#endif

}  // namespace lopt
