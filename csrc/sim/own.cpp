// `sim` as a library of one feature set and MLP that are not compiled in (cuda/own.cpp). It has options of its own.
#include "sim/cuda_on_cpu.h"
//
#include "../../cuda/accumulate.cu"
#include "../../cuda/advance.cu"
#include "../../cuda/apply.cu"
#include "../../cuda/apply_mma.cu"
#include "../../cuda/sweep.cu"
#include "../../cuda/sweep_mma.cu"
#include "../../cuda/write.cu"

extern "C" __attribute__((visibility("default"))) void lopt_sim_options(int reverse, int tensor_cores) {
  lopt::sim::reverse_order = reverse != 0;
  lopt::sim::tensor_cores = static_cast<lopt::sim::TensorCores>(tensor_cores);
}
