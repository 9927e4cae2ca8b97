// The tensor level on the GPU: around accumulate and apply, everything that belongs to a tensor or to all of them; see
// csrc/rule/tensor_lstm.h for the formulas. One launch each:
//   begin    losses given with this step, and the clip limit
//   advance  losses and statistics -> LSTM -> what apply is conditioned on. One block per tensor; the sums over all
//            tensors are so few that every block computes them for itself, and the last block writes the shared state
//   finish   the mean MLP outputs that the next LSTM step sees
// No number is read back to the host. Source: arXiv:2009.11243, appendix C. See Note [Order of reduction].
#include "api/kernels.h"
#include "reduce.cuh"
#include "rule/tensor_lstm.h"

#ifndef __CUDACC__
#define __grid_constant__
#endif

namespace lopt {
namespace {

// See Note [Team] in csrc/rule/tensor_lstm.h.
struct BlockTeam {
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return kRowThreads; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // Each warp adds for itself.
  template <class Value>
  __device__ __forceinline__ float sum(float start, int count, Value value) const {
    return static_cast<float>(start + sum_rows(count, [&](int64_t i) -> double { return value(static_cast<int>(i)); }));
  }

  template <class Value>
  __device__ __forceinline__ double total(int count, Value value) const {
    return sum_rows(count, [&](int64_t i) -> double { return value(static_cast<int>(i)); });
  }
  template <class Value>
  __device__ __forceinline__ float largest(int count, Value value) const {
    float most = 0.0f;
    for (int i = lane_index(); i < count; i += 32) most = ::fmaxf(most, value(i));
    for (int lanes = 16; lanes > 0; lanes /= 2) most = ::fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes));
    return most;
  }

  // A thread per output: neighbours read neighbouring weights, and several loads are under way at once.
  __device__ __forceinline__ void linear(const float* x, int inputs, const float* w, const float* bias, int outputs,
                                         float* out) const {
    for (int j = rank(); j < outputs; j += kRowThreads) {
      float sum = bias[j];
#pragma unroll 16
      for (int i = 0; i < inputs; ++i) sum += x[i] * w[i * outputs + j];
      out[j] = sum;
    }
  }
};

// x [num_lstm_input] and h [lstm_width] lie one after the other in shared memory.
struct BlockLstm {
  BlockTeam team;
  const ThetaView& theta;
  int inputs, hidden;
  float* gates;  // [4 hidden] shared

  __device__ __forceinline__ void operator()(const float* x, float* h, float* c) const {
    team.linear(x, inputs + hidden, theta.lstm_w, theta.lstm_b, 4 * hidden, gates);
    team.sync();
    for (int j = team.rank(); j < hidden; j += kRowThreads)
      h[j] = lstm_unit(gates[j], gates[hidden + j], gates[2 * hidden + j], gates[3 * hidden + j], c[j]);
    team.sync();
  }
};

__global__ void __launch_bounds__(kThreads)
    begin_kernel(const __grid_constant__ Spec s, const __grid_constant__ AdvanceParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const Globals g{p.step, p.train_loss, p.valid_loss, p.clip, p.from_lstm};
  if (i == 0) {
    observe_pending(p.pending_loss, p.new_train ? *p.new_train : p.train_value);
    observe_valid(s, g, p.new_valid ? *p.new_valid : p.valid_value);
  }
  if (i < p.num_tensors) p.clip_limit[p.rows[i]] = clip_limit(s, g);
}

