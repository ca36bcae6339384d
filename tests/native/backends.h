// What the conformance tests share: every backend of this machine in turn, tensors from and to host vectors.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/bf16.h"

namespace merf::testing {

// Calls body(backend) for every device that can be opened here, with `threads` threads where that means something.
template <class Body>
void for_each_backend(int threads, Body&& body) {
  int opened = 0;
  for (const std::string& name : backend_names()) {
    std::shared_ptr<Backend> backend;
    try {
      backend = open_backend(name, threads);
    } catch (const Error& error) {
      REQUIRE(error.code == "DEVICE_UNAVAILABLE");
      continue;
    }
    CAPTURE(name);
    CAPTURE(threads);
    ++opened;
    body(*backend);
  }
  REQUIRE(opened > 0);
}

template <class Body>
void for_each_backend(Body&& body) {
  for_each_backend(2, body);
}

// What a value becomes when it is stored.
inline float stored(float value, DType dtype) {
  return dtype == DType::bf16 ? to_f32(to_bf16(value)) : value;
}

inline Tensor to_device(Backend& backend, const std::vector<float>& values,
                        std::initializer_list<int64_t> shape, DType dtype = DType::f32) {
  const Tensor tensor = backend.allocate(dtype, shape);
  REQUIRE(tensor.size() == static_cast<int64_t>(values.size()));
  if (dtype == DType::bf16) {
    std::vector<bf16> narrow(values.size());
    for (size_t i = 0; i < values.size(); ++i) narrow[i] = to_bf16(values[i]);
    backend.upload(tensor, narrow.data(), tensor.bytes());
  } else {
    backend.upload(tensor, values.data(), tensor.bytes());
  }
  return tensor;
}

inline Tensor to_device(Backend& backend, const std::vector<int32_t>& values,
                        std::initializer_list<int64_t> shape) {
  const Tensor tensor = backend.allocate(DType::i32, shape);
  REQUIRE(tensor.size() == static_cast<int64_t>(values.size()));
  backend.upload(tensor, values.data(), tensor.bytes());
  return tensor;
}

inline std::vector<float> to_host(Backend& backend, const Tensor& tensor) {
  std::vector<float> values(tensor.size());
  if (tensor.dtype == DType::bf16) {
    std::vector<bf16> narrow(values.size());
    backend.download(narrow.data(), tensor, tensor.bytes());
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_f32(narrow[i]);
  } else {
    backend.download(values.data(), tensor, tensor.bytes());
  }
  return values;
}

inline std::vector<int32_t> ids_to_host(Backend& backend, const Tensor& tensor) {
  std::vector<int32_t> values(tensor.size());
  backend.download(values.data(), tensor, tensor.bytes());
  return values;
}

inline std::vector<float> normal(size_t n, uint32_t seed, float deviation = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution(0.0f, deviation);
  std::vector<float> values(n);
  for (float& value : values) value = distribution(engine);
  return values;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace merf::testing
