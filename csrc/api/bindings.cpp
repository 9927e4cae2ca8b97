// The pybind11 module lopt._C: the back ends `cpu` and `cuda`, the unroll engine, and how all of it was built.
#include "api/bind_backend.h"
#include "api/bind_engine.h"
#include "api/bind_factored.h"
#include "api/contracts.h"
#include "api/seen.h"
#include "cpu/cpu_dispatch.h"
#include "unroll/unroll.h"

namespace py = pybind11;

namespace lopt {

const Backend* find_backend(const std::string& name) {
  if (name == "cpu") return &cpu_backend();
#if LOPT_WITH_CUDA
  if (name == "cuda") return &cuda_backend();
#endif
  return nullptr;
}

const UnrollEngine* find_engine(const std::string& name) {
  if (name == "cpu") return &cpu_engine();
#if LOPT_WITH_CUDA
  if (name == "cuda") return &cuda_engine();
#endif
  return nullptr;
}

const FactoredKernels* find_factored(const std::string& name) {
  if (name == "cpu") return &cpu_factored();
#if LOPT_WITH_CUDA
  if (name == "cuda") return &cuda_factored();
#endif
  return nullptr;
}

}  // namespace lopt

PYBIND11_MODULE(_C, m) {
  using namespace pybind11::literals;
  m.doc() = "Kernels of lopt over raw pointers, and how they were built.";
  m.attr("has_cuda") = bool(LOPT_WITH_CUDA);      // compiled with nvcc; says nothing about a device
  m.attr("why_not_cuda") = LOPT_WHY_NOT_CUDA;     // why it was built without; or ""
  m.attr("cuda_archs") = LOPT_CUDA_ARCHS_STRING;  // as in CMAKE_CUDA_ARCHITECTURES, separated by commas; or ""
  m.attr("cuda_version") = LOPT_CUDA_VERSION;     // of nvcc; or ""
  m.attr("compiler") = LOPT_COMPILER;             // name and version of the C++ compiler
  m.attr("build_type") = LOPT_BUILD_TYPE;         // CMake's
  lopt::bind_backends(m);
  m.def(
      "add_kernels",
      [](const std::string& name, std::map<std::string, py::bytes> images, std::vector<std::string> kernels) {
        std::map<std::string, std::string> code(images.begin(), images.end());
        lopt::added_backends()[name] = lopt::loaded_backend(std::move(code), std::move(kernels));
      },
      "name"_a, "images"_a, "kernels"_a,
      "Make known a back end of kernels that NVRTC compiled: machine code by architecture, as '90', and the names of "
      "its "
      "kernels in the order of enum Kernel in cuda/grids.h. They are loaded when they are first started.");
  lopt::bind_factored(m);
  lopt::bind_contracts(m);
  lopt::bind_seen(m);
  m.def(
      "cuda_driver_version",
      [] {
#if LOPT_WITH_CUDA
        return lopt::cuda_driver_version();
#else
        return 0;
#endif
      },
      "Newest CUDA version that the driver supports, 1000 major + 10 minor; 0 where there is none.");
  m.def("simd_available", &lopt::simd_available, "Instruction sets this processor can run, widest first.");
  m.def("simd_selected", &lopt::simd_selected, "Instruction set the CPU kernels use.");
  m.def("simd_select", &lopt::simd_select, "name"_a,
        "Use another instruction set; False when this processor lacks it.");
  m.def("multiply_add_rate", &lopt::multiply_add_rate, "num_threads"_a, "seconds"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Floating-point operations per second of the CPU at its best, a multiply-add counted as two; for benchmarks.");
  m.def(
      "start_run",
      [](uint64_t spec, uint64_t problem, uint64_t theta, uint64_t init, uint64_t state) {
        using namespace lopt;
        return start_run_cpu(*pointer<Spec>(spec), *pointer<Problem>(problem), pointer<float>(theta),
                             pointer<float>(init), pointer<float>(state));
      },
      "spec"_a, "problem"_a, "theta"_a, "init"_a, "state"_a,
      "Write the state of an inner run before its first step; with state 0 only return its size in floats.");
  lopt::bind_engines(m);
}
