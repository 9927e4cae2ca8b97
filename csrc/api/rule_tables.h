// The tables and constants of csrc/rule as Python objects; lopt/kernels/tables.py compares them with its own.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "rule/inputs.h"

namespace lopt {
namespace {

namespace py = pybind11;

// Of LOPT_ENUM.
std::vector<std::string> split(const char* names) {
  std::vector<std::string> list;
  std::istringstream stream(names);
  for (std::string name; std::getline(stream >> std::ws, name, ',');) list.push_back(name);
  return list;
}

template <class Features>
void add_feature_set(py::dict& tables) {
  const std::string prefix = std::string("feature set ") + Features::kName + ": ";
  const auto add = [&](const char* part, auto value) { tables[(prefix + part).c_str()] = value; };
  add("columns", split(Features::ColumnNames));
  add("moments", split(Features::MomentNames));
  add("accumulators", std::vector<int>{Features::kNumMom, Features::kNumRms});
  add("first_shifted", int{Features::kFirstShifted});
  add("slow", int{Features::kSlow});
  add("epsilon", float{Features::kEpsilon});
}

template <class Inputs>
void add_input_set(py::dict& tables) {
  const std::string prefix = std::string("input set ") + Inputs::kName + ": ";
  const auto add = [&](const char* part, auto value) { tables[(prefix + part).c_str()] = value; };
  add("scalars", split(Inputs::ScalarNames));
  add("time", split(Inputs::TimeNames));
  add("facts", split(Inputs::FactNames));
  add("untold", int{Inputs::kUntold});
  add("lstm_sees_constants", bool{Inputs::kLstmSeesConstants});
  add("robust", bool{Inputs::kRobust});
  add("natural", bool{Inputs::kNatural});
}

py::dict rule_tables() {
  py::dict tables;
  tables["STATS"] = split(Stat::ColumnNames);
  tables["LossState"] = split(LossState::FieldNames);
  tables["ClipState"] = split(ClipState::FieldNames);
  std::vector<std::string> names;
  const auto add_features = [&](auto features) {
    names.push_back(decltype(features)::kName);
    add_feature_set<decltype(features)>(tables);
  };
  for (int i = 0; with_feature_set(i, add_features); ++i) {
  }
  tables["FEATURE_SETS"] = names;
  names.clear();
  Spec spec{};
  for (; spec.tensor_inputs < kNumInputSets; ++spec.tensor_inputs)
    with_inputs(spec, [&](auto inputs) {
      names.push_back(decltype(inputs)::kName);
      add_input_set<decltype(inputs)>(tables);
    });
  tables["INPUT_SETS"] = names;
#define LOPT_CONSTANT(name, python_name, value) tables[python_name] = name;
  LOPT_CONSTANTS(LOPT_CONSTANT)
#undef LOPT_CONSTANT
  std::vector<float> waves;
  for (int i = 0; i < PaperInputs::kNumTime; ++i) waves.push_back(wave(i));
  tables["WAVES"] = waves;
  return tables;
}

}  // namespace
}  // namespace lopt
