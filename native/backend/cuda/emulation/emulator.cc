#include "backend/cuda/emulation/emulator.h"

#include <omp.h>
#include <sys/mman.h>
#if defined(__FMA__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <boost/context/fiber.hpp>
#include <cmath>
#include <deque>
#include <exception>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <string>

#include "backend/bf16.h"
#include "backend/cuda/emulation/counts.h"
#include "backend/cuda/emulation/memory.h"
#include "backend/tensor.h"

namespace merf::cuda::emulation {
namespace {

namespace context = boost::context;

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr int kMaxThreads = 1024;
constexpr int kScheduler = -1;  // in place of a fiber's number

// Stacks for the threads of one block, each with a page below it that may not be touched.
class Stacks {
 public:
  Stacks() {
    memory_ = static_cast<char*>(mmap(nullptr, kMaxThreads * kSlot, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw Error("OUT_OF_MEMORY", "Could not map stacks for the emulated GPU");
    for (int i = 0; i < kMaxThreads; ++i) mprotect(memory_ + i * kSlot, kPage, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, kMaxThreads * kSlot); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // What Boost.Context asks a stack allocator for.
  struct Allocator {
    char* top;
    context::stack_context allocate() {
      context::stack_context stack;
      stack.sp = top;
      stack.size = kStackBytes - kPage;
      return stack;
    }
    void deallocate(context::stack_context&) noexcept {}
  };
  // Tops stand in different lines of a page: else what all threads have at one depth would share a few sets of the
  // cache.
  Allocator of(int slot) { return {memory_ + (slot + 1) * kSlot - slot % 64 * 64}; }

 private:
  static constexpr size_t kPage = 4096;
  static constexpr size_t kSlot = kStackBytes + kPage;
  char* memory_;
};

struct PendingCopy {
  void* to;
  const void* from;
  bool valid;
  int group;
};

constexpr int kWarpgroup = 128;

struct BulkCopy {
  char* to;
  TensorMap map;  // without data: `bytes` from `from`
  int column, middle, row;
  const char* from;
  uint32_t bytes;
};

// An mbarrier; the word in shared memory is only its name.
struct MemoryBarrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // announced and not copied yet
  int phase = 0;
  std::vector<int> waiting;
  std::vector<BulkCopy> copies;  // that have not begun
};

// A product of a warpgroup that was begun and not waited for.
struct Product {
  int group = 0, columns = 0, steps = 0;
  bool in_registers = false, b_mn_major = false, add = false, read = false;
  float* d[kWarpgroup];
  std::vector<uint32_t> registers;  // [thread][steps][4]
  std::vector<uint64_t> a_descriptors, b_descriptors;
  std::vector<float> a, b;  // [64][depth], [depth][columns], once read
  std::source_location location;
};

// The sums of products that have ended, which each thread gets when it waits for them.
struct Sums {
  int group, columns;
  float* d[kWarpgroup];       // null where the thread has got its own
  std::vector<float> values;  // [64][columns]
  int left = kWarpgroup;
};

struct Warpgroup {
  int arrived = 0;
  uint32_t line = 0;
  int waiting[kWarpgroup];
  Product next;
  std::deque<Product> products;
  std::list<Sums> ended;
  std::map<float*, std::vector<float>> sums;  // [64][columns] of products under way, by the first thread's d
};

// A fiber and the thread of the block that it runs.
struct Fiber {
  context::fiber handle;  // where it goes on; empty while it runs
  ThreadIndices indices;
  int index = 0;  // among fibers
  int thread = 0;
  int open_group = 0;
  std::vector<PendingCopy> copies;  // in the order of their groups, from first_copy on
  size_t first_copy = 0;
  int open_product_group = 0;
  bool fenced = false;             // wgmma_fence since the last wait
  const char* waits_at = nullptr;  // the operation
  std::source_location location;
};

// Where one lane's fragments stand, on its stack: [blocks][registers].
struct MmaOperands {
  const uint32_t *a, *b;
  float* d;
};

// What the lanes of a warp give an operation, and what they get.
struct Warp {
  int arrived = 0;
  const char* operation = nullptr;
  uint32_t line = 0;
  int waiting[kLanes];
  union {
    struct {
      uint64_t value[kLanes];
      int source[kLanes];
    } shuffle;
    uint32_t* matrices[kLanes];
    MmaOperands mma[kLanes];
  } in;
  uint64_t out[kLanes];
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  uint32_t line = 0;
  std::vector<int> waiting;
};

struct SharedPiece {
  char* data;
  size_t bytes;
};

struct Broken {
  std::string what;
};

class Order {
 public:
  explicit Order(uint64_t seed) : state_(seed) {}
  bool drawn() const { return state_ != 0; }
  size_t below(size_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<size_t>((state_ >> 11) % n);
  }

 private:
  uint64_t state_;
};

}  // namespace

// Runs the blocks that one thread of the host has.
class BlockRunner {
 public:
  // Throws Broken.
  void run(dim3 block, dim3 grid, int threads, size_t shared_bytes, uint64_t seed, bool by_warp,
           const std::function<void()>& body);

  static thread_local BlockRunner* active;
  Fiber* current = nullptr;

  void* take_shared(size_t piece, size_t bytes);
  void block_barrier(int id, int threads, const char* operation, const std::source_location& at);
  template <class Give, class Compute>
  Warp& warp_operation(const char* operation, const std::source_location& at, const Give& give,
                       const Compute& compute);
  int lane() const { return current->thread % kLanes; }
  // Ends the launch: no thread of the block goes on.
  void stop(std::string what, const char* operation, const std::source_location& at);
  // 16 bytes that cp.async or ldmatrix access.
  void check_shared(const void* address, const char* operation, const std::source_location& at);
  void check_global(const void* address, const char* operation, const std::source_location& at);
  std::string where(const std::source_location& at) const;

