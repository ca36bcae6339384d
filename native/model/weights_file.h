// Reads tensors out of model files: mapped into memory, checked against the file's real size, turned into
// float32.
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
  std::string encoding;  // F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K
  std::vector<int64_t> shape;
  // Not 0: rows of a llama GGUF's q or k, whose heads (this many) hold the two halves of a rotation
  // interleaved; they are put back into Hugging Face's order.
  int64_t permuted_heads = 0;
};

// Gives `consume` the tensor's elements in order, as float32, a bounded stretch at a time. Throws
// FILE_NOT_FOUND, MALFORMED_FILE or UNSUPPORTED with the tensor's name and the file's.
void read_tensor(
    const TensorSource& source,
    const std::function<void(const float* data, int64_t first_element, int64_t elements)>& consume);

}  // namespace merf
