// `sim`, for tests: the .cu files compiled for the CPU (see cuda_on_cpu.h). Their launchers are renamed, so that the
// real ones can live in the same module; everything else in them is inline or in an unnamed namespace.
#include "cuda_on_cpu.h"
#include "kernels.h"

#define accumulate_cuda accumulate_on_cpu
#define apply_cuda apply_on_cpu
#include "../cuda/accumulate.cu"
#include "../cuda/apply.cu"

namespace lopt {

void set_sim_reverse_order(bool reverse) { sim::reverse_order = reverse; }

bool accumulate_sim(const AccumulateParams& params, int feature_set) {
  return accumulate_on_cpu(params, feature_set, 0, 0);
}

bool apply_sim(const ApplyParams& params, int feature_set, int width) {
  return apply_on_cpu(params, feature_set, width, 0, 0);
}

}  // namespace lopt
