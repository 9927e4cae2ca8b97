// Which of the compiled instruction sets the CPU kernels use, and what only the CPU has.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lopt {

std::vector<std::string> simd_available();  // names this processor can run, widest first
std::string simd_selected();                // the one in use
bool simd_select(const std::string& name);  // for tests; false when this processor cannot run it

// accumulate and apply in one sweep, chunk by chunk: what apply reads again is in a cache near by. For operands of apply
// that do not depend on this step's statistics; the two need partials of their own.
bool sweep_cpu(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,
               int num_threads);

// Floating-point operations per second of num_threads threads at their best, for benchmarks.
double multiply_add_rate(int num_threads, double seconds);

}  // namespace lopt
