// What the tests of the emulated GPU share: a GPU whose threads run in the order of a seed, arrays in its memory, and
// the message of an error. Kernels are lambdas beside what is expected of them.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/gpu.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/primitives/atomic.h"
#include "backend/cuda/primitives/copy.h"
#include "backend/cuda/primitives/math.h"
#include "backend/cuda/primitives/mma.h"
#include "backend/cuda/primitives/shared.h"
#include "backend/cuda/primitives/warp.h"

namespace merf::test {

constexpr uint64_t kSeeds[] = {0, 1, 2, 3};

inline std::unique_ptr<cuda::Gpu> gpu_of(uint64_t seed, int host_threads = 1) {
  setenv("MERF_EMULATION_SEED", std::to_string(seed).c_str(), 1);
  auto gpu = std::make_unique<cuda::Gpu>(host_threads);
  unsetenv("MERF_EMULATION_SEED");
  return gpu;
}

// Values in the GPU's memory, poisoned where none are given.
template <typename T>
class Array {
 public:
  Array(cuda::Gpu& gpu, size_t size) : gpu_(gpu), size_(size) {
    data_ = static_cast<T*>(gpu.allocate(size * sizeof(T)));
    REQUIRE(data_ != nullptr);
  }
  Array(cuda::Gpu& gpu, const std::vector<T>& values) : Array(gpu, values.size()) {
    gpu.upload(data_, values.data(), size_ * sizeof(T));
  }
  ~Array() { gpu_.free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> values(size_);
    gpu_.download(values.data(), data_, size_ * sizeof(T));
    return values;
  }

 private:
  cuda::Gpu& gpu_;
  size_t size_;
  T* data_;
};

template <typename T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Whether run(gpu), which returns a vector, gives the same bits for every order of threads.
template <class Run>
bool same_for_all_seeds(Run&& run) {
  const auto first = run(*gpu_of(kSeeds[0]));
  for (const uint64_t seed : kSeeds) {
    if (!same_bytes(first, run(*gpu_of(seed)))) return false;
  }
  return true;
}

// The message of the error that ends body(); empty where none does.
template <class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    CHECK(error.code == "INTERNAL");
    return error.what();
  }
  return {};
}

// Whether every word stands in the message.
inline bool says(const std::string& message, std::initializer_list<const char*> words) {
  for (const char* word : words) {
    if (message.find(word) == std::string::npos) return false;
  }
  return true;
}

// Checks that body(gpu) ends with an error that says all of the words, under every order of threads.
template <class Body>
void check_refused(std::initializer_list<const char*> words, Body&& body) {
  for (const uint64_t seed : kSeeds) {
    const auto gpu = gpu_of(seed);
    const std::string message = error_of([&] { body(*gpu); });
    INFO("seed " << seed << ": " << message);
    CHECK(says(message, words));
  }
}

// Numbers in [-1, 1), the same on every machine.
inline std::vector<float> numbers(size_t n, uint64_t seed) {
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  std::vector<float> values(n);
  for (float& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value = static_cast<float>(static_cast<double>(state >> 11) * 0x1p-52 - 1.0);
  }
  return values;
}

template <typename T>
std::vector<T> stored_as(const std::vector<float>& values) {
  std::vector<T> stored(values.size());
  for (size_t i = 0; i < values.size(); ++i) stored[i] = from_f32<T>(values[i]);
  return stored;
}

}  // namespace merf::test
