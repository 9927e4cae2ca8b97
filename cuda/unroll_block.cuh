// One inner run of the unroll engine in one CUDA block: its memory, and a step of the optimizer. The networks and the loop over
// the steps are those of the CPU (csrc/unroll/run.h), the formulas those of csrc/rule.
//
// Note [Memory of a run]
// A block's shared memory holds, in this order and as far as it goes: the run's state but for the average of its iterates,
// gradients, what belongs to tensors, activations, theta. What is left over is in global memory, in `scratch`, or where the
// caller's state is; nothing else depends on it.
#pragma once

#include <new>

#include "unroll_team.cuh"
// unroll_team.cuh comes first: see Note [Teams] in csrc/unroll/layers.h.
#include "accumulate.cuh"
#include "api/step.h"
#include "cpu/orthogonal.h"
#include "unroll/run.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// Parts of shared and of global memory, of whole quads of floats; with null pointers it only counts.
struct BlockArena {
  float *shared, *global;
  int64_t limit;  // floats of shared memory
  int64_t used_shared = 0, used_global = 0;

  LOPT_BOTH bool fits(int64_t count) const { return used_shared + (count + 3) / 4 * 4 <= limit; }

  LOPT_BOTH float* take_shared(int64_t count) {
    float* at = shared ? shared + used_shared : nullptr;
    used_shared += (count + 3) / 4 * 4;
    return at;
  }

  LOPT_BOTH float* take(int64_t count) {
    if (fits(count)) return take_shared(count);
    float* at = global ? global + used_global : nullptr;
    used_global += (count + 3) / 4 * 4;
    return at;
  }
};

constexpr Size kPiece = 256;  // parameters of one tensor that a warp takes at once

// The LSTM cell of one tensor by a warp; x [inputs] and h [hidden] lie one after the other.
struct WarpLstm {
  WarpTeam team;
  const ThetaView& theta;
  int inputs, hidden;
  float* gates;  // [4 hidden]

  __device__ __forceinline__ void operator()(const float* x, float* h, float* c) const {
    team.linear(x, inputs + hidden, theta.lstm_w, theta.lstm_b, 4 * hidden, gates);
    team.sync();
    team.each(hidden, [&](Size j) LOPT_INLINE {
      h[j] = lstm_unit(gates[j], gates[hidden + j], gates[2 * hidden + j], gates[3 * hidden + j], c[j]);
    });
    team.sync();
  }
};

// The MLP's weights (MlpLayout) of the block's run.
template <int kSize>
__device__ __forceinline__ float* packed_weights() {
  struct alignas(16) Weights {
    float value[kSize];
  };
  __shared__ Weights weights;
  return weights.value;
}

// It lies in shared memory, made by one thread.
template <class Features, int kWidth>
struct BlockEngine {
  static constexpr int kColumns = Features::kNumColumns, kStats = kNumStats<Features>;
  static constexpr int kMom = Features::kNumMom, kRms = Features::kNumRms;
  using Layout = MlpLayout<kColumns, kWidth>;

  const BlockTeam team;
  const Spec s;
  const int tensors;
  const Size params;
  float* const kept_state;  // where the state is during the run; the caller's, or shared memory
  float* kept_theta;        // likewise; null for the caller's
  float* grad;
  float *stats, *hidden;         // [tensors, kStats], [tensors, width]
  double *of_pieces, *of_warps;  // [pieces, kStats or width], [warps, kStats]
  Size pieces = 0;
  int *tensor_of_piece, *first_piece, *offset;  // [pieces], [tensors], [tensors + 1] of the parameters
  Shared* shared;
  double* sums;        // [warps, kNumSums]
  float* corrections;  // [warps, kMom + kRms]
  float* to_lstm;      // [tensors, from_lstm]
  const TensorShape* const shapes;
  TensorLevel levels[kTeamWarps];  // they differ in their scratch memory
  ThetaView theta;
  Network<BlockTeam> model;
  Orthogonal<BlockTeam> orthogonal;
  RunState state;

