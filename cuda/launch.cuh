// How kernels start: device, stream, grid and error check in one place, for nvcc and for the CPU (csrc/sim/cuda_on_cpu.h).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launchers.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LOPT_DYNAMIC_SHARED(type, name)            \
  extern __shared__ uint4 dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_memory)
#define LOPT_LAUNCH(name, kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#else
#include "sim/cuda_on_cpu.h"
#endif

#define LOPT_CUDA_CHECK(call) ::lopt::check_cuda(call, #call, __FILE__, __LINE__)

// Unnamed: one module holds nvcc's version of these functions and the CPU's.
namespace lopt {
namespace {

constexpr int kThreads = 128;  // per block
constexpr int kWarps = kThreads / 32;

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

// A kernel's shared memory is static up to this many bytes, of the 48 KiB that there may be; a few more are in functions that
// it calls. Beyond, Memory is dynamic.
constexpr size_t kStaticShared = (48 << 10) - 512;
template <class Memory>
constexpr bool kIsStatic = sizeof(Memory) <= kStaticShared;

// kernel(params) with one block of kThreads per chunk and Memory, on the caller's stream.
template <class Memory = char, class Params>
void launch_per_chunk(const char* name, void (*kernel)(Params), const Params& params, const Target& target) {
  if (params.num_chunks == 0) return;
  if (params.num_chunks > 0x7fffffff)
    throw std::runtime_error(std::string(name) + ": expected at most 2^31 - 1 chunks, got " +
                             std::to_string(params.num_chunks) + "; update the tensors in several calls");
  const DeviceGuard guard(target.device);
  constexpr size_t kBytes = kIsStatic<Memory> ? 0 : sizeof(Memory);
  if (kBytes)
    LOPT_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes)));
  LOPT_LAUNCH(name, kernel, static_cast<unsigned>(params.num_chunks), kThreads, kBytes,
              reinterpret_cast<cudaStream_t>(target.stream), params);
  LOPT_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace lopt
