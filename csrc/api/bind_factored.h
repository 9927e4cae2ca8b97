// What a module offers to Python of learned optimizers of others (factored.h): names, arguments, docstrings; no logic.
#pragma once

#include "api/bind_backend.h"
#include "api/factored.h"

namespace lopt {
namespace {

template <bool (*FactoredKernels::*operation)(const FactoredParams&, const Target&)>
void factored(const std::string& backend, uint64_t params, int num_threads, int device, uint64_t stream) {
  const FactoredKernels* kernels = find_factored(backend);
  if (!kernels) throw std::invalid_argument("back end '" + backend + "' has no factored kernels in this build");
  const FactoredParams& p = *pointer<FactoredParams>(params);
  check_ran((kernels->*operation)(p, Target{num_threads, device, stream}), p.rule, p.width);
}

void bind_factored(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  m.def("factored_accumulate", &factored<&FactoredKernels::accumulate>, "backend"_a, "params"_a, "num_threads"_a,
        "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "Of a learned optimizer of others all accumulators, and what its MLP is made of; see csrc/api/factored.h.");
  m.def("factored_apply", &factored<&FactoredKernels::apply>, "backend"_a, "params"_a, "num_threads"_a, "device"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>(), "Its MLP and parameters; see csrc/api/factored.h.");
  m.def("factored_write", &factored<&FactoredKernels::write>, "backend"_a, "params"_a, "num_threads"_a, "device"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>(),
        "Directions that were treated as a whole to parameters; see csrc/api/factored.h.");
  m.def(
      "has_factored", [](const std::string& backend) { return find_factored(backend) != nullptr; }, "backend"_a,
      "Whether a back end has kernels of learned optimizers of others.");
}

}  // namespace
}  // namespace lopt
