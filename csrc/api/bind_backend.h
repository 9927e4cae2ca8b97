// What a module of kernels offers to Python over its back ends: names, arguments, docstrings; no logic. Addresses, sizes
// and streams are integers, so a module needs no torch to build and works with any.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../cuda/loaded.h"
#include "api/backend.h"
#include "api/step.h"

namespace lopt {
namespace {

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// Those of libraries and kernels that were loaded later (csrc/cpu/own_cpu.cpp, cuda/loaded.cpp), by name.
std::map<std::string, LoadedBackend>& added_backends() {
  static std::map<std::string, LoadedBackend> backends;
  return backends;
}

// A back end, and where it is to run.
struct Place {
  const Backend& backend;
  LoadedTarget target;
};

Place place_of(const std::string& name, int num_threads = 1, int device = 0, uint64_t stream = 0) {
  if (const Backend* backend = find_backend(name)) return {*backend, {{num_threads, device, stream}, nullptr}};
  const auto added = added_backends().find(name);
  if (added == added_backends().end()) throw std::invalid_argument("back end '" + name + "' is not part of this build");
  return {added->second.backend, {{num_threads, device, stream}, added->second.kernels}};
}

void check_ran(bool ran, int feature_set, int width) {
  if (!ran)
    throw std::invalid_argument("no kernel is compiled for feature set " + std::to_string(feature_set) + " and width " +
                                std::to_string(width));
}

void accumulate(const std::string& backend, int feature_set, uint64_t params, int num_threads, int device,
                uint64_t stream) {
  const Place place = place_of(backend, num_threads, device, stream);
  check_ran(place.backend.accumulate(*pointer<AccumulateParams>(params), feature_set, place.target), feature_set, 0);
}

bool write(const std::string& backend, uint64_t params, bool orthogonalised, int num_threads, int device,
           uint64_t stream) {
  const Place place = place_of(backend, num_threads, device, stream);
  return place.backend.write(*pointer<ApplyParams>(params), orthogonalised, place.target);
}

void apply(const std::string& backend, int feature_set, int width, uint64_t params, int num_threads, int device,
           uint64_t stream) {
  const Place place = place_of(backend, num_threads, device, stream);
  check_ran(place.backend.apply(*pointer<ApplyParams>(params), feature_set, width, place.target), feature_set, width);
}

void sweep(const std::string& backend, int feature_set, int width, uint64_t accumulating, uint64_t applying,
           int num_threads, int device, uint64_t stream) {
  const Place place = place_of(backend, num_threads, device, stream);
  check_ran(place.backend.sweep(*pointer<AccumulateParams>(accumulating), *pointer<ApplyParams>(applying), feature_set,
                                width, place.target),
            feature_set, width);
}

// The part of the tensor level that `operation` is.
template <bool (*Backend::*operation)(const AdvanceParams&, const Target&)>
void level(const std::string& backend, uint64_t params, int device, uint64_t stream) {
  const AdvanceParams& p = *pointer<AdvanceParams>(params);
  const Place place = place_of(backend, 1, device, stream);
  check_ran((place.backend.*operation)(p, place.target), p.spec->feature_set, p.spec->width);
}

// The phases of a back end over one plan and the levels that share it (api/step.h).
struct BackendPhases {
  const Backend& backend;
  const Target& target;
  const uint64_t* levels;  // [num_levels] addresses of AdvanceParams
  int64_t num_levels;
  const AccumulateParams& accumulating;
  const ApplyParams& applying;
  int feature_set, width;

