// What the CPU takes of the machine's memory, and what control groups leave of it.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu/memory.h"
#include "harness.h"

using namespace merf;
using namespace merf::test;

namespace {

// A folder that stands in for / with these files.
class FakeRoot {
 public:
  explicit FakeRoot(const std::vector<std::pair<std::string, std::string>>& files) {
    for (const auto& [path, text] : files) {
      const std::filesystem::path file = root_ + path;
      std::filesystem::create_directories(file.parent_path());
      std::ofstream(file) << text;
    }
  }
  ~FakeRoot() { std::filesystem::remove_all(root_); }
  FakeRoot(const FakeRoot&) = delete;
  FakeRoot& operator=(const FakeRoot&) = delete;
  ControlGroupMemory memory() const { return control_group_memory(root_); }

 private:
  static std::string make_folder() {
    std::string path = (std::filesystem::temp_directory_path() / "merf-memory-XXXXXX").string();
    return mkdtemp(path.data()) == nullptr ? throw Error("INTERNAL", "no folder") : path;
  }
  const std::string root_ = make_folder();
};

constexpr size_t kNone = std::numeric_limits<size_t>::max();
const std::string kUnlimitedV1 = "9223372036854771712\n";

}  // namespace

TEST_CASE("the limits of control groups, version 2: a group's own and those above it") {
  const std::string folder = "/sys/fs/cgroup";
  const FakeRoot root({{"/proc/self/cgroup", "0::/user/job\n"},
                       {folder + "/user/job/memory.max", "max\n"},
                       {folder + "/user/job/memory.current", "500\n"},
                       {folder + "/user/memory.max", "10000\n"},
                       {folder + "/user/memory.current", "7000\n"},
                       {folder + "/user/memory.stat", "anon 5000\ninactive_file 1500\nactive_file 500\n"}});
  CHECK(root.memory().limit == 10000);
  CHECK(root.memory().available == 10000 - (7000 - 1500));
}

TEST_CASE("the limits of control groups, version 1") {
  const std::string folder = "/sys/fs/cgroup/memory";
  const FakeRoot root(
      {{"/proc/self/cgroup", "9:cpu,cpuacct:/job\n4:hugetlb,memory:/job\n1:name=systemd:/x\n"},
       {folder + "/memory.limit_in_bytes", kUnlimitedV1},
       {folder + "/memory.usage_in_bytes", "123456\n"},
       {folder + "/job/memory.limit_in_bytes", "8000\n"},
       {folder + "/job/memory.usage_in_bytes", "9000\n"},
       {folder + "/job/memory.stat", "inactive_file 1\ntotal_inactive_file 3000\n"},
       {"/sys/fs/cgroup/cpu/job/memory.limit_in_bytes", "1\n"}});
  CHECK(root.memory().limit == 8000);
  CHECK(root.memory().available == 2000);
}

TEST_CASE("a container that sees its group's path from outside has the limits of its root") {
  for (const bool version2 : {true, false}) {
    const std::string folder = version2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    const FakeRoot root({{"/proc/self/cgroup", version2 ? "0::/../docker/1f\n" : "4:memory:/docker/1f\n"},
                         {folder + (version2 ? "/memory.max" : "/memory.limit_in_bytes"), "4096\n"},
                         {folder + (version2 ? "/memory.current" : "/memory.usage_in_bytes"), "96\n"}});
    CHECK(root.memory().limit == 4096);
    CHECK(root.memory().available == 4000);
  }
}

TEST_CASE("without control groups there is no limit") {
  using Files = std::vector<std::pair<std::string, std::string>>;
  const FakeRoot none(Files{{"/proc/self/other", ""}});
  const FakeRoot unlimited(Files{{"/proc/self/cgroup", "0::/\nnonsense\n:\n"}});
  CHECK(none.memory().limit == kNone);
  CHECK(unlimited.memory().available == kNone);
}

TEST_CASE("many small blocks are refused as one large one is" * doctest::skip(!tests_device("cpu"))) {
  // Nothing of them is touched, so that the system has its memory still.
  const auto backend = open_backend("cpu", 1);
  std::vector<Tensor> all;
  const int64_t most = 2 * backend->info().memory_bytes;
  std::string code;
  try {
    for (int64_t bytes = 0; bytes < most; bytes += int64_t{16} << 20) {
      all.push_back(backend->allocate(DType::f32, {int64_t{4} << 20}));
    }
  } catch (const Error& error) {
    code = error.code;
  }
  CHECK(code == "OUT_OF_MEMORY");
  CHECK(!all.empty());
}
