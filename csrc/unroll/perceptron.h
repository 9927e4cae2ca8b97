// A perceptron of the unroll engine (model.h says what a model is): forward, loss and backward of one minibatch.
#pragma once

#include <algorithm>

#include "unroll/dense.h"
// dense.h comes first: see simd.h.
#include "unroll/model.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

struct Perceptron {
  const Problem& p;
  float* activation[kMaxLayers + 1];  // [batch, padded(size)]; the last holds outputs, then their gradient
  float* slope[kMaxLayers + 1];       // [batch, padded(size)] derivative of the activation
  float* weight[kMaxLayers];          // [in, padded(out)]
  float* bias;                        // [padded(out)]
  float* transposed;                  // [out, padded(in)]
  float* product_out;                 // [in, padded(out)] or [batch, padded(in)]
  float* target;                      // [batch, padded(outputs)]
  int64_t* label;                     // [batch]

  template <class Function>
  static void for_tensors(const Problem& p, const Function& f) {
    for (int64_t l = 0; l < p.num_layers; ++l) {
      f(matrix_of(p.sizes[l], p.sizes[l + 1]));
      f(vector_of(p.sizes[l + 1]));
    }
  }

  Perceptron(const Problem& problem, Arena& arena) : p(problem) {
    int64_t largest = 0;
    for (int64_t l = 0; l <= p.num_layers; ++l) {
      activation[l] = arena.take(p.batch * padded(p.sizes[l]));
      slope[l] = arena.take(p.batch * padded(p.sizes[l]));
      largest = std::max(largest, p.batch * padded(p.sizes[l]));
    }
    int64_t widest = 0, longest = 0;
    for (int64_t l = 0; l < p.num_layers; ++l) {
      weight[l] = arena.take(p.sizes[l] * padded(p.sizes[l + 1]));
      longest = std::max({longest, p.sizes[l] * padded(p.sizes[l + 1]), p.sizes[l + 1] * padded(p.sizes[l])});
      widest = std::max(widest, padded(p.sizes[l + 1]));
    }
    bias = arena.take(widest);
    transposed = arena.take(longest);
    product_out = arena.take(std::max(longest, largest));
    target = arena.take(p.batch * padded(p.sizes[p.num_layers]));
    label = reinterpret_cast<int64_t*>(arena.take(2 * p.batch));
  }

  void gather(Split split, uint64_t key, int64_t step) {
    const int64_t in = p.sizes[0], out = p.sizes[p.num_layers], in_padded = padded(in), out_padded = padded(out);
    const float* inputs = reinterpret_cast<const float*>(p.inputs[split]);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = minibatch_row(key, step, p.batch, b, p.rows[split]);
      std::memcpy(activation[0] + b * in_padded, inputs + row * in, in * sizeof(float));
      if (p.loss == kSoftmax)
        label[b] = reinterpret_cast<const int64_t*>(p.targets[split])[row];
      else
        std::memcpy(target + b * out_padded, reinterpret_cast<const float*>(p.targets[split]) + row * out,
                    out * sizeof(float));
    }
  }

  // Loss of the gathered minibatch; activation[num_layers] becomes its gradient with respect to the outputs.
  float forward(const float* param) {
    for (int64_t l = 0; l < p.num_layers; ++l) {
      const int64_t in = p.sizes[l], out = p.sizes[l + 1], out_padded = padded(out);
      for (int64_t i = 0; i < in; ++i) std::memcpy(weight[l] + i * out_padded, param + i * out, out * sizeof(float));
      std::memset(bias, 0, out_padded * sizeof(float));
      std::memcpy(bias, param + in * out, out * sizeof(float));
      param += (in + 1) * out;
      product(p.batch, out_padded, in, activation[l], padded(in), 1, weight[l], bias, activation[l + 1]);
      if (l + 1 < p.num_layers) activate(p.activation, p.batch * out_padded, activation[l + 1], slope[l + 1]);
    }
    const int64_t out = p.sizes[p.num_layers];
    return p.loss == kSoftmax ? softmax_loss(p.batch, out, padded(out), label, activation[p.num_layers])
                              : squared_loss(p.batch, out, padded(out), target, activation[p.num_layers]);
  }

  // After forward: gradient of the loss with respect to all parameters.
  void backward(float* grad) {
    grad += num_params<Perceptron>(p);
    for (int64_t l = p.num_layers - 1; l >= 0; --l) {
      const int64_t in = p.sizes[l], out = p.sizes[l + 1], in_padded = padded(in), out_padded = padded(out);
      const float* delta = activation[l + 1];
      grad -= (in + 1) * out;
      product(in, out_padded, p.batch, activation[l], 1, in_padded, delta, nullptr, product_out);
      for (int64_t i = 0; i < in; ++i) std::memcpy(grad + i * out, product_out + i * out_padded, out * sizeof(float));
      for (int64_t j = 0; j < out; ++j) {
        float sum = 0.0f;
        for (int64_t b = 0; b < p.batch; ++b) sum += delta[b * out_padded + j];
        grad[in * out + j] = sum;
      }
      if (l == 0) return;
      for (int64_t j = 0; j < out; ++j)
        for (int64_t i = 0; i < in_padded; ++i)
          transposed[j * in_padded + i] = i < in ? weight[l][i * out_padded + j] : 0.0f;
      product(p.batch, in_padded, out, delta, out_padded, 1, transposed, nullptr, activation[l]);
      for (int64_t i = 0; i < p.batch * in_padded; i += kLanes)
        store(activation[l] + i, load(activation[l] + i, kLanes) * load(slope[l] + i, kLanes), kLanes);
    }
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