  void each_level(bool (*operation)(const AdvanceParams&, const Target&)) const {
    for (int64_t i = 0; i < num_levels; ++i)
      check_ran(operation(*pointer<AdvanceParams>(levels[i]), target), feature_set, width);
  }
  void begin() const { each_level(backend.begin); }
  void accumulate() const { check_ran(backend.accumulate(accumulating, feature_set, target), feature_set, width); }
  void advance() const { each_level(backend.advance); }
  void apply() const { check_ran(backend.apply(applying, feature_set, width, target), feature_set, width); }
  void sweep() const {
    check_ran(backend.sweep(accumulating, applying, feature_set, width, target), feature_set, width);
  }
  void finish() const { each_level(backend.finish); }
};

// False where it stopped: matrices are to be orthogonalised by torch, and write and finish have yet to come.
bool step(const std::string& backend, uint64_t levels, int64_t num_levels, uint64_t accumulating, uint64_t applying,
          bool lagged, int num_threads, int device, uint64_t stream) {
  const uint64_t* addresses = pointer<uint64_t>(levels);
  const Spec& s = *pointer<AdvanceParams>(addresses[0])->spec;
  const Place place = place_of(backend, num_threads, device, stream);
  BackendPhases phases{place.backend,
                       place.target,
                       addresses,
                       num_levels,
                       *pointer<AccumulateParams>(accumulating),
                       *pointer<ApplyParams>(applying),
                       s.feature_set,
                       s.width};
  run_until_direction(phases, lagged);
  const bool written = phases.backend.write(phases.applying, false, phases.target);
  if (written) phases.finish();
  return written;
}

void write_words(const std::string& backend, uint64_t to, const std::vector<int64_t>& words, int device,
                 uint64_t stream) {
  const Place place = place_of(backend, 1, device, stream);
  place.backend.write_words(pointer<int64_t>(to), words.data(), int64_t(words.size()), place.target);
}

void bind_backends(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  m.attr("chunk") = kChunk;                      // parameters of one row of the chunk table
  m.attr("source_sha256") = LOPT_SOURCE_SHA256;  // of csrc, cuda and CMakeLists.txt
  m.attr("sanitizer") = LOPT_SANITIZER;          // as in -fsanitize=; or ""
  m.def("accumulate", &accumulate, "backend"_a, "feature_set"_a, "params"_a, "num_threads"_a, "device"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Clip gradients, update mom and rms, reduce statistics; see AccumulateParams in csrc/api/structs.h.");
  m.def("apply", &apply, "backend"_a, "feature_set"_a, "width"_a, "params"_a, "num_threads"_a, "device"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Features, small MLP, parameter update; see ApplyParams in csrc/api/structs.h.");
  m.def("sweep", &sweep, "backend"_a, "feature_set"_a, "width"_a, "accumulating"_a, "applying"_a, "num_threads"_a,
        "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "accumulate and apply in one sweep, for operands of apply that do not depend on the statistics.");
  m.def("step", &step, "backend"_a, "levels"_a, "num_levels"_a, "accumulating"_a, "applying"_a, "lagged"_a,
        "num_threads"_a, "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "begin, accumulate, advance, apply and finish; lagged: begin, advance, accumulate and apply in one "
        "sweep, finish. False where it stopped before finish: matrices are to be orthogonalised by the caller, and "
        "written.");
  m.def(
      "native_side", [](const std::string& backend) { return place_of(backend).backend.native_side; }, "backend"_a,
      "Shorter side up to which write orthogonalises matrices itself.");
  m.def("write", &write, "backend"_a, "params"_a, "orthogonalised"_a, "num_threads"_a, "device"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Directions of matrices -> parameters; False where some are left for the caller to orthogonalise, and for "
        "another "
        "call. See ApplyParams in csrc/api/structs.h.");
  m.def("write_words", &write_words, "backend"_a, "to"_a, "words"_a, "device"_a, "stream"_a,
        "Write 64-bit integers to the device as kernel arguments, for CUDA graphs.");
  m.def(
      "add_backend",
      [](const std::string& name, uint64_t backend) {
        added_backends()[name] = {*pointer<const Backend>(backend), nullptr};
      },
      "name"_a, "backend"_a, "Make known the back end of a library that was compiled of the same sources.");
  m.def("begin", &level<&Backend::begin>, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "Before accumulate: losses, and the clip limit of this step; see AdvanceParams in csrc/api/structs.h.");
  m.def("advance", &level<&Backend::advance>, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "Tensor level between the two operations.");
  m.def("finish", &level<&Backend::finish>, "backend"_a, "params"_a, "device"_a, "stream"_a,
        "After apply: what the next LSTM step sees of the MLP.");
}

}  // namespace
}  // namespace lopt