  void arrive(int id, int threads, const char* operation, const std::source_location& at);
  uint32_t shared_address(const void* at) const;
  // Finds `bytes` at an address in shared memory, which must lie in one piece.
  char* shared_at(uint32_t address, size_t bytes, const char* operation, const std::source_location& at);
  void init_memory_barrier(uint64_t* barrier, int arrivals, const std::source_location& at);
  void arrive_memory_barrier(uint64_t* barrier, int64_t bytes, const std::source_location& at);
  void wait_memory_barrier(uint64_t* barrier, int parity, const std::source_location& at);
  void copy_tensor(void* to, const TensorMap& map, int column, int middle, int row, uint64_t* barrier,
                   const std::source_location& at);
  void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                 const std::source_location& at);
  void begin_product(float* d, int columns, int steps, const uint32_t* a, const uint64_t* a_descriptors,
                     const uint64_t* b_descriptors, bool b_mn_major, bool add,
                     const std::source_location& at);
  void end_products(int pending);

 private:
  MemoryBarrier& memory_barrier(uint64_t* barrier, const char* operation, const std::source_location& at);
  void end_phase(MemoryBarrier& barrier);
  void run_copies(MemoryBarrier& barrier, const std::source_location& at);
  const char* described(uint64_t descriptor, uint32_t mn, uint32_t k, bool mn_major,
                        const std::source_location& at);
  void read_operands(Product& product);
  bool drawn_now() { return order_.drawn() && order_.below(2) == 0; }
  void loop(int fiber);
  void draw_unstarted();
  int take_fiber();
  int take_ready();
  int next_fiber();
  // Never inlined: the next block may have the fiber on another thread of the host, where addresses of thread_local
  // variables that the compiler kept would be wrong.
  [[gnu::noinline]] void leave(context::fiber& from, int self);
  void wait(const char* operation, const std::source_location& at);
  void check_end();

  Stacks stacks_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  context::fiber scheduler_;           // where run() goes on
  context::fiber* leaving_ = nullptr;  // where to keep what was left last
  std::vector<int> idle_, ready_;
  size_t ready_begin_ = 0;  // of ready_, where threads go on in order
  std::vector<int> unstarted_;
  size_t started_ = 0;
  int unfinished_ = 0, threads_ = 0;
  ThreadIndices indices_;
  const std::function<void()>* body_ = nullptr;
  Order order_{0};
  bool by_warp_ = false;
  int favourite_ = 0;  // the warp that goes on as long as it can
  std::string broken_;

  std::vector<Warp> warps_;
  std::map<int, Barrier> barriers_;
  std::map<const uint64_t*, MemoryBarrier> memory_barriers_;
  std::vector<Warpgroup> warpgroups_;
  std::vector<char> shared_;
  std::vector<SharedPiece> pieces_;
  size_t shared_bytes_ = 0, shared_taken_ = 0, shared_end_ = 0;
  Range read_[4];  // allocations lately read
  size_t next_read_ = 0;
};

thread_local BlockRunner* BlockRunner::active = nullptr;

namespace {
// Kept apart from BlockRunner so that it is one load away.
thread_local const ThreadIndices* current_indices = nullptr;
}  // namespace

const ThreadIndices& indices() { return *current_indices; }

void BlockRunner::run(dim3 block, dim3 grid, int threads, size_t shared_bytes, uint64_t seed, bool by_warp,
                      const std::function<void()>& body) {
  threads_ = unfinished_ = threads;
  indices_ = {{}, block, {static_cast<unsigned>(threads)}, grid};
  body_ = &body;
  order_ = Order(seed);
  by_warp_ = by_warp;
  favourite_ = 0;
  broken_.clear();
  ready_.clear();
  ready_begin_ = 0;
  started_ = 0;
  warps_.resize(static_cast<size_t>(threads / kLanes));
  for (Warp& warp : warps_) warp.arrived = 0;
  unstarted_.resize(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) unstarted_[static_cast<size_t>(i)] = i;
  if (order_.drawn()) draw_unstarted();
  barriers_.clear();
  memory_barriers_.clear();
  warpgroups_.clear();
  warpgroups_.resize(static_cast<size_t>(threads / kWarpgroup));
  pieces_.clear();
  shared_bytes_ = shared_bytes;
  shared_taken_ = shared_end_ = 0;
  for (Range& range : read_) range = {};

  active = this;
  leave(scheduler_, kScheduler);
  active = nullptr;
  if (broken_.empty()) check_end();
  if (broken_.empty()) return;
  // What waits will never go on: its stack is unwound.
  idle_.clear();
  fibers_.clear();
  throw Broken{broken_};
}

void BlockRunner::draw_unstarted() {
  const auto shuffle = [this](size_t begin, size_t end) {
    for (size_t i = end; i > begin + 1; --i) {
      std::swap(unstarted_[i - 1], unstarted_[begin + order_.below(i - begin)]);
    }
  };
  shuffle(0, unstarted_.size());
  if (!by_warp_) return;
  std::vector<size_t> place(warps_.size(), warps_.size());
  size_t seen = 0;
  for (const int thread : unstarted_) {
    size_t& of_warp = place[static_cast<size_t>(thread / kLanes)];
    if (of_warp == warps_.size()) of_warp = seen++;
  }
  std::stable_sort(unstarted_.begin(), unstarted_.end(), [&](int a, int b) {
    return place[static_cast<size_t>(a / kLanes)] < place[static_cast<size_t>(b / kLanes)];
  });
}

// A fiber that can go on, in an order that is drawn.
int BlockRunner::take_ready() {
  size_t at = order_.below(ready_.size());
  if (by_warp_) {
    const auto warp = [&] { return fibers_[static_cast<size_t>(ready_[at])]->thread / kLanes; };
    for (size_t tried = 0; tried < ready_.size() && warp() != favourite_; ++tried) {
      at = (at + 1) % ready_.size();
    }
    favourite_ = warp();
  }
  std::swap(ready_[at], ready_.back());
  const int fiber = ready_.back();
  ready_.pop_back();
  return fiber;
}

// Which fiber goes on; kScheduler where none can, or the block is broken.
int BlockRunner::next_fiber() {
  const bool ready = ready_begin_ < ready_.size(), unstarted = started_ < unstarted_.size();
  if (!broken_.empty() || (!ready && !unstarted)) return kScheduler;
  if (unstarted && (!ready || !order_.drawn() || (!by_warp_ && order_.below(2) == 0))) return take_fiber();
  if (order_.drawn()) return take_ready();
  const int next = ready_[ready_begin_++];
  if (ready_begin_ == ready_.size()) {
    ready_.clear();
    ready_begin_ = 0;
  }
  return next;
}

// Goes straight to what can go on, without a detour through run(); comes back when something goes on with `self`, which
// stands in `from`.
void BlockRunner::leave(context::fiber& from, int self) {
  const int next = next_fiber();
  if (next == self) return;
  leaving_ = &from;
  context::fiber* to = &scheduler_;
  if (next != kScheduler) {
    current = fibers_[static_cast<size_t>(next)].get();
    current_indices = &current->indices;
    to = &current->handle;
  }
  context::fiber left = std::move(*to).resume();
  *leaving_ = std::move(left);
}

// The fiber that goes on with the next thread that has not started.
int BlockRunner::take_fiber() {
  if (!idle_.empty()) {
    const int fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }
  const int fiber = static_cast<int>(fibers_.size());
  fibers_.push_back(std::make_unique<Fiber>());
  fibers_.back()->index = fiber;
  fibers_.back()->handle =
      context::fiber(std::allocator_arg, stacks_.of(fiber), [this, fiber](context::fiber&& left) {
        *leaving_ = std::move(left);
        loop(fiber);
        return std::move(scheduler_);
      });
  return fiber;
}

void BlockRunner::loop(int fiber) {
  Fiber& self = *fibers_[static_cast<size_t>(fiber)];
  while (true) {
    while (started_ < unstarted_.size()) {
      self.thread = unstarted_[started_++];
      self.indices = indices_;
      self.indices.thread.x = static_cast<unsigned>(self.thread);
      self.copies.clear();
      self.first_copy = 0;
      self.open_group = 0;
      self.open_product_group = 0;
      self.fenced = false;
      (*body_)();
      --unfinished_;
      if (order_.drawn()) break;
    }
    idle_.push_back(fiber);
    leave(self.handle, fiber);
  }
}

std::string BlockRunner::where(const std::source_location& at) const {
  const std::string file = at.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line());
}

// Until another thread puts this one back into ready_.
void BlockRunner::wait(const char* operation, const std::source_location& at) {
  Fiber& self = *current;
  self.waits_at = operation;
  self.location = at;
  leave(self.handle, self.index);
  self.waits_at = nullptr;
}

void BlockRunner::stop(std::string what, const char* operation, const std::source_location& at) {
  broken_ = std::move(what);
  wait(operation, at);
}

void BlockRunner::check_shared(const void* address, const char* operation, const std::source_location& at) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    stop(std::string(operation) + " (" + where(at) +
             ") got an address in shared memory that is no multiple of 16",
         operation, at);
  }
  const bool inside = std::any_of(pieces_.begin(), pieces_.end(), [&](const SharedPiece& piece) {
    return Range{piece.data, piece.data + piece.bytes}.contains(address, 16);
  });
  if (inside) return;
  stop(std::string(operation) + " (" + where(at) + ") got an address outside of the block's shared memory",
       operation, at);
}

