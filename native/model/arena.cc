#include "model/arena.h"

#include <algorithm>

namespace merf {
namespace {

constexpr size_t kAlignment = 256;  // bytes; a multiple of cache lines, vector widths and device transactions
constexpr size_t kSmallestBlock = size_t{4} << 20;

}  // namespace

Tensor Arena::take(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), tensor.shape.begin());
  const size_t bytes = (std::max<size_t>(tensor.bytes(), 1) + kAlignment - 1) / kAlignment * kAlignment;
  while (block_ < blocks_.size() && offset_ + bytes > blocks_[block_].bytes()) {
    ++block_;
    offset_ = 0;
  }
  if (block_ == blocks_.size()) {
    const int64_t words = static_cast<int64_t>(std::max(bytes, kSmallestBlock) / sizeof(float));
    blocks_.push_back(backend_.allocate(DType::f32, {words}));
    offset_ = 0;
  }
  tensor.storage = blocks_[block_].storage;
  tensor.data = static_cast<char*>(blocks_[block_].data) + offset_;
  offset_ += bytes;
  taken_ += bytes;
  most_ = std::max(most_, taken_);
  return tensor;
}

void Arena::release(Mark mark) {
  block_ = mark.block;
  offset_ = mark.offset;
  taken_ = mark.taken;
}

void Arena::reset() {
  release({});
  if (blocks_.size() < 2) return;
  blocks_.clear();
  blocks_.push_back(backend_.allocate(DType::f32, {static_cast<int64_t>(most_ / sizeof(float))}));
}

void Arena::free() {
  release({});
  blocks_.clear();
  most_ = 0;
}

}  // namespace merf
