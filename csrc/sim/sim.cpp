// The pybind11 module lopt._sim, for tests: the back end `sim`, which is the .cu files compiled for the CPU (see
// cuda_on_cpu.h). Most are in kernels.cpp.
#include "sim/cuda_on_cpu.h"
//
#include "../../cuda/advance.cu"
#include "../../cuda/write.cu"
#include "api/bind_engine.h"
#include "api/bind_factored.h"

namespace lopt {

const Backend* find_backend(const std::string& name) { return name == "sim" ? &cuda_backend() : nullptr; }
const UnrollEngine* find_engine(const std::string& name) { return name == "sim" ? &cuda_engine() : nullptr; }

const FactoredKernels* find_factored(const std::string& name) { return name == "sim" ? &cuda_factored() : nullptr; }

}  // namespace lopt

PYBIND11_MODULE(_sim, m) {
  using namespace pybind11::literals;
  m.doc() = "The CUDA kernels of lopt on the CPU, one fiber per CUDA thread; for tests.";
  lopt::bind_backends(m);
  lopt::bind_factored(m);
  lopt::bind_engines(m);
  m.def(
      "reverse_order", [](bool reverse) { lopt::sim::reverse_order = reverse; }, "reverse"_a,
      "Run threads and blocks in descending order, to reveal missing barriers.");
  m.def(
      "use_tensor_cores",
      [](const std::string& of) {
        using lopt::sim::TensorCores;
        if (of != "ideal" && of != "ampere" && of != "hopper")
          throw std::invalid_argument("of: expected ideal, ampere or hopper, got " + of);
        lopt::sim::tensor_cores = of == "ampere"   ? TensorCores::ampere
                                  : of == "hopper" ? TensorCores::hopper
                                                   : TensorCores::ideal;
      },
      "of"_a, "From now on add up products as the tensor cores of ampere or hopper do; ideal: exactly.");
  m.def(
      "tensor_core_sum",
      [](const std::vector<float>& a, const std::vector<float>& b, float d) {
        float rows[16][16] = {}, columns[16][8] = {}, sums[16][8] = {};
        for (size_t k = 0; k < 16; ++k) rows[0][k] = a.at(k), columns[k][0] = b.at(k);
        sums[0][0] = d;
        lopt::sim::multiply_add(rows, columns, sums);
        return sums[0][0];
      },
      "a"_a, "b"_a, "d"_a, "d + a[0] b[0] + .. + a[15] b[15] as they add it up, of halves.");
  m.def(
      "estimate",
      [](const std::string& of, float x) {
        using namespace lopt;
        if (of == "log") return log_of(x);
        if (of == "rough_log") return log_of(Rough(x)).value;
        if (of == "exp") return exp_of(x);
        if (of == "rsqrt") return rsqrt_of(x);
        if (of == "reciprocal") return reciprocal_of(x);
        throw std::invalid_argument("of: expected log, rough_log, exp, rsqrt or reciprocal, got " + of);
      },
      "of"_a, "x"_a, "What kernels compute for one parameter from estimates (rule/maths.h).");
  m.def("launches", [] { return lopt::sim::launches.load(); }, "Kernels run so far.");
  m.def(
      "devices", [] { return std::make_pair(lopt::sim::current_device, lopt::sim::launched_on.load()); },
      "The current device, and that on which the last kernel ran.");
}
