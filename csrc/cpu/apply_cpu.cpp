// apply on the CPU: all tensors, in chunks over threads; the formulas are in apply_block.h. Compiled once per instruction
// set; cpu_dispatch.cpp picks. apply takes the chunks in descending order: accumulate left the last ones in the caches.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/alone.h"
#include "cpu/apply_block.h"
#include "cpu/chunks_cpu.h"
// alone.h comes first: see Note [Teams] in unroll/layers.h.
#include "cpu/orthogonal.h"
#include "cpu/threads.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

template <class Features, int kWidth>
void run_chunk(const ApplyParams& params, int64_t index) {
  constexpr int kColumns = Features::kNumColumns;
  const Chunk chunk = params.chunks[index];
  const TensorEntry& tensor = params.tensors[chunk.tensor];
  const int64_t left = tensor.numel - chunk.begin;
  const Numbers param = Numbers::at(tensor.param, tensor.param_dtype, chunk.begin);
  const bool whole = is_whole(params, tensor);
  using ApplierOf = Applier<Features, kWidth>;
  const ApplierOf applier{
      param,
      Numbers::at(params.grads[chunk.tensor], tensor.grad_dtype, chunk.begin),
      whole ? Numbers::at(tensor.direction, direction_dtype(params.state_dtype), chunk.begin) : param,
      decltype(ApplierOf::mom)::of(tensor, tensor.mom, 0, params.state_dtype, chunk.begin),
      decltype(ApplierOf::rms)::of(tensor, tensor.rms, Features::kNumMom, params.state_dtype, chunk.begin),
      TensorInputs(inputs_of(params), tensor.row, kColumns, kWidth, whole),
      params.weights + tensor.theta * MlpLayout<kColumns, kWidth>::kSize,
      params.magnitude_rate,
      params.feature_clip,
  };
  applier.run(left < kChunk ? left : kChunk, params.partials + index * kWidth);
}

template <int kWidth>
void merge_tensor(const ApplyParams& params, int64_t t) {
  const TensorEntry& tensor = params.tensors[t];
  for (int j = 0; j < kWidth; ++j) {
    double total = 0.0;
    for (int64_t begin = 0; begin < tensor.numel; begin += kChunk)
      total += params.partials[(tensor.first_chunk + begin / kChunk) * kWidth + j];
    params.hidden[tensor.row * kWidth + j] = static_cast<float>(total / static_cast<double>(tensor.numel));
  }
}

// What is left to torch: large matrices, and those of which only a part is here.
bool by_torch(const TensorEntry& tensor) {
  if (tensor.matrix_rows == 0) return true;
  return std::min(tensor.matrix_rows, tensor.numel / tensor.matrix_rows) > kNativeSide;
}

// The direction of tensor t, and its rank.
void orthogonalise(const ApplyParams& params, int64_t t) {
  const TensorEntry& tensor = params.tensors[t];
  const float gate = params.gate[tensor.row];
  const int64_t rows = tensor.matrix_rows, columns = tensor.numel / rows;
  OrthogonalSizes sizes;
  sizes.include(rows, columns);
  Arena count{nullptr};
  Orthogonal<Alone>(Alone{}, sizes, count);
  static thread_local std::vector<float> memory, buffer;  // kept between steps
  memory.resize(std::max(memory.size(), static_cast<size_t>(count.used)));
  buffer.resize(std::max(buffer.size(), static_cast<size_t>(tensor.numel)));
  Arena arena{memory.data()};
  const Numbers direction = Numbers::at(tensor.direction, direction_dtype(params.state_dtype), 0);
  float* values = direction.read(0, tensor.numel, buffer.data());
  float rank = params.rank[tensor.row];
  Orthogonal<Alone>(Alone{}, sizes, arena)
      .run(values, rows, columns, tensor.turned != 0, gate, params.newton_schulz, rank);
  direction.write(0, tensor.numel, values);
  if (std::isfinite(rank)) params.rank[tensor.row] = rank;
}

// param = keep * param - step_size * direction
void write_chunk(const ApplyParams& params, int64_t index) {
  constexpr int64_t kBlock = 1024;
  alignas(64) float param_buffer[kBlock], direction_buffer[kBlock];
  const Chunk chunk = params.chunks[index];
  const TensorEntry& tensor = params.tensors[chunk.tensor];
  const float step_size = params.step_size[tensor.row], keep = params.keep[tensor.row];
  if (!moves(step_size, keep)) return;
  const Numbers param = Numbers::at(tensor.param, tensor.param_dtype, 0);
  const Numbers direction = Numbers::at(tensor.direction, direction_dtype(params.state_dtype), 0);
  const int64_t end = chunk.begin + kChunk < tensor.numel ? chunk.begin + kChunk : tensor.numel;
  for (int64_t begin = chunk.begin; begin < end; begin += kBlock) {
    const int64_t size = end - begin < kBlock ? end - begin : kBlock;
    float* p = param.read(begin, size, param_buffer);
    const float* d = direction.read(begin, size, direction_buffer);
    for_vectors(size, [&](int64_t i, int lanes) {
      store(p + i, next_param(load(p + i, lanes), load(d + i, lanes), step_size, keep), lanes);
    });
    param.write(begin, size, p);
  }
}

}  // namespace

bool write(const ApplyParams& params, bool orthogonalised, const Target& target) {
  if (params.newton_schulz == 0) return true;
  const auto whole = [&](const TensorEntry& tensor) { return is_whole(params, tensor); };
  if (std::none_of(params.tensors, params.tensors + params.num_tensors, whole)) return true;
  std::atomic<bool> left{false};
#pragma omp parallel num_threads(threads_over(params.tensors, params.num_tensors, target.num_threads))
  {
    if (!orthogonalised) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < params.num_tensors; ++t) {
        const TensorEntry& tensor = params.tensors[t];
        if (!whole(tensor)) continue;
        by_torch(tensor) ? left.store(true, std::memory_order_relaxed) : orthogonalise(params, t);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < params.num_chunks; ++i) {
      const TensorEntry& tensor = params.tensors[params.chunks[i].tensor];
      if (whole(tensor) && by_torch(tensor) == orthogonalised) write_chunk(params, i);
    }
  }
  return !left;
}

bool apply(const ApplyParams& params, int feature_set, int width, const Target& target) {
  return with_kernel(feature_set, width, [&](auto features, auto width_constant) {
    using Features = decltype(features);
    constexpr int kWidth = decltype(width_constant)::value;
#pragma omp parallel num_threads(threads_over(params.tensors, params.num_tensors, target.num_threads))
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < params.num_chunks; ++i) run_chunk<Features, kWidth>(params, params.num_chunks - 1 - i);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < params.num_tensors; ++t) merge_tensor<kWidth>(params, t);
    }
  });
}

// Chunk by chunk: what apply reads again is in a cache near by.
bool sweep(const AccumulateParams& accumulating, const ApplyParams& applying, int feature_set, int width,
           const Target& target) {
  return with_kernel(feature_set, width, [&](auto features, auto width_constant) {
    using Features = decltype(features);
    constexpr int kWidth = decltype(width_constant)::value;
#pragma omp parallel num_threads(threads_over(applying.tensors, applying.num_tensors, target.num_threads))
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < applying.num_chunks; ++i) {
        accumulate_chunk(accumulating, feature_set, i);
        run_chunk<Features, kWidth>(applying, i);
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < applying.num_tensors; ++t) {
        merge_stats(accumulating, feature_set, t);
        merge_tensor<kWidth>(applying, t);
      }
    }
  });
}

}  // namespace LOPT_ISA
}  // namespace lopt
