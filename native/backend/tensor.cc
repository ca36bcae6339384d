#include "backend/tensor.h"

namespace merf {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::i32:
      return "i32";
  }
  return "unknown";
}

Tensor Tensor::rows(int64_t begin, int64_t end) const {
  if (rank == 0 || begin < 0 || end < begin || end > shape[0]) {
    throw Error("INTERNAL", "Expected rows within the tensor but received [" + std::to_string(begin) + ", " +
                                std::to_string(end) + ") of " + std::to_string(rank == 0 ? 0 : shape[0]));
  }
  Tensor part = *this;
  part.shape[0] = end - begin;
  part.data = static_cast<char*>(data) + static_cast<size_t>(begin * row_size()) * size_of(dtype);
  return part;
}

Tensor Tensor::view(std::initializer_list<int64_t> new_shape) const {
  Tensor other = *this;
  other.shape = {1, 1, 1, 1};
  if (new_shape.size() > other.shape.size()) {
    throw Error("INTERNAL",
                "Expected a shape of rank 4 at most but received rank " + std::to_string(new_shape.size()));
  }
  other.rank = static_cast<int>(new_shape.size());
  int i = 0;
  for (const int64_t extent : new_shape) other.shape[i++] = extent;
  if (other.size() != size()) {
    throw Error("INTERNAL", "Expected a shape of " + std::to_string(size()) +
                                " elements but received one of " + std::to_string(other.size()));
  }
  return other;
}

}  // namespace merf