void BlockRunner::check_global(const void* address, const char* operation, const std::source_location& at) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    stop(std::string(operation) + " (" + where(at) +
             ") got an address in global memory that is no multiple of 16",
         operation, at);
  }
  for (const Range& range : read_) {
    if (range.contains(address, 16)) return;
  }
  read_[next_read_] = allocation_of(address);
  if (!read_[next_read_].contains(address, 16)) {
    stop(std::string(operation) + " (" + where(at) + ") read outside of global memory", operation, at);
  }
  next_read_ = (next_read_ + 1) % std::size(read_);
}

void BlockRunner::check_end() {
  if (unfinished_ > 0) {
    std::map<std::string, int> waiting;
    for (const auto& fiber : fibers_) {
      if (fiber->waits_at != nullptr) {
        ++waiting[std::string(fiber->waits_at) + " (" + where(fiber->location) + ")"];
      }
    }
    for (const auto& [operation, count] : waiting) {
      broken_ += (broken_.empty() ? "" : ", ") + std::to_string(count) + " threads wait at " + operation;
    }
    broken_ += " and " + std::to_string(threads_ - unfinished_) + " of " + std::to_string(threads_) +
               " threads have ended";
    for (const auto& fiber : fibers_) fiber->waits_at = nullptr;
    return;
  }
  for (const Warpgroup& warpgroup : warpgroups_) {
    if (warpgroup.products.empty()) continue;
    broken_ = "its threads ended before a product that they had begun (" +
              where(warpgroup.products.front().location) + ")";
    return;
  }
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const bool before = guard_intact(pieces_[i].data - kGuardBytes, kGuardBytes);
    const bool behind = guard_intact(pieces_[i].data + pieces_[i].bytes, kGuardBytes);
    if (before && behind) continue;
    broken_ = std::string("it wrote ") + (before ? "behind" : "before") + " piece " + std::to_string(i) +
              " of its shared memory, of " + std::to_string(pieces_[i].bytes) + " bytes";
    return;
  }
}

void* BlockRunner::take_shared(size_t piece, size_t bytes) {
  if (piece < pieces_.size()) {
    if (pieces_[piece].bytes != bytes) {
      broken_ =
          "its threads took different pieces of shared memory: " + std::to_string(pieces_[piece].bytes) +
          " and " + std::to_string(bytes) + " bytes";
      wait("shared memory", std::source_location::current());
    }
    return pieces_[piece].data;
  }
  shared_taken_ += bytes;
  if (shared_taken_ > shared_bytes_) {
    broken_ = "it took " + std::to_string(shared_taken_) + " bytes of shared memory but was launched with " +
              std::to_string(shared_bytes_);
    wait("shared memory", std::source_location::current());
  }
  // Room for the pieces with a guard zone between any two; a block takes no more than 64.
  constexpr size_t kAlignment = 1024;
  if (shared_.empty()) shared_.resize(kMostShared + 65 * (kGuardBytes + kAlignment));
  if (pieces_.empty()) {
    shared_end_ = kAlignment - reinterpret_cast<uintptr_t>(shared_.data()) % kAlignment;
  }
  char* guard = shared_.data() + shared_end_;
  char* data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(guard) + kGuardBytes + kAlignment - 1) /
                                       kAlignment * kAlignment);
  write_guard(data - kGuardBytes, kGuardBytes);
  std::memset(data, kPoison, bytes);
  write_guard(data + bytes, kGuardBytes);
  shared_end_ = static_cast<size_t>(data + bytes + kGuardBytes - shared_.data());
  pieces_.push_back({data, bytes});
  return data;
}

