// A CUDA block and its warps as teams of the unroll engine (Note [Teams] in csrc/unroll/layers.h): every thread takes its
// share of the floats. Whatever is added up is added in an order that depends on sizes only.
#pragma once

#include "reduce.cuh"
#include "rule/maths.h"

#define LOPT_ISA on_gpu
#ifdef __CUDACC__
#define LOPT_TEAM __device__ inline
#define LOPT_BOTH __host__ __device__ inline
#define LOPT_CALLED __device__ __noinline__  // once in the code, whatever kernels there are
#else
#define LOPT_TEAM inline
#define LOPT_BOTH inline
#define LOPT_CALLED inline
#endif

namespace lopt {
namespace LOPT_ISA {
namespace {

using Size = int;
using Vec = float;
constexpr int kLanes = 1;

LOPT_HD float splat(float x) { return x; }
LOPT_HD float load(const float* at) { return *at; }
LOPT_HD float load(const float* at, int) { return *at; }
LOPT_HD void store(float* at, float x) { *at = x; }
LOPT_HD void store(float* at, float x, int) { *at = x; }
LOPT_HD float lane_mask(int) { return 1.0f; }
LOPT_HD double sum_lanes(float x) { return x; }
LOPT_HD Size padded(Size count) { return count; }
LOPT_HD float min_of(float x, float y) { return x > y ? y : x; }
LOPT_HD float tanh_of(float x) { return 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f); }

constexpr Size kTeamThreads = 128, kTeamWarps = kTeamThreads / 32;

// The sum and the largest over the lanes of a warp, in every lane.
__device__ __forceinline__ double sum_of_warp(double own) {
  for (int lanes = 16; lanes > 0; lanes /= 2) own += __shfl_xor_sync(0xffffffffu, own, lanes);
  return own;
}
__device__ __forceinline__ float largest_of_warp(float own) {
  for (int lanes = 16; lanes > 0; lanes /= 2) own = ::fmaxf(own, __shfl_xor_sync(0xffffffffu, own, lanes));
  return own;
}

// What block and warp have in common; Team has rank() and size().
template <class Team>
struct TeamOfThreads {
  __device__ __forceinline__ Size first() const { return static_cast<const Team*>(this)->rank(); }

  template <class Function>
  __device__ __forceinline__ void each(Size count, const Function& f) const {
    for (Size i = first(); i < count; i += Team::size()) f(i);
  }

  template <class Function>
  __device__ __forceinline__ void table(Size rows, Size columns, const Function& f) const {
    each(rows * columns, [&](Size i) LOPT_INLINE {
      const Size row = static_cast<Size>(static_cast<unsigned>(i) / static_cast<unsigned>(columns));
      f(row, i - row * columns);
    });
  }

  template <class Function>
  __device__ __forceinline__ void cells(Size batch, Size rows, Size columns, Size depth, const Function& f) const {
    table(batch * rows, columns * depth, [&](Size line, Size rest) LOPT_INLINE {
      const unsigned b = static_cast<unsigned>(line) / static_cast<unsigned>(rows);
      const unsigned j = static_cast<unsigned>(rest) / static_cast<unsigned>(depth);
      f(static_cast<Size>(b), line - static_cast<Size>(b) * rows, static_cast<Size>(j),
        rest - static_cast<Size>(j) * depth);
    });
  }

  template <class Function>
  __device__ __forceinline__ void vectors(Size count, const Function& f) const {
    each(count, f);
  }

  template <class Function>
  __device__ __forceinline__ void lanes(Size count, const Function& f) const {
    each(count, [&](Size i) LOPT_INLINE { f(i, 1); });
  }

  template <class Function>
  __device__ __forceinline__ void grid(Size rows, Size count, const Function& f) const {
    table(rows, count, [&](Size row, Size i) LOPT_INLINE { f(row, i, 1); });
  }

  template <class T>
  __device__ __forceinline__ void copy(Size count, const T* from, T* to) const {
    each(count, [&](Size i) LOPT_INLINE { to[i] = from[i]; });
  }

  __device__ __forceinline__ void zero(Size count, float* to) const {
    each(count, [&](Size i) LOPT_INLINE { to[i] = 0.0f; });
  }

