// The small MLP on tensor cores, one block per chunk (apply_mma.cu, sweep_mma.cu); its oracle is in apply.cuh.
//
// Note [MLP on tensor cores]
// A warp takes a window of 128 consecutive parameters at a time, four per lane (Note [Quads]). The lane that loaded a
// parameter computes its columns, splits them into halves (Note [Split halves]) and stages them in shared memory as a
// row; 16 rows are the A of one product, with parameters as rows, columns as inputs, and a one in the column after the
// last, which takes the bias. Products of the first layer are the input of the second as they lie in registers (Note
// [Fragments]), whose sums start from its bias. Each lane adds up its share of the two outputs on FFMA, and the shares of
// a row's four lanes go back through the row to its owner; with `fast` the outputs are one more product. Weights stay in
// registers, or, where they are too many, as the fragments of all lanes in shared memory.
//
// Why stage: 24 STS.128, 32 LDSM, 16 STS.64 and 8 LDS.128 per lane and 4 parameters of `paper`, 20 instructions per
// parameter. Without it, the four lanes that hold a row would each compute the columns they supply. That takes no
// shuffle either, but the lanes of a warp run one program: all four would compute every root and logarithm, some 100
// instructions more.
// Why FFMA for the last layer of `high`: 64 FFMA per parameter at width 32; for a product its 32 inputs had to be split,
// 96 instructions, of which 6 of 8 columns would be waste.
//
// Instructions per parameter of the main loop and the time they take to issue on an H100 or H200, by benchmarks/sass.py
// (sm_90), beside what four fifths of their memory bandwidth need for the bytes (predicted, not measured):
//             bytes   H100 memory   H200 memory    plain float      high            fast
//   compact 8    32     11.9 ps        8.3 ps      389  13.1 ps    270   9.1 ps    153   5.1 ps
//   compact 16   32     11.9 ps        8.3 ps      812  27.4 ps    351  11.8 ps    188   6.3 ps
//   compact 32   32     11.9 ps        8.3 ps     2140  72.2 ps    552  18.6 ps    271   9.1 ps
//   paper 8      52     19.4 ps       13.5 ps      550  18.5 ps    352  11.9 ps    209   7.1 ps
//   paper 16     52     19.4 ps       13.5 ps     1090  36.8 ps    436  14.7 ps    248   8.4 ps
//   paper 32     52     19.4 ps       13.5 ps     2656  89.6 ps    640  21.6 ps    338  11.4 ps
//
// The halves reach to 65504, or for hidden units of the first layer, which come with a scale, to 1023. Columns divided
// by their root mean square do not exceed the square root of the number of parameters, and ratios of accumulators not
// some 30, so next to nothing goes beyond; but where something does, with precision `high` it shows as a NaN in every
// unit of the last hidden layer, and the warp leaves the window for later, when it is computed in plain float. So are
// windows that are not whole. With `fast`, which keeps only the high halves, columns and hidden units saturate at 65504.
//
// Note [Truncation]
// Tensor cores round sums toward zero, as Fasi et al. (2021) measured. A sum with a large product loses half an ulp on
// average, .25 / ln 2 * 2^-23 of itself; the small products come first (Note [Split halves]) and lose next to nothing.
// All hidden units shrink alike, so the outputs would by up to 1.4 * 2^-23, several times the error of float32, whose
// roundings cancel. The last layer gives the mean loss back: then errors are those of float32.
#pragma once

#include "apply.cuh"
#include "mma.cuh"

namespace lopt {

// Of the weights of both layers. Low halves of usual weights and hidden units are then normal numbers, not subnormal
// ones.
template <int kParts>
constexpr float kWeightScale = kParts == 1 ? 1.0f : 64.0f;

constexpr int kWindow = 32 * kQuad;  // parameters
static_assert(kChunk <= 32 * kWindow * kWarps, "a word has a bit for each of a warp's windows");

// A warp's staging memory: for each part and block of inputs, 16 bytes for every row. Neighbouring lanes write
// neighbouring rows, and load_matrices reads eight of them, without bank conflicts; two more rows keep the outputs free
// of them.
template <int kParts, int kBlocks, int kRows>
struct Stage {
  uint4 columns[kParts * kBlocks][kRows + 2];

