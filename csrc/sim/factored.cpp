// The kernels of `sim` for learned optimizers of others.
#include "sim/cuda_on_cpu.h"
//
#include "../../cuda/factored.cu"