void BlockRunner::block_barrier(int id, int threads, const char* operation, const std::source_location& at) {
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.line == 0) barrier.line = at.line();
  if (barrier.expected != threads || barrier.line != at.line()) {
    broken_ = "threads of one block wait at different places for barrier " + std::to_string(id) + ": line " +
              std::to_string(barrier.line) + " and " + where(at);
    wait(operation, at);
  }
  if (++barrier.arrived < barrier.expected) {
    barrier.waiting.push_back(current->index);
    wait(operation, at);
    return;
  }
  barrier.arrived = 0;
  barrier.line = 0;
  ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

void BlockRunner::arrive(int id, int threads, const char* operation, const std::source_location& at) {
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) {
    stop("threads expect different numbers of others at barrier " + std::to_string(id) + " (" + where(at) +
             ")",
         operation, at);
  }
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  barrier.line = 0;
  ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

// ---- shared memory by number, mbarrier and the copies that complete on it

uint32_t BlockRunner::shared_address(const void* at) const {
  // Pieces of shared memory are aligned to this.
  constexpr uintptr_t kAlignment = 1024;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(shared_.data()) / kAlignment * kAlignment;
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at) - begin);
}

char* BlockRunner::shared_at(uint32_t address, size_t bytes, const char* operation,
                             const std::source_location& at) {
  char* there = shared_.data() - shared_address(shared_.data()) + address;
  for (const SharedPiece& piece : pieces_) {
    if (Range{piece.data, piece.data + piece.bytes}.contains(there, bytes)) return there;
  }
  stop(std::string(operation) + " (" + where(at) + ") got an address outside of the block's shared memory",
       operation, at);
  return nullptr;
}

MemoryBarrier& BlockRunner::memory_barrier(uint64_t* barrier, const char* operation,
                                           const std::source_location& at) {
  const auto found = memory_barriers_.find(barrier);
  if (found == memory_barriers_.end()) {
    stop(std::string(operation) + " (" + where(at) + ") got a barrier that was not initialised", operation,
         at);
  }
  return found->second;
}

void BlockRunner::init_memory_barrier(uint64_t* barrier, int arrivals, const std::source_location& at) {
  shared_at(shared_address(barrier), sizeof(uint64_t), "barrier_init", at);
  memory_barriers_[barrier] = {};
  memory_barriers_[barrier].arrivals = memory_barriers_[barrier].missing = arrivals;
}

void BlockRunner::end_phase(MemoryBarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.phase = 1 - barrier.phase;
  barrier.missing = barrier.arrivals;
  ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

void BlockRunner::arrive_memory_barrier(uint64_t* barrier, int64_t bytes, const std::source_location& at) {
  MemoryBarrier& b = memory_barrier(barrier, "barrier_arrive", at);
  if (b.missing == 0) {
    stop("more threads arrived at a barrier (" + where(at) + ") than it waits for", "barrier_arrive", at);
  }
  b.bytes += bytes;
  --b.missing;
  end_phase(b);
}

void BlockRunner::wait_memory_barrier(uint64_t* barrier, int parity, const std::source_location& at) {
  MemoryBarrier& b = memory_barrier(barrier, "barrier_wait", at);
  while (b.phase == parity) {
    run_copies(b, at);
    if (b.phase != parity) break;
    b.waiting.push_back(current->index);
    wait("barrier_wait", at);
  }
}

void BlockRunner::copy_tensor(void* to, const TensorMap& map, int column, int middle, int row,
                              uint64_t* barrier, const std::source_location& at) {
  MemoryBarrier& b = memory_barrier(barrier, "copy_tensor", at);
  const uint32_t address = shared_address(to);
  if (address % 1024 != 0) {
    stop("copy_tensor (" + where(at) + ") got an address in shared memory that is no multiple of 1024",
         "copy_tensor", at);
  }
  shared_at(address, static_cast<size_t>(map.rows) * 128, "copy_tensor", at);
  b.copies.push_back({static_cast<char*>(to), map, column, middle, row, nullptr, 0});
  if (!b.waiting.empty() || drawn_now()) run_copies(b, at);
}

void BlockRunner::copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                            const std::source_location& at) {
  MemoryBarrier& b = memory_barrier(barrier, "copy_bulk", at);
  const uint32_t address = shared_address(to);
  if (address % 16 != 0 || bytes % 16 != 0) {
    stop("copy_bulk (" + where(at) + ") got an address or size that is no multiple of 16", "copy_bulk", at);
  }
  shared_at(address, bytes, "copy_bulk", at);
  b.copies.push_back({static_cast<char*>(to), {}, 0, 0, 0, static_cast<const char*>(from), bytes});
  if (!b.waiting.empty() || drawn_now()) run_copies(b, at);
}

void BlockRunner::run_copies(MemoryBarrier& barrier, const std::source_location& at) {
  for (const BulkCopy& copy : barrier.copies) {
    for (uint32_t i = 0; i < copy.bytes; i += 16) {
      check_global(copy.from + i, "copy_bulk", at);
      count_read(copy.from + i, 16);
      std::memcpy(copy.to + i, copy.from + i, 16);
    }
    barrier.bytes -= copy.bytes;
    const TensorMap& map = copy.map;
    const uint32_t begin = shared_address(copy.to);
    for (int i = 0; i < map.rows; ++i) {
      const int64_t row = copy.row + i;
      const bool inside = row >= 0 && row < map.sizes[2] && copy.middle >= 0 && copy.middle < map.sizes[1] &&
                          copy.column >= 0;
      for (int j = 0; j < 8; ++j) {
        const int64_t column = copy.column + 8 * j;
        const uint32_t offset = static_cast<uint32_t>(128 * i + 16 * j);
        // Bits 4 to 6 of the address, exclusive or bits 7 to 9.
        const uint32_t swizzled = (begin + offset) ^ ((begin + offset) >> 3 & 0x70);
        char* to = copy.to + (swizzled - begin);
        std::memset(to, 0, 16);
        if (!inside || column >= map.sizes[0]) continue;
        const char* from = map.data + row * map.strides[2] + copy.middle * map.strides[1] + 2 * column;
        check_global(from, "copy_tensor", at);
        const auto bytes = static_cast<size_t>(std::min<int64_t>(16, 2 * (map.sizes[0] - column)));
        count_read(from, bytes);
        std::memcpy(to, from, bytes);
      }
    }
    barrier.bytes -= int64_t{map.rows} * 128;
  }
  barrier.copies.clear();
  end_phase(barrier);
}