  // `x` [8 blocks] -> a row.
  __device__ __forceinline__ void write(int row, const float* x) {
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) {
      uint32_t words[4][kParts];
#pragma unroll
      for (int t = 0; t < 4; ++t) split(x[8 * q + 2 * t], x[8 * q + 2 * t + 1], words[t]);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        columns[part * kBlocks + q][row] = {words[0][part], words[1][part], words[2][part], words[3][part]};
    }
  }

  // Rows row .. row + 15 as fragments.
  __device__ __forceinline__ void read(int row, int lane, Inputs<kParts, kBlocks>& inputs) const {
    const uint4* from = &columns[lane / 16][row + lane % 16];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int q = 0; q + 1 < kBlocks; q += 2) {
        uint32_t a[4];
        load_matrices(from + (part * kBlocks + q) * (kRows + 2), a);
#pragma unroll
        for (int i = 0; i < 4; ++i) inputs.a[part][2 * q + i] = a[i];
      }
    if (kBlocks % 2) {  // of all parts; with one, the addresses of lanes 16 .. 31 are not used
      uint32_t a[2 * kParts];
      load_matrices(&columns[(lane / 16 % kParts + 1) * kBlocks - 1][row + lane % 16], a);
#pragma unroll
      for (int i = 0; i < 2 * kParts; ++i) inputs.a[i / 2][2 * kBlocks - 2 + i % 2] = a[i];
    }
  }

  // What a lane adds to the outputs of a row; four lanes do, and with one part the first has all.
  __device__ __forceinline__ void write_outputs(int row, int t, const float* outputs) {
    *(reinterpret_cast<uint2*>(&columns[t / 2][row]) + t % 2) = {float_bits(outputs[0]), float_bits(outputs[1])};
  }
  __device__ __forceinline__ MlpOutput<float> read_outputs(int row) const {
    const uint4 a = columns[0][row];
    if (kParts == 1) return {bits_float(a.x), bits_float(a.y)};
    const uint4 b = columns[1][row];
    return {(bits_float(a.x) + bits_float(a.z)) + (bits_float(b.x) + bits_float(b.z)),
            (bits_float(a.y) + bits_float(a.w)) + (bits_float(b.y) + bits_float(b.w))};
  }
};

// Weights [8 kBlocks, 8 kTiles] as fragments of one lane; weight(input, column).
template <int kParts, int kBlocks, int kTiles, class Fragments, class Weight>
__device__ __forceinline__ void load_weights(int lane, Fragments& weights, Weight weight) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int q = 0; q < kBlocks; ++q) {
      uint32_t parts[kParts];
      const int input = 8 * q + 2 * t, column = 8 * n + g;
      split(weight(input, column) * kWeightScale<kParts>, weight(input + 1, column) * kWeightScale<kParts>, parts);
#pragma unroll
      for (int part = 0; part < kParts; ++part) weights(part, n, q) = parts[part];
    }
}

// How a MLP is cut: blocks of eight inputs and tiles of eight hidden units.
template <class Features, int kWidth, int kParts>
struct MmaShape {
  static constexpr int kBlocks = Features::kNumColumns / 8 + 1, kTiles = kWidth / 8;
  // See Note [Truncation]; sums of large products follow each other as blocks of inputs do, two by two.
  static constexpr int kSums = (kBlocks + 1) / 2 + (kMlpLayers == 2 ? (kTiles + 1) / 2 : 0);
  static constexpr float kLoss = kParts == 1 ? 0.0f : 4.3e-8f * kSums;
  static constexpr float kHiddenScale = kWeightScale<kParts> * (kMlpLayers == 2 ? kWeightScale<kParts> : 1.0f);
  static constexpr bool kInRegisters = kParts * kTiles * (kBlocks + (kMlpLayers == 2 ? kTiles : 0)) <= 64;
};

