// Starts kernels that NVRTC compiled while Python ran (own_rtc.cu), through the CUDA driver, which is looked up when it is
// needed: building this takes no CUDA. What a launcher of a .cu file does is here once for all of them.
#include "loaded.h"

#include <dlfcn.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>

#include "checks.h"

namespace lopt {

namespace {

// CUresult, CUdevice and enums are int, CUcontext, CUmodule, CUfunction and CUstream pointers, CUdeviceptr is a number.
struct Driver {
  int (*cuInit)(unsigned);
  int (*cuGetErrorString)(int, const char**);
  int (*cuDeviceGet)(int*, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuCtxPushCurrent_v2)(void*);
  int (*cuCtxPopCurrent_v2)(void**);
  int (*cuModuleLoadData)(void**, const void*);
  int (*cuModuleGetFunction)(void**, void*, const char*);
  int (*cuModuleGetGlobal_v2)(uint64_t*, size_t*, void*, const char*);
  int (*cuMemcpyDtoH_v2)(void*, uint64_t, size_t);
  int (*cuFuncSetAttribute)(void*, int, int);
  int (*cuLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                        void**);
};
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
constexpr int kMostDynamicBytes = 8;                         // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

template <class Function>
void look_up(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("the CUDA driver has no ") + name + "; update it");
}

const Driver& driver() {
  static const Driver found = [] {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) throw std::runtime_error(std::string("there is no CUDA driver: ") + dlerror());
    Driver d{};
#define LOPT_LOOK_UP(name) look_up(library, #name, d.name)
    LOPT_LOOK_UP(cuInit), LOPT_LOOK_UP(cuGetErrorString), LOPT_LOOK_UP(cuDeviceGet), LOPT_LOOK_UP(cuDeviceGetAttribute);
    LOPT_LOOK_UP(cuDevicePrimaryCtxRetain), LOPT_LOOK_UP(cuCtxPushCurrent_v2), LOPT_LOOK_UP(cuCtxPopCurrent_v2);
    LOPT_LOOK_UP(cuModuleLoadData), LOPT_LOOK_UP(cuModuleGetFunction), LOPT_LOOK_UP(cuModuleGetGlobal_v2);
    LOPT_LOOK_UP(cuMemcpyDtoH_v2), LOPT_LOOK_UP(cuFuncSetAttribute), LOPT_LOOK_UP(cuLaunchKernel);
#undef LOPT_LOOK_UP
    return d;
  }();
  return found;
}

void check(int result, const std::string& call) {
  if (result == 0) return;
  const char* message = nullptr;
  driver().cuGetErrorString(result, &message);
  throw std::runtime_error(call + " failed: " + (message ? message : "error " + std::to_string(result)));
}
#define LOPT_DRIVER(name, ...) check(driver().name(__VA_ARGS__), #name)

// The primary context of a device, which torch uses too, is current for the life of this.
class Context {
 public:
  explicit Context(int device) { LOPT_DRIVER(cuCtxPushCurrent_v2, of(device)); }
  ~Context() {
    void* popped;
    (void)driver().cuCtxPopCurrent_v2(&popped);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

 private:
  static void* of(int device) {
    static std::mutex mutex;
    static std::map<int, void*> contexts;  // kept for good, as torch keeps them
    const std::lock_guard<std::mutex> lock(mutex);
    void*& context = contexts[device];
    if (!context) {
      int handle;
      LOPT_DRIVER(cuInit, 0);
      LOPT_DRIVER(cuDeviceGet, &handle, device);
      LOPT_DRIVER(cuDevicePrimaryCtxRetain, &context, handle);
    }
    return context;
  }
};

}  // namespace

class LoadedKernels {
 public:
  LoadedKernels(std::map<std::string, std::string> images, std::vector<std::string> names)
      : images_(std::move(images)), names_(std::move(names)) {
    if (names_.size() != kNumKernels)
      throw std::invalid_argument("names: expected " + std::to_string(int{kNumKernels}) + " of kernels, got " +
                                  std::to_string(names_.size()));
  }

  bool has(int kernel) const { return !names_[kernel].empty(); }

  // The kernel with these arguments, on the caller's stream. `bytes` of dynamic shared memory, beside its own.
  template <class... Arguments>
  void launch(int kernel, unsigned grid, unsigned block, size_t bytes, const Target& target,
              const Arguments&... arguments) const {
    const Context context(target.device);
    const OnDevice& here = on_device(target.device);
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check(driver().cuLaunchKernel(here.functions[kernel], grid, 1, 1, block, 1, 1,
                                  static_cast<unsigned>(here.bytes[kernel] + bytes),
                                  reinterpret_cast<void*>(target.stream), addresses, nullptr),
          "cuLaunchKernel of " + names_[kernel]);
  }

