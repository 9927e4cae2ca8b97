// What a module offers to Python over its unroll engines (unroll/unroll.h): names, arguments, docstrings; no logic.
#pragma once

#include "api/bind_backend.h"
#include "unroll/unroll.h"

namespace lopt {
namespace {

const UnrollEngine& engine_of(const std::string& name) {
  const UnrollEngine* engine = find_engine(name);
  if (!engine) throw std::invalid_argument("back end '" + name + "' has no unroll engine in this build");
  return *engine;
}

int64_t unroll_scratch(const std::string& backend, uint64_t spec, uint64_t host_problems, int64_t num_problems,
                       int device) {
  return engine_of(backend).scratch(pointer<Spec>(spec), pointer<Problem>(host_problems), num_problems,
                                    Target{1, device, 0});
}

void unroll(const std::string& backend, uint64_t spec, uint64_t problems, uint64_t host_problems, uint64_t runs,
            uint64_t host_runs, int64_t num_runs, uint64_t theta, int64_t theta_stride, uint64_t scratch,
            int64_t scratch_stride, int num_threads, int device, uint64_t stream) {
  const UnrollCall call{*pointer<Spec>(spec),
                        pointer<Problem>(problems),
                        pointer<Problem>(host_problems),
                        pointer<Run>(runs),
                        pointer<Run>(host_runs),
                        num_runs,
                        pointer<float>(theta),
                        theta_stride,
                        pointer<float>(scratch),
                        scratch_stride};
  check_ran(engine_of(backend).unroll(call, Target{num_threads, device, stream}), call.spec.feature_set,
            call.spec.width);
}

void loss_and_gradient(const std::string& backend, uint64_t problem, uint64_t host_problem, int64_t split, uint64_t key,
                       int64_t step, uint64_t param, uint64_t loss, uint64_t grad, uint64_t scratch, int device,
                       uint64_t stream) {
  const GradientCall call{pointer<Problem>(problem),
                          *pointer<Problem>(host_problem),
                          split,
                          key,
                          step,
                          pointer<float>(param),
                          pointer<float>(loss),
                          pointer<float>(grad),
                          pointer<float>(scratch)};
  engine_of(backend).loss_and_gradient(call, Target{1, device, stream});
}

void bind_engines(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  m.def(
      "unroll_scratch", &unroll_scratch, "backend"_a, "spec"_a, "host_problems"_a, "num_problems"_a, "device"_a,
      "Floats of scratch memory that an inner run needs; -1 where no kernel is compiled for the spec, 0 for that of a "
      "gradient.");
  m.def("unroll", &unroll, "backend"_a, "spec"_a, "problems"_a, "host_problems"_a, "runs"_a, "host_runs"_a,
        "num_runs"_a, "theta"_a, "theta_stride"_a, "scratch"_a, "scratch_stride"_a, "num_threads"_a, "device"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>(), "Continue inner runs; see csrc/unroll/unroll.h.");
  m.def("loss_and_gradient", &loss_and_gradient, "backend"_a, "problem"_a, "host_problem"_a, "split"_a, "key"_a,
        "step"_a, "param"_a, "loss"_a, "grad"_a, "scratch"_a, "device"_a, "stream"_a,
        "Loss of a minibatch of a problem of the unroll engine, and its gradient.");
}

}  // namespace
}  // namespace lopt
