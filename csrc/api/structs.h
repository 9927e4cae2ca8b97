// The structs that Python builds: one list of fields for each. FIELD(type, name) declares a member here; in contracts.cpp
// the same list tells Python every name, format and offset, from which lopt/kernels/structs.py makes its NumPy dtypes. So
// a field is added, moved or renamed in one place, and Python that does not know it fails at import.
#pragma once

#include <cstdint>

#include "rule/maths.h"

namespace lopt {

constexpr int kMaxDecays = 8;
using Decays = float[kMaxDecays];

// A state is never float16, and nothing else is in 8 bits (codes.h).
enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

LOPT_HD constexpr int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2; }

// Of the directions of matrices.
LOPT_HD constexpr int32_t direction_dtype(int32_t state) { return state == kFloat32 ? kFloat32 : kBFloat16; }

// Of the small MLP in the CUDA kernels: plain float; on tensor cores, as exact as float32 but for two bits; on tensor cores
// with 11 bits.
enum Precision : int32_t { kExact = 0, kHigh = 1, kFast = 2 };

#define LOPT_MEMBER(Type, name) Type name;

// Rows: tables over tensors have a row for each of the R tensors that an optimizer has; a step works on those T of them
// that have a gradient, and TensorEntry::row says which they are.

// One row of the tensor table. Accumulators are planes of `stride` elements, in row-major order of the parameter.
#define LOPT_TENSOR_ENTRY(FIELD)                                                                             \
  FIELD(int64_t, param)       /* address of [numel] values of param_dtype, read and written */               \
  FIELD(int64_t, mom)         /* address of [num_mom, stride] values of the state's dtype */                 \
  FIELD(int64_t, rms)         /* address of [num_rms, stride] */                                             \
  FIELD(int64_t, scales)      /* of an 8-bit state: address of [num_mom + num_rms, blocks] bytes, codes.h */ \
  FIELD(int64_t, numel)       /* > 0 */                                                                      \
  FIELD(int64_t, stride)      /* elements between accumulator planes, >= numel */                            \
  FIELD(int64_t, first_chunk) /* this tensor's first row in the chunk table; its chunks follow in order */   \
  FIELD(int64_t, theta)       /* row of ApplyParams::weights */                                              \
  FIELD(int64_t, direction)   /* address of [numel] values of direction_dtype where apply writes the */      \
                              /* direction where the gate is open, or 0 */                                   \
  FIELD(int64_t, matrix_rows) /* of a tensor with a direction; 0: it is a part, orthogonalised elsewhere */  \
  FIELD(int64_t, turned)      /* whether its columns belong to one output each, not its rows */              \
  FIELD(int64_t, row)         /* of all tables [R, ...] below */                                             \
  FIELD(int64_t, offset)      /* of a part of a tensor: elements of the whole before it, for rounding.h */   \
  FIELD(int32_t, param_dtype) /* enum Dtype */                                                               \
  FIELD(int32_t, grad_dtype)  /* enum Dtype */
struct TensorEntry {
  LOPT_TENSOR_ENTRY(LOPT_MEMBER)
};

#define LOPT_CHUNK(FIELD)                          \
  FIELD(int64_t, tensor) /* of the tensor table */ \
  FIELD(int64_t, begin)  /* first parameter; the chunk ends at min(begin + kChunk, numel) */
struct Chunk {
  LOPT_CHUNK(LOPT_MEMBER)
};

// What the tensor level writes for the per-parameter rule, in its place in AdvanceParams, and apply reads, in ApplyParams:
// begin writes clip_limit, advance the rest. Python makes the memory by the widths in lopt/kernels/structs.py.
#define LOPT_APPLY_INPUTS(FIELD)                                                                               \
  FIELD(float*, clip_limit) /* [R] gradients are clamped to +-limit, as in accumulate */                       \
  FIELD(float*, scale)      /* [R, columns] */                                                                 \
  FIELD(float*, shift)      /* [R, columns] */                                                                 \
  FIELD(float*, bias)       /* [R, width] first-layer bias with everything constant in the tensor folded in */ \
  FIELD(float*, step_size)  /* [R] lr * step multiplier */                                                     \
  FIELD(float*, keep)       /* [R] what is left of the parameter after weight decay */                         \
  FIELD(float*, gate)       /* [R] in [0, 1], from the elementwise to the orthogonal direction */
struct ApplyInputs {
  LOPT_APPLY_INPUTS(LOPT_MEMBER)
};

