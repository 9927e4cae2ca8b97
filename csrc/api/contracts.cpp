// What Python must agree with, told to it: the fields of every struct, from which lopt/kernels/structs.py builds its dtypes;
// the tables and constants of csrc/rule, and the layout of theta, which are compared with Python's when lopt is imported.
#include "api/contracts.h"

#include <pybind11/stl.h>

#include <cstddef>
#include <string>
#include <type_traits>
#include <vector>

#include "api/factored.h"
#include "api/kernels.h"
#include "api/rule_tables.h"
#include "rule/theta_view.h"
#include "unroll/unroll.h"

namespace py = pybind11;

namespace lopt {
namespace {

// As NumPy writes it; addresses are integers.
template <class T>
std::string format_of() {
  if (std::is_array<T>::value) return format_of<std::remove_extent_t<T>>();
  const char kind = std::is_floating_point<T>::value ? 'f' : std::is_unsigned<T>::value ? 'u' : 'i';
  return std::string(1, kind) + std::to_string(sizeof(T));
}

// {"fields": [(name, format, offset, count)], "size": bytes}; count is 0 for a single number.
#define LOPT_TELL(Type, name)                                                                       \
  fields.append(py::make_tuple(#name, format_of<std::remove_all_extents_t<decltype(Self::name)>>(), \
                               offsetof(Self, name), std::extent<decltype(Self::name)>::value));
#define LOPT_STRUCT(Name, FIELDS)                                            \
  {                                                                          \
    using Self = Name;                                                       \
    py::list fields;                                                         \
    FIELDS(LOPT_TELL)                                                        \
    structs[#Name] = py::dict("fields"_a = fields, "size"_a = sizeof(Name)); \
  }

py::dict struct_fields() {
  using namespace pybind11::literals;
  py::dict structs;
  LOPT_STRUCT(TensorEntry, LOPT_TENSOR_ENTRY)
  LOPT_STRUCT(Chunk, LOPT_CHUNK)
  LOPT_STRUCT(AccumulateParams, LOPT_ACCUMULATE_PARAMS)
  LOPT_STRUCT(ApplyParams, LOPT_APPLY_PARAMS)
  LOPT_STRUCT(Spec, LOPT_SPEC)
  LOPT_STRUCT(TensorShape, LOPT_TENSOR_SHAPE)
  LOPT_STRUCT(AdvanceParams, LOPT_ADVANCE_PARAMS)
  LOPT_STRUCT(FactoredTensor, LOPT_FACTORED_TENSOR)
  LOPT_STRUCT(Tile, LOPT_TILE)
  LOPT_STRUCT(Piece, LOPT_PIECE)
  LOPT_STRUCT(FactoredParams, LOPT_FACTORED_PARAMS)
  LOPT_STRUCT(Problem, LOPT_PROBLEM)
  LOPT_STRUCT(Run, LOPT_RUN)
  return structs;
}

// [(name, offset, count)] in floats.
py::list theta_layout(uint64_t address) {
  const Spec& s = *reinterpret_cast<const Spec*>(address);
  int columns = 0;
  with_feature_set(s.feature_set, [&](auto features) { columns = decltype(features)::kNumColumns; });
  py::list layout;
  int64_t offset = 0;
#define LOPT_TENSOR(name, count)                         \
  layout.append(py::make_tuple(#name, offset, (count))); \
  offset += (count);
  LOPT_THETA(LOPT_TENSOR)
#undef LOPT_TENSOR
  return layout;
}

int packed_weights(int feature_set, int width) {
  int size = 0;
  with_kernel(feature_set, width, [&](auto features, auto width_constant) {
    size = MlpLayout<decltype(features)::kNumColumns, decltype(width_constant)::value>::kSize;
  });
  return size;
}

// Of a learned optimizer of others: floats in one row of weights, and in a tensor's own; columns; measures of a tensor;
// entries of a piece. Zeros when no kernel is compiled for it.
std::vector<int64_t> factored_sizes(int rule, int width) {
  std::vector<int64_t> sizes(5);
  with_factored(rule, width, [&](auto columns, auto width_constant) {
    using Columns = decltype(columns);
    constexpr int kWidth = decltype(width_constant)::value;
    sizes = {FactoredMlp<Columns::kNumColumns, kWidth, Columns::kNumTimes>::kSize,
             FactoredMlp<Columns::kNumColumns, kWidth>::kSize, Columns::kNumColumns, Measure::kCount, kPiece};
  });
  return sizes;
}

}  // namespace

void bind_contracts(py::module_& m) {
  using namespace pybind11::literals;
  m.def("struct_fields", &struct_fields, "Fields of the structs that Python builds, with formats and offsets.");
  m.def("rule_tables", &rule_tables, "Names and constants of csrc/rule, as lopt/kernels/tables.py has them.");
  m.def("theta_layout", &theta_layout, "spec"_a, "Name, offset and size of every tensor of theta, in floats.");
  m.def("packed_weights", &packed_weights, "feature_set"_a, "width"_a,
        "Floats in one packed row of MLP weights; 0 when no kernel is compiled for this combination.");
  m.def(
      "factored_sizes", &factored_sizes, "rule"_a, "width"_a,
      "Of a learned optimizer of others: floats in one row of MLP weights, and in a tensor's own; columns; measures of "
      "a tensor; entries of a piece. Zeros when no kernel is compiled for it.");
}

}  // namespace lopt
