// The model of the unroll engine (model.h says what a model is): a sequence of layers on rows of numbers; forward, loss and
// backward of one minibatch.
//
// What a layer gives is [batch * places, padded(width)], with zeros where rows are padded. A place is a position of a
// sequence, or a pixel of an image; other rows have one place. Backward puts the gradient of a layer's output where the
// output was.
#pragma once

#include <algorithm>

#include "unroll/layers.h"
// layers.h comes first: see simd.h.
#include "unroll/model.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

// Widths and places of a layer, before it and after.
struct LayerShape {
  int64_t kind, option;
  int64_t in, out;  // numbers of a place
  int64_t places_in, places;
};

template <class Function>
void for_layers(const Problem& p, const Function& f) {
  int64_t in = p.inputs, places = p.places;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    LayerShape layer{p.kinds[l], p.options[l], in, p.outputs[l], places, places};
    if (layer.kind == kPool) layer.places /= 4;
    if (layer.kind == kFlatten || layer.kind == kMean) layer.places = 1;
    f(l, layer);
    in = layer.out;
    places = layer.places;
  }
}

struct Network {
  // A layer with its memory.
  struct Layer : LayerShape {
    int64_t in_padded, out_padded, rows_in, rows;
    int64_t offset;  // of its parameters among all
    float*
        values;  // [rows, out_padded] what it gives, and the gradient of that; where it changes what is there, the same
    float* weight;     // [in, out_padded], of a convolution [3, 3, in, out_padded], of a norm its gain [out_padded]
    float* kept;       // what backward needs of forward, or what lies between a branch and its join
    float* row_scale;  // [rows] of norms
  };

  const Problem& p;
  Layer layers[kMaxLayers];
  float* inputs;                    // [batch * places, padded(inputs)]
  int64_t* symbol;                  // [batch * places * inputs]
  int64_t* label;                   // [rows of the last layer]
  float* target;                    // [batch, padded(outputs)]
  float* bias;                      // [padded(width)]
  float *transposed, *product_out;  // weights the other way round; gradients of weights
  float* planes;                    // gradients of images with a margin
  AttentionScratch attention;

  template <class Function>
  static void for_tensors(const Problem& p, const Function& f) {
    for_layers(p, [&](int64_t, const LayerShape& layer) {
      switch (layer.kind) {
        case kDense:
          f(layer.in * layer.out);
          if (layer.option) f(layer.out);
          break;
        case kEmbedding:
          f(layer.option * (layer.out / layer.in));
          break;
        case kPositions:
          f(layer.places * layer.out);
          break;
        case kNorm:
          f(layer.out);
          if (layer.option == kLayerNorm) f(layer.out);
          break;
        case kConvolution:
          f(9 * layer.in * layer.out);
          f(layer.out);
          break;
        default:
          break;
      }
    });
  }

