// Memory for activations: taken piece by piece, given back all at once, and kept between calls, so that a
// step allocates nothing that an earlier step of its size had.
#pragma once

#include <vector>

#include "backend/backend.h"

namespace merf {

class Arena {
 public:
  explicit Arena(Backend& backend) : backend_(&backend) {}
  // An arena without a backend takes nothing and counts what would be taken.
  Arena() = default;

  // Contents are undefined. The tensor is valid until release() to a mark before it.
  Tensor take(DType dtype, std::initializer_list<int64_t> shape);

  struct Mark {
    size_t block = 0;
    size_t offset = 0;
    size_t taken = 0;
  };
  Mark mark() const { return {block_, offset_, taken_}; }
  void release(Mark mark);
  size_t taken() const { return taken_; }
  // Bytes of the device that are the arena's, in use or not.
  size_t held() const;
  // Gives everything back but the resident memory; where the last use spilled over several blocks, they
  // become one.
  void reset();
  // Has room for `bytes` in one block, where nothing is taken: what grows piece by piece is one block only
  // after the first reset() that follows, and then in memory that has not been touched before.
  void reserve(size_t bytes);
  // Gives everything back, and returns the memory to the device, the resident's too, with that of
  // recordings.
  void free();

  // Resident memory outlives reset(), such as keys and values between two rollouts. It stands in the arena's
  // own blocks where those have room, since whoever needs all of the arena can evict it: so it makes no
  // call's memory larger than it was. There is one resident at a time.

  // Makes `bytes` resident (more than before, or the first), where nothing is taken: [bytes] as f32 words,
  // which begin with what was resident before. Throws OUT_OF_MEMORY, and leaves what there was.
  Tensor hold_resident(size_t bytes);
  // Where it stands now: make_room may move it.
  const Tensor& resident() const { return resident_; }
  size_t resident_bytes() const { return resident_ ? resident_.bytes() : 0; }
  // Tells one resident from the next: another number once it has been evicted.
  uint64_t resident_version() const { return resident_version_; }
  void evict_resident();
  // Evicts the resident, unless it is small, where the arena's memory does not hold both it and `bytes`.
  void make_room(size_t bytes);

 private:
  Backend* backend_ = nullptr;
  std::vector<Tensor> blocks_;
  size_t block_ = 0;   // the block in use
  size_t offset_ = 0;  // bytes used in it
  size_t taken_ = 0;   // bytes given out, without what was left over at the ends of blocks
  size_t most_ = 0;    // the most that taken_ ever was
  Tensor resident_;
  // Bytes at the front of the first block that are the resident's; 0 where it has memory of its own.
  size_t floor_ = 0;
  size_t most_behind_ = 0;  // the most that taken_ was behind it
  uint64_t resident_version_ = 0;
};

// Says for messages how many of `count` tokens, which need `needed` bytes together, would have fitted into
// `available`: in two figures, with a part left for the temporaries of operators, and fewer than `count`,
// which did not fit.
int64_t count_that_fits(int64_t count, int64_t needed, int64_t available);

// Gives back, on leaving a scope, what was taken in it.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace merf