  template <class Params>
  void launch_per_chunk(int kernel, const char* name, const Params& params, const Target& target) const {
    check_chunks(name, params.num_chunks);
    if (params.num_chunks) launch(kernel, static_cast<unsigned>(params.num_chunks), kThreads, 0, target, params);
  }

 private:
  struct OnDevice {
    void* functions[kNumKernels] = {};
    int bytes[kNumKernels] = {};
  };

  // In the context of the device.
  const OnDevice& on_device(int device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = devices_.find(device);
    return found != devices_.end() ? found->second : devices_.emplace(device, load(device)).first->second;
  }

  OnDevice load(int device) const {
    int handle, major, minor;
    LOPT_DRIVER(cuDeviceGet, &handle, device);
    LOPT_DRIVER(cuDeviceGetAttribute, &major, kCapabilityMajor, handle);
    LOPT_DRIVER(cuDeviceGetAttribute, &minor, kCapabilityMinor, handle);
    const auto image = images_.find(std::to_string(major) + std::to_string(minor));
    if (image == images_.end())
      throw std::runtime_error("device " + std::to_string(device) + ": no kernel was compiled for capability " +
                               std::to_string(major) + "." + std::to_string(minor) +
                               "; make the optimizer anew, after the GPU is there");
    void* module;
    LOPT_DRIVER(cuModuleLoadData, &module, image->second.data());
    OnDevice result;
    uint64_t address;
    size_t size;
    LOPT_DRIVER(cuModuleGetGlobal_v2, &address, &size, module, "lopt_dynamic_bytes");
    if (size != sizeof result.bytes) throw std::runtime_error("lopt_dynamic_bytes: of other sources");
    LOPT_DRIVER(cuMemcpyDtoH_v2, result.bytes, address, size);
    for (int kernel = 0; kernel < kNumKernels; ++kernel) {
      if (!has(kernel)) continue;
      LOPT_DRIVER(cuModuleGetFunction, &result.functions[kernel], module, names_[kernel].c_str());
      if (result.bytes[kernel])
        LOPT_DRIVER(cuFuncSetAttribute, result.functions[kernel], kMostDynamicBytes, result.bytes[kernel]);
    }
    return result;
  }

  const std::map<std::string, std::string> images_;
  const std::vector<std::string> names_;
  mutable std::mutex mutex_;
  mutable std::map<int, OnDevice> devices_;  // whose entries stay where they are
};

namespace {

const LoadedKernels& kernels_of(const Target& target) { return *static_cast<const LoadedTarget&>(target).kernels; }

bool begin(const AdvanceParams& params, const Target& target) {
  kernels_of(target).launch(kBeginKernel, blocks_of(params.num_tensors + 1), kThreads, 0, target, *params.spec, params);
  return true;
}

bool accumulate(const AccumulateParams& params, int, const Target& target) {
  kernels_of(target).launch_per_chunk(kAccumulateKernel, "accumulate", params, target);
  return true;
}

bool advance(const AdvanceParams& params, const Target& target) {
  const Spec& s = *params.spec;
  const size_t bytes = row_bytes(s);
  if (params.num_tensors)
    kernels_of(target).launch(kAdvanceKernel, row_blocks(params.num_tensors), kRowThreads, bytes, target, s, params);
  return true;
}

bool apply(const ApplyParams& params, int, int, const Target& target) {
  kernels_of(target).launch_per_chunk(kApplyKernel + params.precision, "apply", params, target);
  return true;
}

bool sweep(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,
           const Target& target) {
  const int kernel = kSweepKernel + applying.precision;
  if (!kernels_of(target).has(kernel))  // of a state in 8 bits
    return accumulate(accumulating, feature_set, target) && apply(applying, feature_set, width, target);
  kernels_of(target).launch_per_chunk(kernel, "sweep", SweepParams{accumulating, applying, applying.num_chunks},
                                      target);
  return true;
}

bool write(const ApplyParams& params, bool orthogonalised, const Target& target) {
  if (params.newton_schulz == 0) return true;
  if (!orthogonalised) return false;
  kernels_of(target).launch_per_chunk(kWriteKernel, "write", params, target);
  return true;
}

bool finish(const AdvanceParams& params, const Target& target) {
  const Spec& s = *params.spec;
  if (params.num_tensors)
    kernels_of(target).launch(kFinishKernel, blocks_of(params.num_tensors * s.from_mlp), kThreads, 0, target, s,
                              params);
  return true;
}

void write_words(int64_t* to, const int64_t* words, int64_t count, const Target& target) {
  in_parts(words, count, [&](const Words& part, int64_t first, int size) {
    kernels_of(target).launch(kWordsKernel, 1, kThreads, 0, target, part, to + first, size);
  });
}

}  // namespace

LoadedBackend loaded_backend(std::map<std::string, std::string> images, std::vector<std::string> names) {
  const Backend backend{begin, accumulate, advance, apply, sweep, write, 0, finish, write_words};
  return {backend, new LoadedKernels(std::move(images), std::move(names))};
}

}  // namespace lopt