  Network(const Problem& problem, Arena& arena) : p(problem) {
    int64_t widest = 1, longest = 1, most_planes = 0, last_rows = p.batch, offset = 0;
    inputs = p.tokens ? nullptr : arena.take(p.batch * p.places * padded(p.inputs));
    symbol = p.tokens ? reinterpret_cast<int64_t*>(arena.take(2 * p.batch * p.places * p.inputs)) : nullptr;
    float *before = inputs, *open[kMaxLayers];
    int num_open = 0;
    for_layers(p, [&](int64_t l, const LayerShape& shape) {
      Layer& layer = layers[l];
      static_cast<LayerShape&>(layer) = shape;
      layer.in_padded = padded(layer.in);
      layer.out_padded = padded(layer.out);
      layer.rows_in = p.batch * layer.places_in;
      layer.rows = p.batch * layer.places;
      layer.offset = offset;
      const int64_t size = layer.rows * layer.out_padded;
      const bool in_place =
          layer.kind == kActivation || layer.kind == kBranch || layer.kind == kJoin || layer.kind == kPositions;
      layer.values = in_place ? before : arena.take(size);
      layer.weight = layer.kept = layer.row_scale = nullptr;
      switch (layer.kind) {
        case kDense:
          layer.weight = arena.take(layer.in * layer.out_padded);
          longest = std::max({longest, layer.in * layer.out_padded, layer.out * layer.in_padded});
          offset += layer.in * layer.out + (layer.option ? layer.out : 0);
          break;
        case kEmbedding:
          offset += layer.option * (layer.out / layer.in);
          break;
        case kPositions:
          offset += layer.places * layer.out;
          break;
        case kNorm:
          layer.weight = arena.take(layer.out_padded);
          layer.kept = arena.take(size);
          layer.row_scale = arena.take(layer.rows);
          offset += layer.out * (layer.option == kLayerNorm ? 2 : 1);
          break;
        case kConvolution:
          layer.weight = arena.take(9 * layer.in * layer.out_padded);
          layer.kept = arena.take(planes_size(p.batch, layer.places, layer.in));
          most_planes = std::max(most_planes, planes_size(p.batch, layer.places, layer.out));
          longest = std::max({longest, 9 * layer.in * layer.out_padded, 9 * layer.out * layer.in_padded});
          offset += 9 * layer.in * layer.out + layer.out;
          break;
        case kAttention:
          layer.kept = arena.take(p.batch * layer.option * layer.places * padded(layer.places));
          attention.require(layer.places, layer.out / layer.option);
          break;
        case kBranch:
          layer.kept = open[num_open++] = arena.take(size);
          break;
        case kJoin:
          layer.kept = open[--num_open];
          break;
        case kActivation:
        case kPool:
          layer.kept = arena.take(size);
          break;
        default:
          break;
      }
      widest = std::max(widest, layer.out_padded);
      last_rows = layer.rows;
      before = layer.values;
    });
    const Layer& last = layers[p.num_layers - 1];
    label = reinterpret_cast<int64_t*>(arena.take(2 * last_rows));
    target = p.loss == kSquaredError ? arena.take(last_rows * last.out_padded) : nullptr;
    bias = arena.take(widest);
    transposed = arena.take(longest);
    product_out = arena.take(longest);
    planes = arena.take(most_planes);
    attention.take(arena);
  }

