// The pybind11 module lopt._sim, for tests: the back end `sim`, which is the .cu files compiled for the CPU (see
// cuda_on_cpu.h). Most are in kernels.cpp.
#include "sim/cuda_on_cpu.h"
//
#include "../../cuda/advance.cu"
#include "../../cuda/write.cu"
#include "api/bind_backend.h"

namespace lopt {

const Backend* find_backend(const std::string& name) { return name == "sim" ? &cuda_backend() : nullptr; }

}  // namespace lopt

PYBIND11_MODULE(_sim, m) {
  using namespace pybind11::literals;
  m.doc() = "The CUDA kernels of lopt on the CPU, one fiber per CUDA thread; for tests.";
  lopt::bind_backends(m);
  m.def(
      "reverse_order", [](bool reverse) { lopt::sim::reverse_order = reverse; }, "reverse"_a,
      "Run threads and blocks in descending order, to reveal missing barriers.");
  m.def("launches", [] { return lopt::sim::launches.load(); }, "Kernels run so far.");
}
