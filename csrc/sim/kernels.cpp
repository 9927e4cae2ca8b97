// The kernels of `sim`: the .cu files that are compiled for one feature set and dtype of the state at a time
// (cuda/launchers.h).
#include "sim/cuda_on_cpu.h"
//
#include "../../cuda/accumulate.cu"
#include "../../cuda/apply.cu"
#include "../../cuda/apply_mma.cu"
#include "../../cuda/sweep.cu"
#include "../../cuda/sweep_mma.cu"
