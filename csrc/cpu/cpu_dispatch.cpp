// Picks the widest instruction set that was compiled and that this processor has.
#include "cpu/cpu_dispatch.h"

#ifdef LOPT_X86_LEVELS
#include <cpuid.h>
#endif

#include <algorithm>

#include "api/factored.h"
#include "unroll/unroll.h"

namespace lopt {

#define LOPT_DECLARE(isa)                                                                                           \
  namespace isa {                                                                                                   \
  bool begin(const AdvanceParams& params, const Target& target);                                                    \
  bool accumulate(const AccumulateParams& params, int feature_set, const Target& target);                           \
  bool advance(const AdvanceParams& params, const Target& target);                                                  \
  bool apply(const ApplyParams& params, int feature_set, int width, const Target& target);                          \
  bool sweep(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,         \
             const Target& target);                                                                                 \
  bool write(const ApplyParams& params, bool orthogonalised, const Target& target);                                 \
  bool finish(const AdvanceParams& params, const Target& target);                                                   \
  double multiply_add_rate(int num_threads, double seconds);                                                        \
  int64_t start_run(const Spec& spec, const Problem& problem, const float* theta, const float* init, float* state); \
  bool unroll(const UnrollCall& call, const Target& target);                                                        \
  void loss_and_gradient(const GradientCall& call, const Target& target);                                           \
  bool factored_accumulate(const FactoredParams& params, const Target& target);                                     \
  bool factored_apply(const FactoredParams& params, const Target& target);                                          \
  bool factored_write(const FactoredParams& params, const Target& target);                                          \
  }
LOPT_DECLARE(baseline)
#ifdef LOPT_X86_LEVELS
LOPT_DECLARE(v3)
LOPT_DECLARE(v4)
#endif

namespace {

int64_t no_scratch(const Spec*, const Problem*, int64_t, const Target&) { return 0; }

void write_words(int64_t* to, const int64_t* words, int64_t count, const Target&) { std::copy_n(words, count, to); }

struct CpuKernels {
  const char* name;
  Backend backend;
  decltype(&baseline::multiply_add_rate) multiply_add_rate;
  decltype(&baseline::start_run) start_run;
  UnrollEngine engine;
  FactoredKernels factored;
};

#define LOPT_KERNELS(name, isa)                                                                                 \
  {                                                                                                             \
      name,                                                                                                     \
      {isa::begin, isa::accumulate, isa::advance, isa::apply, isa::sweep, isa::write, kNativeSide, isa::finish, \
       write_words},                                                                                            \
      isa::multiply_add_rate,                                                                                   \
      isa::start_run,                                                                                           \
      {no_scratch, isa::unroll, isa::loss_and_gradient},                                                        \
      {isa::factored_accumulate, isa::factored_apply, isa::factored_write},                                     \
  }

constexpr CpuKernels kKernels[] = {
#ifdef LOPT_X86_LEVELS
    LOPT_KERNELS("x86-64-v4", v4),
    LOPT_KERNELS("x86-64-v3", v3),
#endif
    LOPT_KERNELS("baseline", baseline),
};

#ifdef LOPT_X86_LEVELS
// Not all compilers know __builtin_cpu_supports("f16c").
bool converts_halves() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool supported([[maybe_unused]] int index) {
#ifdef LOPT_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("bmi") && converts_halves();
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

const Backend& cpu_backend() { return selected()->backend; }

int64_t start_run_cpu(const Spec& spec, const Problem& problem, const float* theta, const float* init, float* state) {
  return selected()->start_run(spec, problem, theta, init, state);
}

const UnrollEngine& cpu_engine() { return selected()->engine; }

const FactoredKernels& cpu_factored() { return selected()->factored; }

}  // namespace lopt
