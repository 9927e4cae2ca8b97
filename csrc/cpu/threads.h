// How many threads a parallel region gets: never more than its work is worth, and one in a process that was forked, as
// OpenMP's threads stay behind in its parent and a region of more than one would wait for them for ever.
// The number of threads changes no result.
#pragma once

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "api/kernels.h"

namespace lopt {

inline std::atomic<bool> forked{false}, started{false};  // started: a region of ours had several threads

// Torch may share this OpenMP and would wait for threads that we started.
inline void in_forked_child() {
  forked = true;
  if (started) omp_set_num_threads(1);
}
inline const int fork_handler = pthread_atfork(nullptr, nullptr, in_forked_child);

// `work` in the unit of `grain`, which is what one thread does in less time than it takes to wake another.
inline int threads_for(int num_threads, int64_t work, int64_t grain) {
  if (forked || num_threads < 2 || work < 2 * grain) return 1;
  started = true;
  return static_cast<int>(std::min<int64_t>(work / grain, num_threads));
}

// For one region over all tensors.
inline int threads_over(const TensorEntry* tensors, int64_t num_tensors, int num_threads) {
  constexpr int64_t kGrain = 16384;  // parameters
  int64_t params = 0;
  for (int64_t t = 0; t < num_tensors && params < num_threads * kGrain; ++t) params += tensors[t].numel;
  return threads_for(num_threads, params, kGrain);
}

}  // namespace lopt