  __device__ __forceinline__ void copy_rows(Size rows, Size count, const float* from, Size from_stride, float* to,
                                            Size to_stride) const {
    table(rows, count, [&](Size row, Size i) LOPT_INLINE { to[row * to_stride + i] = from[row * from_stride + i]; });
  }
};

// Also a team of csrc/rule/tensor_lstm.h.
struct WarpTeam : TeamOfThreads<WarpTeam> {
  __device__ __forceinline__ Size rank() const { return lane_index(); }
  LOPT_HD static constexpr Size size() { return 32; }
  __device__ __forceinline__ Size part() const { return warp_index(); }
  __device__ __forceinline__ void sync() const { __syncwarp(); }

  __device__ __forceinline__ double sum(double own) const { return sum_of_warp(own); }
  __device__ __forceinline__ float largest(float own) const { return largest_of_warp(own); }

  template <class Value>
  __device__ __forceinline__ float sum(float start, int count, Value value) const {
    return static_cast<float>(start + total(count, value));
  }

  template <class Value>
  __device__ __forceinline__ double total(int count, Value value) const {
    double own = 0.0;
    each(count, [&](Size i) LOPT_INLINE { own += value(i); });
    return sum_of_warp(own);
  }

  template <class Value>
  __device__ __forceinline__ float largest(int count, Value value) const {
    float own = 0.0f;
    each(count, [&](Size i) LOPT_INLINE { own = ::fmaxf(own, value(i)); });
    return largest_of_warp(own);
  }

  // A lane for every output: neighbours read neighbouring weights, and several loads are under way at once.
  __device__ __forceinline__ void linear(const float* x, int inputs, const float* w, const float* bias, int outputs,
                                         float* out) const {
    each(outputs, [&](Size j) LOPT_INLINE {
      float sum = bias[j];
#pragma unroll 8
      for (int i = 0; i < inputs; ++i) sum += x[i] * w[i * outputs + j];
      out[j] = sum;
    });
  }
};

struct BlockTeam : TeamOfThreads<BlockTeam> {
  static constexpr Size kParts = kTeamWarps;

