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
#include <exception>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

#include "backend/bf16.h"
#include "backend/cuda/emulation/memory.h"
#include "backend/tensor.h"

namespace merf::cuda::emulation {
namespace {

namespace context = boost::context;

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 << 10;  // of a block on sm_90
constexpr int kScheduler = -1;            // in place of a fiber's number

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

// A fiber and the thread of the block that it runs.
struct Fiber {
  context::fiber handle;  // where it goes on; empty while it runs
  ThreadIndices indices;
  int index = 0;  // among fibers
  int thread = 0;
  int open_group = 0;
  std::vector<PendingCopy> copies;  // in the order of their groups, from first_copy on
  size_t first_copy = 0;
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

 private:
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
  if (shared_.empty()) shared_.resize(kMaxShared + 65 * (kGuardBytes + kAlignment));
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
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.line = at.line();
  } else if (barrier.expected != threads || barrier.line != at.line()) {
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
  ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
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

// ---- the emulator

// Each runner has a mapping for every stack and its guard page, and a process may have some 65,000.
constexpr int kMostRunners = 16;

Emulator::Emulator(int threads, uint64_t seed)
    : seed_(seed), runners_(static_cast<size_t>(std::clamp(threads, 1, kMostRunners))) {}

Emulator::~Emulator() = default;

void Emulator::run(const char* kernel, dim3 grid, int threads, size_t shared_bytes,
                   const std::function<void()>& thread_body) {
  const auto fail = [&](const std::string& what) {
    throw Error("INTERNAL", std::string("The kernel ") + kernel + " broke the rules of CUDA: " + what);
  };
  if (threads < kLanes || threads > kMaxThreads || threads % kLanes != 0) {
    fail("its blocks have " + std::to_string(threads) + " threads");
  }
  if (shared_bytes > kMaxShared)
    fail("it asks for " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) fail("its grid is too large");
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
  return std::atomic_ref<uint32_t>(*to).fetch_add(value, std::memory_order_relaxed);
}
uint64_t atomic_add(uint64_t* to, uint64_t value) {
  return std::atomic_ref<uint64_t>(*to).fetch_add(value, std::memory_order_relaxed);
}

void fence_memory() { std::atomic_thread_fence(std::memory_order_seq_cst); }

float fast_exp2(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

void refuse_address(const char* operation, size_t bytes) {
  BlockRunner::active->stop(
      std::string(operation) + " got an address that is no multiple of " + std::to_string(bytes), operation,
      std::source_location::current());
}

void copy_async(void* to_shared, const void* from, bool valid, std::source_location at) {
  BlockRunner& runner = *BlockRunner::active;
  runner.check_shared(to_shared, "copy_async", at);
  if (valid) runner.check_global(from, "copy_async", at);
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
