// One warp's matrix products on tensor cores, D += A B, with A and B in half precision and D in float.
//
// Note [Fragments]
// A has 16 rows, B has 8 columns, D is 16 x 8; lane 4 g + t (g = 0 .. 7, t = 0 .. 3) holds, for every block q of 8 inputs
//   A: a[2 q] = inputs 8 q + 2 t, + 1 of row g,        a[2 q + 1] = the same of row g + 8
//   B: b[q]   = inputs 8 q + 2 t, + 1 of column g
//   D: d[0], d[1] = columns 2 t, 2 t + 1 of row g,     d[2], d[3] = the same of row g + 8
// A row of D is held as a row of A is, so the output of one layer is the input of the next without moving between lanes:
// the 8 columns of D number n are block q = n of the next A.
//
// Note [Split halves]
// x = high + low, high = half(x), low = half(x - high), keeps 22 bits of a float, and
//   x y = high(x) high(y) + high(x) low(y) + low(x) high(y) + O(2^-22 x y)
// is three products on tensor cores, all exact in float; the small ones are added up first, and where a block of eight inputs
// is left over, both of them are one product over 16. This is Ootomo and Yokota's method (2022) with halves in place of TF32:
// the same 11 bits each at twice the rate and half the registers, for a range of 65504 instead of 1e38. A value beyond it
// becomes Inf as `high` and -Inf as `low`, and every product with it NaN. With bfloat16 the three products keep only 16 bits,
// which float32 beats by a factor of 100.
#pragma once

#include "halves.cuh"

namespace lopt {

// (x, y) -> parts[0] = the high halves, parts[1] = the low ones; with one part only the high ones, saturated.
template <int kParts>
__device__ __forceinline__ void split(float x, float y, uint32_t (&parts)[kParts]) {
  parts[0] = pack_halves<kParts == 1>(x, y);
  if (kParts == 1) return;
  float high_x, high_y;
  unpack_halves(parts[0], high_x, high_y);
  parts[kParts - 1] = pack_halves<false>(x - high_x, y - high_y);
}

// Of max(x, 0) and max(y, 0). The low half of a number below 0 is that number, and below minus the high half, which is 0;
// of others it is not.
template <int kParts>
__device__ __forceinline__ void split_positive(float x, float y, uint32_t (&parts)[kParts]) {
  parts[0] = pack_halves<kParts == 1>(max_of(x, 0.0f), max_of(y, 0.0f));
  if (kParts == 1) return;
  float high_x, high_y;
  unpack_halves(parts[0], high_x, high_y);
  parts[kParts - 1] = max_of_negative(pack_halves<false>(x - high_x, y - high_y), parts[0]);
}

// ---- Products --------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
// Over 16 inputs, two blocks, which need not be neighbours: a[0], a[1] and b[0] are of the first.
__device__ __forceinline__ void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Over 8 inputs, one block.
__device__ __forceinline__ void mma_8(float (&d)[4], const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
#else
struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};

// D of all lanes, added up as csrc/sim/tensor_cores.h says.
template <int kInputs>
void mma_of_warp(void* const* lanes) {
  const auto operands = [&](int lane) -> const MmaOperands& { return *static_cast<MmaOperands*>(lanes[lane]); };
  const auto element = [&](int row, int n) -> float& { return operands(row % 8 * 4 + n / 2).d[row / 8 * 2 + n % 2]; };
  float a[16][kInputs], b[kInputs][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int q = 0; q < kInputs / 8; ++q) {
      const int g = lane / 4, k = 8 * q + lane % 4 * 2;
      for (int half = 0; half < 2; ++half)
        unpack_halves(operands(lane).a[2 * q + half], a[g + 8 * half][k], a[g + 8 * half][k + 1]);
      unpack_halves(operands(lane).b[q], b[k][g], b[k + 1][g]);
    }
  for (int row = 0; row < 16; ++row)
    for (int n = 0; n < 8; ++n) d[row][n] = element(row, n);
  sim::multiply_add(a, b, d);
  for (int row = 0; row < 16; ++row)
    for (int n = 0; n < 8; ++n) element(row, n) = d[row][n];
}
inline void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands operands{d, a, b};
  sim::warp_collective(&operands, mma_of_warp<16>);
}
inline void mma_8(float (&d)[4], const uint32_t* a, const uint32_t* b) {
  MmaOperands operands{d, a, b};
  sim::warp_collective(&operands, mma_of_warp<8>);
}
#endif

