// CUDA on the CPU, for tests: enough of the language for g++ to compile our .cu files and run them without a GPU.
//
// A CUDA thread is a fiber, a block is a set of fibers on one OS thread, blocks are spread over OpenMP threads, and
// `__shared__` is thread-local memory. A fiber runs until it meets a barrier or a warp operation, a warp until it meets a
// barrier. Threads, warps and blocks go in ascending order, or descending with `sim::reverse_order`: a missing barrier
// gives a wrong number in one of the two.
// Threads that wait for each other forever, and warp operations with exited lanes, lanes outside the mask or beyond the
// block, are errors that name kernel, block, thread and line.
//
// Tensor cores add up as those of a chosen architecture do (tensor_cores.h), and estimates of logarithms, exponentials and
// roots are as wrong as they may be (rule/maths.h).
//
// Not here: memory-model races between blocks, contraction to multiply-adds, alignment faults, grid-wide barriers. ASAN
// sees global and dynamic shared memory, but no `__shared__` array.
#pragma once

#ifdef LOPT_HD
#error "rule/maths.h came before cuda_on_cpu.h: its estimates would not be as wrong as they may be"
#endif
#define LOPT_ESTIMATES

#if !defined(__x86_64__) && !defined(LOPT_SIM_UCONTEXT)
#define LOPT_SIM_UCONTEXT  // the portable, slower context switch
#endif
#ifdef LOPT_SIM_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/threads.h"
#include "sim/tensor_cores.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// The two constructs that cannot be spelled as in nvcc's C++; launch.cuh holds the other spelling. `name` is for messages.
#define LOPT_LAUNCH(name, kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::lopt::sim::launch(name, kernel, grid, block, shared_bytes, __VA_ARGS__))
#define LOPT_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::lopt::sim::block->shared.get())

namespace lopt::sim {

inline bool reverse_order = false;
inline std::atomic<int64_t> launches{0};     // kernels run so far
inline thread_local int current_device = 0;  // of which there are as many as one likes, all alike
inline std::atomic<int> launched_on{0};      // where the last kernel ran

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- Context switch ------------------------------------------------------------------------------------------------

#ifdef LOPT_SIM_UCONTEXT
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#else
using Context = void*;  // the stack pointer; the six callee-saved registers lie above it
extern "C" void lopt_sim_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .weak lopt_sim_switch
  .hidden lopt_sim_switch
  .type lopt_sim_switch, @function
lopt_sim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
  .size lopt_sim_switch, . - lopt_sim_switch
  .popsection
)");
inline void switch_context(Context& from, Context& to) { lopt_sim_switch(&from, to); }
inline void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  std::fill(top - 8, top, nullptr);          // six registers, `entry`, and the end of the call chain
  top[-2] = reinterpret_cast<void*>(entry);  // where `ret` goes, with the stack aligned as after a call
  context = top - 8;
}
#endif

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_unpoison_memory_region(const void*, size_t) {}
#endif

// ---- Fibers, blocks, grids -------------------------------------------------------------------------------------------

enum class State { ready, exited, barrier, syncwarp, shuffle, any, collective };  // from `barrier` on, it waits there
inline const char* const kStateNames[] = {"ready",     "exited",     "__syncthreads",           "__syncwarp",
                                          "a shuffle", "__any_sync", "an operation of its warp"};
using Collective = void(void* const* operands);  // computes for all 32 lanes at once

struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { return {f, l}; }
};

struct Fiber {
  Context context{};
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;  // ASAN's
  dim3 thread;
  State state = State::ready;
  Place place{};      // where it waits
  unsigned mask = 0;  // what it brings to a warp operation: mask, source lane, value
  int source = 0;
  uint64_t value = 0, result = 0;

  bool meets(const Fiber& other) const {
    return state == other.state && place.line == other.place.line && place.file == other.place.file;
  }
  std::string describe() const {
    const std::string name = kStateNames[int(state)];
    if (state < State::barrier) return name;
    const char* slash = std::strrchr(place.file, '/');
    return name + " (" + (slash ? slash + 1 : place.file) + ":" + std::to_string(place.line) + ")";
  }
};

