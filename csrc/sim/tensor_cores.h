// How tensor cores add up, for the C++ compiler: D += A B of halves, D in float.
//
// Note [Tensor cores]
// Products of halves are exact. What happens to their sum is not documented; `ampere` and `hopper` are the models that
// Xie et al. (MMA-Sim, arXiv:2511.10909) found to give the bits of the hardware, as did Khattak and Mikaitis
// (arXiv:2512.07004): some inputs at a time, 8 or 16, all products and D are aligned to the largest exponent among them,
// cut off after some bits, 24 or 25 below that exponent, added up exactly, and the sum is cut off to a float.
// `ideal` adds up exactly and cuts off once.
// The exponent of a product is the sum of its factors', so its significand may be anything below 4; subnormal numbers
// have the least exponent of their format.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lopt::sim {

enum class TensorCores { ideal, ampere, hopper };
inline TensorCores tensor_cores = TensorCores::ideal;

inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(double{nearest}) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

constexpr int kLeastHalf = -14, kLeastFloat = -126;  // exponents of subnormal numbers

inline int exponent_of(float x, int least) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127;
  return exponent < least ? least : exponent;
}

// 2^exponent, or 0 below the normal numbers.
inline double power_of_two(int exponent) {
  const uint64_t bits = exponent < -1022 ? 0 : uint64_t(1023 + exponent) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// d + sum of a[k] b[k] over `inputs` of them, with `bits` below the largest exponent.
inline float add_aligned(const float* a, const float* b, const int* exponents_a, const int* exponents_b, int inputs,
                         int bits, float d) {
  double products[16], all = d;
  int largest = exponent_of(d, kLeastFloat);
  for (int k = 0; k < inputs; ++k) {
    all += products[k] = double{a[k]} * double{b[k]};
    const int exponent = exponents_a[k] + exponents_b[k];
    if (products[k] != 0.0 && exponent > largest) largest = exponent;
  }
  if (!std::isfinite(all)) return static_cast<float>(all);
  const double scale = power_of_two(bits - largest);
  auto sum = static_cast<int64_t>(double{d} * scale);  // a conversion to an integer cuts off
  for (int k = 0; k < inputs; ++k) sum += static_cast<int64_t>(products[k] * scale);
  return toward_zero(static_cast<double>(sum) * power_of_two(largest - bits));
}

template <int kInputs>
void multiply_add(const float (&a)[16][kInputs], const float (&b)[kInputs][8], float (&d)[16][8]) {
  if (tensor_cores == TensorCores::ideal) {
    for (int row = 0; row < 16; ++row) {
      double sums[8];
      for (int n = 0; n < 8; ++n) sums[n] = d[row][n];
      for (int k = 0; k < kInputs; ++k)
        for (int n = 0; n < 8; ++n) sums[n] += double{a[row][k]} * double{b[k][n]};
      for (int n = 0; n < 8; ++n) d[row][n] = toward_zero(sums[n]);
    }
    return;
  }
  const bool ampere = tensor_cores == TensorCores::ampere;
  const int bits = ampere ? 24 : 25, at_a_time = ampere ? 8 : kInputs;
  float columns[8][kInputs];
  int of_rows[16][kInputs], of_columns[8][kInputs];  // exponents
  for (int k = 0; k < kInputs; ++k) {
    for (int row = 0; row < 16; ++row) of_rows[row][k] = exponent_of(a[row][k], kLeastHalf);
    for (int n = 0; n < 8; ++n) of_columns[n][k] = exponent_of(columns[n][k] = b[k][n], kLeastHalf);
  }
  for (int row = 0; row < 16; ++row)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < kInputs; k += at_a_time)
        d[row][n] =
            add_aligned(a[row] + k, columns[n] + k, of_rows[row] + k, of_columns[n] + k, at_a_time, bits, d[row][n]);
}

}  // namespace lopt::sim
