// Device memory and the dense tensors that operators take.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>

namespace merf {

// Storage types. Arithmetic accumulates in float32 whatever the storage.
enum class DType : uint8_t { f32, bf16, i32 };

inline size_t size_of(DType dtype) { return dtype == DType::bf16 ? 2 : 4; }
const char* name_of(DType dtype);

// An error the user can act on. `code` is one of the stable codes of lib/errors.ts.
class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message) : std::runtime_error(message), code(std::move(code)) {}
  std::string code;
};

// One allocation on a device; freed (or returned to the device's pool) with its last owner.
class Storage {
 public:
  virtual ~Storage() = default;
  void* data = nullptr;
  size_t bytes = 0;
};

// A contiguous row-major tensor of rank 0 to 4, sharing its storage.
struct Tensor {
  std::shared_ptr<Storage> storage;
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<int64_t, 4> shape{1, 1, 1, 1};

  explicit operator bool() const { return data != nullptr; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  size_t bytes() const { return static_cast<size_t>(size()) * size_of(dtype); }
  // Elements in one step of the leading dimension.
  int64_t row_size() const { return rank == 0 || shape[0] == 0 ? 0 : size() / shape[0]; }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  // Rows [begin, end) of the leading dimension, sharing storage.
  Tensor rows(int64_t begin, int64_t end) const;
  // A tensor of these elements under another shape of equal size.
  Tensor view(std::initializer_list<int64_t> new_shape) const;
};

// A tensor of that shape that has no storage yet; `device` is for messages. Throws INVALID_ARGUMENT where an extent is
// below 0, OUT_OF_MEMORY where its bytes cannot be counted, INTERNAL where its rank is above 4.
Tensor shaped(DType dtype, std::initializer_list<int64_t> shape, const std::string& device);

// [tokens, heads, head_size] inside rows that may be wider, so that q, k and v can be read in place from the
// output of one fused projection. Element (t, h, d) is at data + t * row_stride + h * head_size + d.
struct HeadsView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t head_size = 0;
  int64_t row_stride = 0;
};

}  // namespace merf
