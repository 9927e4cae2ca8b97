// Parts of accumulate that the single sweep shares; one chunk or tensor each.
#pragma once

#include "api/backend.h"

namespace lopt {
namespace LOPT_ISA {

void accumulate_chunk(const AccumulateParams& params, int feature_set, int64_t index);
void merge_stats(const AccumulateParams& params, int feature_set, int64_t t);

}  // namespace LOPT_ISA
}  // namespace lopt
