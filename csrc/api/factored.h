// Steps of learned optimizers of others (rule/factored.h): the phases that all back ends share, how a tensor lies and where
// its sums are. No torch, no CUDA header.
//
//   measure     gradients, parameters -> sums of squares along and across lines, what an LSTM sees, of each tile
//   begin       of each tensor: what is not finite, what an LSTM sees
//   moments     of each piece: sums of tiles -> the next rows and columns
//   factors     of each tensor: their inverse roots and factors
//   accumulate  mom, rms -> the next ones; sums of squares of every column of the MLP's input, of each tile
//   fold        of each tensor: root mean squares and times -> its own MLP
//   apply       MLP -> parameters, or directions of what is treated as a whole; where Adam steps mom, rms and parameters
//   write       of the latter: directions -> parameters
//
// One pass over gradients and parameters, one over everything that also writes the accumulators, and one that writes
// parameters: 8 + 40 + 28 bytes of each in float32, 12 more where directions are kept. A rule without MLP has measure, begin
// and apply: 16 + 28.
#pragma once

#include <cstdint>
#include <string>

#include "api/backend.h"
#include "rule/factored.h"

namespace lopt {

// ---- What Python builds (structs.h says how) -----------------------------------------------------------------------------

// One row of their tensor table. A tensor of less than two dimensions is one line, and its `along` are the second moments
// themselves, [3, numel].
#define LOPT_FACTORED_TENSOR(FIELD)                                                                    \
  FIELD(int64_t, param)  /* address of [numel] values of param_dtype, read and written */              \
  FIELD(int64_t, mom)    /* address of [num_mom, numel] of state_dtype */                              \
  FIELD(int64_t, rms)    /* address of [num_rms, numel] */                                             \
  FIELD(int64_t, along)  /* address of [3, outer, lines, groups, inner]: means over length */          \
  FIELD(int64_t, across) /* address of [3, outer, groups, length, inner]: means over lines; or 0 */    \
  FIELD(int64_t, numel)  /* > 0 */                                                                     \
  FIELD(int64_t, outer)                                                                                \
  FIELD(int64_t, lines)                                                                                \
  FIELD(int64_t, groups)                                                                               \
  FIELD(int64_t, length)                                                                               \
  FIELD(int64_t, inner)                                                                                \
  FIELD(int64_t, along_is_row) /* whether `along` is Adafactor's row, not its column */                \
  FIELD(int64_t, tile_lines)   /* at most, and */                                                      \
  FIELD(int64_t, tile_width)   /* elements of each line, of a tile */                                  \
  FIELD(int64_t, first_tile)                                                                           \
  FIELD(int64_t, num_tiles)                                                                            \
  FIELD(int64_t, sums)          /* offset in FactoredParams::sums, */                                  \
  FIELD(int64_t, factors)       /* factors, */                                                         \
  FIELD(int64_t, squares)       /* squares, */                                                         \
  FIELD(int64_t, scales)        /* and scales */                                                       \
  FIELD(int64_t, direction)     /* address of [numel] floats, where directions are kept; or 0 */       \
  FIELD(int64_t, row)           /* of all tables [R, ...] below */                                     \
  FIELD(int32_t, adam)          /* whether it is stepped by adam_direction */                          \
  FIELD(int32_t, matrices)      /* 1, or how many of them have scales of their own: element i is in */ \
  FIELD(int32_t, matrix_stride) /* matrix i / matrix_stride % matrices */                              \
  FIELD(int32_t, param_dtype)                                                                          \
  FIELD(int32_t, grad_dtype)
struct FactoredTensor {
  LOPT_FACTORED_TENSOR(LOPT_MEMBER)
};

// A part of a tensor: up to tile_lines lines from `line` on (of one of its `outer`), up to tile_width elements of each from
// `begin` on.
#define LOPT_TILE(FIELD)                           \
  FIELD(int64_t, tensor) /* of the tensor table */ \
  FIELD(int64_t, line)                             \
  FIELD(int64_t, begin)
struct Tile {
  LOPT_TILE(LOPT_MEMBER)
};

// Up to kPiece entries of a tensor's `along` or `across` from `begin` on.
#define LOPT_PIECE(FIELD)  \
  FIELD(int64_t, tensor)   \
  FIELD(int64_t, is_along) \
  FIELD(int64_t, begin)
struct Piece {
  LOPT_PIECE(LOPT_MEMBER)
};

#define LOPT_FACTORED_PARAMS(FIELD)                                                                   \
  FIELD(const FactoredTensor*, tensors) /* [T] */                                                     \
  FIELD(const int64_t*, grads)          /* [T] addresses of [numel] values of grad_dtype */           \
  FIELD(const Tile*, tiles)             /* [num_tiles] */                                             \
  FIELD(const Piece*, pieces)           /* [num_pieces] */                                            \
  FIELD(int64_t, num_tensors)                                                                         \
  FIELD(int64_t, num_tiles)                                                                           \
  FIELD(int64_t, num_pieces)                                                                          \
  FIELD(int32_t, rule)  /* enum FactoredRule */                                                       \
  FIELD(int32_t, width) /* of the MLP */                                                              \
  FIELD(Decays, mom_decay)                                                                            \
  FIELD(Decays, rms_decay)                                                                            \
  FIELD(Decays, factored_decay)                                                                       \
  FIELD(float, magnitude_rate)                                                                        \
  FIELD(int64_t, seed)         /* a number, by which with step, row and element */                    \
  FIELD(Dtype, state_dtype)    /* mom and rms, float32 or bfloat16, are rounded (rounding.h) */       \
  FIELD(const int64_t*, step)  /* [1] steps so far */                                                 \
  FIELD(const float*, weights) /* FactoredMlp, [R, weight_stride], or one row and 0 */                \
  FIELD(int64_t, weight_stride)                                                                       \
  FIELD(const float*, step_size) /* [R] */                                                            \
  FIELD(const float*, keep)      /* [R] what is left of the parameter after weight decay */           \
  FIELD(const float*, controls)  /* [R, AdamControl::kCount] */                                       \
  FIELD(double*, measures)       /* [num_tiles, kMeasures] scratch */                                 \
  FIELD(double*, sums)           /* scratch of squared gradients along and across */                  \
  FIELD(float*, factors)         /* scratch of inverse roots and factors of rows and columns */       \
  FIELD(double*, squares)        /* scratch, of each tile [columns, matrices] */                      \
  FIELD(float*, scales)          /* scratch, of tensors with several matrices [columns, matrices] */  \
  FIELD(float*, own_weights)     /* [R, FactoredMlp::kSize] scratch: MLPs with the columns' scales */ \
  FIELD(float*, stats)           /* [R, kMeasures] written; see Measure */
struct FactoredParams {
  LOPT_FACTORED_PARAMS(LOPT_MEMBER)
};

constexpr int64_t kPiece = 1024;

enum FactoredRule : int32_t { kSmallFC = 0, kVeLO = 1, kMLPLOpt = 2, kNNAdam = 3, kCelo2 = 4, kNumFactoredRules };

// Of a tile sums, of a tensor in `stats`:
//   nonfinite     number of NaN and Inf gradient elements
//   param_square  sum, and mean, of param^2 before the step; NaN where a parameter is not finite: the tensor rests
//   grad_size     where Columns::kSees is the step, sum, and mean, of |grad|
//   mean.., var..  of what Columns::kSees says: mean, and sum of squared deviations from it, and variance
struct Measure {
  LOPT_ENUM(Column, kCount, nonfinite, param_square, grad_size, mean0, mean1, mean2, mean3, var0, var1, var2, var3);
};
constexpr int kSeenThings = 4;

// Calls f(Columns{}, IntConstant<width>{}) for a compiled combination; false for any other.
template <class Function>
bool with_factored(int rule, int width, Function&& f) {
  if (rule == kSmallFC && width == 4) return f(SmallFCColumns{}, IntConstant<4>{}), true;
  if (rule == kSmallFC && width == 32) return f(SmallFCColumns{}, IntConstant<32>{}), true;
  if (rule == kVeLO && width == 4) return f(VeLOColumns{}, IntConstant<4>{}), true;
  if (rule == kMLPLOpt && width == 32) return f(MLPLOptColumns{}, IntConstant<32>{}), true;
  if (rule == kNNAdam && width == 0) return f(NNAdamColumns{}, IntConstant<0>{}), true;
  if (rule == kCelo2 && width == 8) return f(Celo2Columns{}, IntConstant<8>{}), true;
  return false;
}

// Quotients of numbers below 2^31, as a tensor has no more elements: on the GPU those of 64 bits are calls.
LOPT_HD uint32_t quotient(int64_t x, int64_t y) { return static_cast<uint32_t>(x) / static_cast<uint32_t>(y); }
LOPT_HD uint32_t rest_of(int64_t x, int64_t y) { return static_cast<uint32_t>(x) % static_cast<uint32_t>(y); }

// How a tensor lies.
struct Lines {
  const FactoredTensor& tensor;

