// What a kernel and whoever starts it agree on: sizes of blocks and grids, shared memory, arguments.
#pragma once

#include "api/kernels.h"
#include "rule/inputs.h"

namespace lopt {

constexpr int kThreads = 128;  // per block
constexpr int kWarps = kThreads / 32;
constexpr int kRowThreads = 256;  // per block of `advance`: a column of the LSTM's matrix each, in the paper
constexpr int kRowBlocks = 512;   // at most; with more tensors, a block takes several
constexpr int64_t kMostChunks = 0x7fffffff;
constexpr int kMostRowBytes = 32 << 10;

LOPT_HD unsigned blocks_of(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }
LOPT_HD unsigned row_blocks(int64_t tensors) {
  return static_cast<unsigned>(tensors < kRowBlocks ? tensors : kRowBlocks);
}

// Floats of dynamic shared memory in a block of `advance`: x and h, gates, constant.
LOPT_HD int row_floats(const Spec& s) { return s.num_lstm_input() + 5 * s.lstm_width + s.num_constant(); }

struct SweepParams {
  AccumulateParams accumulating;  // its `finished` counts the blocks of a tensor
  ApplyParams applying;
  int64_t num_chunks;
};

// Those of one feature set, MLP and dtype of the state, where they are compiled without who starts them (own_rtc.cu).
enum Kernel {
  kBeginKernel,
  kAccumulateKernel,
  kAdvanceKernel,
  kApplyKernel,  // by precision: exact, high, fast
  kSweepKernel = kApplyKernel + 3,
  kWriteKernel = kSweepKernel + 3,
  kFinishKernel,
  kWordsKernel,
  kNumKernels
};

// As many as fit into the 4 KB of a kernel's arguments.
struct Words {
  int64_t value[448];
};

}  // namespace lopt
