// How kernels start: device, stream, grid and error check in one place, for nvcc and for the CPU (csrc/sim/cuda_on_cpu.h).
// NVRTC compiles kernels alone (LOPT_WITH_LAUNCHERS is 0), which loaded.cpp starts.
#pragma once

#include "grids.h"

#ifdef __CUDACC_RTC__
#define LOPT_WITH_LAUNCHERS 0
#else
#define LOPT_WITH_LAUNCHERS 1
#include <stdexcept>
#include <string>

#include "checks.h"
#include "launchers.h"
#endif

#ifdef __CUDACC__
#if LOPT_WITH_LAUNCHERS
#include <cuda_runtime.h>
#endif
#define LOPT_DYNAMIC_SHARED(type, name)            \
  extern __shared__ uint4 dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_memory)
#define LOPT_LAUNCH(name, kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#else
#include "sim/cuda_on_cpu.h"
#endif

namespace lopt {
namespace {

// A kernel's shared memory is static up to this many bytes, of the 48 KiB that there may be; a few more are in functions that
// it calls. Beyond, Memory is dynamic.
constexpr size_t kStaticShared = (48 << 10) - 512;
template <class Memory>
constexpr bool kIsStatic = sizeof(Memory) <= kStaticShared;
template <class Memory>
constexpr size_t kDynamicBytes = kIsStatic<Memory> ? 0 : sizeof(Memory);

}  // namespace
}  // namespace lopt

#if LOPT_WITH_LAUNCHERS
#define LOPT_CUDA_CHECK(call) ::lopt::check_cuda(call, #call, __FILE__, __LINE__)

// Unnamed: one module holds nvcc's version of these functions and the CPU's.
namespace lopt {
namespace {

inline void check_cuda(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " failed at " + file + ":" + std::to_string(line) + ": " +
                           cudaGetErrorString(error));
}

// The device is current for the life of the guard; launches would otherwise go to the caller's.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    LOPT_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device_ != previous_) LOPT_CUDA_CHECK(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (device_ != previous_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

// kernel(params) with one block of kThreads per chunk and Memory, on the caller's stream.
template <class Memory = char, class Params>
void launch_per_chunk(const char* name, void (*kernel)(Params), const Params& params, const Target& target) {
  if (params.num_chunks == 0) return;
  check_chunks(name, params.num_chunks);
  const DeviceGuard guard(target.device);
  constexpr size_t kBytes = kDynamicBytes<Memory>;
  if (kBytes)
    LOPT_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes)));
  LOPT_LAUNCH(name, kernel, static_cast<unsigned>(params.num_chunks), kThreads, kBytes,
              reinterpret_cast<cudaStream_t>(target.stream), params);
  LOPT_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace lopt
#endif
