// What the tests of all operators share. References are computed in float64 from the values as stored, so that the
// rounding of inputs to bfloat16 is no error.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/bf16.h"

namespace merf::test {

// MERF_TEST_DEVICES, names with commas between them: these are tested and must open. Otherwise, those of this build
// that can be opened here.
inline std::vector<std::string> named_devices() {
  std::vector<std::string> names;
  const char* named = std::getenv("MERF_TEST_DEVICES");
  std::stringstream list(named == nullptr ? "" : named);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}
inline std::vector<std::string> tested_devices() {
  const std::vector<std::string> names = named_devices();
  return names.empty() ? backend_names() : names;
}

// Whether the device is tested. For tests that need it: TEST_CASE("..." * doctest::skip(!tests_device("cpu"))).
inline bool tests_device(const std::string& name) {
  const std::vector<std::string> names = tested_devices();
  return std::find(names.begin(), names.end(), name) != names.end();
}

#if defined(MERF_CUDA_EMULATION_BUILT)
constexpr bool kEmulationBuilt = true;
#else
constexpr bool kEmulationBuilt = false;
#endif

// Calls body(backend) for every device that is tested.
template <class Body>
void for_each_backend(Body&& body, int threads = 0) {
  const bool named = !named_devices().empty();
  for (const std::string& name : tested_devices()) {
    std::shared_ptr<Backend> backend;
    try {
      backend = open_backend(name, threads);
    } catch (const Error& error) {
      // A device that is not there cannot be tested, but the CPU always is, and the emulation where it was built.
      const bool always = named || name == "cpu" || (name == "cuda-emulated" && kEmulationBuilt);
      REQUIRE_MESSAGE(!always, error.what());
      continue;
    }
    INFO("backend: " << name << " " << backend->info().isa << ", threads: " << backend->info().threads);
    body(*backend);
  }
}

// Whether a row of a product has the same bits whatever the rows beside it.
inline bool sums_in_one_order(const Backend& backend) {
  const auto& libraries = backend.info().libraries;
  return std::none_of(libraries.begin(), libraries.end(),
                      [](const auto& library) { return library.first == "cuBLASLt"; });
}

// The emulated GPU with less shared memory than 9.0 has: 163 KiB at 8.0, 99 at 8.6 and 8.9.
inline bool tests_small_gpu() { return kEmulationBuilt && tests_device("cuda-emulated"); }
inline std::shared_ptr<Backend> open_small_gpu(int kibibytes) {
  const char* const name = "MERF_EMULATION_SHARED";
  const char* const set = std::getenv(name);
  const std::string before = set == nullptr ? "" : set;
  setenv(name, std::to_string(kibibytes << 10).c_str(), 1);
  std::shared_ptr<Backend> backend = open_backend("cuda-emulated", 0);
  if (set == nullptr) {
    unsetenv(name);
  } else {
    setenv(name, before.c_str(), 1);
  }
  return backend;
}

// Numbers by seed, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() {
    return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(2.0 * 3.14159265358979323846 * uniform());
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  std::vector<float> normals(int64_t n, double scale = 1.0) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = static_cast<float>(normal() * scale);
    return values;
  }

 private:
  uint64_t state_;
};

// The values as they are once stored in that type.
inline std::vector<float> stored(std::vector<float> values, DType dtype) {
  if (dtype == DType::bf16) {
    for (float& value : values) value = to_f32(to_bf16(value));
  }
  return values;
}

inline Tensor upload(Backend& backend, DType dtype, std::initializer_list<int64_t> shape,
                     const std::vector<float>& values) {
  Tensor tensor = backend.allocate(dtype, shape);
  REQUIRE(tensor.size() == static_cast<int64_t>(values.size()));
  if (dtype == DType::bf16) {
    std::vector<bf16> halves(values.size());
    std::transform(values.begin(), values.end(), halves.begin(), to_bf16);
    backend.upload(tensor, halves.data(), tensor.bytes());
  } else {
    backend.upload(tensor, values.data(), tensor.bytes());
  }
  return tensor;
}

inline Tensor upload(Backend& backend, std::initializer_list<int64_t> shape,
                     const std::vector<int32_t>& values) {
  Tensor tensor = backend.allocate(DType::i32, shape);
  REQUIRE(tensor.size() == static_cast<int64_t>(values.size()));
  backend.upload(tensor, values.data(), tensor.bytes());
  return tensor;
}

// Every element is NaN: a kernel that leaves part of its output unwritten, or reads it, shows.
inline Tensor poisoned(Backend& backend, DType dtype, std::initializer_list<int64_t> shape) {
  Tensor tensor = backend.allocate(dtype, shape);
  std::vector<uint8_t> bytes(tensor.bytes(), 0xff);
  backend.upload(tensor, bytes.data(), bytes.size());
  return tensor;
}

inline std::vector<float> download(Backend& backend, const Tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.size()));
  if (tensor.dtype == DType::bf16) {
    std::vector<bf16> halves(values.size());
    backend.download(halves.data(), tensor, tensor.bytes());
    std::transform(halves.begin(), halves.end(), values.begin(), [](bf16 half) { return to_f32(half); });
  } else {
    REQUIRE(tensor.dtype == DType::f32);
    backend.download(values.data(), tensor, tensor.bytes());
  }
  return values;
}

inline std::vector<int32_t> download_ints(Backend& backend, const Tensor& tensor) {
  REQUIRE(tensor.dtype == DType::i32);
  std::vector<int32_t> values(static_cast<size_t>(tensor.size()));
  backend.download(values.data(), tensor, tensor.bytes());
  return values;
}

// The greatest difference, relative to the greatest expected magnitude. Infinite where sizes differ or anything is
// NaN.
template <class Actual, class Expected>
double relative_error(const Actual& actual, const Expected& expected) {
  if (actual.size() != expected.size()) return std::numeric_limits<double>::infinity();
  double scale = 0.0, worst = 0.0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(actual[i]) - static_cast<double>(expected[i]));
    if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, difference);
    scale = std::max(scale, std::fabs(static_cast<double>(expected[i])));
  }
  return scale == 0.0 ? worst : worst / scale;
}

// What storing a result in that type may cost, beside what the arithmetic does.
inline double tolerance(DType dtype, double arithmetic) { return dtype == DType::bf16 ? 0x1p-8 : arithmetic; }

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace merf::test
