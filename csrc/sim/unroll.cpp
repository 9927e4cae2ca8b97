// The unroll engine of `sim`.
#include "sim/cuda_on_cpu.h"
//
#include "../../cuda/unroll.cu"
