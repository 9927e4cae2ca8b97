// The kernels of one feature set, MLP and dtype of the state for NVRTC, which compiles no host code: cuda/loaded.cpp starts
// them.
#include "accumulate.cu"
#include "advance.cu"
#include "apply.cu"
#include "apply_mma.cu"
#include "sweep.cu"
#include "sweep_mma.cu"
#include "write.cu"

namespace lopt {

// Bytes of dynamic shared memory of each; advance's depend on the theta.
extern "C" __device__ int lopt_dynamic_bytes[kNumKernels] = {
    0,
    0,
    0,
    static_cast<int>(kDynamicBytes<ApplyMemory<OwnFeatures, LOPT_OWN_WIDTH>>),
    static_cast<int>(kDynamicBytes<ApplyMmaMemory<OwnFeatures, LOPT_OWN_WIDTH, 2>>),
    static_cast<int>(kDynamicBytes<ApplyMmaMemory<OwnFeatures, LOPT_OWN_WIDTH, 1>>),
    static_cast<int>(kDynamicBytes<SweepMemory<OwnFeatures, LOPT_OWN_WIDTH>>),
    static_cast<int>(kDynamicBytes<SweepMmaMemory<OwnFeatures, LOPT_OWN_WIDTH, 2>>),
    static_cast<int>(kDynamicBytes<SweepMmaMemory<OwnFeatures, LOPT_OWN_WIDTH, 1>>),
    0,
    0,
    0,
};

}  // namespace lopt
