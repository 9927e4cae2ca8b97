// How many multiply-adds a processor can do, for benchmarks to be compared with: independent chains in registers, no
// memory. Compiled once per instruction set; cpu_dispatch.cpp picks.
#include <omp.h>

#include "cpu/simd.h"
#include "cpu/threads.h"
#include "rule/mlp.h"

namespace lopt {
namespace LOPT_ISA {

// Floating-point operations per second of all threads together, a multiply-add counted as two.
double multiply_add_rate(int num_threads, double seconds) {
  constexpr int kChains = 10,
                kRounds = 20000;  // five cycles of latency times two units, and the operands: 12 registers
  double rate = 0.0;
#pragma omp parallel num_threads(threads_for(num_threads, num_threads, 1)) reduction(+ : rate)
  {
    Vec sum[kChains];
    unrolled<kChains>([&](auto j) LOPT_INLINE { sum[j] = splat(0.01f * static_cast<float>(j + 1)); });
    const Vec factor = splat(0.999f), term = splat(static_cast<float>(num_threads) * 1e-3f);
    int64_t rounds = 0;
    double elapsed = 0.0;
#pragma omp barrier
    const double start = omp_get_wtime();
    for (; elapsed < seconds; rounds += kRounds) {
      for (int i = 0; i < kRounds; ++i) unrolled<kChains>([&](auto j) LOPT_INLINE { sum[j] = sum[j] * factor + term; });
      elapsed = omp_get_wtime() - start;
    }
    Vec all{};
    unrolled<kChains>([&](auto j) LOPT_INLINE { all += sum[j]; });
    // The sums converge to term / (1 - factor) > 0: the comparison only keeps them alive.
    if (sum_lanes(all) > 0.0) rate += 2.0 * kChains * kLanes * static_cast<double>(rounds) / elapsed;
  }
  return rate;
}

}  // namespace LOPT_ISA
}  // namespace lopt
