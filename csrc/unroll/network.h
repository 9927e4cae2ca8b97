// The model of the unroll engine: a sequence of layers on rows of numbers; forward, loss and backward of one minibatch, by a
// team (Note [Teams] in layers.h).
//
// What a layer gives is [batch * places, padded(width)], with zeros where rows are padded. A place is a position of a
// sequence, or a pixel of an image; other rows have one place. Backward puts the gradient of a layer's output where the
// output was. Vectors of one lane need no padding: then weights and their gradients are used where they are.
#pragma once

#include "unroll/layers.h"

namespace lopt {
namespace LOPT_ISA {
namespace {

constexpr bool kPadded = kLanes > 1;

// Widths and places of a layer, before it and after.
struct LayerShape {
  Size kind, option;
  Size in, out;  // numbers of a place
  Size places_in, places;
};

template <class Function>
LOPT_BOTH void for_layers(const Problem& p, const Function& f) {
  Size in = static_cast<Size>(p.inputs), places = static_cast<Size>(p.places);
  for (Size l = 0; l < p.num_layers; ++l) {
    LayerShape layer{static_cast<Size>(p.kinds[l]),
                     static_cast<Size>(p.options[l]),
                     in,
                     static_cast<Size>(p.outputs[l]),
                     places,
                     places};
    if (layer.kind == kPool) layer.places /= 4;
    if (layer.kind == kFlatten || layer.kind == kMean) layer.places = 1;
    f(l, layer);
    in = layer.out;
    places = layer.places;
  }
}

// f(number of parameters) for all tensors, in their order
template <class Function>
LOPT_BOTH void for_tensors(const Problem& p, const Function& f) {
  for_layers(p, [&](Size, const LayerShape& layer) {
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

LOPT_BOTH int num_tensors(const Problem& p) {
  int count = 0;
  for_tensors(p, [&](Size) { ++count; });
  return count;
}

LOPT_BOTH Size num_params(const Problem& p) {
  Size count = 0;
  for_tensors(p, [&](Size numel) { count += numel; });
  return count;
}

// A layer with its memory.
struct Layer : LayerShape {
  Size in_padded, out_padded, rows_in, rows;
  Size offset;  // of its parameters among all
  float*
      values;  // [rows, out_padded] what it gives, and the gradient of that; where it changes what is there, the same
  float* weight;  // in padded rows: [in, out_padded], of a convolution [3, 3, in, out_padded], of a norm [out_padded]
  float* kept;    // what backward needs of forward, or what lies between a branch and its join
  float* row_scale;  // [rows] of norms
};

// The branch that belongs to the join `l`.
LOPT_BOTH Size branch_of(const Layer* layers, Size l) {
  for (Size open = 1; open > 0;) {
    --l;
    open += (layers[l].kind == kJoin) - (layers[l].kind == kBranch);
  }
  return l;
}

template <class Team>
struct Network {
  const Team team;
  const Problem& p;
  const Size batch;
  Layer* const layers;              // [num_layers]
  float* inputs;                    // [batch * places, padded(inputs)]
  int64_t* symbol;                  // [batch * places * inputs]
  int64_t* label;                   // [rows of the last layer]
  float* target;                    // [batch, padded(outputs)]
  float* bias;                      // [padded(width)]
  float *transposed, *product_out;  // weights the other way round; gradients of weights
  float* planes;                    // gradients of images with a margin
  AttentionScratch attention;

  // memory: of the layers.
  template <class Arena>
  LOPT_BOTH Network(const Team& the_team, const Problem& problem, Layer* memory, Arena& arena)
      : team(the_team), p(problem), batch(static_cast<Size>(problem.batch)), layers(memory) {
    const Size places = static_cast<Size>(p.places), width = static_cast<Size>(p.inputs);
    Size widest = 1, longest = 1, most_planes = 0, last_rows = batch, offset = 0;
    const auto at_least = [](Size& largest, Size size) { largest = largest < size ? size : largest; };
    inputs = p.tokens ? nullptr : arena.take(batch * places * padded(width));
    symbol = p.tokens ? reinterpret_cast<int64_t*>(arena.take(2 * batch * places * width)) : nullptr;
    float* before = inputs;
    for_layers(p, [&](Size l, const LayerShape& shape) {
      Layer& layer = layers[l];
      static_cast<LayerShape&>(layer) = shape;
      layer.in_padded = padded(layer.in);
      layer.out_padded = padded(layer.out);
      layer.rows_in = batch * layer.places_in;
      layer.rows = batch * layer.places;
      layer.offset = offset;
      const Size size = layer.rows * layer.out_padded;
      const bool in_place =
          layer.kind == kActivation || layer.kind == kBranch || layer.kind == kJoin || layer.kind == kPositions;
      layer.values = in_place ? before : arena.take(size);
      layer.weight = layer.kept = layer.row_scale = nullptr;
      switch (layer.kind) {
        case kDense:
          if (kPadded) layer.weight = arena.take(layer.in * layer.out_padded);
          at_least(longest, layer.in * layer.out_padded);
          at_least(longest, layer.out * layer.in_padded);
          offset += layer.in * layer.out + (layer.option ? layer.out : 0);
          break;
        case kEmbedding:
          offset += layer.option * (layer.out / layer.in);
          break;
        case kPositions:
          offset += layer.places * layer.out;
          break;
        case kNorm:
          if (kPadded) layer.weight = arena.take(layer.out_padded);
          layer.kept = arena.take(size);
          layer.row_scale = arena.take(layer.rows);
          offset += layer.out * (layer.option == kLayerNorm ? 2 : 1);
          break;
        case kConvolution:
          layer.weight = arena.take(9 * layer.in * layer.out_padded);
          layer.kept = arena.take(planes_size(batch, layer.places, layer.in));
          at_least(most_planes, planes_size(batch, layer.places, layer.out));
          at_least(longest, 9 * layer.in * layer.out_padded);
          at_least(longest, 9 * layer.out * layer.in_padded);
          offset += 9 * layer.in * layer.out + layer.out;
          break;
        case kAttention:
          layer.kept = arena.take(batch * layer.option * layer.places * padded(layer.places));
          attention.require(layer.places, layer.out / layer.option);
          break;
        case kBranch:
          layer.kept = arena.take(size);
          break;
        case kJoin:
          layer.kept = layers[branch_of(layers, l)].kept;
          break;
        case kActivation:
        case kPool:
          layer.kept = arena.take(size);
          break;
        default:
          break;
      }
      at_least(widest, layer.out_padded);
      last_rows = layer.rows;
      before = layer.values;
    });
    const Size outputs = padded(static_cast<Size>(p.outputs[p.num_layers - 1]));
    label = reinterpret_cast<int64_t*>(arena.take(2 * last_rows));
    target = p.loss == kSquaredError ? arena.take(last_rows * outputs) : nullptr;
    bias = kPadded ? arena.take(widest) : nullptr;
    transposed = arena.take(longest);
    product_out = arena.take(longest);
    planes = arena.take(most_planes);
    attention.take(Team::kParts, arena);
  }

  LOPT_TEAM const Layer& last() const { return layers[p.num_layers - 1]; }

  LOPT_CALLED void gather(Split split, uint64_t key, int64_t step) {
    const Size out = last().out, out_padded = last().out_padded;
    const Size places = static_cast<Size>(p.places), width = static_cast<Size>(p.inputs);
    team.parts(batch, [&](Size b, const auto& part) LOPT_INLINE {
      const int64_t row = minibatch_row(key, step, p.batch, b, p.rows[split]);
      if (p.tokens) {
        const Size window = places * width;
        const int64_t* stream = reinterpret_cast<const int64_t*>(p.data[split]) + row;
        part.copy(window, stream, symbol + b * window);
        part.copy(places, stream + window + 1 - places, label + b * places);
        return;
      }
      const float* source = reinterpret_cast<const float*>(p.data[split]) + row * p.places * p.inputs;
      part.copy_rows(places, width, source, width, inputs + b * places * padded(width), padded(width));
      if (p.loss == kSoftmax) {
        if (part.rank() == 0) label[b] = reinterpret_cast<const int64_t*>(p.targets[split])[row];
      } else {
        part.copy(out, reinterpret_cast<const float*>(p.targets[split]) + row * out, target + b * out_padded);
      }
    });
    team.sync();
  }

  // Parameters of a layer, [rows, count], as rows of whole vectors.
  LOPT_TEAM const float* as_rows(Size rows, Size count, const float* own, float* memory) const {
    if (!kPadded) return own;
    team.copy_rows(rows, count, own, count, memory, padded(count));
    return memory;
  }

  // A bias, of zeros where there is none.
  LOPT_TEAM const float* bias_of(Size count, const float* own) const {
    if (!kPadded) return own;
    team.zero(padded(count), bias);
    if (own) team.copy(count, own, bias);
    return bias;
  }

  // Loss of the gathered minibatch; the values of the last layer become their gradient.
  LOPT_CALLED float forward(const float* param) {
    for (Size l = 0; l < p.num_layers; ++l) {
      Layer& layer = layers[l];
      const float *x = l ? layers[l - 1].values : inputs, *own = param + layer.offset;
      float* y = layer.values;
      const Size size = layer.rows * layer.out_padded;
      switch (layer.kind) {
        case kDense:
          product(team, layer.rows, layer.out_padded, Factor{x, layer.in_padded, 1, layer.in},
                  as_rows(layer.in, layer.out, own, layer.weight),
                  bias_of(layer.out, layer.option ? own + layer.in * layer.out : nullptr), y);
          team.sync();
          break;
        case kActivation:
          activate(team, layer.option, size, y, layer.kept);
          break;
        case kBranch:
          team.copy(size, y, layer.kept);
          team.sync();
          break;
        case kJoin:
          add(team, size, layer.kept, y);
          break;
        case kNorm:
          norm_forward(team, layer.option == kLayerNorm, layer.rows, layer.out, x,
                       as_rows(1, layer.out, own, layer.weight),
                       bias_of(layer.out, layer.option == kLayerNorm ? own + layer.out : nullptr), layer.kept,
                       layer.row_scale, y);
          break;
        case kEmbedding:
          team.look_up(layer.rows, layer.in, layer.out / layer.in, symbol, own, y, layer.out_padded);
          team.sync();
          break;
        case kPositions:
          positions_forward(team, batch, layer.places, layer.out, own, y);
          break;
        case kConvolution:
          pack_kernel(team, layer.in, layer.out, own, layer.weight);
          fill_planes(team, batch, layer.places, layer.in, x, layer.kept);
          convolve(team, batch, layer.places, layer.in, layer.out, layer.kept, layer.weight,
                   bias_of(layer.out, own + 9 * layer.in * layer.out), y);
          break;
        case kPool:
          pool_forward(team, layer.option == kMaxPool, batch, layer.places_in, layer.out, x, y, layer.kept);
          break;
        case kMean:
          mean_forward(team, batch, layer.places_in, layer.out, x, y);
          break;
        case kFlatten:
          flatten_forward(team, batch, layer.places_in, layer.in, x, y);
          break;
        case kAttention:
          attention_forward(team, attention, batch, layer.places, layer.option, layer.out, x, layer.kept, y);
          break;
      }
    }
    const Layer& end = last();
    return p.loss == kSoftmax ? softmax_loss(team, end.rows, end.out, end.out_padded, label, end.values)
                              : squared_loss(team, end.rows, end.out, end.out_padded, target, end.values);
  }

  // After forward with the same parameters: gradient of the loss with respect to all of them.
  LOPT_CALLED void backward(const float* param, float* grad) {
    for (Size l = static_cast<Size>(p.num_layers) - 1; l >= 0; --l) {
      Layer& layer = layers[l];
      float *x = l ? layers[l - 1].values : inputs, *y = layer.values, *own = grad + layer.offset;
      const Size size = layer.rows * layer.out_padded;
      switch (layer.kind) {
        case kDense:
          product(team, layer.in, layer.out_padded, Factor{x, 1, layer.in_padded, layer.rows}, y, nullptr,
                  kPadded ? product_out : own);
          if (kPadded) team.copy_rows(layer.in, layer.out, product_out, layer.out_padded, own, layer.out);
          if (layer.option) sum_rows_of(team, layer.rows, layer.out, y, own + layer.in * layer.out);
          if (l > 0) {
            transpose(team, layer.in, layer.out, kPadded ? layer.weight : param + layer.offset, transposed);
            product(team, layer.rows, layer.in_padded, Factor{y, layer.out_padded, 1, layer.out}, transposed, nullptr,
                    x);
          }
          team.sync();
          break;
        case kActivation:
          multiply(team, size, layer.kept, y);
          break;
        case kBranch:
          add(team, size, layer.kept, y);
          break;
        case kJoin:
          team.copy(size, y, layer.kept);
          team.sync();
          break;
        case kNorm:
          if (layer.option == kLayerNorm) sum_rows_of(team, layer.rows, layer.out, y, own + layer.out);
          sum_products(team, layer.rows, layer.out, y, layer.kept, own);
          norm_backward(team, layer.option == kLayerNorm, layer.rows, layer.out, y,
                        kPadded ? layer.weight : param + layer.offset, layer.kept, layer.row_scale, x);
          break;
        case kEmbedding:
          team.zero(layer.option * (layer.out / layer.in), own);
          team.sync();
          team.add_up(layer.rows, layer.in, layer.out / layer.in, symbol, y, layer.out_padded, own);
          team.sync();
          break;
        case kPositions:
          positions_backward(team, batch, layer.places, layer.out, y, own);
          break;
        case kConvolution:
          kernel_gradient(team, batch, layer.places, layer.in, layer.out, layer.kept, y, product_out);
          unpack_kernel(team, layer.in, layer.out, product_out, own);
          sum_rows_of(team, layer.rows, layer.out, y, own + 9 * layer.in * layer.out);
          if (l == 0) break;
          turn_kernel(team, layer.in, layer.out, layer.weight, transposed);
          fill_planes(team, batch, layer.places, layer.out, y, planes);
          convolve(team, batch, layer.places, layer.out, layer.in, planes, transposed, nullptr, x);
          break;
        case kPool:
          pool_backward(team, layer.option == kMaxPool, batch, layer.places_in, layer.out, y, layer.kept, x);
          break;
        case kMean:
          mean_backward(team, batch, layer.places_in, layer.out, y, x);
          break;
        case kFlatten:
          flatten_backward(team, batch, layer.places_in, layer.in, y, x);
          break;
        case kAttention:
          attention_backward(team, attention, batch, layer.places, layer.option, layer.out, y, layer.kept, x);
          break;
      }
    }
  }
};

}  // namespace
}  // namespace LOPT_ISA
}  // namespace lopt
