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

Tensor shaped(DType dtype, std::initializer_list<int64_t> shape, const std::string& device) {
  Tensor tensor;
  tensor.dtype = dtype;
  if (shape.size() > tensor.shape.size()) {
    throw Error("INTERNAL",
                "Expected a shape of rank 4 at most but received rank " + std::to_string(shape.size()));
  }
  tensor.rank = static_cast<int>(shape.size());
  int64_t bytes = static_cast<int64_t>(size_of(dtype));
  bool overflow = false;
  int i = 0;
  for (const int64_t extent : shape) {
    if (extent < 0) {
      throw Error("INVALID_ARGUMENT",
                  "Expected extents of 0 or more for shape but received " + std::to_string(extent));
    }
    tensor.shape[i++] = extent;
    overflow = __builtin_mul_overflow(bytes, extent, &bytes) || overflow;
  }
  if (overflow) {
    std::string dims;
    for (const int64_t extent : shape) dims += (dims.empty() ? "" : " x ") + std::to_string(extent);
    throw Error("OUT_OF_MEMORY",
                "Could not allocate a tensor of " + dims + " " + name_of(dtype) + " on " + device);
  }
  return tensor;
}

}  // namespace merf