// Two blocks per multiprocessor leave 128 registers: without a bound, some compilers aim at 40 and spill.
template <class Features>
__global__ void __launch_bounds__(kRowThreads, 2)
    advance_kernel(const __grid_constant__ Spec s, const __grid_constant__ AdvanceParams p) {
  constexpr int kStats = kNumStats<Features>;
  __shared__ double rows[kSumFinite][kRowThreads], sums[kNumSums];
  __shared__ uint32_t counts[kNumSums];  // of the sums that are numbers of tensors
  __shared__ float stats[kStats], corrections[Features::kNumMom + Features::kNumRms];
  // The next state, in every block.
  __shared__ float train_loss[LossState::kCount], valid_loss[LossState::kCount], clip[ClipState::kCount];
  __shared__ Shared shared;
  __shared__ ThetaView theta;          // too many pointers for registers
  LOPT_DYNAMIC_SHARED(float, memory);  // [row_floats]
  const BlockTeam team;
  const int tensors = static_cast<int>(p.num_tensors), inputs = s.num_lstm_input(), hidden = s.lstm_width;
  float* const h = memory + inputs;
  float* const gates = h + hidden;
  float* const constant = gates + 4 * hidden;
  const int64_t step = *p.step;
  const Globals g{p.step, train_loss, valid_loss, clip, p.from_lstm};

  // All tensors -> what they share.
  if (threadIdx.x < kNumSums) counts[threadIdx.x] = 0;
  __syncthreads();
  double own[kNumSums] = {};
  for (int i = team.rank(); i < tensors; i += kRowThreads)
    add_to_sums(p.shapes[p.rows[i]], p.stats + p.rows[i] * kStats, own);
#pragma unroll
  for (int i = 0; i < kNumSums; ++i) {
    if (i < kSumFinite) rows[i][threadIdx.x] = own[i];
    if (i >= kSumFinite && own[i] > 0) atomicAdd(counts + i, static_cast<uint32_t>(own[i]));
  }
  time_inputs(team, s, step, *p.total_steps, constant);
  __syncthreads();
  if (threadIdx.x >= kSumFinite && threadIdx.x < kNumSums) sums[threadIdx.x] = counts[threadIdx.x];
  if (warp_index() < kSumFinite) {
    const double sum = sum_rows(kRowThreads, [&](int64_t thread) { return rows[warp_index()][thread]; });
    if (lane_index() == 0) sums[warp_index()] = sum;
  }
  __syncthreads();
  const auto shape_of = [&](int i) -> const TensorShape& { return p.shapes[p.rows[i]]; };
  const auto stats_of = [&](int i) { return p.stats + p.rows[i] * kStats; };
  bool first = false;  // among the block's tensors, which no other block writes
  for (int i = static_cast<int>(blockIdx.x); i < tensors; i += static_cast<int>(gridDim.x))
    first = first || !(p.initial_scale[p.rows[i]] > 0);
  const float mean_scale = first ? typical_scale(team, tensors, shape_of, stats_of, sums) : 0.0f;
  const float mean_square = mean_grad_square(team, s, tensors, stats_of, sums);
  if (threadIdx.x == 0) {
    theta = ThetaView(s, Features::kNumColumns, p.theta);
    for (int i = 0; i < LossState::kCount; ++i) train_loss[i] = p.train_loss[i], valid_loss[i] = p.valid_loss[i];
    for (int i = 0; i < ClipState::kCount; ++i) clip[i] = p.clip[i];
    shared = advance_shared(s, g, sums, mean_square, mean_scale, mean_pending(p.pending_loss));
  }

  // Each tensor.
  TensorLevel level{};
  level.num_tensors = tensors;
  level.shapes = p.shapes;
  level.feedback = p.feedback;
  level.initial_scale = p.initial_scale;
  level.rank = p.rank;
  level.lr = p.lr;
  level.decay = p.decay;
  level.inputs = inputs_of(p);
  level.x = memory;
  level.constant = constant;
  const BlockLstm lstm{team, theta, inputs, hidden, gates};
  for (int index = static_cast<int>(blockIdx.x); index < tensors; index += static_cast<int>(gridDim.x)) {
    const int t = static_cast<int>(p.rows[index]);
    const float updates = p.updates[t] + 1.0f;
    for (int i = team.rank(); i < kStats; i += kRowThreads) stats[i] = p.stats[int64_t{t} * kStats + i];
    for (int j = team.rank(); j < hidden; j += kRowThreads) h[j] = p.h[int64_t{t} * hidden + j];
    bias_corrections<Features>(team, s, updates, corrections);
    __syncthreads();
    advance_row<Features>(team, s, theta, g, shared, level, t, updates, stats, corrections, h,
                          p.c + int64_t{t} * hidden, p.to_lstm + int64_t{t} * s.from_lstm, lstm);
    for (int j = team.rank(); j < hidden; j += kRowThreads) p.h[int64_t{t} * hidden + j] = h[j];
    if (threadIdx.x == 0) p.updates[t] = updates;
    __syncthreads();
  }

  // Tensors -> shared state, once nobody reads the old one.
  if (!last_of_tensor(p.finished, gridDim.x)) return;
  for (int i = warp_index(); i < s.from_lstm; i += kRowThreads / 32) {
    const double sum = sum_rows(tensors, [&](int64_t j) -> double {
      return rests(p.stats + p.rows[j] * kStats) ? 0.0 : p.to_lstm[p.rows[j] * s.from_lstm + i];
    });
    if (lane_index() == 0 && sums[kSumFinite] > 0) p.from_lstm[i] = static_cast<float>(sum / sums[kSumFinite]);
  }
  if (threadIdx.x != 0) return;
  *p.step = step + 1;
  for (int i = 0; i < LossState::kCount; ++i) p.train_loss[i] = train_loss[i];
  for (int i = 0; i < ClipState::kCount; ++i) p.clip[i] = clip[i];
  for (int i = 0; i < PendingLoss::kCount; ++i) p.pending_loss[i] = 0.0f;
  p.nonfinite[0] += static_cast<int64_t>(sums[kSumNonfinite]);
  p.nonfinite[1] += tensors - static_cast<int64_t>(sums[kSumFinite]);
}