// `give` puts in what this lane brings; `compute` runs once all 32 have.
template <class Give, class Compute>
Warp& BlockRunner::warp_operation(const char* operation, const std::source_location& at, const Give& give,
                                  const Compute& compute) {
  Warp& warp = warps_[static_cast<size_t>(current->thread / kLanes)];
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.line = at.line();
  } else if (warp.operation != operation || warp.line != at.line()) {
    broken_ = std::string("lanes of one warp reached different operations: ") + warp.operation + " in line " +
              std::to_string(warp.line) + " and " + operation + " (" + where(at) + ")";
    wait(operation, at);
  }
  const int lane = this->lane();
  give(warp, lane);
  if (++warp.arrived < kLanes) {
    warp.waiting[warp.arrived - 1] = current->index;
    wait(operation, at);
    return warp;
  }
  warp.arrived = 0;
  compute(warp);
  ready_.insert(ready_.end(), warp.waiting, warp.waiting + kLanes - 1);
  return warp;
}

// ---- products of a warpgroup

void BlockRunner::begin_product(float* d, int columns, int steps, const uint32_t* a,
                                const uint64_t* a_descriptors, const uint64_t* b_descriptors, bool b_mn_major,
                                bool add, const std::source_location& at) {
  const auto group = static_cast<size_t>(current->thread / kWarpgroup);
  if (group >= warpgroups_.size()) stop("wgmma (" + where(at) + ") needs whole warpgroups", "wgmma", at);
  Warpgroup& warpgroup = warpgroups_[group];
  Product& product = warpgroup.next;
  if (!current->fenced) {
    stop("wgmma (" + where(at) + ") without wgmma_fence since the last wait", "wgmma", at);
  }
  if (warpgroup.arrived == 0) {
    product = {};
    product.group = current->open_product_group;
    product.columns = columns;
    product.steps = steps;
    product.in_registers = a != nullptr;
    product.b_mn_major = b_mn_major;
    product.add = add;
    product.location = at;
    if (a != nullptr) {
      product.registers.resize(static_cast<size_t>(kWarpgroup * 4 * steps));
    } else {
      product.a_descriptors.assign(a_descriptors, a_descriptors + steps);
    }
    product.b_descriptors.assign(b_descriptors, b_descriptors + steps);
  } else if (product.location.line() != at.line() || product.columns != columns || product.steps != steps ||
             product.add != add || product.group != current->open_product_group ||
             !std::equal(b_descriptors, b_descriptors + steps, product.b_descriptors.begin()) ||
             (a == nullptr &&
              !std::equal(a_descriptors, a_descriptors + steps, product.a_descriptors.begin()))) {
    stop("threads of one warpgroup reached different products: line " +
             std::to_string(product.location.line()) + " and " + where(at),
         "wgmma", at);
  }
  const int thread = current->thread % kWarpgroup;
  product.d[thread] = d;
  if (a != nullptr) {
    std::copy(a, a + 4 * steps, product.registers.begin() + std::ptrdiff_t{4} * steps * thread);
  }
  if (++warpgroup.arrived < kWarpgroup) {
    warpgroup.waiting[warpgroup.arrived - 1] = current->index;
    wait("wgmma", at);
    return;
  }
  warpgroup.arrived = 0;
  if (drawn_now()) read_operands(product);
  const auto [sums, made] = warpgroup.sums.try_emplace(product.d[0]);
  if (made) sums->second.resize(static_cast<size_t>(64 * columns));
  for (int t = 0; made && t < kWarpgroup; ++t) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      sums->second[static_cast<size_t>(row * columns + column)] = product.d[t][i];
    }
    std::memset(product.d[t], kPoison, static_cast<size_t>(columns / 2) * sizeof(float));
  }
  warpgroup.products.push_back(std::move(product));
  ready_.insert(ready_.end(), warpgroup.waiting, warpgroup.waiting + kWarpgroup - 1);
}

// Eight elements along the contiguous direction, as the PTX ISA's canonical layouts have them for 128-byte swizzle: rows
// of 128 bytes, eight of which repeat a pattern; `mn` and `k` count elements, that of the contiguous direction is a
// multiple of 8.
const char* BlockRunner::described(uint64_t descriptor, uint32_t mn, uint32_t k, bool mn_major,
                                   const std::source_location& at) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    stop("wgmma (" + where(at) + ") got a descriptor that is not of 128-byte swizzle", "wgmma", at);
  }
  const uint32_t leading = field(16), stride = field(32);
  const uint32_t offset = mn_major ? mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                   : mn / 8 * stride + mn % 8 * 128 + k * 2;
  const uint32_t address = field(0) + offset;
  return shared_at(address ^ (address >> 3 & 0x70), 16, "wgmma", at);
}

