// Which of the compiled instruction sets the CPU kernels use.
#pragma once

#include <string>
#include <vector>

namespace lopt {

std::vector<std::string> simd_available();  // names this processor can run, widest first
std::string simd_selected();                // the one in use
bool simd_select(const std::string& name);  // for tests; false when this processor cannot run it

}  // namespace lopt