// A block's shared memory, in arrays of their own: of members the compiler would think that they overlap. Of a quad,
// kStaged parameters are staged at a time.
template <class Features, int kWidth, int kParts, int kStaged = 2>
using StageOf = Stage<kParts, MmaShape<Features, kWidth, kParts>::kBlocks, 32 * kStaged>;
template <int kWidth>
using HiddenRows = float[kWidth][kThreads / 4];  // sums of hidden units: eight lanes of each warp hold one
// Weights of both layers, where they are not in registers.
template <class Features, int kWidth, int kParts, bool = MmaShape<Features, kWidth, kParts>::kInRegisters>
struct FragmentsOf {};
template <class Features, int kWidth, int kParts>
struct FragmentsOf<Features, kWidth, kParts, false> {
  using Shape = MmaShape<Features, kWidth, kParts>;
  SharedWeights<kParts, Shape::kBlocks, Shape::kTiles> first;
  SharedWeights<kParts, kMlpLayers == 2 ? Shape::kTiles : 1, Shape::kTiles> second;
};
template <int kWidth>
struct alignas(16) LastLayer {
  float bias[kWidth / 8][4][4];     // of the second layer, for every lane t: of its two units, for rows g and g + 8
  float weights[kWidth / 8][4][4];  // of the last one: direction and magnitude, of two units each
};

