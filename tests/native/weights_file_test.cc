#include "model/weights_file.h"

#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>

#include "backend/tensor.h"
#include "harness.h"

using namespace merf;

namespace {

// A file of float32 values that is gone when it goes out of scope.
class ValuesFile {
 public:
  explicit ValuesFile(const std::vector<float>& values)
      : path_(std::filesystem::temp_directory_path() / ("merf-weights-" + std::to_string(getpid()))) {
    FILE* const file = std::fopen(path_.c_str(), "wb");
    REQUIRE(file != nullptr);
    REQUIRE(std::fwrite(values.data(), sizeof(float), values.size(), file) == values.size());
    REQUIRE(std::fclose(file) == 0);
  }
  ~ValuesFile() { std::filesystem::remove(path_); }

  TensorSource source(std::vector<int64_t> shape, int64_t permuted_heads = 0) const {
    int64_t elements = 1;
    for (const int64_t extent : shape) elements *= extent;
    return {"weight", path_.string(), 0, 4 * elements, "F32", std::move(shape), permuted_heads};
  }
  void cut(int64_t bytes) const { std::filesystem::resize_file(path_, static_cast<uintmax_t>(bytes)); }

 private:
  std::filesystem::path path_;
};

std::vector<float> counted(int64_t elements) {
  std::vector<float> values(static_cast<size_t>(elements));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  return values;
}

std::vector<float> read_all(const TensorSource& source) {
  std::vector<float> values;
  read_tensor(source, [&](const float* data, int64_t first, int64_t elements) {
    CHECK(first == static_cast<int64_t>(values.size()));
    values.insert(values.end(), data, data + elements);
  });
  return values;
}

// The code and the message of the error that reading fails with.
std::pair<std::string, std::string> failure(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    return {error.code, error.what()};
  }
  return {"", "no failure"};
}

}  // namespace

TEST_CASE("a tensor of several stretches is read in order") {
  const std::vector<float> values = counted(3 * 1024 * 1024 + 8);
  const ValuesFile file(values);
  CHECK(read_all(file.source({static_cast<int64_t>(values.size())})) == values);
  CHECK(read_all(file.source({1024, 3072})) ==
        std::vector<float>(values.begin(), values.begin() + 1024 * 3072));
}

TEST_CASE("interleaved heads are put in Hugging Face's order, over stretches too") {
  // Stretches are of 2^20 elements: 10 heads of 128 rows at a time in the first, a single one in the second.
  for (const auto& [heads, head, columns] :
       {std::array<int64_t, 3>{24, 128, 800}, {3, 4, 400000}, {2, 8, 1}}) {
    CAPTURE(heads);
    const int64_t rows = heads * head;
    const std::vector<float> values = counted(rows * columns);
    const ValuesFile file(values);
    const std::vector<float> read = read_all(file.source({rows, columns}, heads));
    REQUIRE(read.size() == values.size());
    int64_t wrong = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t in_head = row % head, half = in_head / (head / 2), i = in_head % (head / 2);
      const int64_t stored = row - in_head + 2 * i + half;
      const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
      wrong += std::memcmp(read.data() + row * columns, values.data() + stored * columns, bytes) != 0;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("a file that is cut short while it is read is an error") {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{3 * 1024 * 1024}, {3072, 1024}}) {
    const ValuesFile file(counted(3 * 1024 * 1024));
    int64_t stretches = 0;
    const auto [code, message] = failure([&] {
      read_tensor(file.source(shape), [&](const float*, int64_t, int64_t) {
        if (stretches++ == 0) file.cut(5 * 1024 * 1024);
      });
    });
    CHECK(code == "MALFORMED_FILE");
    CHECK(message.find("weight") != std::string::npos);
    CHECK(message.find("ends at byte 5242880") != std::string::npos);
    CHECK(stretches == 1);
  }
}

TEST_CASE("weights that are not finite are named with their place") {
  std::vector<float> values = counted(64 * 32);
  values[5 * 32 + 7] = std::numeric_limits<float>::quiet_NaN();
  {
    const ValuesFile file(values);
    const auto [code, message] = failure([&] { read_all(file.source({64, 32})); });
    CHECK(code == "NON_FINITE");
    CHECK(message.find("weight") != std::string::npos);
    CHECK(message.find("NaN at [5, 7]") != std::string::npos);
    // In the order that the model has: of heads of 16 rows, row 5 of the file is the second of a pair.
    CHECK(failure([&] {
            read_all(file.source({64, 32}, 4));
          }).second.find("NaN at [10, 7]") != std::string::npos);
  }
  values[5 * 32 + 7] = -std::numeric_limits<float>::infinity();
  const ValuesFile file(values);
  CHECK(failure([&] { read_all(file.source({64 * 32})); }).second.find("-Infinity at [167]") !=
        std::string::npos);
  values[5 * 32 + 7] = std::numeric_limits<float>::max();
  CHECK(read_all(ValuesFile(values).source({64, 32})) == values);
}
