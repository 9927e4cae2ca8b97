// Everything at tensor level between accumulate and apply, for the optimizer on the CPU; the formulas are in tensor_lstm.h.
// Compiled once per instruction set; cpu_dispatch.cpp picks.
#include <algorithm>
#include <vector>

#include "lstm_cell.h"

namespace lopt {
namespace LOPT_ISA {

void begin(const AdvanceParams& p) {
  const Globals g{p.step, p.train_loss, p.valid_loss, p.clip, p.from_lstm};
  std::fill_n(p.clip_limit, p.num_tensors, g.clip_limit(*p.spec));
}

bool advance(const AdvanceParams& p) {
  const Spec& s = *p.spec;
  return with_kernel(s.feature_set, s.width, [&](auto features, auto) {
    using Features = decltype(features);
    constexpr int kStats = kNumStats<Features>;
    const int tensors = static_cast<int>(p.num_tensors);
    const ThetaView theta(s, Features::kNumColumns, p.theta);
    const Globals g{p.step, p.train_loss, p.valid_loss, p.clip, p.from_lstm};
    TensorLevel level{tensors, p.shapes, p.h,         p.c,     p.feedback, p.initial_scale, p.updates, p.stats, p.scale,
                      p.shift, p.bias,   p.step_size, nullptr, nullptr,    nullptr,         nullptr,   nullptr};
    Arena count{nullptr};
    take_scratch(s, level, count);
    static thread_local std::vector<float> memory;  // kept between steps
    memory.resize(std::max(memory.size(), static_cast<size_t>(count.used)));
    Arena arena{memory.data()};
    take_scratch(s, level, arena);

    const float loss = p.pending_loss[1] > 0 ? p.pending_loss[0] / p.pending_loss[1] : NAN;
    p.pending_loss[0] = p.pending_loss[1] = 0;
    lopt::advance<Features>(s, theta, g, level, loss, static_cast<float>(p.total_steps),
                            LstmCell{theta, s.num_lstm_input(), s.lstm_width, level.gates, level.activation});
    double nonfinite = 0;
    for (int t = 0; t < tensors; ++t) {
      p.step_size[t] = p.lr[t] > 0 ? p.step_size[t] * p.lr[t] : 0.0f;  // lr = 0 wins over NaN
      p.keep[t] = 1.0f - p.lr[t] * p.decay[t];
      nonfinite += p.stats[int64_t{t} * kStats + kNonfinite];
    }
    *p.nonfinite += static_cast<int64_t>(nonfinite);
  });
}

void finish(const AdvanceParams& p) {
  const Spec& s = *p.spec;
  with_kernel(s.feature_set, s.width, [&](auto features, auto) {
    const ThetaView theta(s, decltype(features)::kNumColumns, p.theta);
    for (int64_t t = 0; t < p.num_tensors; ++t)
      next_feedback(s, theta, p.hidden + t * s.width, p.feedback + t * s.from_mlp);
  });
}

}  // namespace LOPT_ISA
}  // namespace lopt
