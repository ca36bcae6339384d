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
  taken_ += bytes;
  most_ = std::max(most_, taken_);
  if (backend_ == nullptr) return tensor;
  while (block_ < blocks_.size() && offset_ + bytes > blocks_[block_].bytes()) {
    ++block_;
    offset_ = 0;
  }
  if (block_ == blocks_.size()) {
    const int64_t words = static_cast<int64_t>(std::max(bytes, kSmallestBlock) / sizeof(float));
    blocks_.push_back(backend_->allocate(DType::f32, {words}));
    offset_ = 0;
  }
  tensor.storage = blocks_[block_].storage;
  tensor.data = static_cast<char*>(blocks_[block_].data) + offset_;
  offset_ += bytes;
  return tensor;
}

void Arena::release(Mark mark) {
  block_ = mark.block;
  offset_ = mark.offset;
  taken_ = mark.taken;
}

void Arena::reset() {
  release({});
  if (blocks_.size() > 1) reserve(most_);
}

void Arena::reserve(size_t bytes) {
  if (blocks_.size() == 1 && blocks_[0].bytes() >= bytes) return;
  most_ = std::max(most_, bytes);
  blocks_.clear();
  blocks_.push_back(backend_->allocate(DType::f32, {static_cast<int64_t>(most_ / sizeof(float))}));
}

size_t Arena::held() const {
  size_t bytes = 0;
  for (const Tensor& block : blocks_) bytes += block.bytes();
  return bytes;
}

void Arena::free() {
  release({});
  blocks_.clear();
  most_ = 0;
  // What they were made over has gone, and where memory is wanted theirs is too.
  if (backend_ != nullptr) backend_->release_recordings();
}

int64_t count_that_fits(int64_t count, int64_t needed, int64_t available) {
  const double share =
      0.9 * static_cast<double>(std::max<int64_t>(0, available)) / static_cast<double>(needed);
  int64_t fit = static_cast<int64_t>(std::min(share, 0.75) * static_cast<double>(count));
  int64_t unit = 1;
  while (fit / unit >= 100) unit *= 10;
  return fit / unit * unit;
}

}  // namespace merf
