// Stands in for NVIDIA's driver, as far as merf asks it before it opens the device cuda, so that what merf says of
// drivers and GPUs that it cannot use is tested where there are none. The environment says what it has.
#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

long number(const char* variable, long otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atol(text);
}

constexpr size_t kMebibyte = size_t{1} << 20;
size_t total_bytes() { return static_cast<size_t>(number("FAKE_CUDA_MEMORY", 81920)) * kMebibyte; }

}  // namespace

#define DRIVER extern "C" __attribute__((visibility("default")))

// FAKE_CUDA_VERSION counts as cudaDriverGetVersion does: 13000 is CUDA 13.0.
DRIVER int cuDriverGetVersion(int* version) {
  *version = static_cast<int>(number("FAKE_CUDA_VERSION", 13000));
  return 0;
}
DRIVER int cuInit(unsigned) { return static_cast<int>(number("FAKE_CUDA_INIT", 0)); }
DRIVER int cuGetErrorString(int status, const char** text) {
  *text = status == 802 ? "system not yet initialized" : nullptr;
  return 0;
}
DRIVER int cuDeviceGetCount(int* count) {
  *count = static_cast<int>(number("FAKE_CUDA_GPUS", 1));
  return 0;
}
DRIVER int cuDeviceGet(int* device, int) {
  *device = 0;
  return 0;
}
DRIVER int cuDeviceGetName(char* name, int bytes, int) {
  std::snprintf(name, static_cast<size_t>(bytes), "NVIDIA Fake 80GB");
  return 0;
}
// FAKE_CUDA_CAPABILITY is 10 times the compute capability.
DRIVER int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = static_cast<int>(number("FAKE_CUDA_CAPABILITY", 90));
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
DRIVER int cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = total_bytes();
  return 0;
}
// FAKE_CUDA_FREE is in MiB; -1: there is not even room for a context.
DRIVER int cuDevicePrimaryCtxRetain(void** context, int) {
  static int only;
  *context = &only;
  return number("FAKE_CUDA_FREE", 80000) < 0 ? 2 : 0;
}
DRIVER int cuCtxPushCurrent_v2(void*) { return 0; }
DRIVER int cuCtxPopCurrent_v2(void**) { return 0; }
DRIVER int cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = static_cast<size_t>(number("FAKE_CUDA_FREE", 80000)) * kMebibyte;
  *total = total_bytes();
  return 0;
}
