// Reads tensors out of model files: checked against the file's real size, turned into float32, and refused
// where they are not finite.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace merf {

// Where in a file a parameter lies.
struct TensorSource {
  std::string name;  // Hugging Face's
  std::string path;
  int64_t offset = 0;
  int64_t byte_length = 0;
  std::string encoding;  // as Encoding names it (dequantize.h)
  std::vector<int64_t> shape;
  // Not 0: rows of a llama GGUF's q or k, whose heads (this many) hold the two halves of a rotation
  // interleaved; they are put back into Hugging Face's order.
  int64_t permuted_heads = 0;
};

// Gives `consume` the tensor's elements in order, as float32, a bounded stretch at a time. Throws
// FILE_NOT_FOUND, MALFORMED_FILE, UNSUPPORTED or NON_FINITE with the tensor's name and the file's.
void read_tensor(
    const TensorSource& source,
    const std::function<void(const float* data, int64_t first_element, int64_t elements)>& consume);

}  // namespace merf
