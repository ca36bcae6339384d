#include "model/arena.h"

#include <algorithm>

namespace merf {
namespace {

constexpr size_t kAlignment = 256;  // bytes; a multiple of cache lines, vector widths and device transactions
constexpr size_t kSmallestBlock = size_t{4} << 20;
constexpr size_t kSmallResident = size_t{8} << 20;

size_t aligned(size_t bytes) {
  return (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

Tensor Arena::take(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor tensor;
  tensor.dtype = dtype;
  tensor.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), tensor.shape.begin());
  const size_t bytes = aligned(tensor.bytes());
  taken_ += bytes;
  most_ = std::max(most_, taken_);
  if (floor_ > 0) most_behind_ = std::max(most_behind_, taken_);
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
  offset_ = block_ == 0 ? std::max(mark.offset, floor_) : mark.offset;
  taken_ = mark.taken;
}

void Arena::reset() {
  release({});
  if (floor_ == 0 && blocks_.size() > 1) reserve(most_);
  // Behind a resident there may be a second block.
  if (floor_ > 0 && blocks_.size() > 2) reserve(most_behind_);
}

void Arena::reserve(size_t bytes) {
  // The front may have become free since the last reset.
  release({});
  const size_t behind = floor_ > 0 ? 1 : 0;  // the first block that is whole
  if (blocks_.size() == 1 && blocks_[0].bytes() - floor_ >= bytes) return;
  if (blocks_.size() == behind + 1 && blocks_[behind].bytes() >= bytes) return;
  most_ = std::max(most_, bytes);
  most_behind_ = std::max(most_behind_, bytes);
  const size_t needed = floor_ > 0 ? most_behind_ : most_;
  // A block that a resident had made too small may do without it.
  const bool fits = floor_ == 0 && blocks_.size() > 1 && blocks_[0].bytes() >= needed;
  blocks_.resize(std::min(blocks_.size(), fits ? 1 : behind));
  if (!fits)
    blocks_.push_back(backend_->allocate(DType::f32, {static_cast<int64_t>(needed / sizeof(float))}));
}

size_t Arena::held() const {
  size_t bytes = floor_ > 0 ? 0 : resident_bytes();
  for (const Tensor& block : blocks_) bytes += block.bytes();
  return bytes;
}

void Arena::free() {
  evict_resident();
  release({});
  blocks_.clear();
  most_ = 0;
  // What they were made over has gone, and where memory is wanted theirs is too.
  if (backend_ != nullptr) backend_->release_recordings();
}

Tensor Arena::hold_resident(size_t bytes) {
  bytes = aligned(bytes);
  if (bytes <= resident_bytes()) return resident_;
  const int64_t words = static_cast<int64_t>(bytes / sizeof(float));
  const Tensor before = resident_;
  const bool in_front = !blocks_.empty() && blocks_[0].bytes() >= bytes;
  resident_ = in_front ? blocks_[0].rows(0, words) : backend_->allocate(DType::f32, {words});
  if (before && before.data != resident_.data) {
    backend_->copy(resident_.rows(0, before.shape[0]), before);
  }
  floor_ = in_front ? bytes : 0;
  if (!before) most_behind_ = 0;
  release({});
  return resident_;
}

void Arena::evict_resident() {
  if (!resident_) return;
  resident_ = Tensor();
  ++resident_version_;
  floor_ = 0;
}

void Arena::make_room(size_t bytes) {
  if (!resident_ || (floor_ > 0 && blocks_[0].bytes() - floor_ >= bytes)) return;
  if (resident_bytes() > kSmallResident) return evict_resident();
  if (floor_ == 0) return;
  Tensor own;
  try {
    own = backend_->allocate(DType::f32, {resident_.shape[0]});
  } catch (const Error& error) {
    if (error.code != "OUT_OF_MEMORY") throw;
    return evict_resident();
  }
  backend_->copy(own, resident_);
  resident_ = own;
  floor_ = 0;
  release({});
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
