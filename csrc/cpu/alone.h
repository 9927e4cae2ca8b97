// One CPU thread as a team of the unroll engine (Note [Teams] in unroll/layers.h): it does everything itself, by vectors.
#pragma once

#include "cpu/product.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

using Size = int64_t;
#define LOPT_TEAM inline
#define LOPT_CALLED inline
#define LOPT_BOTH inline

struct Alone {
  static constexpr Size kParts = 1;

  Size rank() const { return 0; }
  Size part() const { return 0; }
  void sync() const {}

  template <class Function>
  LOPT_HD void each(Size count, const Function& f) const {
    for (Size i = 0; i < count; ++i) f(i);
  }

  template <class Function>
  LOPT_HD void table(Size rows, Size columns, const Function& f) const {
    for (Size i = 0; i < rows; ++i)
      for (Size j = 0; j < columns; ++j) f(i, j);
  }

  template <class Function>
  LOPT_HD void cells(Size batch, Size rows, Size columns, Size depth, const Function& f) const {
    for (Size b = 0; b < batch; ++b)
      for (Size i = 0; i < rows; ++i)
        for (Size j = 0; j < columns; ++j)
          for (Size c = 0; c < depth; ++c) f(b, i, j, c);
  }

  template <class Function>
  LOPT_HD void vectors(Size count, const Function& f) const {
    for (Size i = 0; i < count; i += kLanes) f(i);
  }

  template <class Function>
  LOPT_HD void lanes(Size count, const Function& f) const {
    for_vectors(count, f);
  }

  template <class Function>
  LOPT_HD void grid(Size rows, Size count, const Function& f) const {
    for (Size row = 0; row < rows; ++row)
      for_vectors(count, [&](int64_t j, int lanes) LOPT_INLINE { f(row, j, lanes); });
  }

  template <class Function>
  LOPT_HD void parts(Size count, const Function& f) const {
    for (Size i = 0; i < count; ++i) f(i, *this);
  }

  double sum(Vec own) const { return sum_lanes(own); }
  double sum(double own) const { return own; }
  float largest(float own) const { return own; }

  template <class T>
  void copy(Size count, const T* from, T* to) const {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  }

  void zero(Size count, float* to) const { std::fill_n(to, count, 0.0f); }

  void copy_rows(Size rows, Size count, const float* from, Size from_stride, float* to, Size to_stride) const {
    for (Size i = 0; i < rows; ++i) copy(count, from + i * from_stride, to + i * to_stride);
  }

  template <class Value, class Finish>
  LOPT_HD void column_sums(Size rows, Size count, const Value& value, const Finish& finish) const {
    for_vectors(count, [&](int64_t j, int lanes) LOPT_INLINE {
      Vec sum{};
      for (Size row = 0; row < rows; ++row) value(row, j, lanes, sum);
      finish(j, lanes, sum);
    });
  }

  void look_up(Size rows, Size per_row, Size count, const int64_t* which, const float* table, float* to,
               Size stride) const {
    for (Size row = 0; row < rows; ++row)
      for (Size i = 0; i < per_row; ++i)
        copy(count, table + which[row * per_row + i] * count, to + row * stride + i * count);
  }

  void add_up(Size rows, Size per_row, Size count, const int64_t* which, const float* from, Size stride,
              float* table) const {
    for (Size row = 0; row < rows; ++row)
      for (Size i = 0; i < per_row; ++i) {
        float* const to = table + which[row * per_row + i] * count;
        const float* const values = from + row * stride + i * count;
        for_vectors(count, [&](int64_t j, int lanes)
                               LOPT_INLINE { store(to + j, load(to + j, lanes) + load(values + j, lanes), lanes); });
      }
  }
};

template <bool kAdd = false>
void product(const Alone&, Size rows, Size n_padded, const Factor& a, const float* b, const float* bias, float* c) {
  product<kAdd>(rows, n_padded, a, b, bias, c);
}

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
