// See seen.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace lopt {

void bind_seen(pybind11::module_& m);

}  // namespace lopt
