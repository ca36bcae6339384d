#include "backend/cuda/driver.h"

#include <dlfcn.h>

#include <string>

#include "backend/in_words.h"
#include "backend/tensor.h"

namespace merf::cuda {
namespace {

constexpr int kOldestMajor = 8;  // compute capability 8.0, Ampere
// Bytes that must be free; with less, nothing of use could be computed.
constexpr size_t kLeastFree = size_t{128} << 20;

// Constants of cuda.h.
constexpr int kSuccess = 0;
constexpr int kOutOfMemory = 2;
constexpr int kNoDevice = 100;
constexpr int kMajorAttribute = 75, kMinorAttribute = 76;

[[noreturn]] void unavailable(const std::string& why) { throw Error("DEVICE_UNAVAILABLE", why); }

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// NVIDIA's number of the first driver for the first CUDA version of a major one.
std::string first_driver(int version) {
  return version == 12000 ? " (525.60 or newer)" : version == 13000 ? " (580.65 or newer)" : "";
}

[[noreturn]] void does_not_start(void* library, int status);

template <typename Function>
Function* find(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) unavailable(std::string("The NVIDIA driver found here lacks ") + name);
  return reinterpret_cast<Function*>(symbol);
}

void does_not_start(void* library, int status) {
  const char* text = nullptr;
  find<int(int, const char**)>(library, "cuGetErrorString")(status, &text);
  unavailable(std::string("The NVIDIA driver does not start: ") +
              (text == nullptr ? "error " + std::to_string(status) : text));
}

// Makes the GPU's context, which the CUDA runtime then shares, so it is kept. A GPU whose memory others have may not
// even have room for that.
void require_memory(void* library, int device, const std::string& name) {
  void* context = nullptr;
  const int status = find<int(void**, int)>(library, "cuDevicePrimaryCtxRetain")(&context, device);
  size_t free = 0, total = 0;
  if (status == kSuccess && find<int(void*)>(library, "cuCtxPushCurrent_v2")(context) == kSuccess) {
    const int asked = find<int(size_t*, size_t*)>(library, "cuMemGetInfo_v2")(&free, &total);
    find<int(void**)>(library, "cuCtxPopCurrent_v2")(&context);
    if (asked == kSuccess && free >= kLeastFree) return;
    if (asked != kSuccess) does_not_start(library, asked);
  } else if (status != kOutOfMemory) {
    does_not_start(library, status);
  }
  if (total == 0) find<int(size_t*, int)>(library, "cuDeviceTotalMem_v2")(&total, device);
  unavailable("The GPU " + name + " is full: " + in_words(free) + " are free of its " + in_words(total) +
              "; end what else is using it");
}

}  // namespace

void require_gpu(int oldest_driver) {
  // Kept open: drivers do not like to be closed.
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) unavailable("No NVIDIA driver was found (libcuda.so.1)");
  int version = 0;
  if (find<int(int*)>(library, "cuDriverGetVersion")(&version) != kSuccess || version < oldest_driver) {
    unavailable("The NVIDIA driver here is for CUDA " + version_text(version) +
                "; this build of merf needs one for CUDA " + version_text(oldest_driver) + " or later" +
                first_driver(oldest_driver) + ": update the driver");
  }
  int status = find<int(unsigned)>(library, "cuInit")(0);
  int count = 0;
  if (status == kSuccess) status = find<int(int*)>(library, "cuDeviceGetCount")(&count);
  if (status == kNoDevice || (status == kSuccess && count == 0)) {
    unavailable("The NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)");
  }
  if (status != kSuccess) does_not_start(library, status);
  int device = 0, major = 0, minor = 0;
  const auto attribute = find<int(int*, int, int)>(library, "cuDeviceGetAttribute");
  if (find<int(int*, int)>(library, "cuDeviceGet")(&device, 0) != kSuccess ||
      attribute(&major, kMajorAttribute, device) != kSuccess ||
      attribute(&minor, kMinorAttribute, device) != kSuccess) {
    unavailable("The NVIDIA driver does not say what the first GPU is");
  }
  char name[256] = "";
  find<int(char*, int, int)>(library, "cuDeviceGetName")(name, sizeof(name), device);
  if (major < kOldestMajor) {
    unavailable(std::string("The GPU ") + name + " has compute capability " + std::to_string(major) + "." +
                std::to_string(minor) + "; " + std::to_string(kOldestMajor) + ".0 or later is needed");
  }
  require_memory(library, device, name);
}

}  // namespace merf::cuda