void BlockRunner::read_operands(Product& p) {
  const auto columns = static_cast<size_t>(p.columns), depth = static_cast<size_t>(16 * p.steps);
  p.read = true;
  p.a.resize(64 * depth);
  p.b.resize(depth * columns);
  const auto value = [](const char* from, size_t i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof(bits));
    return std::bit_cast<float>(uint32_t{bits} << 16);
  };
  for (size_t step = 0; step < static_cast<size_t>(p.steps); ++step) {
    for (size_t row = 0; row < 64; ++row) {
      if (p.in_registers) continue;
      for (size_t k = 0; k < 16; k += 8) {
        const char* from = described(p.a_descriptors[step], static_cast<uint32_t>(row),
                                     static_cast<uint32_t>(k), false, p.location);
        for (size_t i = 0; i < 8; ++i) p.a[row * depth + 16 * step + k + i] = value(from, i);
      }
    }
    for (size_t t = 0; p.in_registers && t < kWarpgroup; ++t) {
      for (size_t r = 0; r < 4; ++r) {
        const uint32_t packed = p.registers[(t * static_cast<size_t>(p.steps) + step) * 4 + r];
        float* to = &p.a[(t / 32 * 16 + t % 32 / 4 + r % 2 * 8) * depth + 16 * step + t % 4 * 2 + r / 2 * 8];
        to[0] = std::bit_cast<float>(packed << 16);
        to[1] = std::bit_cast<float>(packed & 0xffff0000u);
      }
    }
    for (size_t n = 0; n < columns; n += p.b_mn_major ? 8 : 1) {
      for (size_t k = 0; k < 16; k += p.b_mn_major ? 1 : 8) {
        const char* from = described(p.b_descriptors[step], static_cast<uint32_t>(n),
                                     static_cast<uint32_t>(k), p.b_mn_major, p.location);
        for (size_t i = 0; i < 8; ++i) {
          p.b[p.b_mn_major ? (16 * step + k) * columns + n + i : (16 * step + k + i) * columns + n] =
              value(from, i);
        }
      }
    }
  }
}

void BlockRunner::end_products(int pending) {
  Fiber& fiber = *current;
  fiber.fenced = false;
  const auto group = static_cast<size_t>(fiber.thread / kWarpgroup);
  if (group >= warpgroups_.size()) return;
  Warpgroup& warpgroup = warpgroups_[group];
  while (!warpgroup.products.empty() &&
         warpgroup.products.front().group < fiber.open_product_group - pending) {
    Product product = std::move(warpgroup.products.front());
    warpgroup.products.pop_front();
    if (!product.read) read_operands(product);
    const auto columns = static_cast<size_t>(product.columns),
               depth = static_cast<size_t>(16 * product.steps);
    std::vector<float>& sums = warpgroup.sums.at(product.d[0]);
    if (!product.add) std::fill(sums.begin(), sums.end(), 0.0f);
    for (size_t row = 0; row < 64; ++row) {
      float* to = sums.data() + row * columns;
      for (size_t k = 0; k < depth; ++k) {
        const float a = product.a[row * depth + k];
        const float* b = product.b.data() + k * columns;
        for (size_t n = 0; n < columns; ++n) to[n] += a * b[n];
      }
    }
    const bool more = std::any_of(warpgroup.products.begin(), warpgroup.products.end(),
                                  [&](const Product& p) { return p.d[0] == product.d[0]; });
    if (more) continue;
    Sums& ended = warpgroup.ended.emplace_back();
    ended.group = product.group;
    ended.columns = product.columns;
    std::copy(std::begin(product.d), std::end(product.d), ended.d);
    ended.values = std::move(sums);
    warpgroup.sums.erase(product.d[0]);
  }
  const int t = fiber.thread % kWarpgroup;
  for (auto sums = warpgroup.ended.begin(); sums != warpgroup.ended.end();) {
    const auto at = sums++;
    float* d = at->d[t];
    if (d == nullptr || at->group >= fiber.open_product_group - pending) continue;
    at->d[t] = nullptr;
    for (int i = 0; i < at->columns / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      d[i] = at->values[static_cast<size_t>(row * at->columns + column)];
    }
    if (--at->left == 0) warpgroup.ended.erase(at);
  }
}

// ---- the emulator

// Each runner has a mapping for every stack and its guard page, and a process may have some 65,000.
constexpr int kMostRunners = 16;

Emulator::Emulator(int threads, uint64_t seed, size_t most_shared)
    : seed_(seed),
      most_shared_(std::min(most_shared, kMostShared)),
      runners_(static_cast<size_t>(std::clamp(threads, 1, kMostRunners))) {}

Emulator::~Emulator() = default;

void Emulator::run(const char* kernel, dim3 grid, int threads, size_t shared_bytes,
                   const std::function<void()>& thread_body) {
  const auto fail = [&](const std::string& what) {
    throw Error("INTERNAL", std::string("The kernel ") + kernel + " broke the rules of CUDA: " + what);
  };
  if (threads < kLanes || threads > kMaxThreads || threads % kLanes != 0) {
    fail("its blocks have " + std::to_string(threads) + " threads");
  }
  if (shared_bytes > most_shared_) {
    fail("it asks for " + std::to_string(shared_bytes) + " bytes of shared memory and a block can have " +
         std::to_string(most_shared_));
  }
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) fail("its grid is too large");
  if (kernels_passed_over()) {
    count_launch(kernel);
    return;
  }
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const uint64_t launch_seed = seed_ == 0 ? 0 : (seed_ * 0x9e3779b97f4a7c15u + ++launches_) | 1;

  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::string broken;
  const auto work = [&](BlockRunner& runner) {
    for (int64_t i = next++; i < blocks && !stop; i = next++) {
      // Another seed, another order of blocks.
      const int64_t at = launch_seed == 0 ? i : blocks - 1 - i;
      const dim3 block(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                       static_cast<unsigned>(at / grid.x / grid.y));
      const uint64_t seed = launch_seed == 0 ? 0 : launch_seed + 2 * static_cast<uint64_t>(at);
      try {
        runner.run(block, grid, threads, shared_bytes, seed, seed_ % 2 == 1, thread_body);
      } catch (const Broken& error) {
        std::lock_guard<std::mutex> lock(mutex);
        stop = true;
        if (broken.empty()) {
          broken = "in block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                   std::to_string(block.z) + ") " + error.what;
        }
      }
    }
  };
  const int workers = static_cast<int>(std::min<int64_t>(blocks, static_cast<int64_t>(runners_.size())));
  for (size_t i = 0; i < static_cast<size_t>(workers); ++i) {
    if (!runners_[i]) runners_[i] = std::make_unique<BlockRunner>();
  }
  if (workers == 1) {
    work(*runners_[0]);
  } else {
#pragma omp parallel num_threads(workers)
    work(*runners_[static_cast<size_t>(omp_get_thread_num())]);
  }
  if (broken.empty()) {
    const std::string overrun = find_overrun();
    if (!overrun.empty()) broken = "it wrote " + overrun;
  }
  if (!broken.empty()) fail(broken);
  count_launch(kernel);
}

// ---- what kernels call