inline std::string to_string(dim3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

struct Block {  // one per OS thread, used for one CUDA block after the other
  std::vector<Fiber> fibers;
  int threads = 0, current = 0;
  Context scheduler{};
  void* fake_stack = nullptr;  // of the scheduler, for ASAN, and where its stack lies
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  std::unique_ptr<char[]> shared;  // dynamic shared memory, of exactly the size asked for
  const std::function<void()>* body = nullptr;
  std::string error;

  void enter(int i) {  // scheduler -> fiber
    current = i;
    threadIdx = fibers[i].thread;
    __sanitizer_start_switch_fiber(&fake_stack, fibers[i].stack.get(), kStackBytes);
    switch_context(scheduler, fibers[i].context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }
  void leave(bool forever = false) {  // fiber -> scheduler
    Fiber& fiber = fibers[current];
    __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, stack_bottom, stack_bytes);
    switch_context(fiber.context, scheduler);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack_bottom, &stack_bytes);
  }
  // No destructor runs on the stack that is left for good: the message owns nothing.
  [[noreturn]] void fail(const char* before, int lane, const char* after) {
    const Fiber& fiber = fibers[current];
    error =
        "thread " + to_string(fiber.thread) + " at " + fiber.describe() + ": " + before + std::to_string(lane) + after;
    for (;;) leave(true);
  }
  std::string run();
  uint64_t wait(State, Place, unsigned mask, int source, uint64_t value, Collective* compute = nullptr);
};
inline thread_local Block* block = nullptr;

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &block->stack_bottom, &block->stack_bytes);
  (*block->body)();
  block->fibers[block->current].state = State::exited;
  block->leave(true);
}

// Runs the threads of one block to their end; returns what went wrong, or nothing.
inline std::string Block::run() {
  error.clear();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    const unsigned row = unsigned(i) / blockDim.x;
    fiber.thread = dim3(unsigned(i) % blockDim.x, row % blockDim.y, row / blockDim.y);
    fiber.state = State::ready;
    __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
    start_context(fiber.context, fiber.stack.get(), kStackBytes, fiber_main);
  }
  const int warps = (threads + warpSize - 1) / warpSize;
  for (;;) {
    // One warp after the other, each as far as it can go: what a missing barrier does not survive.
    for (int w = 0; w < warps; ++w) {
      const int begin = (reverse_order ? warps - 1 - w : w) * warpSize, end = std::min(begin + warpSize, threads);
      for (bool progress = true; progress;) {
        progress = false;
        for (int n = begin; n < end; ++n) {
          const int i = reverse_order ? begin + end - 1 - n : n;
          if (fibers[i].state != State::ready) continue;
          progress = true;
          enter(i);
          if (!error.empty()) return error;
        }
      }
    }
    const Fiber* first = nullptr;  // of the living
    bool together = true;          // do they all wait at one __syncthreads
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].state == State::exited) continue;
      if (!first) first = &fibers[i];
      together &= fibers[i].state == State::barrier && fibers[i].meets(*first);
    }
    if (!first) return {};
    if (!together) {
      std::map<std::string, int> places;
      for (int i = 0; i < threads; ++i) ++places[fibers[i].describe()];
      std::string text = "deadlock, threads wait at different places";
      for (const auto& [place, count] : places) text += "; " + std::to_string(count) + " " + place;
      return text;
    }
    for (int i = 0; i < threads; ++i)
      if (fibers[i].state == State::barrier) fibers[i].state = State::ready;
  }
}