// Those that Params, which has the same fields, points to.
template <class Params>
LOPT_HD ApplyInputs inputs_of(const Params& params) {
#define LOPT_FIELD_OF(Type, name) params.name,
  return {LOPT_APPLY_INPUTS(LOPT_FIELD_OF)};
#undef LOPT_FIELD_OF
}

#define LOPT_ACCUMULATE_PARAMS(FIELD)                                                                            \
  FIELD(const TensorEntry*, tensors) /* [T] */                                                                   \
  FIELD(const int64_t*, grads)       /* [T] addresses of [numel] values of grad_dtype */                         \
  FIELD(const Chunk*, chunks)        /* [num_chunks] */                                                          \
  FIELD(int64_t, num_tensors)        /* T */                                                                     \
  FIELD(int64_t, num_chunks)                                                                                     \
  FIELD(const float*, clip_limit) /* [R] gradients are clamped to +-limit */                                     \
  FIELD(Decays, mom_decay)                                                                                       \
  FIELD(Decays, rms_decay)                                                                                       \
  FIELD(const int64_t*, step) /* [1] steps so far, and */                                                        \
  FIELD(int64_t, seed)        /* a number: they choose the random bits that round a narrow state (rounding.h) */ \
  FIELD(Dtype, state_dtype)   /* of mom and rms */                                                               \
  FIELD(double*, partials)    /* [num_chunks * S] scratch */                                                     \
  FIELD(uint32_t*, finished)  /* [T] scratch of the CUDA kernel: zero before and after */                        \
  FIELD(float*, stats)        /* [R, S] written; see Stat */
struct AccumulateParams {
  LOPT_ACCUMULATE_PARAMS(LOPT_MEMBER)
};

#define LOPT_APPLY_PARAMS(FIELD)                                                            \
  FIELD(const TensorEntry*, tensors) /* [T] */                                              \
  FIELD(const int64_t*, grads)       /* [T] */                                              \
  FIELD(const Chunk*, chunks)        /* [num_chunks] */                                     \
  FIELD(int64_t, num_tensors)        /* T */                                                \
  FIELD(int64_t, num_chunks)                                                                \
  LOPT_APPLY_INPUTS(FIELD)                                                                  \
  FIELD(const float*, weights) /* [num_theta, MlpLayout::kSize] */                          \
  FIELD(float, magnitude_rate)                                                              \
  FIELD(float, feature_clip)    /* +inf: no clipping */                                     \
  FIELD(Precision, precision)   /* of the CUDA kernels; the CPU's are exact */              \
  FIELD(Dtype, state_dtype)     /* of mom and rms */                                        \
  FIELD(double*, partials)      /* [num_chunks * width] scratch */                          \
  FIELD(uint32_t*, finished)    /* [T] scratch of the CUDA kernel: zero before and after */ \
  FIELD(int32_t, newton_schulz) /* iterations; 0: no tensor has a direction */              \
  FIELD(float*, rank)           /* [R] written by the direction stage */                    \
  FIELD(float*, hidden)         /* [R, width] written: mean of hidden2 over the tensor */
struct ApplyParams {
  LOPT_APPLY_PARAMS(LOPT_MEMBER)
};

// ThetaSpec (lopt/rule/spec.py) as plain numbers.
#define LOPT_SPEC(FIELD)                                                                           \
  FIELD(int32_t, feature_set)                                                                      \
  FIELD(int32_t, width)                                                                            \
  FIELD(int32_t, mlp_layers) /* hidden ones */                                                     \
  FIELD(int32_t, lstm_width)                                                                       \
  FIELD(int32_t, from_mlp)                                                                         \
  FIELD(int32_t, lstm_to_mlp)                                                                      \
  FIELD(int32_t, from_lstm)                                                                        \
  FIELD(int32_t, linear_skip)                                                                      \
  FIELD(int32_t, step_control)                                                                     \
  FIELD(int32_t, tensor_inputs)                                                                    \
  FIELD(int32_t, newton_schulz)                                                                    \
  FIELD(int32_t, lagged) /* a step sees the statistics of the step before */                       \
  FIELD(int32_t, horizon_input)                                                                    \
  FIELD(int32_t, valid_advances_step)                                                              \
  FIELD(double, train_loss_decay) /* of these three 1 - decay is formed in double, as in Python */ \
  FIELD(double, valid_loss_decay)                                                                  \
  FIELD(double, clip_decay)                                                                        \
  FIELD(float, step_multiplier)                                                                    \
  FIELD(float, magnitude_rate)                                                                     \
  FIELD(float, time_limit)                                                                         \
  FIELD(float, clip_multiplier)                                                                    \
  FIELD(float, feature_clip) /* +inf: none */                                                      \
  FIELD(Decays, mom_decay)                                                                         \
  FIELD(Decays, rms_decay)
