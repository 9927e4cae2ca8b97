// Picks the widest instruction set that was compiled and that this processor has.
#include "cpu/cpu_dispatch.h"

#include "api/kernels.h"
#include "unroll/unroll.h"

namespace lopt {

#define LOPT_DECLARE(isa)                                                                                           \
  namespace isa {                                                                                                   \
  bool begin(const AdvanceParams& params);                                                                          \
  bool accumulate(const AccumulateParams& params, int feature_set, int num_threads);                                \
  bool advance(const AdvanceParams& params);                                                                        \
  bool apply(const ApplyParams& params, int feature_set, int width, int num_threads);                               \
  bool sweep(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,         \
             int num_threads);                                                                                      \
  bool finish(const AdvanceParams& params);                                                                         \
  double multiply_add_rate(int num_threads, double seconds);                                                        \
  int64_t start_run(const Spec& spec, const Problem& problem, const float* theta, const float* init, float* state); \
  bool unroll(const Spec& spec, const Problem* problems, const Run* runs, int64_t num_runs, const float* theta,     \
              int64_t theta_stride, int num_threads);                                                               \
  }
LOPT_DECLARE(baseline)
#if defined(__x86_64__)
LOPT_DECLARE(v3)
LOPT_DECLARE(v4)
#endif

namespace {

struct CpuKernels {
  const char* name;
  decltype(&baseline::begin) begin;
  decltype(&baseline::accumulate) accumulate;
  decltype(&baseline::advance) advance;
  decltype(&baseline::apply) apply;
  decltype(&baseline::sweep) sweep;
  decltype(&baseline::finish) finish;
  decltype(&baseline::multiply_add_rate) multiply_add_rate;
  decltype(&baseline::start_run) start_run;
  decltype(&baseline::unroll) unroll;
};

#define LOPT_KERNELS(name, isa)                                                 \
  {name,       isa::begin,  isa::accumulate,        isa::advance,   isa::apply, \
   isa::sweep, isa::finish, isa::multiply_add_rate, isa::start_run, isa::unroll}

constexpr CpuKernels kKernels[] = {
#if defined(__x86_64__)
    LOPT_KERNELS("x86-64-v4", v4),
    LOPT_KERNELS("x86-64-v3", v3),
#endif
    LOPT_KERNELS("baseline", baseline),
};

bool supported([[maybe_unused]] int index) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("bmi");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return index == 0 ? v4 : index == 1 ? v3 : true;
#else
  return true;
#endif
}

const CpuKernels*& selected() {
  static const CpuKernels* kernels = [] {
    const CpuKernels* first = kKernels;
    while (!supported(static_cast<int>(first - kKernels))) ++first;
    return first;
  }();
  return kernels;
}

}  // namespace

std::vector<std::string> simd_available() {
  std::vector<std::string> names;
  for (const CpuKernels& kernels : kKernels)
    if (supported(static_cast<int>(&kernels - kKernels))) names.emplace_back(kernels.name);
  return names;
}

std::string simd_selected() { return selected()->name; }

bool simd_select(const std::string& name) {
  for (const CpuKernels& kernels : kKernels)
    if (name == kernels.name && supported(static_cast<int>(&kernels - kKernels))) {
      selected() = &kernels;
      return true;
    }
  return false;
}

double multiply_add_rate(int num_threads, double seconds) {
  return selected()->multiply_add_rate(num_threads, seconds);
}

bool accumulate_cpu(const AccumulateParams& params, int feature_set, int num_threads) {
  return selected()->accumulate(params, feature_set, num_threads);
}

bool apply_cpu(const ApplyParams& params, int feature_set, int width, int num_threads) {
  return selected()->apply(params, feature_set, width, num_threads);
}

bool sweep_cpu(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,
               int num_threads) {
  return selected()->sweep(accumulating, applying, feature_set, width, num_threads);
}

bool begin_cpu(const AdvanceParams& params) { return selected()->begin(params); }

bool advance_cpu(const AdvanceParams& params) { return selected()->advance(params); }

bool finish_cpu(const AdvanceParams& params) { return selected()->finish(params); }

int64_t start_run_cpu(const Spec& spec, const Problem& problem, const float* theta, const float* init, float* state) {
  return selected()->start_run(spec, problem, theta, init, state);
}

bool unroll_cpu(const Spec& spec, const Problem* problems, const Run* runs, int64_t num_runs, const float* theta,
                int64_t theta_stride, int num_threads) {
  return selected()->unroll(spec, problems, runs, num_runs, theta, theta_stride, num_threads);
}

}  // namespace lopt
