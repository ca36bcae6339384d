#include "harness.h"

using namespace merf;
using namespace merf::test;

TEST_CASE("memory is counted, given back and reused") {
  for_each_backend([](Backend& backend) {
    const int64_t before = backend.memory_used();
    {
      const Tensor a = backend.allocate(DType::f32, {1000, 1000});
      CHECK(backend.memory_used() >= before + 4000000);
      backend.reset_peak_memory();
      { const Tensor b = backend.allocate(DType::bf16, {1000, 1000}); }
      CHECK(backend.memory_peak() >= before + 6000000);
      CHECK(backend.memory_used() < before + 6000000);
      const Tensor view = a.rows(10, 20);
      CHECK(view.as<float>() == a.as<float>() + 10000);
      CHECK(view.view({100, 100}).shape[1] == 100);
      CHECK_THROWS_AS(a.rows(10, 1001), Error);
      CHECK_THROWS_AS(a.view({7}), Error);
    }
    CHECK(backend.memory_used() == before);
    CHECK(static_cast<bool>(backend.allocate(DType::f32, {0, 5})));
  });
}

TEST_CASE("a tensor outlives its backend" * doctest::skip(!tests_device("cpu"))) {
  auto backend = open_backend("cpu", 1);
  const Tensor tensor = backend->allocate(DType::f32, {100000});
  backend.reset();
  tensor.as<float>()[99999] = 1.0f;
  CHECK(tensor.as<float>()[99999] == 1.0f);
}

TEST_CASE("memory that is not there is refused with its size") {
  for_each_backend([](Backend& backend) {
    const int64_t before = backend.memory_used();
    const auto code_of = [&](std::initializer_list<int64_t> shape) {
      try {
        backend.allocate(DType::f32, shape);
      } catch (const Error& error) {
        INFO(error.what());
        CHECK(std::string(error.what()).find("allocate") != std::string::npos);
        return error.code;
      }
      return std::string();
    };
    CHECK(code_of({int64_t{1} << 50}) == "OUT_OF_MEMORY");
    CHECK(code_of({int64_t{1} << 40, int64_t{1} << 40}) == "OUT_OF_MEMORY");
    CHECK(code_of({backend.info().memory_bytes / 4}) == "OUT_OF_MEMORY");
    CHECK_THROWS_AS(backend.allocate(DType::f32, {-1}), Error);
    // Many that would fit one by one: refused before the system has to kill anyone.
    std::vector<Tensor> held;
    const int64_t part = backend.info().memory_bytes / 4 / 8;
    std::string code;
    for (int i = 0; i < 10 && code.empty(); ++i) {
      try {
        held.push_back(backend.allocate(DType::f32, {part}));
      } catch (const Error& error) {
        code = error.code;
      }
    }
    CHECK(code == "OUT_OF_MEMORY");
    held.clear();
    CHECK(backend.memory_used() == before);
  });
}

TEST_CASE("devices are opened by name" * doctest::skip(!tests_device("cpu"))) {
  CHECK(open_backend("cpu", 3)->info().threads == 3);
  const DeviceInfo info = open_backend("cpu", 0)->info();
  CHECK(info.threads >= 1);
  CHECK(info.name == "cpu");
  CHECK_FALSE(info.isa.empty());
  CHECK_FALSE(info.description.empty());
  CHECK(info.memory_bytes > 0);
  CHECK(info.libraries.size() == 3);
  try {
    open_backend("tpu", 0);
    FAIL("opened a device that does not exist");
  } catch (const Error& error) {
    CHECK(error.code == "DEVICE_UNAVAILABLE");
    CHECK(std::string(error.what()).find("tpu") != std::string::npos);
  }
  CHECK_THROWS_AS(open_backend("cpu", -1), Error);
}