  LOPT_BOTH BlockEngine(const Spec& spec, const Problem& problem, int64_t theta_floats, float* run_state, Layer* layers,
                        BlockArena& arena)
      : team(),
        s(spec),
        tensors(num_tensors(problem)),
        params(num_params(problem)),
        kept_state(place_state(spec, run_state, arena)),
        kept_theta(nullptr),
        shapes(reinterpret_cast<const TensorShape*>(problem.shapes)),
        model(take_rule(arena), problem, layers, arena),
        orthogonal(team, sizes_of_whole(), arena),
        state(Features{}, s, params, tensors, kept_state) {
    if (kept_state != run_state) state.average = run_state + (state.average - kept_state);
    if (arena.fits(theta_floats)) kept_theta = arena.take_shared(theta_floats);
  }

  LOPT_BOTH float* place_state(const Spec& spec, float* run_state, BlockArena& arena) const {
    const RunState counted(Features{}, spec, params, tensors, nullptr);
    const int64_t floats = counted.size - (params + 15) / 16 * 16;  // all but the average
    return arena.fits(floats) ? arena.take_shared(floats) : run_state;
  }

  LOPT_BOTH bool whole(int t) const { return s.newton_schulz > 0 && shapes[t].whole; }
  LOPT_BOTH Size numel(int t) const { return static_cast<Size>(shapes[t].numel); }

  LOPT_BOTH OrthogonalSizes sizes_of_whole() const {
    OrthogonalSizes sizes;
    for (int t = 0; t < tensors; ++t)
      if (whole(t)) sizes.include(static_cast<Size>(shapes[t].rows), numel(t) / static_cast<Size>(shapes[t].rows));
    return sizes;
  }

