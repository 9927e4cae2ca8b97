// The pybind11 module lopt._C: names, arguments, docstrings; no logic. Addresses, sizes and streams are integers, so the
// module needs no torch to build and works with any.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "api/kernels.h"
#include "api/spec.h"
#include "cpu/cpu_dispatch.h"
#include "unroll/unroll.h"

namespace py = pybind11;

namespace lopt {
namespace {

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

void check_ran(bool ran, int feature_set, int width) {
  if (!ran)
    throw std::invalid_argument("no kernel is compiled for feature set " + std::to_string(feature_set) + " and width " +
                                std::to_string(width));
}

void accumulate(const std::string& backend, int feature_set, uint64_t address, int num_threads,
                [[maybe_unused]] int device, [[maybe_unused]] uint64_t stream) {
  const AccumulateParams& params = *pointer<AccumulateParams>(address);
  if (backend == "cpu")
    check_ran(accumulate_cpu(params, feature_set, num_threads), feature_set, 0);
  else if (backend == "sim")
    check_ran(accumulate_sim(params, feature_set), feature_set, 0);
#if LOPT_WITH_CUDA
  else if (backend == "cuda")
    check_ran(accumulate_cuda(params, feature_set, device, stream), feature_set, 0);
#endif
  else
    throw std::invalid_argument("back end '" + backend + "' is not part of this build");
}

void apply(const std::string& backend, int feature_set, int width, uint64_t address, int num_threads,
           [[maybe_unused]] int device, [[maybe_unused]] uint64_t stream) {
  const ApplyParams& params = *pointer<ApplyParams>(address);
  if (backend == "cpu")
    check_ran(apply_cpu(params, feature_set, width, num_threads), feature_set, width);
  else if (backend == "sim")
    check_ran(apply_sim(params, feature_set, width), feature_set, width);
#if LOPT_WITH_CUDA
  else if (backend == "cuda")
    check_ran(apply_cuda(params, feature_set, width, device, stream), feature_set, width);
#endif
  else
    throw std::invalid_argument("back end '" + backend + "' is not part of this build");
}

// The part of the tensor level that `cpu`, `sim` or `cuda` runs.
template <class Cpu, class Sim, class Cuda>
void run_level(const std::string& backend, uint64_t params, Cpu cpu, Sim sim, [[maybe_unused]] Cuda cuda) {
  const AdvanceParams& p = *pointer<AdvanceParams>(params);
  bool ran = true;
  if (backend == "cpu")
    ran = cpu(p);
  else if (backend == "sim")
    ran = sim(p);
#if LOPT_WITH_CUDA
  else if (backend == "cuda")
    ran = cuda(p);
#endif
  else
    throw std::invalid_argument("back end '" + backend + "' is not part of this build");
  check_ran(ran, p.spec->feature_set, p.spec->width);
}

#if LOPT_WITH_CUDA
#define LOPT_CUDA_LEVEL(name) [=](const AdvanceParams& p) { return name##_cuda(p, device, stream); }
#else
#define LOPT_CUDA_LEVEL(name) nullptr
#endif
#define LOPT_LEVEL(name)                                                              \
  void name(const std::string& backend, uint64_t params, [[maybe_unused]] int device, \
            [[maybe_unused]] uint64_t stream) {                                       \
    run_level(backend, params, name##_cpu, name##_sim, LOPT_CUDA_LEVEL(name));        \
  }
LOPT_LEVEL(begin)
LOPT_LEVEL(advance)
LOPT_LEVEL(finish)

void sweep(const std::string& backend, int feature_set, int width, uint64_t accumulating, uint64_t applying,
           int num_threads, [[maybe_unused]] int device, [[maybe_unused]] uint64_t stream) {
  const AccumulateParams& first = *pointer<AccumulateParams>(accumulating);
  const ApplyParams& second = *pointer<ApplyParams>(applying);
  if (backend == "cpu")
    check_ran(sweep_cpu(first, second, feature_set, width, num_threads), feature_set, width);
  else if (backend == "sim")
    check_ran(sweep_sim(first, second, feature_set, width), feature_set, width);
#if LOPT_WITH_CUDA
  else if (backend == "cuda")
    check_ran(sweep_cuda(first, second, feature_set, width, device, stream), feature_set, width);
#endif
  else
    throw std::invalid_argument("back end '" + backend + "' is not part of this build");
}

void step(const std::string& backend, uint64_t level, uint64_t accumulating, uint64_t applying, bool lagged,
          int num_threads, int device, uint64_t stream) {
  const Spec& s = *pointer<AdvanceParams>(level)->spec;
  begin(backend, level, device, stream);
  if (lagged) {
    advance(backend, level, device, stream);
    sweep(backend, s.feature_set, s.width, accumulating, applying, num_threads, device, stream);
  } else {
    accumulate(backend, s.feature_set, accumulating, num_threads, device, stream);
    advance(backend, level, device, stream);
    apply(backend, s.feature_set, s.width, applying, num_threads, device, stream);
  }
  finish(backend, level, device, stream);
}

void write_words(const std::string& backend, uint64_t to, const std::vector<int64_t>& words,
                 [[maybe_unused]] int device, [[maybe_unused]] uint64_t stream) {
  if (backend == "sim") return write_words_sim(pointer<int64_t>(to), words.data(), int64_t(words.size()));
#if LOPT_WITH_CUDA
  if (backend == "cuda")
    return write_words_cuda(pointer<int64_t>(to), words.data(), int64_t(words.size()), device, stream);
#endif
  throw std::invalid_argument("back end '" + backend + "' is not part of this build");
}

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
  m.attr("source_sha256") = LOPT_SOURCE_SHA256;   // of csrc, cuda and CMakeLists.txt
  m.attr("compiler") = LOPT_COMPILER;             // name and version of the C++ compiler
  m.attr("build_type") = LOPT_BUILD_TYPE;         // CMake's
  m.attr("sanitizer") = LOPT_SANITIZER;           // as in -fsanitize=; or ""
  m.attr("chunk") = lopt::kChunk;
  m.def("feature_sets", &lopt::feature_sets,
        "Name and sizes of every compiled feature set, in the order of their index.");
  m.def("packed_weights", &lopt::packed_weights, "feature_set"_a, "width"_a,
        "Floats in one packed row of MLP weights; 0 when no kernel is compiled for this combination.");
  m.def("simd_available", &lopt::simd_available, "Instruction sets this processor can run, widest first.");
  m.def("simd_selected", &lopt::simd_selected, "Instruction set the CPU kernels use.");
  m.def("simd_select", &lopt::simd_select, "name"_a,
        "Use another instruction set; False when this processor lacks it.");
  m.def("multiply_add_rate", &lopt::multiply_add_rate, "num_threads"_a, "seconds"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Floating-point operations per second of the CPU at its best, a multiply-add counted as two; for benchmarks.");
  m.def("sim_reverse_order", &lopt::set_sim_reverse_order, "reverse"_a,
        "Let sim run threads and blocks in descending order, to reveal missing barriers.");
  m.def("accumulate", &lopt::accumulate, "backend"_a, "feature_set"_a, "params"_a, "num_threads"_a, "device"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "Clip gradients, update mom and rms, reduce statistics; see AccumulateParams in csrc/api/kernels.h.");
  m.def("apply", &lopt::apply, "backend"_a, "feature_set"_a, "width"_a, "params"_a, "num_threads"_a, "device"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "Features, small MLP, parameter update; see ApplyParams in csrc/api/kernels.h.");
  m.def("sweep", &lopt::sweep, "backend"_a, "feature_set"_a, "width"_a, "accumulating"_a, "applying"_a, "num_threads"_a,
        "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "accumulate and apply in one sweep, for operands of apply that do not depend on the statistics.");
  m.def("step", &lopt::step, "backend"_a, "level"_a, "accumulating"_a, "applying"_a, "lagged"_a, "num_threads"_a,
        "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "begin, accumulate, advance, apply and finish; lagged: begin, advance, accumulate and apply in one "
        "sweep, finish.");
  m.def("sim_launches", &lopt::sim_launches, "Kernels that sim has run so far.");
  m.def("write_words", &lopt::write_words, "backend"_a, "to"_a, "words"_a, "device"_a, "stream"_a,
        "Write 64-bit integers to the device as kernel arguments, for CUDA graphs.");
  m.def("begin", &lopt::begin, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "Before accumulate: losses, and the clip limit of this step; see AdvanceParams in csrc/api/spec.h.");
  m.def("advance", &lopt::advance, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "Tensor level between the two operations.");
  m.def("finish", &lopt::finish, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "After apply: what the next LSTM step sees of the MLP.");
  m.def("struct_sizes", &lopt::struct_sizes, "Bytes of the structs that Python builds as NumPy records.");
  m.def("start_run", &lopt::start_run, "spec"_a, "problem"_a, "theta"_a, "init"_a, "state"_a,
        "Write the state of an inner run before its first step; with state 0 only return its size in floats.");
  m.def("unroll", &lopt::unroll, "spec"_a, "problems"_a, "runs"_a, "num_runs"_a, "theta"_a, "theta_stride"_a,
        "num_threads"_a, py::call_guard<py::gil_scoped_release>(), "Continue inner runs; see csrc/unroll/unroll.h.");
}
