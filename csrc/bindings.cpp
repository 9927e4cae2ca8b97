// The pybind11 module lopt._C: names, arguments, docstrings; no logic.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of lopt over raw pointers, and how they were built.";
  m.attr("has_cuda") = bool(LOPT_WITH_CUDA);              // compiled with nvcc; says nothing about a device
  m.attr("cuda_archs") = LOPT_CUDA_ARCHS_STRING;          // as in CMAKE_CUDA_ARCHITECTURES, separated by commas; or ""
  m.attr("cuda_version") = LOPT_CUDA_VERSION;             // of nvcc; or ""
  m.attr("compiler") = LOPT_COMPILER;                     // name and version of the C++ compiler
  m.attr("build_type") = LOPT_BUILD_TYPE;                 // CMake's
  m.attr("sanitizer") = LOPT_SANITIZER;                   // as in -fsanitize=; or ""
}