  template <class T>
  LOPT_BOTH static T* take_as(BlockArena& arena, int64_t count) {
    return reinterpret_cast<T*>(arena.take((count * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  }

  // Memory of the optimizer's step; of the network's comes after it.
  LOPT_BOTH BlockTeam take_rule(BlockArena& arena) {
    grad = arena.take(params);
    stats = s.lagged ? nullptr : arena.take(int64_t{tensors} * kStats);
    hidden = arena.take(int64_t{tensors} * kWidth);
    for (int t = 0; t < tensors; ++t) pieces += (numel(t) + kPiece - 1) / kPiece;
    of_pieces = take_as<double>(arena, int64_t{pieces} * (kStats < kWidth ? kWidth : kStats));
    of_warps = take_as<double>(arena, kTeamWarps * kStats);
    tensor_of_piece = take_as<int>(arena, pieces);
    first_piece = take_as<int>(arena, tensors);
    offset = take_as<int>(arena, tensors + 1);
    shared = take_as<Shared>(arena, 1);
    sums = take_as<double>(arena, kTeamWarps * kNumSums);
    corrections = arena.take(kTeamWarps * (kMom + kRms));
    to_lstm = arena.take(int64_t{tensors} * s.from_lstm);
    TensorLevel& level = levels[0];
    level = TensorLevel{};
    level.num_tensors = tensors;
    level.shapes = shapes;
    constexpr int of_clip_limit = 1, of_scale = kColumns, of_shift = kColumns, of_bias = kWidth, of_step_size = 1,
                  of_keep = 1, of_gate = 1;
#define LOPT_TAKE(Type, name) level.inputs.name = arena.take(int64_t{tensors} * of_##name);
    LOPT_APPLY_INPUTS(LOPT_TAKE)
#undef LOPT_TAKE
    for (int warp = 0; warp < kTeamWarps; ++warp) {
      if (warp > 0) levels[warp] = level;
      levels[warp].x = arena.take(s.num_lstm_input() + s.lstm_width);
      levels[warp].gates = arena.take(4 * s.lstm_width);
      levels[warp].constant = arena.take(s.num_constant());
    }
    return team;
  }

  // By one thread, where there is memory.
  LOPT_TEAM void fill_tables() {
    Size piece = 0;
    offset[0] = 0;
    for (int t = 0; t < tensors; ++t) {
      offset[t + 1] = offset[t] + numel(t);
      first_piece[t] = piece;
      for (Size begin = 0; begin < numel(t); begin += kPiece) tensor_of_piece[piece++] = t;
    }
    if (s.lagged) stats = state.stats;
    for (TensorLevel& level : levels) {
      level.stats = stats;
      level.h = state.h;
      level.c = state.c;
      level.feedback = state.feedback;
      level.initial_scale = state.initial_scale;
      level.updates = state.updates;
      level.rank = state.rank;
    }
  }

  LOPT_TEAM void run(const Run& r, const float* theta_row, int64_t theta_floats) {
    float* const there = reinterpret_cast<float*>(r.state);
    const Size floats = static_cast<Size>(state.size - (params + 15) / 16 * 16);
    if (kept_state != there) team.copy(floats, there, kept_state);
    if (kept_theta) team.copy(static_cast<Size>(theta_floats), theta_row, kept_theta);
    team.sync();
    if (team.rank() == 0) {
      theta = ThetaView(s, kColumns, kept_theta ? kept_theta : theta_row);
      fill_tables();
    }
    team.sync();
    pack_mlp<Features, kWidth>(team, s, theta, packed_weights<Layout::kSize>());
    team.sync();
    continue_run(*this, r, state);
    if (kept_state != there) team.copy(floats, kept_state, there);
  }

  // ---- The phases of a step (api/step.h) -------------------------------------------------------------------------------

  struct Step {
    BlockEngine& engine;
    const RunState& state;
    float loss, total_steps;

    LOPT_TEAM void begin() const {
      const float limit = clip_limit(engine.s, state.globals);
      engine.team.each(engine.tensors, [&](Size t) LOPT_INLINE { engine.levels[0].inputs.clip_limit[t] = limit; });
      engine.team.sync();
    }

    LOPT_TEAM void accumulate() const { engine.accumulate(); }
    LOPT_TEAM void advance() const { engine.advance(loss, total_steps); }
    LOPT_TEAM void apply() const { engine.apply(); }
    LOPT_TEAM void direction() const { engine.direct(); }
    LOPT_TEAM void finish() const { engine.finish(); }
    LOPT_TEAM void sweep() const {
      accumulate();
      apply();
    }
  };

  LOPT_CALLED void step(const RunState&, float loss, float total_steps, bool lagged) {
    Step phases{*this, state, loss, total_steps};
    run_step(phases, lagged);
  }

  // f(t, piece, first parameter among all, number of parameters), by warps.
  template <class Function>
  LOPT_TEAM void for_pieces(const Function& f) const {
    for (Size piece = warp_index(); piece < pieces; piece += kTeamWarps) {
      const int t = tensor_of_piece[piece];
      const Size begin = offset[t] + (piece - first_piece[t]) * kPiece, left = offset[t + 1] - begin;
      f(t, piece, begin, left < kPiece ? left : kPiece);
    }
  }

  LOPT_CALLED void accumulate() {
    float mom_decay[kMom], rms_decay[kRms];
#pragma unroll
    for (int k = 0; k < kMom; ++k) mom_decay[k] = s.mom_decay[k];
#pragma unroll
    for (int k = 0; k < kRms; ++k) rms_decay[k] = s.rms_decay[k];
    const Size stride = params;
    for_pieces([&](int t, Size piece, Size begin, Size count) LOPT_INLINE {
      const float limit = levels[0].inputs.clip_limit[t];
      const float *const params_at = state.param + begin, *const grads = grad + begin;
      float *const moms = state.mom + begin, *const rmss = state.rms + begin;
      float row[kStats] = {};
      Pivots pivots{};
      for (Size i = lane_index(); i < count; i += 32) {
        const float raw = grads[i], g = clip_gradient(raw, limit), p = params_at[i];
        float mom[kMom], rms[kRms];
        float first_mom = 0.0f, first_rms = 0.0f;
#pragma unroll
        for (int k = 0; k < kMom; ++k) {
          mom[k] = moms[k * stride + i] = next_accumulator(moms[k * stride + i], mom_decay[k], g);
          first_mom += mom[k];
        }
#pragma unroll
        for (int k = 0; k < kRms; ++k) {
          rms[k] = rmss[k * stride + i] = next_accumulator(rmss[k * stride + i], rms_decay[k], g * g);
          first_rms += rms[k];
        }
        if (i == lane_index()) pivots = {bounded(p), first_mom * (1.0f / kMom), first_rms * (1.0f / kRms)};
        add_one<Features>(g, p, mom, rms, pivots, row);
        row[Stat::nonfinite] += abs_of(raw) <= kLargestFloat ? 0.0f : 1.0f;
      }
      const auto of_lane = [&](Size lane) LOPT_INLINE { return lane < count ? (count - lane + 31) / 32 : 0; };
      finish_row<Features>(of_lane(lane_index()), pivots, row);
#pragma unroll
      for (int c = 0; c < kStats; ++c) {
        const double merged = merge_column<Features>(
            c, 32, count, [&](int64_t lane) -> double { return of_lane(static_cast<Size>(lane)); },
            [&](int64_t, int column) -> double { return row[column]; });
        if (lane_index() == 0) of_pieces[piece * kStats + c] = merged;
      }
    });
    team.sync();
    const WarpTeam warp;
    double* const total = of_warps + warp_index() * kStats;
    for (int t = warp_index(); t < tensors; t += kTeamWarps) {
      const double* const rows = of_pieces + first_piece[t] * kStats;
      const Size count = offset[t + 1] - offset[t];
      for (int c = 0; c < kStats; ++c) {
        const double merged = merge_column<Features>(
            c, (count + kPiece - 1) / kPiece, count,
            [&](int64_t r) -> double {
              const Size left = count - static_cast<Size>(r) * kPiece;
              return left < kPiece ? left : kPiece;
            },
            [&](int64_t r, int column) { return rows[r * kStats + column]; });
        if (lane_index() == 0) total[c] = merged;
      }
      warp.sync();
      if (lane_index() == 0) finish_stats<Features, double>(total, count, stats + int64_t{t} * kStats);
      warp.sync();
    }
    team.sync();
  }

  LOPT_CALLED void advance(float loss, float total_steps) {
    const WarpTeam warp;
    const Globals& g = state.globals;
    const TensorLevel& level = levels[warp_index()];
    const auto shape_of = [&](int t) LOPT_INLINE -> const TensorShape& { return shapes[t]; };
    const auto stats_of = [&](int t) LOPT_INLINE { return stats + t * kStats; };
    double own[kNumSums] = {};
    int new_tensors = 0;
    warp.each(tensors, [&](Size t) LOPT_INLINE {
      add_to_sums(shape_of(t), stats_of(t), own);
      new_tensors += !(state.initial_scale[t] > 0);
    });
    double* const total = sums + warp_index() * kNumSums;
#pragma unroll
    for (int i = 0; i < kNumSums; ++i) {
      const double sum = sum_of_warp(own[i]);
      if (lane_index() == 0) total[i] = sum;
    }
    const bool first = __any_sync(0xffffffffu, new_tensors > 0);
    warp.sync();
    const float mean_scale = first ? typical_scale(warp, tensors, shape_of, stats_of, total) : 0.0f;
    const float mean_square = mean_grad_square(warp, s, tensors, stats_of, total);
    time_inputs(warp, s, *g.step, total_steps, level.constant);
    team.sync();
    if (team.rank() == 0) *shared = advance_shared(s, g, total, mean_square, mean_scale, loss);
    team.sync();

    const int inputs = s.num_lstm_input(), width = s.lstm_width;
    float* const h = level.x + inputs;
    float* const correction = corrections + warp_index() * (kMom + kRms);
    const WarpLstm lstm{warp, theta, inputs, width, level.gates};
    for (int t = warp_index(); t < tensors; t += kTeamWarps) {
      const float updates = state.updates[t] + 1.0f;
      warp.copy(width, state.h + t * width, h);
      bias_corrections<Features>(warp, s, updates, correction);
      warp.sync();
      advance_row<Features>(warp, s, theta, g, *shared, level, t, updates, stats_of(t), correction, h,
                            state.c + t * width, to_lstm + t * s.from_lstm, lstm);
      warp.sync();
      warp.copy(width, h, state.h + t * width);
      if (lane_index() == 0) state.updates[t] = updates;
      warp.sync();
    }
    team.sync();
    const float finite = static_cast<float>(total[kSumFinite]);
    team.each(s.from_lstm, [&](Size j) LOPT_INLINE {
      float sum = 0.0f;
      for (int t = 0; t < tensors; ++t)
        if (!rests(stats_of(t))) sum += to_lstm[t * s.from_lstm + j] / finite;
      if (finite > 0) g.from_lstm[j] = sum;
    });
    if (team.rank() == 0) *g.step += 1;
    team.sync();
  }

  // Directions of matrices that are treated as a whole take the place of their gradients.
  LOPT_CALLED void apply() {
    const float* const weights = packed_weights<Layout::kSize>();
    constexpr int kRows = kWidth < 16 ? 2 : 1;  // parameters of a lane at once, which share the loads of weights
    const float feature_clip = s.feature_clip, magnitude_rate = s.magnitude_rate;
    const Size stride = params;
    for_pieces([&](int t, Size piece, Size begin, Size count) LOPT_INLINE {
      const bool is_whole = whole(t);
      const TensorInputs inputs(levels[0].inputs, t, kColumns, kWidth, is_whole);
      const float *const grads = grad + begin, *const params_at = state.param + begin;
      const float *const moms = state.mom + begin, *const rmss = state.rms + begin;
      float* const written = (is_whole ? grad : state.param) + begin;
      float hidden_sum[kWidth] = {};
      for (Size i = lane_index(); i < count; i += 32 * kRows) {
        float p[kRows], active[kRows], x[kColumns * kRows], units[kWidth * kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Size at = i + 32 * r < count ? i + 32 * r : i;
          const float g = clip_gradient(grads[at], inputs.clip_limit);
          p[r] = params_at[at];
          float mom[kMom], rms[kRms], raw[kColumns];
#pragma unroll
          for (int k = 0; k < kMom; ++k) mom[k] = moms[k * stride + at];
#pragma unroll
          for (int k = 0; k < kRms; ++k) rms[k] = rmss[k * stride + at];
          Features::columns(g, p[r], mom, rms, raw);
          active[r] = Features::active(rms);
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            x[c * kRows + r] = clamp_of(raw[c] * inputs.scale[c] + inputs.shift[c], feature_clip);
        }
        MlpOutput<float> out[kRows];
        small_mlp_rows < kColumns, kWidth, kRows, kWidth<16 ? kWidth : 16>(x, weights, inputs.bias, units, out);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (i + 32 * r >= count) break;
          if (inputs.moves()) written[i + 32 * r] = next_param(p[r], out[r], inputs, active[r], magnitude_rate);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) hidden_sum[j] += units[j * kRows + r];
        }
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const double sum = sum_of_warp(hidden_sum[j]);
        if (lane_index() == 0) of_pieces[piece * kWidth + j] = sum;
      }
    });
    team.sync();
    team.table(tensors, kWidth, [&](Size t, Size j) LOPT_INLINE {
      double sum = 0.0;
      const Size count = offset[t + 1] - offset[t], end = first_piece[t] + (count + kPiece - 1) / kPiece;
      for (Size piece = first_piece[t]; piece < end; ++piece) sum += of_pieces[piece * kWidth + j];
      hidden[t * kWidth + j] = static_cast<float>(sum / count);
    });
    team.sync();
  }

  LOPT_CALLED void direct() {
    if (s.newton_schulz == 0) return;
    const ApplyInputs& inputs = levels[0].inputs;
    for (int t = 0; t < tensors; ++t) {
      if (!whole(t)) continue;
      const Size rows = static_cast<Size>(shapes[t].rows), count = numel(t);
      const float step_size = inputs.step_size[t], keep = inputs.keep[t];
      float* const direction = grad + offset[t];
      float* const param = state.param + offset[t];
      float rank = state.rank[t];
      orthogonal.run(direction, rows, count / rows, shapes[t].turned != 0, inputs.gate[t], s.newton_schulz, rank);
      team.sync();
      if (team.rank() == 0 && step_size == step_size && is_finite(rank)) state.rank[t] = rank;
      if (moves(step_size, keep))
        team.each(count, [&](Size i) LOPT_INLINE { param[i] = next_param(param[i], direction[i], step_size, keep); });
    }
    team.sync();
  }

  LOPT_CALLED void finish() {
    team.table(tensors, s.from_mlp, [&](Size t, Size o) LOPT_INLINE {
      set_feedback(levels[0].inputs.step_size[t], feedback_of(s, theta, hidden + t * kWidth, o),
                   state.feedback[t * s.from_mlp + o]);
    });
    team.sync();
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
