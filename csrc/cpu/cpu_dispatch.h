// Which of the compiled instruction sets the CPU kernels use, and what only the CPU has.
#pragma once

#include <string>
#include <vector>

#include "api/kernels.h"

namespace lopt {

std::vector<std::string> simd_available();  // names this processor can run, widest first
std::string simd_selected();                // the one in use
bool simd_select(const std::string& name);  // for tests; false when this processor cannot run it

// Floating-point operations per second of num_threads threads at their best, for benchmarks.
double multiply_add_rate(int num_threads, double seconds);

}  // namespace lopt
