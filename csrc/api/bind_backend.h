// What a module of kernels offers to Python over its back ends: names, arguments, docstrings; no logic. Addresses, sizes
// and streams are integers, so a module needs no torch to build and works with any.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "api/backend.h"

namespace lopt {
namespace {

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

const Backend& backend_of(const std::string& name) {
  const Backend* backend = find_backend(name);
  if (!backend) throw std::invalid_argument("back end '" + name + "' is not part of this build");
  return *backend;
}

void check_ran(bool ran, int feature_set, int width) {
  if (!ran)
    throw std::invalid_argument("no kernel is compiled for feature set " + std::to_string(feature_set) + " and width " +
                                std::to_string(width));
}

void accumulate(const std::string& backend, int feature_set, uint64_t params, int num_threads, int device,
                uint64_t stream) {
  check_ran(backend_of(backend).accumulate(*pointer<AccumulateParams>(params), feature_set,
                                           Target{num_threads, device, stream}),
            feature_set, 0);
}

void apply(const std::string& backend, int feature_set, int width, uint64_t params, int num_threads, int device,
           uint64_t stream) {
  check_ran(
      backend_of(backend).apply(*pointer<ApplyParams>(params), feature_set, width, Target{num_threads, device, stream}),
      feature_set, width);
}

void sweep(const std::string& backend, int feature_set, int width, uint64_t accumulating, uint64_t applying,
           int num_threads, int device, uint64_t stream) {
  check_ran(backend_of(backend).sweep(*pointer<AccumulateParams>(accumulating), *pointer<ApplyParams>(applying),
                                      feature_set, width, Target{num_threads, device, stream}),
            feature_set, width);
}

// The part of the tensor level that `operation` is.
template <bool (*Backend::*operation)(const AdvanceParams&, const Target&)>
void level(const std::string& backend, uint64_t params, int device, uint64_t stream) {
  const AdvanceParams& p = *pointer<AdvanceParams>(params);
  check_ran((backend_of(backend).*operation)(p, Target{1, device, stream}), p.spec->feature_set, p.spec->width);
}

void step(const std::string& name, uint64_t level, uint64_t accumulating, uint64_t applying, bool lagged,
          int num_threads, int device, uint64_t stream) {
  const Backend& backend = backend_of(name);
  const Target target{num_threads, device, stream};
  const AdvanceParams& p = *pointer<AdvanceParams>(level);
  const AccumulateParams& first = *pointer<AccumulateParams>(accumulating);
  const ApplyParams& second = *pointer<ApplyParams>(applying);
  const int feature_set = p.spec->feature_set, width = p.spec->width;
  bool ran = backend.begin(p, target);
  if (lagged)
    ran = ran && backend.advance(p, target) && backend.sweep(first, second, feature_set, width, target);
  else
    ran = ran && backend.accumulate(first, feature_set, target) && backend.advance(p, target) &&
          backend.apply(second, feature_set, width, target);
  check_ran(ran && backend.finish(p, target), feature_set, width);
}

void write_words(const std::string& backend, uint64_t to, const std::vector<int64_t>& words, int device,
                 uint64_t stream) {
  backend_of(backend).write_words(pointer<int64_t>(to), words.data(), int64_t(words.size()), Target{1, device, stream});
}

void bind_backends(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  m.attr("chunk") = kChunk;                      // parameters of one row of the chunk table
  m.attr("source_sha256") = LOPT_SOURCE_SHA256;  // of csrc, cuda and CMakeLists.txt
  m.attr("sanitizer") = LOPT_SANITIZER;          // as in -fsanitize=; or ""
  m.def("accumulate", &accumulate, "backend"_a, "feature_set"_a, "params"_a, "num_threads"_a, "device"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Clip gradients, update mom and rms, reduce statistics; see AccumulateParams in csrc/api/kernels.h.");
  m.def("apply", &apply, "backend"_a, "feature_set"_a, "width"_a, "params"_a, "num_threads"_a, "device"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Features, small MLP, parameter update; see ApplyParams in csrc/api/kernels.h.");
  m.def("sweep", &sweep, "backend"_a, "feature_set"_a, "width"_a, "accumulating"_a, "applying"_a, "num_threads"_a,
        "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "accumulate and apply in one sweep, for operands of apply that do not depend on the statistics.");
  m.def("step", &step, "backend"_a, "level"_a, "accumulating"_a, "applying"_a, "lagged"_a, "num_threads"_a, "device"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "begin, accumulate, advance, apply and finish; lagged: begin, advance, accumulate and apply in one "
        "sweep, finish.");
  m.def("write_words", &write_words, "backend"_a, "to"_a, "words"_a, "device"_a, "stream"_a,
        "Write 64-bit integers to the device as kernel arguments, for CUDA graphs.");
  m.def("begin", &level<&Backend::begin>, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "Before accumulate: losses, and the clip limit of this step; see AdvanceParams in csrc/api/spec.h.");
  m.def("advance", &level<&Backend::advance>, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "Tensor level between the two operations.");
  m.def("finish", &level<&Backend::finish>, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "After apply: what the next LSTM step sees of the MLP.");
}

}  // namespace
}  // namespace lopt
