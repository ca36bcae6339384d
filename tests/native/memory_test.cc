#include <cstdlib>
#include <functional>

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
    CHECK(backend.memory_free() > 0);
    CHECK(backend.memory_free() <= backend.info().memory_bytes);
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
  // The emulated GPU writes to all that it allocates.
  setenv("MERF_EMULATION_MEMORY", "100000000", 1);
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
    CHECK(code_of({backend.info().memory_bytes / 4 + 1}) == "OUT_OF_MEMORY");
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
  unsetenv("MERF_EMULATION_MEMORY");
}

TEST_CASE("a recorder runs its bodies, temporaries and failures included") {
  for_each_backend([](Backend& backend) {
    const int64_t before = backend.memory_used();
    {
      const int64_t most = 1000;
      const Tensor x = backend.allocate(DType::f32, {most}), y = backend.allocate(DType::f32, {most});
      const std::unique_ptr<Recorder> recorder = backend.make_recorder();
      const auto run = [&](int64_t count, uint64_t seed, bool fail) {
        const std::vector<float> values = Random(seed).normals(most);
        backend.upload(x, values.data(), x.bytes());
        backend.zero(y);
        recorder->run(count, [&] {
          // Freed at the end of the first pass, so that the second one can have the same memory.
          for (int pass = 0; pass < 2; ++pass) {
            const Tensor first = backend.allocate(DType::f32, {count});
            backend.copy(first, x.rows(0, count));
            const Tensor second = backend.allocate(DType::f32, {count});
            backend.copy(second, first);
            backend.zero(first);
            if (fail) throw Error("ABORTED", "on purpose");
            backend.copy(y.rows(0, count), second);
          }
        });
        std::vector<float> expected(values.begin(), values.begin() + count);
        expected.resize(static_cast<size_t>(most), 0.0f);
        CHECK(same_bits(download(backend, y), expected));
      };
      CHECK_THROWS_AS(run(100, 1, true), Error);
      for (uint64_t seed = 1; seed <= 4; ++seed) {
        for (const int64_t count : {int64_t{100}, int64_t{1000}, int64_t{7}}) {
          if (seed == 2) CHECK_THROWS_AS(run(count, seed, true), Error);
          run(count, seed, false);
        }
      }
    }
    CHECK(backend.memory_used() == before);
  });
}

TEST_CASE("a recording cannot hold what was allocated in it, nor transfer") {
  for_each_backend([](Backend& backend) {
    if (backend.info().name == "cpu") return;  // runs bodies as they are
    const Tensor x = backend.allocate(DType::f32, {10});
    const std::unique_ptr<Recorder> recorder = backend.make_recorder();
    Tensor held;
    const auto hold = [&] { held = backend.allocate(DType::f32, {10}); };
    const auto transfer = [&] { download(backend, x); };
    recorder->run(1, hold);
    recorder->run(2, transfer);
    CHECK_THROWS_AS(recorder->run(1, hold), Error);
    CHECK_THROWS_AS(recorder->run(2, transfer), Error);
    recorder->run(3, hold);
    const std::vector<float> values(10, 4.0f);
    backend.upload(held, values.data(), held.bytes());
    CHECK(same_bits(download(backend, held), values));
  });
}

namespace {

// The emulated GPU with those variables of its environment; null where this build has none.
std::shared_ptr<Backend> emulated(std::initializer_list<std::pair<const char*, const char*>> variables) {
  if (!kEmulationBuilt || !tests_device("cuda-emulated")) return nullptr;
  for (const auto& [name, value] : variables) setenv(name, value, 1);
  std::shared_ptr<Backend> backend = open_backend("cuda-emulated", 1);
  for (const auto& [name, value] : variables) unsetenv(name);
  return backend;
}

template <class Body>
Error error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  return Error("", "nothing failed");
}

}  // namespace

