// Numbers of the rule that are not meta-learned; lopt/rule/constants.py has the same and explains them, and import compares
// the two lists.
#pragma once

#include "rule/maths.h"

namespace lopt {

// CONSTANT(name in C++, name in Python, value)
#define LOPT_CONSTANTS(CONSTANT)                                   \
  CONSTANT(kEpsilon, "EPSILON", 1e-8f)                             \
  CONSTANT(kTiny, "TINY", 1e-30f)                                  \
  CONSTANT(kInputBound, "INPUT_BOUND", 5.0f)                       \
  CONSTANT(kLogTimeScale, "LOG_TIME_SCALE", 8.0f)                  \
  CONSTANT(kLastShare, "LAST_SHARE", 0.99f)                        \
  CONSTANT(kMiddleShare, "MIDDLE_SHARE", 0.01f)                    \
  CONSTANT(kSlowShare, "SLOW_SHARE", 0.001f)                       \
  CONSTANT(kFallScale, "FALL_SCALE", 10.0f)                        \
  CONSTANT(kRiseScale, "RISE_SCALE", 100.0f)                       \
  CONSTANT(kSmallestScale, "SMALLEST_SCALE", 0.3f)                 \
  CONSTANT(kEmptyScale, "EMPTY_SCALE", 0.1f)                       \
  CONSTANT(kScaleGrowth, "SCALE_GROWTH", 2.0f)                     \
  CONSTANT(kMaxLogStep, "MAX_LOG_STEP", 6.0f)                      \
  CONSTANT(kWarmup, "WARMUP", 10.0f)                               \
  CONSTANT(kLargest, "LARGEST", 1e14f)                             \
  CONSTANT(kLargestParam, "LARGEST_PARAM", 3.3895313892515355e38f) \
  CONSTANT(kScaleOutlier, "SCALE_OUTLIER", 10.0f)                  \
  CONSTANT(kGradOutlier, "GRAD_OUTLIER", 1e4f)                     \
  CONSTANT(kLossOutlier, "LOSS_OUTLIER", 10.0f)                    \
  CONSTANT(kNewtonSchulz1, "NEWTON_SCHULZ_1", 3.4445f)             \
  CONSTANT(kNewtonSchulz3, "NEWTON_SCHULZ_3", -4.775f)             \
  CONSTANT(kNewtonSchulz5, "NEWTON_SCHULZ_5", 2.0315f)             \
  CONSTANT(kLeastRow, "LEAST_ROW", 0.2f)                           \
  CONSTANT(kMaxAspect, "MAX_ASPECT", 16.0f)                        \
  CONSTANT(kResting, "RESTING", 1e-4f)

#define LOPT_CONSTANT(name, python_name, value) constexpr float name = value;
LOPT_CONSTANTS(LOPT_CONSTANT)
#undef LOPT_CONSTANT

// WAVES[i]: 1, 3, 10, 30, ... 1e5
LOPT_HD float wave(int i) {
  return (i % 2 ? 3.0f : 1.0f) * (i < 2 ? 1.0f : i < 4 ? 10.0f : i < 6 ? 1e2f : i < 8 ? 1e3f : i < 10 ? 1e4f : 1e5f);
}

}  // namespace lopt
