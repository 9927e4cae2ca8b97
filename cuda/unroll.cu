// The unroll engine on the GPU: one block per inner run, as long as the window (unroll_block.cuh). One launch continues all runs.
//
// A block may take all of a multiprocessor's shared memory, 227 KB on sm_90; what does not fit is in global memory.
#include <algorithm>
#include <string>
#include <vector>

#include "unroll_block.cuh"

#ifndef __CUDACC__
#define __grid_constant__
#endif

namespace lopt {
namespace LOPT_ISA {
namespace {

// Bytes that T takes, in whole quads of floats.
template <class T>
LOPT_BOTH int64_t bytes_of(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

// Where layers lie, behind the engine, and behind them the floats that BlockArena hands out.
template <class Engine>
LOPT_BOTH int64_t fixed_bytes(const Problem& problem) {
  return bytes_of<Engine>(1) + bytes_of<Layer>(problem.num_layers);
}

// What a run or a gradient takes beside the engine's own bytes.
struct Need {
  int64_t shared_bytes = 0, scratch = 0;

  void include(int64_t bytes, const BlockArena& arena) {
    shared_bytes = std::max(shared_bytes, bytes + arena.used_shared * int64_t{sizeof(float)});
    scratch = std::max(scratch, arena.used_global);
  }
};

// A network alone.
struct GradientEngine {
  Network<BlockTeam> model;

  LOPT_BOTH GradientEngine(const Problem& problem, Layer* layers, BlockArena& arena)
      : model(BlockTeam{}, problem, layers, arena) {}
};

// A spec of any run, and what it is told of memory.
struct Memory {
  int64_t shared_bytes;
  float* scratch;
  int64_t scratch_stride;
};

template <class Engine>
__device__ __forceinline__ BlockArena arena_of(const Problem& problem, char* memory, const Memory& given) {
  const int64_t fixed = fixed_bytes<Engine>(problem);
  return {reinterpret_cast<float*>(memory + fixed), given.scratch + blockIdx.x * given.scratch_stride,
          (given.shared_bytes - fixed) / int64_t{sizeof(float)}};
}

// Engine(args..., layers, arena) in the memory of the block, by one thread.
template <class Engine, class... Args>
LOPT_CALLED void make_engine(const Problem& problem, char* memory, const Memory& given, const Args&... args) {
  BlockArena arena = arena_of<Engine>(problem, memory, given);
  new (memory) Engine(args..., reinterpret_cast<Layer*>(memory + bytes_of<Engine>(1)), arena);
}

template <class Features, int kWidth>
__global__ void __launch_bounds__(kTeamThreads, 2)
    unroll_kernel(const __grid_constant__ Spec s, const __grid_constant__ Memory given, const Problem* problems,
                  const Run* runs, const float* theta, int64_t theta_stride) {
  using Engine = BlockEngine<Features, kWidth>;
  LOPT_DYNAMIC_SHARED(char, memory);
  Engine& engine = *reinterpret_cast<Engine*>(memory);
  const Run& run = runs[blockIdx.x];
  const Problem& problem = problems[run.problem];
  if (threadIdx.x == 0)
    make_engine<Engine>(problem, memory, given, s, problem, theta_stride, reinterpret_cast<float*>(run.state));
  __syncthreads();
  engine.run(run, theta + run.theta * theta_stride, theta_stride);
}

__global__ void __launch_bounds__(kTeamThreads, 2)
    gradient_kernel(const __grid_constant__ Memory given, const Problem* problem, Split split, uint64_t key,
                    int64_t step, const float* param, float* loss, float* grad) {
  LOPT_DYNAMIC_SHARED(char, memory);
  GradientEngine& engine = *reinterpret_cast<GradientEngine*>(memory);
  if (threadIdx.x == 0) make_engine<GradientEngine>(*problem, memory, given, *problem);
  __syncthreads();
  engine.model.gather(split, key, step);
  const float value = engine.model.forward(param);
  if (threadIdx.x == 0) *loss = value;
  engine.model.backward(param, grad);
}

// Numbers of floats are ints on the GPU.
void check_sizes(const Problem& problem) {
  constexpr int64_t kMost = int64_t{1} << 28;
  int64_t places = problem.places, width = problem.inputs;
  for (int64_t l = 0; l < problem.num_layers; ++l) {
    const int64_t out = problem.outputs[l],
                  most = std::max({problem.batch * places * width, problem.batch * places * out, 9 * width * out});
    if (most > kMost)
      throw std::runtime_error("unroll: layer " + std::to_string(l) + " has " + std::to_string(most) +
                               " numbers, expected at most 2^28; use the engine of the CPU");
    width = out;
  }
}

// The shared memory that a block of the kernel may have beside the kernel's own.
template <class Kernel>
int64_t most_shared_bytes(Kernel* kernel, int device) {
  int most = 0;
  cudaFuncAttributes own{};
  LOPT_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  LOPT_CUDA_CHECK(cudaFuncGetAttributes(&own, reinterpret_cast<const void*>(kernel)));
  return (most - static_cast<int64_t>(own.sharedSizeBytes)) / 16 * 16;
}

template <class Kernel>
void allow_shared_bytes(Kernel* kernel, int64_t bytes) {
  LOPT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

template <class Features, int kWidth>
Need need_of_run(const Spec& s, const Problem& problem, int64_t theta_floats, int64_t most_bytes) {
  using Engine = BlockEngine<Features, kWidth>;
  check_sizes(problem);
  std::vector<Layer> layers(static_cast<size_t>(problem.num_layers));
  const int64_t fixed = fixed_bytes<Engine>(problem);
  if (fixed > most_bytes)
    throw std::runtime_error("unroll: a network of " + std::to_string(problem.num_layers) + " layers takes " +
                             std::to_string(fixed) + " bytes of shared memory, expected at most " +
                             std::to_string(most_bytes) + "; use the engine of the CPU");
  BlockArena arena{nullptr, nullptr, (most_bytes - fixed) / int64_t{sizeof(float)}};
  Engine(s, problem, theta_floats, nullptr, layers.data(), arena);
  Need need;
  need.include(fixed, arena);
  return need;
}

Need need_of_gradient(const Problem& problem, int64_t most_bytes) {
  check_sizes(problem);
  std::vector<Layer> layers(static_cast<size_t>(problem.num_layers));
  const int64_t fixed = fixed_bytes<GradientEngine>(problem);
  BlockArena arena{nullptr, nullptr, (most_bytes - fixed) / int64_t{sizeof(float)}};
  GradientEngine(problem, layers.data(), arena);
  Need need;
  need.include(fixed, arena);
  return need;
}

// Floats of theta.
template <class Features>
int64_t theta_floats(const Spec& s) {
  return ThetaView(s, Features::kNumColumns, nullptr).size;
}

int64_t scratch(const Spec* spec, const Problem* problems, int64_t num_problems, const Target& target) {
  const DeviceGuard guard(target.device);
  int64_t most = 0;
  if (!spec) {
    const int64_t bytes = most_shared_bytes(gradient_kernel, target.device);
    for (int64_t i = 0; i < num_problems; ++i) most = std::max(most, need_of_gradient(problems[i], bytes).scratch);
    return most;
  }
  const bool compiled = with_kernel(spec->feature_set, spec->width, [&](auto features, auto width) {
    using Features = decltype(features);
    constexpr int kWidth = decltype(width)::value;
    const int64_t bytes = most_shared_bytes(unroll_kernel<Features, kWidth>, target.device);
    for (int64_t i = 0; i < num_problems; ++i)
      most = std::max(most,
                      need_of_run<Features, kWidth>(*spec, problems[i], theta_floats<Features>(*spec), bytes).scratch);
  });
  return compiled ? most : -1;
}

bool unroll(const UnrollCall& call, const Target& target) {
  if (call.num_runs == 0) return true;
  const DeviceGuard guard(target.device);
  return with_kernel(call.spec.feature_set, call.spec.width, [&](auto features, auto width) {
    using Features = decltype(features);
    constexpr int kWidth = decltype(width)::value;
    auto* const kernel = unroll_kernel<Features, kWidth>;
    const int64_t most = most_shared_bytes(kernel, target.device);
    Need need;
    std::vector<bool> seen;
    for (int64_t i = 0; i < call.num_runs; ++i) {
      const size_t p = static_cast<size_t>(call.host_runs[i].problem);
      if (seen.size() <= p) seen.resize(p + 1);
      if (seen[p]) continue;
      seen[p] = true;
      const Need one = need_of_run<Features, kWidth>(call.spec, call.host_problems[p], call.theta_stride, most);
      need.shared_bytes = std::max(need.shared_bytes, one.shared_bytes);
      need.scratch = std::max(need.scratch, one.scratch);
    }
    if (need.scratch > call.scratch_stride)
      throw std::runtime_error("unroll: expected " + std::to_string(need.scratch) +
                               " floats of scratch for a run, got " + std::to_string(call.scratch_stride));
    // Where something is left over, blocks take all that they may: runs of smaller problems decide alike, whatever the company.
    const int64_t bytes = need.scratch > 0 ? most : need.shared_bytes;
    allow_shared_bytes(kernel, bytes);
    LOPT_LAUNCH("unroll", kernel, static_cast<unsigned>(call.num_runs), kTeamThreads, static_cast<size_t>(bytes),
                reinterpret_cast<cudaStream_t>(target.stream), call.spec,
                (Memory{bytes, call.scratch, call.scratch_stride}), call.problems, call.runs, call.theta,
                call.theta_stride);
    LOPT_CUDA_CHECK(cudaGetLastError());
  });
}

void loss_and_gradient(const GradientCall& call, const Target& target) {
  const DeviceGuard guard(target.device);
  const Need need = need_of_gradient(call.host_problem, most_shared_bytes(gradient_kernel, target.device));
  allow_shared_bytes(gradient_kernel, need.shared_bytes);
  LOPT_LAUNCH("gradient", gradient_kernel, 1u, kTeamThreads, static_cast<size_t>(need.shared_bytes),
              reinterpret_cast<cudaStream_t>(target.stream), (Memory{need.shared_bytes, call.scratch, 0}), call.problem,
              static_cast<Split>(call.split), call.key, call.step, call.param, call.loss, call.grad);
  LOPT_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace LOPT_ISA

const UnrollEngine& cuda_engine() {
  static constexpr UnrollEngine engine{LOPT_ISA::scratch, LOPT_ISA::unroll, LOPT_ISA::loss_and_gradient};
  return engine;
}

}  // namespace lopt