__device__ __forceinline__ void load_four(const float (&from)[4], float (&to)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// Both layers' weights of one lane: in registers, or where they lie.
template <class First, class Second>
struct Layers {
  First first;
  Second second;
};
template <class Features, int kWidth, int kParts>
__device__ __forceinline__ auto layers_of_lane(FragmentsOf<Features, kWidth, kParts>& fragments, int lane) {
  using Shape = MmaShape<Features, kWidth, kParts>;
  constexpr int kBlocks = Shape::kBlocks, kTiles = Shape::kTiles, kSecond = kMlpLayers == 2 ? kTiles : 1;
  if constexpr (Shape::kInRegisters) {
    return Layers<Weights<kParts, kBlocks, kTiles>, Weights<kParts, kSecond, kTiles>>{};
  } else {
    return Layers<WeightsOfLane<kParts, kBlocks, kTiles>, WeightsOfLane<kParts, kSecond, kTiles>>{
        {fragments.first, lane}, {fragments.second, lane}};
  }
}

// Updates the parameters of a chunk and adds up their hidden units, by all threads of the block. read(quad, values) gives
// a lane its four parameters, with clipped gradients; with kAllQuads it also changes their state, and is called for every
// quad, otherwise for those of whole windows.
template <Dtype kState, bool kAllQuads, int kParts, class Features, int kWidth, int kBlocks, int kRows, class Read>
__device__ __forceinline__ void apply_mma(const ApplyParams& params, const ChunkRange& chunk, const Operands& operands,
                                          Rule<Features, kWidth>& rule, Stage<kParts, kBlocks, kRows> (&stages)[kWarps],
                                          LastLayer<kWidth>& last_layer, HiddenRows<kWidth>& rows,
                                          FragmentsOf<Features, kWidth, kParts>& fragments, const Read& read) {
  using Layout = MlpLayout<Features::kNumColumns, kWidth>;
  using Shape = MmaShape<Features, kWidth, kParts>;
  constexpr int kColumns = Features::kNumColumns, kTiles = Shape::kTiles, kStaged = kRows / 32;
  constexpr float kLoss = Shape::kLoss, kHiddenScale = Shape::kHiddenScale;
  // Products of few tiles wait for each other: two times 16 rows at once then.
  constexpr int kTogether = kTiles < 4 ? 2 : 1;
  const TensorEntry& tensor = operands.tensor;
  const Wide wide = operands.wide<kState>();
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const float rate = kParts == 1 ? params.magnitude_rate * kLog2E : 1.0f;  // `fast` has an exponent of 2 as magnitude
  auto& stage = stages[warp_index()];
  rule.load(params, tensor);
  __syncthreads();
  for (int unit = static_cast<int>(threadIdx.x); unit < kWidth; unit += kThreads) {
    const int n = unit / 8, pair = unit % 8 / 2, e = unit % 2;
    if (kMlpLayers == 2)
      last_layer.bias[n][pair][e] = last_layer.bias[n][pair][2 + e] = rule.weights[Layout::kB2 + unit] * kHiddenScale;
    const float direction = rule.weights[Layout::kW3 + unit], magnitude = rule.weights[Layout::kW3 + kWidth + unit];
    last_layer.weights[n][pair][e] = (direction + direction * kLoss) * (1.0f / kHiddenScale);
    last_layer.weights[n][pair][2 + e] = (magnitude + magnitude * kLoss) * (rate / kHiddenScale);
  }
  __syncthreads();

  // This lane's share of the MLP.
  const float* weights = rule.weights;
  const auto load_layers = [&](auto& first, auto& second) {
    load_weights<kParts, kBlocks, kTiles>(lane, first, [&](int input, int column) {
      return input < kColumns    ? weights[Layout::kW1 + input * kWidth + column]
             : input == kColumns ? rule.bias[column]
                                 : 0.0f;
    });
    if constexpr (kMlpLayers == 2)
      load_weights<kParts, kTiles, kTiles>(
          lane, second, [&](int input, int column) { return weights[Layout::kW2 + input * kWidth + column]; });
  };
  auto [first, second] = layers_of_lane<Features, kWidth, kParts>(fragments, lane);
  if (Shape::kInRegisters || warp_index() == 0) load_layers(first, second);
  if (!Shape::kInRegisters) __syncthreads();
  Weights<1, kTiles, 1> third;  // of `fast`
  if (kParts == 1)
    load_weights<1, kTiles, 1>(lane, third, [&](int input, int column) {
      return column < 2 ? weights[Layout::kW3 + column * kWidth + input] * (column ? rate : 1.0f) : 0.0f;
    });
  const float magnitude_bias = weights[Layout::kB3 + 1] * rate;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) rows[8 * n + 2 * t + e][8 * warp_index() + g] = 0.0f;

  // Whole windows of 128 parameters; what is left is computed without tensor cores.
  uint32_t left = 0;  // bit i: window i of this warp
  for (int window = 0, base = kWindow * warp_index(); base < chunk.count; ++window, base += kWindow * kWarps) {
    QuadValues<Features> values;
    if (base + kWindow > chunk.count) {
      if constexpr (kAllQuads) read(quad_at(chunk, base + kQuad * lane, wide), values);
      left |= 1u << window;
      continue;
    }
    const Quad quad{chunk.begin + base + kQuad * lane, kQuad, wide};
    read(quad, values);
    const auto& [param, grad, mom, rms] = values;

    float next[kQuad], sum[kTiles][2] = {};  // sum: of hidden units over these 128 parameters
#pragma unroll
    for (int begin = 0; begin < kQuad; begin += kStaged) {
      float skip[kStaged], active[kStaged];
#pragma unroll
      for (int s = 0; s < kStaged; ++s) {
        float m[Features::kNumMom], r[Features::kNumRms], x[8 * kBlocks] = {};
#pragma unroll
        for (int k = 0; k < Features::kNumMom; ++k) m[k] = mom[k][begin + s];
#pragma unroll
        for (int k = 0; k < Features::kNumRms; ++k) r[k] = rms[k][begin + s];
        rule.template columns<std::conditional_t<kParts == 1, Rough, float>>(grad[begin + s], param[begin + s], m, r,
                                                                             params.feature_clip, x);
        x[kColumns] = 1.0f;
        skip[s] = rule.skip(x);
        active[s] = Features::active(r);
        stage.write(lane + 32 * s, x);
      }
      __syncwarp();
#pragma unroll 1
      for (int row = 0; row < kRows; row += 16 * kTogether) {
        Inputs<kParts, kBlocks> inputs[kTogether];
        float d[kTogether][kTiles][4] = {};
#pragma unroll
        for (int m = 0; m < kTogether; ++m) stage.read(row + 16 * m, lane, inputs[m]);
        multiply(inputs, first, d);
        if constexpr (kMlpLayers == 2) {
          Inputs<kParts, kTiles> hidden[kTogether];
#pragma unroll
          for (int m = 0; m < kTogether; ++m)
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                uint32_t parts[kParts];
                split_positive(d[m][n][2 * half], d[m][n][2 * half + 1], parts);
#pragma unroll
                for (int part = 0; part < kParts; ++part) hidden[m].a[part][2 * n + half] = parts[part];
              }
              load_four(last_layer.bias[n][t], d[m][n]);
            }
          multiply(hidden, second, d);
        }
        float out[kTogether][1][4] = {};  // direction and magnitude of row g, then of row g + 8
#pragma unroll
        for (int m = 0; m < kTogether; ++m)
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) d[m][n][i] = max_of(d[m][n][i], 0.0f), sum[n][i % 2] += d[m][n][i];
        if constexpr (kParts == 1) {
          Inputs<1, kTiles> hidden2[kTogether];
#pragma unroll
          for (int m = 0; m < kTogether; ++m)
#pragma unroll
            for (int i = 0; i < 2 * kTiles; ++i)
              hidden2[m].a[0][i] = pack_halves<true>(d[m][i / 2][i % 2 * 2], d[m][i / 2][i % 2 * 2 + 1]);
          multiply(hidden2, third, out);
        } else {
          float last[kTiles][4];
#pragma unroll
          for (int n = 0; n < kTiles; ++n) load_four(last_layer.weights[n][t], last[n]);
#pragma unroll
          for (int m = 0; m < kTogether; ++m)
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int o = 0; o < 2; ++o) out[m][0][i / 2 * 2 + o] += d[m][n][i] * last[n][2 * o + i % 2];
        }
        __syncwarp();  // all lanes have read the rows
