// Memory, transfers and recordings of the emulated GPU behave as those of a real one (a stream and CUDA graphs).
#include "harness.h"

using namespace merf;
using namespace merf::cuda;
using namespace merf::test;

namespace {

void scale(const float* x, float* y, float factor) { y[thread_index()] = factor * x[thread_index()]; }

}  // namespace

TEST_CASE(
    "emulation: what is recorded runs when it is played, as often as it is, over what is there by then") {
  const auto gpu = gpu_of(0);
  Array<float> x(*gpu, std::vector<float>(32, 1.0f)), y(*gpu, std::vector<float>(32, 0.0f));
  float factor = 2.0f;
  gpu->begin_recording();
  launch(*gpu, "scale", scale, {1, kWarp}, x.data(), y.data(), factor);
  gpu->copy(x.data(), y.data(), 32 * sizeof(float));
  gpu->fill(y.data(), 0, 16 * sizeof(float));
  factor = 100.0f;  // parameters are those of the launch
  const auto recording = gpu->end_recording();
  CHECK(x.read()[5] == 1.0f);
  gpu->play(*recording);
  CHECK(x.read()[5] == 2.0f);
  CHECK(y.read()[5] == 0.0f);
  CHECK(y.read()[20] == 2.0f);
  gpu->play(*recording);
  gpu->play(*recording);
  CHECK(x.read()[5] == 8.0f);
  const std::vector<float> other(32, 5.0f);
  gpu->upload(x.data(), other.data(), 32 * sizeof(float));
  gpu->play(*recording);
  CHECK(x.read()[31] == 10.0f);
}

TEST_CASE("emulation: memory taken and freed while recording stays with the recording") {
  const auto gpu = gpu_of(0);
  const size_t before = gpu->free_bytes();
  {
    Array<float> x(*gpu, numbers(32, 1)), y(*gpu, 32);
    gpu->begin_recording();
    {
      const Array<float> between(*gpu, 32);
      launch(*gpu, "scale", scale, {1, kWarp}, x.data(), between.data(), 2.0f);
      launch(*gpu, "scale", scale, {1, kWarp}, between.data(), y.data(), 2.0f);
    }
    auto recording = gpu->end_recording();
    CHECK(gpu->free_bytes() == before - 3 * 128);
    // What is allocated meanwhile is not the recording's.
    const Array<float> other(*gpu, std::vector<float>(32, 7.0f));
    gpu->play(*recording);
    CHECK(y.read()[3] == 4.0f * numbers(32, 1)[3]);
    CHECK(other.read()[3] == 7.0f);
    recording.reset();
    CHECK(gpu->free_bytes() == before - 3 * 128);
  }
  CHECK(gpu->free_bytes() == before);
}

TEST_CASE("emulation: a recording takes over what is recorded of as many kernels") {
  const auto gpu = gpu_of(0);
  const size_t before = gpu->free_bytes();
  {
    Array<float> x(*gpu, std::vector<float>(32, 1.0f)), y(*gpu, 32), z(*gpu, 32);
    std::unique_ptr<Recording> recording;
    const auto record = [&](float* to, float factor, int kernels) {
      gpu->begin_recording();
      const Array<float> between(*gpu, 32);  // given back before the recording ends
      for (int i = 0; i < kernels; ++i) {
        launch(*gpu, "scale", scale, {1, kWarp}, x.data(), between.data(), factor);
      }
      launch(*gpu, "scale", scale, {1, kWarp}, between.data(), to, factor);
    };
    record(y.data(), 2.0f, 1);
    recording = gpu->end_recording(std::move(recording));
    const Recording* const first = recording.get();
    gpu->play(*recording);
    CHECK(y.read()[7] == 4.0f);
    record(z.data(), 3.0f, 1);
    recording = gpu->end_recording(std::move(recording));
    CHECK(recording.get() == first);
    gpu->play(*recording);
    CHECK(y.read()[7] == 4.0f);
    CHECK(z.read()[7] == 9.0f);
    record(y.data(), 5.0f, 2);
    recording = gpu->end_recording(std::move(recording));
    CHECK(recording.get() != first);
    gpu->play(*recording);
    CHECK(y.read()[7] == 25.0f);
    // What they allocate they have between them.
    CHECK(gpu->free_bytes() == before - 4 * 128);
  }
  CHECK(gpu->free_bytes() == before);
}

TEST_CASE("emulation: a download that nobody has waited for brings nothing") {
  const auto gpu = gpu_of(0);
  Array<float> x(*gpu, std::vector<float>(32, 1.0f));
  const auto download = gpu->make_download(32 * sizeof(float));
  download->start(x.data(), 32 * sizeof(float));
  const float* const at = static_cast<const float*>(download->wait());
  CHECK(at[31] == 1.0f);
  download->start(x.data(), 32 * sizeof(float));
  CHECK(std::isnan(at[0]));
  CHECK(std::isnan(at[31]));
  gpu->fill(x.data(), 0, 32 * sizeof(float));
  CHECK(download->wait() == at);
  CHECK(at[31] == 1.0f);
  gpu->begin_recording();
  CHECK_THROWS_AS(download->start(x.data(), 16), Error);
  gpu->end_recording();
}

TEST_CASE("emulation: memory from before that is freed while recording is there until its end") {
  const auto gpu = gpu_of(0);
  const size_t before = gpu->free_bytes();
  auto x = std::make_unique<Array<float>>(*gpu, numbers(32, 1));
  gpu->begin_recording();
  x.reset();
  CHECK(gpu->free_bytes() == before - 128);
  gpu->end_recording();
  CHECK(gpu->free_bytes() == before);
}

TEST_CASE("emulation: a broken kernel in a recording is told when it is played") {
  const auto gpu = gpu_of(0);
  gpu->begin_recording();
  launch(*gpu, "late",
         +[] {
           if (thread_index() == 0) sync_block();
         },
         {1, kWarp});
  const auto recording = gpu->end_recording();
  CHECK(says(error_of([&] { gpu->play(*recording); }), {"The kernel late"}));
}

TEST_CASE("emulation: memory ends where MERF_EMULATION_MEMORY says") {
  setenv("MERF_EMULATION_MEMORY", "1000000", 1);
  const auto gpu = gpu_of(0);
  unsetenv("MERF_EMULATION_MEMORY");
  CHECK(gpu->properties().total_bytes == 1000000);
  CHECK(gpu->allocate(1000001) == nullptr);
  void* const most = gpu->allocate(999000);
  REQUIRE(most != nullptr);
  CHECK(gpu->free_bytes() == 1000);
  CHECK(gpu->allocate(1001) == nullptr);
  gpu->free(most);
  void* const again = gpu->allocate(999000);
  CHECK(again != nullptr);
  gpu->free(again);
  CHECK(gpu_of(0)->properties().total_bytes == size_t{4} << 30);
}
