// The contract between Python and the kernels: tables and parameter structs. No torch, no CUDA header.
//
// Two operations, each one call for all tensors:
//   accumulate  clip gradients, update mom and rms, reduce per-tensor statistics          -> stats [T, S]
//   apply       features -> small MLP -> write parameters, reduce the last hidden layer   -> hidden [T, width]
// or both in one sweep, for operands of apply that do not depend on this step's statistics.
#pragma once

#include <cstdint>

#include "rule/features.h"
#include "rule/mlp.h"
#include "rule/rounding.h"
#include "rule/stats.h"

namespace lopt {

constexpr int kMaxDecays = 8;
constexpr int64_t kChunk = 8192;  // parameters per chunk: the unit of parallel work and of the first reduction level

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// Of the small MLP in the CUDA kernels: plain float; on tensor cores, as exact as float32 but for two bits; on tensor cores
// with 11 bits.
enum Precision : int32_t { kExact = 0, kHigh = 1, kFast = 2 };

// One row of the tensor table. Accumulators are planes of `stride` elements, in row-major order of the parameter.
struct TensorEntry {
  int64_t param;        // address of [numel] values of param_dtype, read and written
  int64_t mom;          // address of [num_mom, stride] values of the state's dtype
  int64_t rms;          // address of [num_rms, stride]
  int64_t numel;        // > 0
  int64_t stride;       // elements between accumulator planes, >= numel
  int64_t first_chunk;  // this tensor's first row in the chunk table; its chunks follow in order
  int64_t theta;        // row of ApplyParams::weights
  int32_t param_dtype;  // enum Dtype
  int32_t grad_dtype;   // enum Dtype
};
static_assert(sizeof(TensorEntry) == 64, "lopt/kernels builds this table with NumPy");

struct Chunk {
  int64_t tensor;  // row of the tensor table
  int64_t begin;   // first parameter; the chunk ends at min(begin + kChunk, numel)
};

struct AccumulateParams {
  const TensorEntry* tensors;  // [T]
  const int64_t* grads;        // [T] addresses of [numel] values of grad_dtype
  const Chunk* chunks;         // [num_chunks]
  int64_t num_tensors;
  int64_t num_chunks;
  const float* clip_limit;  // [T] gradients are clamped to +-limit
  float mom_decay[kMaxDecays];
  float rms_decay[kMaxDecays];
  const int64_t* step;  // [1] steps so far, and
  int64_t seed;         // a number: they choose the random bits that round a bfloat16 state (rounding.h)
  Dtype state_dtype;    // of mom and rms
  double* partials;     // [num_chunks, S] scratch
  uint32_t* finished;   // [T] scratch of the CUDA kernel: zero before and after
  float* stats;         // [T, S] written; see enum Stat
};

struct ApplyParams {
  const TensorEntry* tensors;  // [T]
  const int64_t* grads;        // [T]
  const Chunk* chunks;         // [num_chunks]
  int64_t num_tensors;
  int64_t num_chunks;
  const float* clip_limit;  // [T] the same limit as in accumulate
  const float* scale;       // [T, columns]
  const float* shift;       // [T, columns]
  const float* bias;        // [T, width] first-layer bias with everything constant in the tensor folded in
  const float* step_size;   // [T] lr * step multiplier
  const float* keep;        // [T] 1 - lr * weight decay
  const float* weights;     // [num_theta, MlpLayout::kSize]
  float magnitude_rate;
  float feature_clip;   // +inf: no clipping
  Precision precision;  // of the CUDA kernels; the CPU's are exact
  Dtype state_dtype;    // of mom and rms
  double* partials;     // [num_chunks, width] scratch
  uint32_t* finished;   // [T] scratch of the CUDA kernel: zero before and after
  float* hidden;        // [T, width] written: mean of hidden2 over the tensor
};

// The formulas one parameter at a time, shared by all kernels.
template <class V>
LOPT_HD V next_accumulator(V value, float decay, V input) {
  return value * decay + input * (1.0f - decay);
}

// step_size: of the tensor, times Features::active.
template <class V>
LOPT_HD V next_param(V param, MlpOutput<V> out, float keep, V step_size, float magnitude_rate) {
  return param * keep - out.direction * exp_of(out.magnitude * magnitude_rate) * step_size;
}

// Calls f(Features{}, integral_constant<int, width>) for a compiled combination.
template <int kValue>
struct IntConstant {
  static constexpr int value = kValue;
};

template <class Function>
bool with_kernel(int feature_set, int width, Function&& f) {
  bool compiled = width == 8 || width == 16 || width == 32;
  return compiled && with_feature_set(feature_set, [&](auto features) {
           if (width == 8) f(features, IntConstant<8>{});
           if (width == 16) f(features, IntConstant<16>{});
           if (width == 32) f(features, IntConstant<32>{});
         });
}

}  // namespace lopt