// The current thread waits at a barrier or a warp operation. The lane that comes last serves all lanes of its mask.
inline uint64_t Block::wait(State state, Place place, unsigned mask, int source, uint64_t value, Collective* compute) {
  Fiber& self = fibers[current];
  const int lane = current % warpSize;
  Fiber* const lanes = &fibers[current - lane];
  self.state = state, self.place = place, self.mask = mask, self.source = source, self.value = value;
  bool complete = state != State::barrier;
  if (complete && !(mask >> lane & 1)) fail("lane ", lane, " is not in its own mask");
  if (state == State::shuffle && !(mask >> source & 1)) fail("reads lane ", source, ", which is not in the mask");
  for (int i = 0; complete && i < warpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    if (current - lane + i >= threads) fail("the mask names lane ", i, ", which is beyond the block");
    if (lanes[i].state == State::exited) fail("the mask names lane ", i, ", which has exited");
    complete = lanes[i].meets(self) && lanes[i].mask == mask;
  }
  if (!complete) {
    leave();
    return self.result;
  }
  uint64_t any = 0;
  void* operands[warpSize];
  for (int i = 0; i < warpSize; ++i) {
    if (mask >> i & 1) any |= lanes[i].value;
    operands[i] = reinterpret_cast<void*>(lanes[i].value);
  }
  if (state == State::collective) compute(operands);
  for (int i = 0; i < warpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    lanes[i].result = state == State::any ? any : lanes[lanes[i].source].value;
    lanes[i].state = State::ready;
  }
  return self.result;
}

// Calls kernel(args...) for every thread of the grid. Throws std::runtime_error on what CUDA refuses or leaves undefined.
template <class Kernel, class... Args>
void launch(const char* name, Kernel* kernel, dim3 grid, dim3 block_dim, size_t shared_bytes, const Args&... args) {
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const int64_t threads = int64_t{block_dim.x} * block_dim.y * block_dim.z;
  const std::string where = std::string("kernel ") + name + ", ";
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads < 1 || threads > 1024)
    throw std::runtime_error(where + "invalid launch: grid " + to_string(grid) + ", block " + to_string(block_dim));
  ++launches;
  launched_on = current_device;
  const std::function<void()> body = [&] { kernel(args...); };
  std::atomic<bool> failed{false};
  std::string error;
#pragma omp parallel num_threads(lopt::threads_for(omp_get_max_threads(), blocks, 1))
  {
    static thread_local Block mine;
    block = &mine;
    mine.body = &body;
    mine.threads = int(threads);
    if (mine.fibers.size() < size_t(threads)) mine.fibers.resize(size_t(threads));
    mine.shared.reset(new char[shared_bytes]);
    blockDim = block_dim, gridDim = grid;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < blocks; ++n) {
      if (failed) continue;
      const int64_t i = reverse_order ? blocks - 1 - n : n, row = i / grid.x;
      blockIdx = dim3(unsigned(i % grid.x), unsigned(row % grid.y), unsigned(row / grid.y));
      std::memset(mine.shared.get(), 0xff, shared_bytes);  // NaN: as good as uninitialised
      const std::string message = mine.run();
      if (!message.empty() && !failed.exchange(true)) error = where + "block " + to_string(blockIdx) + ": " + message;
    }
  }
  if (failed) throw std::runtime_error(error);
}

// ---- Device functions ------------------------------------------------------------------------------------------------

inline void __syncthreads(Place place = Place::here()) { block->wait(State::barrier, place, 0, 0, 0); }
inline void __syncwarp(unsigned mask = ~0u, Place place = Place::here()) {
  block->wait(State::syncwarp, place, mask, 0, 0);
}
inline int __any_sync(unsigned mask, int predicate, Place place = Place::here()) {
  return int(block->wait(State::any, place, mask, 0, predicate != 0));
}
// What one PTX instruction does for a whole warp: `compute` sees the operands of all lanes.
inline void warp_collective(void* operand, Collective* compute, Place place = Place::here()) {
  block->wait(State::collective, place, ~0u, 0, reinterpret_cast<uint64_t>(operand), compute);
}

inline int lane_id() { return block->current % warpSize; }

template <class T>
T shuffle(unsigned mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = block->wait(State::shuffle, place, mask, source, bits);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// A lane whose source lies outside its segment of `width` lanes gets its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, Place place = Place::here()) {
  const int lane = lane_id(), source = lane ^ bits;
  return shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, place);
}

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, std::common_type_t<T> value) {
  *address = value;
}

// ---- The runtime calls of launch.cuh ---------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 227 << 10, cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->sharedSizeBytes = 8 << 10, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }

}  // namespace lopt::sim

namespace lopt {
using namespace sim;  // device code lives in namespace lopt
}