TEST_CASE("what finds memory only once the pool has given back is done, and counted") {
  for (const char* what : {"an allocation", "a recording", "add"}) {
    CAPTURE(what);
    const std::shared_ptr<Backend> backend = emulated({{"MERF_EMULATION_SHORT", what}});
    if (!backend) return;
    CHECK(backend->memory_retries() >= 0);
    const std::vector<float> values(100, 1.0f);
    const Tensor x = upload(*backend, DType::f32, {100}, values),
                 y = upload(*backend, DType::f32, {100}, values);
    const std::unique_ptr<Recorder> recorder = backend->make_recorder();
    for (int turn = 0; turn < 3; ++turn) recorder->run(1, [&] { backend->add(y, x); });
    CHECK(same_bits(download(*backend, y), std::vector<float>(100, 4.0f)));
    CHECK(backend->memory_retries() > 0);
  }
  const std::shared_ptr<Backend> roomy = emulated({});
  upload(*roomy, DType::f32, {3}, {1.0f, 2.0f, 3.0f});
  CHECK(roomy->memory_retries() == 0);
}

TEST_CASE("the failure that ends a GPU is told by every later call, and nothing waits or throws at the end") {
  const std::shared_ptr<Backend> backend = emulated({{"MERF_EMULATION_FAIL_AT", "add:3"}});
  if (!backend) return;
  const std::vector<float> values(100, 1.0f);
  {
    const Tensor x = upload(*backend, DType::f32, {100}, values),
                 y = upload(*backend, DType::f32, {100}, values);
    const std::unique_ptr<Recorder> recorder = backend->make_recorder();
    recorder->run(1, [&] { backend->add(y, x); });
    recorder->run(1, [&] { backend->add(y, x); });
    CHECK(same_bits(download(*backend, y), std::vector<float>(100, 3.0f)));
    // The third one fails, which shows when something waits for it.
    recorder->run(1, [&] { backend->add(y, x); });
    const Error first = error_of([&] { download(*backend, y); });
    CHECK(first.code == "DEVICE_LOST");
    const std::string message = first.what();
    CAPTURE(message);
    for (const char* part :
         {"an illegal memory access was encountered", "seen at a download", "started last: ", "add"}) {
      CHECK(message.find(part) != std::string::npos);
    }
    const std::function<void()> calls[] = {
        [&] { backend->synchronize(); },
        [&] { backend->allocate(DType::f32, {10}); },
        [&] { backend->upload(x, values.data(), x.bytes()); },
        [&] { backend->copy(y, x); },
        [&] { backend->zero(y); },
        [&] { backend->add(y, x); },
        [&] { backend->memory_free(); },
        [&] { recorder->run(1, [&] { backend->add(y, x); }); },
        [&] { recorder->run(2, [&] { backend->add(y, x); }); },
    };
    for (const auto& call : calls) {
      const Error later = error_of(call);
      CHECK(later.code == "DEVICE_LOST");
      CHECK(std::string(later.what()) == message);
    }
  }
  CHECK(backend->memory_used() == 0);
}

TEST_CASE("a GPU that ends while work is recorded is told as such") {
  const std::shared_ptr<Backend> backend = emulated({{"MERF_EMULATION_FAIL_AT", "add:1"}});
  if (!backend) return;
  const Tensor x = upload(*backend, DType::f32, {3}, {1.0f, 2.0f, 3.0f});
  const std::unique_ptr<Recorder> recorder = backend->make_recorder();
  recorder->run(1, [] {});
  backend->add(x, x);
  CHECK(error_of([&] { recorder->run(1, [&] { backend->add(x, x); }); }).code == "DEVICE_LOST");
  CHECK(error_of([&] { backend->synchronize(); }).code == "DEVICE_LOST");
}

TEST_CASE("devices are opened by name" * doctest::skip(!tests_device("cpu"))) {
  CHECK(open_backend("cpu", 3)->info().threads == 3);
  const DeviceInfo info = open_backend("cpu", 0)->info();
  CHECK(info.threads >= 1);
  CHECK(info.name == "cpu");
  CHECK_FALSE(info.isa.empty());
  CHECK_FALSE(info.description.empty());
  CHECK(info.memory_bytes > 0);
  CHECK(info.libraries.size() >= 3);
  try {
    open_backend("tpu", 0);
    FAIL("opened a device that does not exist");
  } catch (const Error& error) {
    CHECK(error.code == "DEVICE_UNAVAILABLE");
    CHECK(std::string(error.what()).find("tpu") != std::string::npos);
  }
  CHECK_THROWS_AS(open_backend("cpu", -1), Error);
}
