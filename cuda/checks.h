// What those who start kernels check and prepare, by the CUDA runtime (launch.cuh) or the driver (loaded.cpp).
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "grids.h"

namespace lopt {

inline void check_chunks(const char* name, int64_t num_chunks) {
  if (num_chunks > kMostChunks)
    throw std::runtime_error(std::string(name) + ": expected at most 2^31 - 1 chunks, got " +
                             std::to_string(num_chunks) + "; update the tensors in several calls");
}

// Bytes of dynamic shared memory in a block of `advance`.
inline size_t row_bytes(const Spec& s) {
  const size_t bytes = static_cast<size_t>(row_floats(s)) * sizeof(float);
  if (bytes > kMostRowBytes)
    throw std::runtime_error("advance: the tensors of one LSTM step take " + std::to_string(bytes) +
                             " bytes of shared memory, expected at most 32768; use a smaller lstm_width or "
                             "impl='reference'");
  return bytes;
}

// Calls f(part, first, size) for words[first] to words[first + size - 1], until all had their turn.
template <class Function>
void in_parts(const int64_t* words, int64_t count, Function&& f) {
  constexpr int64_t kWords = sizeof(Words) / sizeof(int64_t);
  for (int64_t first = 0; first < count; first += kWords) {
    Words part{};
    const int64_t size = std::min(count - first, kWords);
    std::copy_n(words + first, size, part.value);
    f(part, first, static_cast<int>(size));
  }
}

}  // namespace lopt