void* take_shared(int piece, size_t bytes) {
  return BlockRunner::active->take_shared(static_cast<size_t>(piece), bytes);
}

void sync_block(std::source_location at) {
  BlockRunner& runner = *BlockRunner::active;
  runner.block_barrier(0, static_cast<int>(indices().block_size.x), "sync_block", at);
}
void sync_threads(int barrier, int threads, std::source_location at) {
  BlockRunner::active->block_barrier(barrier, threads, "sync_threads", at);
}
void arrive_threads(int barrier, int threads, std::source_location at) {
  BlockRunner::active->arrive(barrier, threads, "arrive_threads", at);
}
void sync_warp(std::source_location at) {
  BlockRunner::active->warp_operation(
      "sync_warp", at, [](Warp&, int) {}, [](Warp&) {});
}

uint64_t shuffle_bits(uint64_t value, int source, const std::source_location& at) {
  BlockRunner& runner = *BlockRunner::active;
  const Warp& warp = runner.warp_operation(
      "shuffle", at,
      [&](Warp& w, int lane) {
        w.in.shuffle.value[lane] = value;
        w.in.shuffle.source[lane] = source & (kLanes - 1);
      },
      [](Warp& w) {
        for (int l = 0; l < kLanes; ++l) w.out[l] = w.in.shuffle.value[w.in.shuffle.source[l]];
      });
  return warp.out[runner.lane()];
}

uint32_t ballot(bool condition, std::source_location at) {
  BlockRunner& runner = *BlockRunner::active;
  const Warp& warp = runner.warp_operation(
      "ballot", at, [&](Warp& w, int lane) { w.in.shuffle.value[lane] = condition; },
      [](Warp& w) {
        uint32_t bits = 0;
        for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(w.in.shuffle.value[l]) << l;
        for (int l = 0; l < kLanes; ++l) w.out[l] = bits;
      });
  return static_cast<uint32_t>(warp.out[runner.lane()]);
}

uint32_t atomic_add(uint32_t* to, uint32_t value) {
  count_read(to, sizeof(*to));
  count_written(to, sizeof(*to));
  return std::atomic_ref<uint32_t>(*to).fetch_add(value, std::memory_order_relaxed);
}
uint64_t atomic_add(uint64_t* to, uint64_t value) {
  count_read(to, sizeof(*to));
  count_written(to, sizeof(*to));
  return std::atomic_ref<uint64_t>(*to).fetch_add(value, std::memory_order_relaxed);
}
void fence_memory() { std::atomic_thread_fence(std::memory_order_seq_cst); }

float fast_exp2(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

void refuse_address(const char* operation, size_t bytes) {
  BlockRunner::active->stop(
      std::string(operation) + " got an address that is no multiple of " + std::to_string(bytes), operation,
      std::source_location::current());
}

uint32_t shared_address(const void* at) { return BlockRunner::active->shared_address(at); }

void barrier_init(uint64_t* barrier, int arrivals, std::source_location at) {
  BlockRunner::active->init_memory_barrier(barrier, arrivals, at);
}
void barrier_arrive(uint64_t* barrier, std::source_location at) {
  BlockRunner::active->arrive_memory_barrier(barrier, 0, at);
}
void barrier_expect(uint64_t* barrier, uint32_t bytes, std::source_location at) {
  BlockRunner::active->arrive_memory_barrier(barrier, bytes, at);
}
void barrier_wait(uint64_t* barrier, int parity, std::source_location at) {
  BlockRunner::active->wait_memory_barrier(barrier, parity, at);
}
void copy_tensor(void* to_shared, const TensorMap& map, int column, int middle, int row, uint64_t* barrier,
                 std::source_location at) {
  BlockRunner::active->copy_tensor(to_shared, map, column, middle, row, barrier, at);
}

void copy_bulk(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier,
               std::source_location at) {
  BlockRunner::active->copy_bulk(to_shared, from, bytes, barrier, at);
}

void wgmma(float* d, int columns, int steps, const uint32_t* a, const uint64_t* a_descriptors,
           const uint64_t* b_descriptors, bool b_mn_major, bool add, std::source_location at) {
  BlockRunner::active->begin_product(d, columns, steps, a, a_descriptors, b_descriptors, b_mn_major, add, at);
}
void wgmma_fence() { BlockRunner::active->current->fenced = true; }
void wgmma_commit() { ++BlockRunner::active->current->open_product_group; }
void wgmma_wait_for(int pending) { BlockRunner::active->end_products(pending); }

void copy_async(void* to_shared, const void* from, bool valid, std::source_location at) {
  BlockRunner& runner = *BlockRunner::active;
  runner.check_shared(to_shared, "copy_async", at);
  if (valid) {
    runner.check_global(from, "copy_async", at);
    count_read(from, 16);
  }
  Fiber& fiber = *runner.current;
  fiber.copies.push_back({to_shared, from, valid, fiber.open_group});
}
void copy_async_commit() { ++BlockRunner::active->current->open_group; }
void copy_async_wait_for(int pending) {
  Fiber& fiber = *BlockRunner::active->current;
  size_t& first = fiber.first_copy;
  for (; first < fiber.copies.size(); ++first) {
    const PendingCopy& copy = fiber.copies[first];
    if (copy.group >= fiber.open_group - pending) break;
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  constexpr size_t kMostPast = 64;
  if (first == fiber.copies.size()) {
    fiber.copies.clear();
    first = 0;
  } else if (first > kMostPast) {
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(first));
    first = 0;
  }
}

namespace {

// Every lane has put its rows into its registers.
template <bool Transposed>
void load_matrices(Warp& w, int count) {
  uint16_t rows[kLanes][8];
  for (int n = 0; n < 4 * count; n += 4) {
    for (int l = 0; l < kLanes; ++l) std::memcpy(rows[l], w.in.matrices[l] + n, sizeof(rows[l]));
    for (int l = 0; l < kLanes; ++l) {
      const int i = l / 4, j = 2 * (l % 4);
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto& of = reinterpret_cast<const uint16_t(&)[8][8]>(rows[8 * matrix]);
        w.in.matrices[l][n + matrix] =
            Transposed ? of[j][i] | uint32_t{of[j + 1][i]} << 16 : of[i][j] | uint32_t{of[i][j + 1]} << 16;
      }
    }
  }
}

using Eight [[gnu::vector_size(32)]] = float;
using FourPairs [[gnu::vector_size(32)]] = double;  // of floats

float low_half(uint32_t packed) { return std::bit_cast<float>(packed << 16); }
float high_half(uint32_t packed) { return std::bit_cast<float>(packed & 0xffff0000u); }

// Four pairs of floats that stand `apart` floats apart.
Eight load_pairs(const float* from, int apart) {
  double pairs[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&pairs[i], from + i * apart, sizeof(double));
  return std::bit_cast<Eight>(FourPairs{pairs[0], pairs[1], pairs[2], pairs[3]});
}
void store_pairs(float* to, int apart, Eight value) {
  const FourPairs pairs = std::bit_cast<FourPairs>(value);
  for (int i = 0; i < 4; ++i) {
    const double pair = pairs[i];
    std::memcpy(to + i * apart, &pair, sizeof(double));
  }
}

void fused_add(Eight& sum, float a, const Eight& b) {
#if defined(__FMA__)
  sum = _mm256_fmadd_ps(_mm256_set1_ps(a), b, sum);
#else
  for (int i = 0; i < 8; ++i) sum[i] = std::fma(a, b[i], sum[i]);
#endif
}

// D += A * B from the fragments of the 32 lanes, `rows` blocks of 16 by `columns` blocks of 8. A product of two
// bfloat16 is exact in float32, so that it is the same whether fused into the sum or not.
void multiply(Warp& w, int rows, int columns) {
  float a[kMostMmaBlocks * 16][16];
  float b[kMostMmaBlocks][16][8];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = 2 * (l % 4);
    for (int i = 0; i < rows; ++i) {
      const uint32_t* in = w.in.mma[l].a + 4 * i;
      for (int r = 0; r < 4; ++r) {
        float* to = &a[16 * i + g + r % 2 * 8][t + r / 2 * 8];
        to[0] = low_half(in[r]);
        to[1] = high_half(in[r]);
      }
    }
    for (int j = 0; j < columns; ++j) {
      const uint32_t* in = w.in.mma[l].b + 2 * j;
      for (int r = 0; r < 2; ++r) {
        b[j][t + r * 8][g] = low_half(in[r]);
        b[j][t + 1 + r * 8][g] = high_half(in[r]);
      }
    }
  }
  for (int j = 0; j < columns; ++j) {
    for (int i = 0; i < 2 * rows; ++i) {
      // Eight rows of the block; two neighbours stand in each of four lanes.
      const auto pair = [&](int g, int t) {
        return w.in.mma[4 * g + t].d + 4 * (i / 2 * columns + j) + i % 2 * 2;
      };
      Eight d[8];
      for (int g = 0; g < 8; ++g) {
        double pairs[4];
        for (int t = 0; t < 4; ++t) std::memcpy(&pairs[t], pair(g, t), sizeof(double));
        d[g] = std::bit_cast<Eight>(FourPairs{pairs[0], pairs[1], pairs[2], pairs[3]});
      }
      for (int k = 0; k < 16; ++k) {
        Eight bk;
        std::memcpy(&bk, b[j][k], sizeof(bk));
        for (int g = 0; g < 8; ++g) d[g] += a[8 * i + g][k] * bk;
      }
      for (int g = 0; g < 8; ++g) {
        const FourPairs pairs = std::bit_cast<FourPairs>(d[g]);
        for (int t = 0; t < 4; ++t) {
          const double value = pairs[t];
          std::memcpy(pair(g, t), &value, sizeof(double));
        }
      }
    }
  }
}

}  // namespace