struct Spec {
  LOPT_SPEC(LOPT_MEMBER)

  // Defined in rule/inputs.h.
  LOPT_HD int num_time() const;
  LOPT_HD int num_facts() const;
  LOPT_HD int num_constant() const;
  LOPT_HD int num_lstm_input() const;
};

// Facts about one tensor that never change.
using LogDims = float[4];
#define LOPT_TENSOR_SHAPE(FIELD)                                \
  FIELD(int64_t, numel)                                         \
  FIELD(LogDims, log_dims)  /* ln(dim) - 1, padded with ones */ \
  FIELD(int32_t, is_scalar) /* rank 0 */                        \
  FIELD(int32_t, is_matrix) /* rank >= 2 */                     \
  FIELD(int64_t, rows)      /* of a matrix, as stored */        \
  FIELD(int32_t, is_input)  /* see lopt/rule/matrices.py */     \
  FIELD(int32_t, is_output)                                     \
  FIELD(int32_t, is_table)                                      \
  FIELD(int32_t, whole)                                         \
  FIELD(int32_t, turned)                                        \
  FIELD(float, natural)                                         \
  FIELD(float, aspect)
struct TensorShape {
  LOPT_TENSOR_SHAPE(LOPT_MEMBER)
};

// Addresses and numbers of begin, advance and finish for one list of tensors; arrays over the tensors are row-major.
// `spec` lies in host memory, everything else on the device of the tensors. With T = 0, begin only takes the losses.
#define LOPT_ADVANCE_PARAMS(FIELD)                                                                                    \
  FIELD(const Spec*, spec)                                                                                            \
  FIELD(const float*, theta)        /* [P] flat */                                                                    \
  FIELD(const TensorShape*, shapes) /* [R] */                                                                         \
  FIELD(const int64_t*, rows)       /* [T] those that take part in this step, ascending */                            \
  FIELD(int64_t, num_tensors)       /* T */                                                                           \
  /* Global state, read and written (lopt.rule.tensor_lstm.Globals). */                                               \
  FIELD(int64_t*, step)                                                                                               \
  FIELD(float*, train_loss)   /* [LossState::kCount], see rule/losses.h */                                            \
  FIELD(float*, valid_loss)   /* [LossState::kCount] */                                                               \
  FIELD(float*, clip)         /* [2] count, running root mean square of gradients */                                  \
  FIELD(float*, from_lstm)    /* [from_lstm] */                                                                       \
  FIELD(float*, pending_loss) /* [2] sum and number of losses observed since the last step; zero afterwards */        \
  FIELD(int64_t*, nonfinite)  /* [2] of all steps: gradient elements, tensors that rested for their parameters */     \
  /* State of every tensor, read and written (lopt.rule.tensor_lstm.Rows). */                                         \
  FIELD(float*, h)             /* [R, lstm_width] */                                                                  \
  FIELD(float*, c)             /* [R, lstm_width] */                                                                  \
  FIELD(float*, feedback)      /* [R, from_mlp], written by finish */                                                 \
  FIELD(float*, initial_scale) /* [R], 0 before the first step */                                                     \
  FIELD(float*, updates)       /* [R] */                                                                              \
  FIELD(float*, rank)          /* [R] of the last orthogonalised direction, written by the direction stage */         \
  /* Inputs. */                                                                                                       \
  FIELD(const float*, stats)       /* [R, S] */                                                                       \
  FIELD(const float*, lr)          /* [R] */                                                                          \
  FIELD(const float*, decay)       /* [R] weight decay */                                                             \
  FIELD(const float*, total_steps) /* [1] 0: unknown */                                                               \
  FIELD(const float*, hidden)      /* [R, width] from apply, read by finish */                                        \
  FIELD(const float*, new_train)   /* [1] a training loss for begin, or null: then it is train_value, NaN for none */ \
  FIELD(const float*, new_valid)   /* [1] a validation loss, likewise */                                              \
  FIELD(float, train_value)                                                                                           \
  FIELD(float, valid_value)                                                                                           \
  /* Written: by begin for accumulate and apply, by advance for apply. */                                             \
  LOPT_APPLY_INPUTS(FIELD)                                                                                            \
  /* Scratch of the CUDA kernel. */                                                                                   \
  FIELD(float*, to_lstm)     /* [R, from_lstm] */                                                                     \
  FIELD(uint32_t*, finished) /* [1] zero before and after */
struct AdvanceParams {
  LOPT_ADVANCE_PARAMS(LOPT_MEMBER)
};

}  // namespace lopt