// a[m][.] for matrices of 8 rows of 8 halves, whose rows lie at the 16-byte aligned addresses that lanes 8 m .. 8 m + 7 pass.
template <int kMatrices>
__device__ __forceinline__ void load_matrices(const uint4* row, uint32_t (&a)[kMatrices]) {
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kMatrices == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a[0]), "=r"(a[1]) : "r"(address));
#else
  struct Operands {
    const uint4* row;
    uint32_t* a;
  } operands{row, a};
  sim::warp_collective(&operands, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < kMatrices; ++m) {
        const uint4* from = static_cast<Operands*>(lanes[8 * m + lane / 4])->row;
        static_cast<Operands*>(lanes[lane])->a[m] = reinterpret_cast<const uint32_t*>(from)[lane % 4];
      }
  });
#endif
}

// 16 rows of inputs and the weights of one layer, as fragments.
template <int kParts, int kBlocks>
struct Inputs {
  uint32_t a[kParts][2 * kBlocks];  // a[.][2 q + half]: block q of row g + 8 half
};
template <int kParts, int kBlocks, int kTiles>
struct Weights {
  uint32_t b[kParts][kTiles][kBlocks];
  __device__ __forceinline__ uint32_t& operator()(int part, int n, int q) { return b[part][n][q]; }
  __device__ __forceinline__ uint32_t operator()(int part, int n, int q) const { return b[part][n][q]; }
};
// The same of all lanes, in shared memory.
template <int kParts, int kBlocks, int kTiles>
using SharedWeights = uint32_t[kParts][kTiles][kBlocks][32];
template <int kParts, int kBlocks, int kTiles>
struct WeightsOfLane {
  SharedWeights<kParts, kBlocks, kTiles>& b;
  int lane;
  __device__ __forceinline__ uint32_t& operator()(int part, int n, int q) const { return b[part][n][q][lane]; }
};

// d[m][n] += inputs[m] times columns 8 n .. 8 n + 7 of the weights. With two parts the small products come first; of an odd
// last block, both of them are one product over 16 inputs. Sums that do not wait for each other follow each other.
template <int kParts, int kBlocks, int kTiles, int kMatrices, class Weights>
__device__ __forceinline__ void multiply(const Inputs<kParts, kBlocks> (&inputs)[kMatrices], const Weights& weights,
                                         float (&d)[kMatrices][kTiles][4]) {
  constexpr int kLow = kParts - 1;
  // Block q of part_q and block r of part_r of the inputs, with those of weights_q and weights_r.
  const auto pair = [&](int q, int part_q, int weights_q, int r, int part_r, int weights_r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        const uint32_t *x = inputs[m].a[part_q] + 2 * q, *y = inputs[m].a[part_r] + 2 * r;
        mma_16(d[m][n], {x[0], x[1], y[0], y[1]}, {weights(weights_q, n, q), weights(weights_r, n, r)});
      }
  };
  if (kParts > 1) {
#pragma unroll
    for (int q = 0; q + 1 < kBlocks; q += 2) pair(q, kLow, 0, q + 1, kLow, 0);
#pragma unroll
    for (int q = 0; q + 1 < kBlocks; q += 2) pair(q, 0, kLow, q + 1, 0, kLow);
    if (kBlocks % 2) pair(kBlocks - 1, 0, kLow, kBlocks - 1, kLow, 0);
  }
#pragma unroll
  for (int q = 0; q + 1 < kBlocks; q += 2) pair(q, 0, 0, q + 1, 0, 0);
  if (kBlocks % 2) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        const uint32_t last = weights(0, n, kBlocks - 1);
        mma_8(d[m][n], inputs[m].a[0] + 2 * (kBlocks - 1), &last);
      }
  }
}

}  // namespace lopt
