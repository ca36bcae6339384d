// The encodings of model files, turned into float32 while loading.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace merf {

// Encodings of a tensor's values in a file; ggml defines the quantised ones.
enum class Encoding : uint8_t {
  F32,
  F16,
  BF16,
  Q8_0,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K,
  IQ4_NL,
  IQ4_XS,
};

std::optional<Encoding> encoding_by_name(const std::string& name);
// The names of all, in words.
std::string encoding_names();

// Elements that share a block, and the block's bytes. A row's elements are a multiple of the former.
int64_t block_elements(Encoding encoding);
int64_t block_bytes(Encoding encoding);

// `elements` (a multiple of block_elements) values from source, which needs no alignment, in file order.
void dequantize(Encoding encoding, const void* source, int64_t elements, float* destination);

}  // namespace merf
