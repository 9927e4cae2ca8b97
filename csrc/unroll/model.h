// What a model of the unroll engine tells the engine of its parameter tensors. A model is a class with
//
//   static void for_tensors(const Problem&, f)   f(const ModelTensor&) for all tensors, in their order in the parameters
//   Model(const Problem&, Arena&)                scratch memory of one thread
//   void gather(Split, key, step)                reads a minibatch
//   float forward(param)                         loss of the gathered minibatch
//   void backward(grad)                          after forward: gradient of the loss with respect to all parameters
#pragma once

#include <cmath>

#include "api/kernels.h"

namespace lopt {

// A parameter tensor. `transposed`: a matrix [in, out], as perceptrons store it; without, the first dimension counts the
// outputs, as in torch's modules: [out, in], [out, in, height, width], and [rows, width] of an embedding.
struct ModelTensor {
  int rank;         // 1 to 4
  int64_t dims[4];  // ones beyond the rank
  bool transposed;

  int64_t numel() const { return dims[0] * dims[1] * dims[2] * dims[3]; }
};

inline ModelTensor vector_of(int64_t size) { return {1, {size, 1, 1, 1}, false}; }
inline ModelTensor matrix_of(int64_t in, int64_t out) { return {2, {in, out, 1, 1}, true}; }
inline ModelTensor table_of(int64_t rows, int64_t width) { return {2, {rows, width, 1, 1}, false}; }
inline ModelTensor kernel_of(int64_t in, int64_t out) { return {4, {out, in, 3, 3}, false}; }

template <class Model>
int num_tensors(const Problem& problem) {
  int count = 0;
  Model::for_tensors(problem, [&](const ModelTensor&) { ++count; });
  return count;
}

template <class Model>
int64_t num_params(const Problem& problem) {
  int64_t count = 0;
  Model::for_tensors(problem, [&](const ModelTensor& tensor) { count += tensor.numel(); });
  return count;
}

}  // namespace lopt