void load_matrices(uint32_t* to, const void* row, int count, size_t bytes_apart, bool transposed,
                   std::source_location at) {
  BlockRunner& runner = *BlockRunner::active;
  const char* operation = transposed ? "load_matrices_transposed" : "load_matrices";
  for (int i = 0; i < count; ++i) {
    runner.check_shared(static_cast<const char*>(row) + static_cast<size_t>(i) * bytes_apart, operation, at);
  }
  runner.warp_operation(
      operation, at,
      [&](Warp& w, int lane) {
        // Read now and not once all lanes have come, so that a row that another lane has yet to write shows: ldmatrix
        // is no barrier.
        for (int i = 0; i < count; ++i) {
          std::memcpy(to + 4 * i, static_cast<const char*>(row) + static_cast<size_t>(i) * bytes_apart, 16);
        }
        w.in.matrices[lane] = to;
      },
      [=](Warp& w) { transposed ? load_matrices<true>(w, count) : load_matrices<false>(w, count); });
}

void mma_f32(float* d, const float* a, const float* b, int rows, int columns) {
  int j = 0;
  for (; j + 4 <= columns; j += 4) {
    Eight by_depth[8];
    for (int k = 0; k < 8; ++k) {
      for (int i = 0; i < 8; ++i) by_depth[k][i] = b[8 * (2 * j + i) + k];
    }
    for (int i = 0; i < rows; ++i) {
      float* at = d + (i * columns + j) * 4;
      Eight first = load_pairs(at, 4), second = load_pairs(at + 2, 4);
      for (int k = 0; k < 8; ++k) {
        fused_add(first, a[16 * i + k], by_depth[k]);
        fused_add(second, a[16 * i + 8 + k], by_depth[k]);
      }
      store_pairs(at, 4, first);
      store_pairs(at + 2, 4, second);
    }
  }
  for (; j < columns; ++j) {
    for (int i = 0; i < rows; ++i) {
      for (int k = 0; k < 8; ++k) {
        for (int l = 0; l < 4; ++l) {
          float& sum = d[(i * columns + j) * 4 + l];
          sum = std::fma(a[16 * i + l / 2 * 8 + k], b[16 * j + l % 2 * 8 + k], sum);
        }
      }
    }
  }
}

void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, int rows, int columns,
              std::source_location at) {
  BlockRunner::active->warp_operation(
      "mma", at,
      [&](Warp& w, int lane) {
        w.in.mma[lane] = {a, b, d};
      },
      [=](Warp& w) { multiply(w, rows, columns); });
}

}  // namespace merf::cuda::emulation
