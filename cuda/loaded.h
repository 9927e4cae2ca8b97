// Kernels for the GPU that were compiled while Python ran, as a back end (loaded.cpp).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "api/backend.h"

namespace lopt {

class LoadedKernels;

// Every back end is given this by bind_backend.h; the operations of one whose kernels were loaded find them here.
struct LoadedTarget : Target {
  const LoadedKernels* kernels;
};

struct LoadedBackend {
  Backend backend;
  const LoadedKernels* kernels;  // null of others
};

// Of machine code by architecture, as "90", and the names of its kernels in the order of enum Kernel (grids.h), empty where
// there is none. It is never destroyed, as a library would not be.
LoadedBackend loaded_backend(std::map<std::string, std::string> images, std::vector<std::string> names);

}  // namespace lopt