  void gather(Split split, uint64_t key, int64_t step) {
    const int64_t out = layers[p.num_layers - 1].out, out_padded = layers[p.num_layers - 1].out_padded;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = minibatch_row(key, step, p.batch, b, p.rows[split]);
      if (p.tokens) {
        const int64_t window = p.places * p.inputs;
        const int64_t* stream = reinterpret_cast<const int64_t*>(p.data[split]) + row;
        std::copy_n(stream, window, symbol + b * window);
        std::copy_n(stream + window + 1 - p.places, p.places, label + b * p.places);
        continue;
      }
      const float* source = reinterpret_cast<const float*>(p.data[split]) + row * p.places * p.inputs;
      for (int64_t i = 0; i < p.places; ++i)
        std::memcpy(inputs + (b * p.places + i) * padded(p.inputs), source + i * p.inputs, p.inputs * sizeof(float));
      if (p.loss == kSoftmax)
        label[b] = reinterpret_cast<const int64_t*>(p.targets[split])[row];
      else
        std::memcpy(target + b * out_padded, reinterpret_cast<const float*>(p.targets[split]) + row * out,
                    out * sizeof(float));
    }
  }

  // Loss of the gathered minibatch; the values of the last layer become their gradient.
  float forward(const float* param) {
    for (int64_t l = 0; l < p.num_layers; ++l) {
      Layer& layer = layers[l];
      const float *x = l ? layers[l - 1].values : inputs, *own = param + layer.offset;
      float* y = layer.values;
      const int64_t size = layer.rows * layer.out_padded;
      switch (layer.kind) {
        case kDense:
          for (int64_t i = 0; i < layer.in; ++i)
            std::memcpy(layer.weight + i * layer.out_padded, own + i * layer.out, layer.out * sizeof(float));
          pad(layer.option ? own + layer.in * layer.out : nullptr, layer.out, bias);
          product(layer.rows, layer.out_padded, layer.in, x, layer.in_padded, 1, layer.weight, bias, y);
          break;
        case kActivation:
          activate(layer.option, size, y, layer.kept);
          break;
        case kBranch:
          std::memcpy(layer.kept, y, size * sizeof(float));
          break;
        case kJoin:
          add(size, layer.kept, y);
          break;
        case kNorm:
          pad(own, layer.out, layer.weight);
          pad(layer.option == kLayerNorm ? own + layer.out : nullptr, layer.out, bias);
          norm_forward(layer.option == kLayerNorm, layer.rows, layer.out, x, layer.weight, bias, layer.kept,
                       layer.row_scale, y);
          break;
        case kEmbedding:
          embed_forward(layer.rows, layer.in, layer.out / layer.in, own, symbol, y);
          break;
        case kPositions:
          positions_forward(layer.rows, layer.places, layer.out, own, y);
          break;
        case kConvolution:
          pack_kernel(layer.in, layer.out, own, layer.weight);
          pad(own + 9 * layer.in * layer.out, layer.out, bias);
          fill_planes(p.batch, layer.places, layer.in, x, layer.kept);
          convolve(p.batch, layer.places, layer.in, layer.out, layer.kept, layer.weight, bias, y);
          break;
        case kPool:
          pool_forward(layer.option == kMaxPool, p.batch, layer.places_in, layer.out, x, y, layer.kept);
          break;
        case kMean:
          mean_forward(p.batch, layer.places_in, layer.out, x, y);
          break;
        case kFlatten:
          flatten_forward(p.batch, layer.places_in, layer.in, x, y);
          break;
        case kAttention:
          attention.forward(p.batch, layer.places, layer.option, layer.out, x, layer.kept, y);
          break;
      }
    }
    const Layer& last = layers[p.num_layers - 1];
    return p.loss == kSoftmax ? softmax_loss(last.rows, last.out, last.out_padded, label, last.values)
                              : squared_loss(last.rows, last.out, last.out_padded, target, last.values);
  }

  // After forward: gradient of the loss with respect to all parameters.
  void backward(float* grad) {
    for (int64_t l = p.num_layers - 1; l >= 0; --l) {
      Layer& layer = layers[l];
      float *x = l ? layers[l - 1].values : inputs, *y = layer.values, *own = grad + layer.offset;
      const int64_t size = layer.rows * layer.out_padded;
      switch (layer.kind) {
        case kDense:
          product(layer.in, layer.out_padded, layer.rows, x, 1, layer.in_padded, y, nullptr, product_out);
          for (int64_t i = 0; i < layer.in; ++i)
            std::memcpy(own + i * layer.out, product_out + i * layer.out_padded, layer.out * sizeof(float));
          if (layer.option) sum_rows(layer.rows, layer.out, y, own + layer.in * layer.out);
          if (l == 0) break;
          transpose(layer.in, layer.out, layer.weight, transposed);
          product(layer.rows, layer.in_padded, layer.out, y, layer.out_padded, 1, transposed, nullptr, x);
          break;
        case kActivation:
          multiply(size, layer.kept, y);
          break;
        case kBranch:
          add(size, layer.kept, y);
          break;
        case kJoin:
          std::memcpy(layer.kept, y, size * sizeof(float));
          break;
        case kNorm:
          if (layer.option == kLayerNorm) sum_rows(layer.rows, layer.out, y, own + layer.out);
          sum_products(layer.rows, layer.out, y, layer.kept, own);
          norm_backward(layer.option == kLayerNorm, layer.rows, layer.out, y, layer.weight, layer.kept, layer.row_scale,
                        x);
          break;
        case kEmbedding:
          std::fill_n(own, layer.option * (layer.out / layer.in), 0.0f);
          embed_backward(layer.rows, layer.in, layer.out / layer.in, y, symbol, own);
          break;
        case kPositions:
          positions_backward(p.batch, layer.places, layer.out, y, own);
          break;
        case kConvolution:
          kernel_gradient(p.batch, layer.places, layer.in, layer.out, layer.kept, y, product_out);
          unpack_kernel(layer.in, layer.out, product_out, own);
          sum_rows(layer.rows, layer.out, y, own + 9 * layer.in * layer.out);
          if (l == 0) break;
          turn_kernel(layer.in, layer.out, layer.weight, transposed);
          fill_planes(p.batch, layer.places, layer.out, y, planes);
          convolve(p.batch, layer.places, layer.out, layer.in, planes, transposed, nullptr, x);
          break;
        case kPool:
          pool_backward(layer.option == kMaxPool, p.batch, layer.places_in, layer.out, y, layer.kept, x);
          break;
        case kMean:
          mean_backward(p.batch, layer.places_in, layer.out, y, x);
          break;
        case kFlatten:
          flatten_backward(p.batch, layer.places_in, layer.in, y, x);
          break;
        case kAttention:
          attention.backward(p.batch, layer.places, layer.option, layer.out, y, layer.kept, x);
          break;
      }
    }
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
