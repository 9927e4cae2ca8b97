// The pybind11 module lopt._C: the back ends `cpu` and `cuda`, the unroll engine, and how all of it was built.
#include "api/bind_backend.h"
#include "api/rule_tables.h"
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

namespace {

int64_t start_run(uint64_t spec, uint64_t problem, uint64_t theta, uint64_t init, uint64_t state) {
  return start_run_cpu(*pointer<Spec>(spec), *pointer<Problem>(problem), pointer<float>(theta), pointer<float>(init),
                       pointer<float>(state));
}

void unroll(uint64_t spec, uint64_t problems, uint64_t runs, int64_t num_runs, uint64_t theta, int64_t theta_stride,
            int num_threads) {
  const Spec& s = *pointer<Spec>(spec);
  check_ran(unroll_cpu(s, pointer<Problem>(problems), pointer<Run>(runs), num_runs, pointer<float>(theta), theta_stride,
                       num_threads),
            s.feature_set, s.width);
}

py::dict struct_sizes() {
  py::dict sizes;
  sizes["TensorEntry"] = sizeof(TensorEntry);
  sizes["AccumulateParams"] = sizeof(AccumulateParams);
  sizes["ApplyParams"] = sizeof(ApplyParams);
  sizes["Spec"] = sizeof(Spec);
  sizes["TensorShape"] = sizeof(TensorShape);
  sizes["AdvanceParams"] = sizeof(AdvanceParams);
  sizes["Problem"] = sizeof(Problem);
  sizes["Run"] = sizeof(Run);
  return sizes;
}

// Sizes the Python tables must agree with.
py::list feature_sets() {
  py::list sets;
  for (int i = 0; with_feature_set(i,
                                   [&](auto features) {
                                     using Features = decltype(features);
                                     py::dict facts;
                                     facts["name"] = Features::kName;
                                     facts["columns"] = int{Features::kNumColumns};
                                     facts["moments"] = int{Features::kNumMoments};
                                     facts["stats"] = int{kNumStats<Features>};
                                     facts["num_mom"] = int{Features::kNumMom};
                                     facts["num_rms"] = int{Features::kNumRms};
                                     sets.append(facts);
                                   });
       ++i) {
  }
  return sets;
}

int packed_weights(int feature_set, int width) {
  int size = 0;
  with_kernel(feature_set, width, [&](auto features, auto width_constant) {
    size = MlpLayout<decltype(features)::kNumColumns, decltype(width_constant)::value>::kSize;
  });
  return size;
}

}  // namespace
}  // namespace lopt

PYBIND11_MODULE(_C, m) {
  using namespace pybind11::literals;
  m.doc() = "Kernels of lopt over raw pointers, and how they were built.";
  m.attr("has_cuda") = bool(LOPT_WITH_CUDA);      // compiled with nvcc; says nothing about a device
  m.attr("cuda_archs") = LOPT_CUDA_ARCHS_STRING;  // as in CMAKE_CUDA_ARCHITECTURES, separated by commas; or ""
  m.attr("cuda_version") = LOPT_CUDA_VERSION;     // of nvcc; or ""
  m.attr("compiler") = LOPT_COMPILER;             // name and version of the C++ compiler
  m.attr("build_type") = LOPT_BUILD_TYPE;         // CMake's
  lopt::bind_backends(m);
  m.def("feature_sets", &lopt::feature_sets,
        "Name and sizes of every compiled feature set, in the order of their index.");
  m.def("rule_tables", &lopt::rule_tables, "Names and constants of csrc/rule, as lopt/kernels/tables.py has them.");
  m.def("packed_weights", &lopt::packed_weights, "feature_set"_a, "width"_a,
        "Floats in one packed row of MLP weights; 0 when no kernel is compiled for this combination.");
  m.def("simd_available", &lopt::simd_available, "Instruction sets this processor can run, widest first.");
  m.def("simd_selected", &lopt::simd_selected, "Instruction set the CPU kernels use.");
  m.def("simd_select", &lopt::simd_select, "name"_a,
        "Use another instruction set; False when this processor lacks it.");
  m.def("multiply_add_rate", &lopt::multiply_add_rate, "num_threads"_a, "seconds"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Floating-point operations per second of the CPU at its best, a multiply-add counted as two; for benchmarks.");
  m.def("struct_sizes", &lopt::struct_sizes, "Bytes of the structs that Python builds as NumPy records.");
  m.def("start_run", &lopt::start_run, "spec"_a, "problem"_a, "theta"_a, "init"_a, "state"_a,
        "Write the state of an inner run before its first step; with state 0 only return its size in floats.");
  m.def("unroll", &lopt::unroll, "spec"_a, "problems"_a, "runs"_a, "num_runs"_a, "theta"_a, "theta_stride"_a,
        "num_threads"_a, py::call_guard<py::gil_scoped_release>(), "Continue inner runs; see csrc/unroll/unroll.h.");
}