  __device__ __forceinline__ Size rank() const { return static_cast<Size>(threadIdx.x); }
  LOPT_HD static constexpr Size size() { return kTeamThreads; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  template <class Function>
  __device__ __forceinline__ void parts(Size count, const Function& f) const {
    const WarpTeam warp;
    for (Size i = warp_index(); i < count; i += kTeamWarps) f(i, warp);
  }

  __device__ __forceinline__ double sum(double own) const {
    __shared__ double of_warps[kTeamWarps];
    own = sum_of_warp(own);
    if (lane_index() == 0) of_warps[warp_index()] = own;
    __syncthreads();
    own = 0.0;
    for (Size i = 0; i < kTeamWarps; ++i) own += of_warps[i];
    __syncthreads();
    return own;
  }

  __device__ __forceinline__ float largest(float own) const {
    __shared__ float of_warps[kTeamWarps];
    own = largest_of_warp(own);
    if (lane_index() == 0) of_warps[warp_index()] = own;
    __syncthreads();
    own = of_warps[0];
    for (Size i = 1; i < kTeamWarps; ++i) own = ::fmaxf(own, of_warps[i]);
    __syncthreads();
    return own;
  }

  // As many threads for each column as there are; each adds up some of the rows, and then one of them what the others have.
  template <class Value, class Finish>
  __device__ __forceinline__ void column_sums(Size rows, Size count, const Value& value, const Finish& finish) const {
    __shared__ float of_threads[kTeamThreads];
    const Size together = count < kTeamThreads ? kTeamThreads / count : 1, own = rank() / count;
    for (Size begin = 0; begin < count; begin += kTeamThreads) {
      const Size j = begin + (together > 1 ? rank() % count : rank());
      float sum = 0.0f;
      if (j < count && own < together)
        for (Size row = together > 1 ? own : 0; row < rows; row += together) value(row, j, 1, sum);
      if (together == 1) {
        if (j < count) finish(j, 1, sum);
        continue;
      }
      of_threads[rank()] = sum;
      __syncthreads();
      if (rank() < count) {
        for (Size i = 1; i < together; ++i) sum += of_threads[i * count + j];
        finish(j, 1, sum);
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void look_up(Size rows, Size per_row, Size count, const int64_t* which,
                                          const float* table_of, float* to, Size) const {
    table(rows * per_row, count, [&](Size row, Size j) LOPT_INLINE {
      to[row * count + j] = table_of[static_cast<Size>(which[row]) * count + j];
    });
  }

  // A number of the table belongs to one thread, which goes over all rows.
  __device__ __forceinline__ void add_up(Size rows, Size per_row, Size count, const int64_t* which, const float* from,
                                         Size, float* table_of) const {
    const Size together = count < kTeamThreads ? kTeamThreads / count : 1, own = together > 1 ? rank() / count : 0;
    for (Size row = 0; row < rows * per_row; ++row) {
      const Size to = static_cast<Size>(which[row]);
      if (to % together != own) continue;
      for (Size j = together > 1 ? rank() % count : rank(); j < count; j += kTeamThreads)
        table_of[to * count + j] += from[row * count + j];
    }
  }
};

// ---- Products -----------------------------------------------------------------------------------------------------------

// See csrc/cpu/product.h.
struct Factor {
  const float* at;
  Size row_stride, column_stride;
  Size depth, segments = 1, segment_stride = 0;
};

// Of one thread: kRows rows and kColumns columns of c at a time, the latter far apart, so that neighbours read neighbouring
// numbers of b.
template <int kRows, int kColumns, bool kAdd, class Team>
__device__ __forceinline__ void product_tiles(const Team& team, Size rows, Size n, const Factor& a, const float* b,
                                              const float* bias, float* c) {
  [[maybe_unused]] constexpr int kAhead = kRows * kColumns > 8 ? 2 : 4;
  const Size across = (n + kColumns - 1) / kColumns, down = (rows + kRows - 1) / kRows;
  team.table(down, across, [&](Size tile, Size column) LOPT_INLINE {
    float sum[kRows][kColumns];
    Size row_at[kRows], column_at[kColumns];  // beyond the end the last one
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_at[r] = tile * kRows + r < rows ? tile * kRows + r : rows - 1;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) column_at[v] = column + v * across < n ? column + v * across : n - 1;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        sum[r][v] = kAdd ? c[row_at[r] * n + column_at[v]] : bias ? bias[column_at[v]] : 0.0f;
    }
    const float* line = b;
    for (Size s = 0; s < a.segments; ++s) {
      const float* element = a.at + s * a.segment_stride;
#pragma unroll kAhead
      for (Size k = 0; k < a.depth; ++k, element += a.column_stride, line += n) {
        float value[kColumns];
#pragma unroll
        for (int v = 0; v < kColumns; ++v) value[v] = line[column_at[v]];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float factor = element[row_at[r] * a.row_stride];
#pragma unroll
          for (int v = 0; v < kColumns; ++v) sum[r][v] += factor * value[v];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (tile * kRows + r < rows && column + v * across < n) c[row_at[r] * n + column_at[v]] = sum[r][v];
    }
  });
}

// c [rows, n]; b [segments * depth, n]; bias [n] or null. Of the largest tiles that give every thread one; whichever, a number
// is added up in the same order.
template <bool kAdd = false, class Team>
LOPT_CALLED void product(const Team& team, Size rows, Size n, const Factor a, const float* b, const float* bias,
                         float* c) {
  const auto enough = [&](Size of_rows, Size of_columns) LOPT_INLINE {
    return ((rows + of_rows - 1) / of_rows) * ((n + of_columns - 1) / of_columns) >= Team::size();
  };
  if (enough(4, 4))
    product_tiles<4, 4, kAdd>(team, rows, n, a, b, bias, c);
  else if (enough(4, 2))
    product_tiles<4, 2, kAdd>(team, rows, n, a, b, bias, c);
  else if (enough(2, 1))
    product_tiles<2, 1, kAdd>(team, rows, n, a, b, bias, c);
  else
    product_tiles<1, 1, kAdd>(team, rows, n, a, b, bias, c);
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