#pragma unroll
        for (int m = 0; m < kTogether; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            stage.write_outputs(row + 16 * m + g + 8 * half, t, out[m][0] + 2 * half);
      }
      __syncwarp();
#pragma unroll
      for (int s = 0; s < kStaged; ++s) {
        MlpOutput<float> out = stage.read_outputs(lane + 32 * s);
        out.direction += skip[s];
        out.magnitude += magnitude_bias;
        const float direction = out.direction * (kParts == 1 ? exp2_estimate(out.magnitude)
                                                             : exp_of(out.magnitude * params.magnitude_rate));
        next[begin + s] = next_param(param[begin + s], direction, operands.inputs, active[s]);
      }
      __syncwarp();  // before the rows are written again
    }

    if (kParts > 1 && __any_sync(0xffffffffu, sum[0][0] != sum[0][0])) {
      left |= 1u << window;
      continue;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        rows[8 * n + 2 * t + e][8 * warp_index() + g] += (sum[n][e] + sum[n][e] * kLoss) * (1.0f / kHiddenScale);
    if (operands.inputs.moves()) store_quad(operands.written, operands.written_dtype, quad, next);
  }

  if (kAllQuads && left != 0) __syncwarp();  // lanes have written what others read now
  // One parameter of each lane at a time; four lanes add their hidden units to the same sum.
  for (int window = 0, base = kWindow * warp_index(); left != 0; ++window, left >>= 1, base += kWindow * kWarps) {
    if (left % 2 == 0) continue;
#pragma unroll 1
    for (int i = base + lane; i < base + kWindow; i += 32) {
      float hidden[kWidth] = {};
      if (i < chunk.count) apply_one<kState>(params, rule, operands, chunk.begin + i, hidden);
#pragma unroll
      for (int unit = 0; unit < kWidth; ++unit) {
        float sum = hidden[unit];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (t == unit % 8 / 2) rows[unit][8 * warp_index() + g] += sum;
      }
    }
  }
}

}  // namespace lopt