  LOPT_HD int64_t size() const { return tensor.groups * tensor.length * tensor.inner; }  // of a line
  LOPT_HD bool factored() const { return tensor.across != 0; }
  LOPT_HD int64_t per_line() const { return tensor.groups * tensor.inner; }  // entries of `along`
  LOPT_HD int64_t num_along() const { return tensor.outer * tensor.lines * per_line(); }
  LOPT_HD int64_t num_across() const { return tensor.outer * size(); }
  LOPT_HD int64_t num_whole() const { return tensor.outer * per_line(); }
  // Which of them is that of the element at `at` of a line.
  LOPT_HD int64_t entry(int64_t at) const {
    return quotient(at, tensor.length * tensor.inner) * tensor.inner + rest_of(at, tensor.inner);
  }
  // Tiles of a line, and of the lines of one `outer`.
  LOPT_HD int64_t wide() const { return quotient(size() + tensor.tile_width - 1, tensor.tile_width); }
  LOPT_HD int64_t high() const { return quotient(tensor.lines + tensor.tile_lines - 1, tensor.tile_lines); }

  // Sums of a tile, [outer * lines, wide, per_line] and behind them [outer, high, size].
  LOPT_HD int64_t along_sums(int64_t line, int64_t at) const {
    return tensor.sums + (line * wide() + quotient(at, tensor.tile_width)) * per_line();
  }
  LOPT_HD int64_t across_sums(int64_t line, int64_t at) const {
    const int64_t outer = quotient(line, tensor.lines);
    const int64_t tile = quotient(rest_of(line, tensor.lines), tensor.tile_lines);
    return tensor.sums + num_along() * wide() + (outer * high() + tile) * size() + at;
  }
  // Planes of three inverse roots, three factors, and for the CPU what `width` units have from an entry, of `along`, then of
  // `across`.
  LOPT_HD int64_t along_factors() const { return tensor.factors; }
  LOPT_HD int64_t across_factors(int width) const {
    return tensor.factors + (2 * kFactoredDecays + width) * num_along();
  }
};

// Which of a tensor's matrices an element is in.
struct Matrices {
  uint32_t count, stride;
  LOPT_HD explicit Matrices(const FactoredTensor& tensor)
      : count(static_cast<uint32_t>(tensor.matrices)), stride(static_cast<uint32_t>(tensor.matrix_stride)) {}
  LOPT_HD uint32_t of(int64_t at) const { return static_cast<uint32_t>(at) / stride % count; }
};

// Sums of squares of column `column` in matrix `matrix`, of the tensor's tile number `tile`.
LOPT_HD double* square_sum(const FactoredParams& params, const FactoredTensor& tensor, int columns, int64_t tile,
                           int column, int64_t matrix) {
  return params.squares + tensor.squares + (tile * columns + column) * tensor.matrices + matrix;
}

// The entries of `along` or `across`, whichever are rows, whose mean is number `whole`: they differ in the second largest
// dimension alone.
struct RowEntries {
  int64_t first, stride, count;
  LOPT_HD RowEntries(const Lines& lines, bool is_along, int64_t whole) {
    const FactoredTensor& t = lines.tensor;
    const int64_t per_line = lines.per_line(), outer = quotient(whole, per_line), rest = rest_of(whole, per_line);
    count = is_along ? t.lines : t.length;
    stride = is_along ? per_line : t.inner;
    first = is_along ? outer * t.lines * per_line + rest
                     : (outer * t.groups + quotient(rest, t.inner)) * t.length * t.inner + rest_of(rest, t.inner);
  }
};

// Mean of the squared gradients of entry `at`, from the sums of tiles.
LOPT_HD double mean_square(const FactoredParams& params, const Lines& lines, bool is_along, int64_t at) {
  const int64_t per = is_along ? lines.per_line() : lines.size();
  const int64_t count = is_along ? lines.wide() : lines.high();
  const double* sums = params.sums + lines.tensor.sums + (is_along ? 0 : lines.num_along() * lines.wide());
  sums += quotient(at, per) * count * per + rest_of(at, per);
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += sums[i * per];
  return total / static_cast<double>(is_along ? lines.tensor.length : lines.tensor.lines);
}

// The lines and elements of each that a tile has.
struct Extent {
  int64_t lines, width;
  LOPT_HD Extent(const FactoredTensor& tensor, const Tile& tile) {
    const int64_t left = tensor.lines - rest_of(tile.line, tensor.lines);
    lines = left < tensor.tile_lines ? left : tensor.tile_lines;
    const int64_t size = tensor.groups * tensor.length * tensor.inner - tile.begin;
    width = size < tensor.tile_width ? size : tensor.tile_width;
  }
  LOPT_HD int64_t count() const { return lines * width; }
};

// What the entries of rows are multiplied by: one by their mean.
LOPT_HD float row_factor(double sum, int64_t count) {
  const float number = static_cast<float>(count);
  return number * reciprocal_of(static_cast<float>(sum) + 1e-9f * number);
}

// What kAccumulators of a tensor, momenta before second moments, are rounded by; a tensor has fewer than 2^32 elements.
template <int kAccumulators>
LOPT_HD RoundingWords<kAccumulators> rounding_words(const FactoredParams& params, const FactoredTensor& tensor) {
  const uint64_t key = rounding_key(static_cast<uint64_t>(params.seed), static_cast<uint64_t>(*params.step),
                                    static_cast<uint64_t>(tensor.row));
  return RoundingWords<kAccumulators>::of(key, 0);
}

// Whether a tensor is left as it is.
LOPT_HD bool rests(const FactoredParams& params, const FactoredTensor& tensor) {
  const float square = params.stats[tensor.row * Measure::kCount + Measure::param_square];
  return square != square;
}

// A parameter as the MLP and sums see it.
template <class V>
LOPT_HD V seen_param(V param) {
  return clamp_of(param, kLargest);
}

// The next value of entry `at` of `along` or `across`, for each decay; the mean of its squares.
LOPT_HD void next_moments(const FactoredParams& params, float* moments, int64_t count, int64_t at, double mean) {
  const float square = static_cast<float>(mean) + 1e-30f;
  for (int k = 0; k < kFactoredDecays; ++k) {
    float& value = moments[k * count + at];
    value = next_accumulator(value, params.factored_decay[k], square);
  }
}

// The operations of a back end: from measure to accumulate; fold and apply; and write. False where no kernel is compiled for
// the rule and width. They throw std::runtime_error.
struct FactoredKernels {
  bool (*accumulate)(const FactoredParams& params, const Target& target);
  bool (*apply)(const FactoredParams& params, const Target& target);
  bool (*write)(const FactoredParams& params, const Target& target);
};

const FactoredKernels& cpu_factored();   // of the selected instruction set
const FactoredKernels& cuda_factored();  // of factored.cu, whether nvcc compiled it or, for `sim`, the C++ compiler

// Those of this name in this module (bindings.cpp, sim.cpp); null where the module has none.
const FactoredKernels* find_factored(const std::string& name);

}  // namespace lopt
