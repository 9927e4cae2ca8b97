// Everything at tensor level between accumulate and apply, for the optimizer on the CPU; the formulas are in tensor_lstm.h.
// Compiled once per instruction set; cpu_dispatch.cpp picks.
#include <algorithm>
#include <vector>

#include "api/backend.h"
#include "cpu/lstm_cell.h"

namespace lopt {
namespace LOPT_ISA {

bool begin(const AdvanceParams& p, const Target&) {
  const Globals g{p.step, p.train_loss, p.valid_loss, p.clip, p.from_lstm};
  observe_pending(p.pending_loss, p.new_train ? *p.new_train : p.train_value);
  observe_valid(*p.spec, g, p.new_valid ? *p.new_valid : p.valid_value);
  const float limit = clip_limit(*p.spec, g);
  for (int64_t i = 0; i < p.num_tensors; ++i) p.clip_limit[p.rows[i]] = limit;
  return true;
}

bool advance(const AdvanceParams& p, const Target&) {
  const Spec& s = *p.spec;
  return with_kernel(s.feature_set, s.width, [&](auto features, auto) {
    using Features = decltype(features);
    const int tensors = static_cast<int>(p.num_tensors);
    const ThetaView theta(s, Features::kNumColumns, p.theta);
    const Globals g{p.step, p.train_loss, p.valid_loss, p.clip, p.from_lstm};
    TensorLevel level{};
    level.num_tensors = tensors;
    level.rows = p.rows;
    level.shapes = p.shapes;
    level.h = p.h;
    level.c = p.c;
    level.feedback = p.feedback;
    level.initial_scale = p.initial_scale;
    level.rank = p.rank;
    level.updates = p.updates;
    level.stats = p.stats;
    level.lr = p.lr;
    level.decay = p.decay;
    level.inputs = inputs_of(p);
    Arena count{nullptr};
    take_scratch(s, level, count);
    static thread_local std::vector<float> memory;  // kept between steps
    memory.resize(std::max(memory.size(), static_cast<size_t>(count.used)));
    Arena arena{memory.data()};
    take_scratch(s, level, arena);

    const float loss = mean_pending(p.pending_loss);
    std::fill_n(p.pending_loss, int{PendingLoss::kCount}, 0.0f);
    const LstmCell cell{theta, s.num_lstm_input(), s.lstm_width, level.gates, level.activation};
    lopt::advance<Features>(s, theta, g, level, loss, *p.total_steps, cell, p.nonfinite);
  });
}

bool finish(const AdvanceParams& p, const Target&) {
  const Spec& s = *p.spec;
  return with_kernel(s.feature_set, s.width, [&](auto features, auto) {
    const ThetaView theta(s, decltype(features)::kNumColumns, p.theta);
    for (int64_t i = 0; i < p.num_tensors; ++i) {
      const int64_t t = p.rows[i];
      next_feedback(s, theta, p.hidden + t * s.width, p.step_size[t], p.feedback + t * s.from_mlp);
    }
  });
}

}  // namespace LOPT_ISA
}  // namespace lopt