template <class Features>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Spec s, const __grid_constant__ AdvanceParams p) {
  const ThetaView theta(s, Features::kNumColumns, p.theta);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;  // of feedback [T, from_mlp]
  if (i >= p.num_tensors * s.from_mlp) return;
  const int64_t t = p.rows[i / s.from_mlp], o = i % s.from_mlp;
  set_feedback(p.step_size[t], feedback_of(s, theta, p.hidden + t * s.width, static_cast<int>(o)),
               p.feedback[t * s.from_mlp + o]);
}

__global__ void __launch_bounds__(kThreads)
    write_words_kernel(const __grid_constant__ Words words, int64_t* to, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = words.value[i];
}

}  // namespace

#if LOPT_WITH_LAUNCHERS
bool begin_cuda(const AdvanceParams& params, const Target& target) {
  const DeviceGuard guard(target.device);
  LOPT_LAUNCH("begin", begin_kernel, blocks_of(params.num_tensors + 1), kThreads, 0,
              reinterpret_cast<cudaStream_t>(target.stream), *params.spec, params);
  LOPT_CUDA_CHECK(cudaGetLastError());
  return true;
}

bool advance_cuda(const AdvanceParams& params, const Target& target) {
  const Spec& s = *params.spec;
  const size_t bytes = row_bytes(s);
  if (params.num_tensors == 0) return true;
  const DeviceGuard guard(target.device);
  return with_feature_set(s.feature_set, [&](auto features) {
    LOPT_LAUNCH("advance", advance_kernel<decltype(features)>, row_blocks(params.num_tensors), kRowThreads, bytes,
                reinterpret_cast<cudaStream_t>(target.stream), s, params);
    LOPT_CUDA_CHECK(cudaGetLastError());
  });
}

bool finish_cuda(const AdvanceParams& params, const Target& target) {
  const Spec& s = *params.spec;
  if (params.num_tensors == 0) return true;
  const DeviceGuard guard(target.device);
  return with_feature_set(s.feature_set, [&](auto features) {
    LOPT_LAUNCH("finish", finish_kernel<decltype(features)>, blocks_of(params.num_tensors * s.from_mlp), kThreads, 0,
                reinterpret_cast<cudaStream_t>(target.stream), s, params);
    LOPT_CUDA_CHECK(cudaGetLastError());
  });
}

void write_words_cuda(int64_t* to, const int64_t* words, int64_t count, const Target& target) {
  const DeviceGuard guard(target.device);
  in_parts(words, count, [&](const Words& part, int64_t first, int size) {
    LOPT_LAUNCH("write_words", write_words_kernel, 1, kThreads, 0, reinterpret_cast<cudaStream_t>(target.stream), part,
                to + first, size);
    LOPT_CUDA_CHECK(cudaGetLastError());
  });
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif

}  // namespace lopt
