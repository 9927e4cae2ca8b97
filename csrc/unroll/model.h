// What a model of the unroll engine is: a class with
//
//   static void for_tensors(const Problem&, f)   f(number of parameters) for all tensors, in their order
//   Model(const Problem&, Arena&)                scratch memory of one thread
//   void gather(Split, key, step)                reads a minibatch
//   float forward(param)                         loss of the gathered minibatch
//   void backward(grad)                          after forward: gradient of the loss with respect to all parameters
#pragma once

#include "unroll/unroll.h"

namespace lopt {

template <class Model>
int num_tensors(const Problem& problem) {
  int count = 0;
  Model::for_tensors(problem, [&](int64_t) { ++count; });
  return count;
}

template <class Model>
int64_t num_params(const Problem& problem) {
  int64_t count = 0;
  Model::for_tensors(problem, [&](int64_t numel) { count += numel; });
  return count;
}

}  // namespace lopt
