// `sim`, for tests: the .cu files compiled for the CPU (see cuda_on_cpu.h). Their launchers are renamed, so that the
// real ones can live in the same module; everything else in them is inline or in an unnamed namespace.
#include "api/kernels.h"
#include "api/spec.h"
#include "sim/cuda_on_cpu.h"

#define accumulate_cuda accumulate_on_cpu
#define apply_cuda apply_on_cpu
#define apply_mma_cuda apply_mma_on_cpu
#define sweep_cuda sweep_on_cpu
#define sweep_mma_cuda sweep_mma_on_cpu
#define begin_cuda begin_on_cpu
#define advance_cuda advance_on_cpu
#define finish_cuda finish_on_cpu
#define write_words_cuda write_words_on_cpu
#include "../../cuda/accumulate.cu"
#include "../../cuda/advance.cu"
#include "../../cuda/apply.cu"
#include "../../cuda/apply_mma.cu"
#include "../../cuda/sweep.cu"
#include "../../cuda/sweep_mma.cu"

namespace lopt {

void set_sim_reverse_order(bool reverse) { sim::reverse_order = reverse; }

bool accumulate_sim(const AccumulateParams& params, int feature_set) {
  return accumulate_on_cpu(params, feature_set, 0, 0);
}

bool apply_sim(const ApplyParams& params, int feature_set, int width) {
  return apply_on_cpu(params, feature_set, width, 0, 0);
}

bool sweep_sim(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width) {
  return sweep_on_cpu(accumulating, applying, feature_set, width, 0, 0);
}

bool begin_sim(const AdvanceParams& params) { return begin_on_cpu(params, 0, 0); }

bool advance_sim(const AdvanceParams& params) { return advance_on_cpu(params, 0, 0); }

bool finish_sim(const AdvanceParams& params) { return finish_on_cpu(params, 0, 0); }

void write_words_sim(int64_t* to, const int64_t* words, int64_t count) { write_words_on_cpu(to, words, count, 0, 0); }

int64_t sim_launches() { return sim::launches; }

}  // namespace lopt
