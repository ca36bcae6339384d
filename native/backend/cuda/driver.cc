#include "backend/cuda/driver.h"

#include <dlfcn.h>

#include <string>

#include "backend/tensor.h"

namespace merf::cuda {
namespace {

constexpr int kOldestDriver = 12040;  // CUDA 12.4
constexpr int kOldestMajor = 8;       // compute capability 8.0, Ampere

// Of cuda.h.
constexpr int kSuccess = 0;
constexpr int kNoDevice = 100;
constexpr int kMajorAttribute = 75, kMinorAttribute = 76;

[[noreturn]] void unavailable(const std::string& why) { throw Error("DEVICE_UNAVAILABLE", why); }

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

template <typename Function>
Function* find(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) unavailable(std::string("The NVIDIA driver found here lacks ") + name);
  return reinterpret_cast<Function*>(symbol);
}

}  // namespace

void require_gpu() {
  // Kept open: drivers do not like to be closed.
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) unavailable("No NVIDIA driver was found (libcuda.so.1)");
  int version = 0;
  if (find<int(int*)>(library, "cuDriverGetVersion")(&version) != kSuccess || version < kOldestDriver) {
    unavailable("The NVIDIA driver here is for CUDA " + version_text(version) + "; CUDA " +
                version_text(kOldestDriver) + " or later is needed: update the driver");
  }
  int status = find<int(unsigned)>(library, "cuInit")(0);
  int count = 0;
  if (status == kSuccess) status = find<int(int*)>(library, "cuDeviceGetCount")(&count);
  if (status == kNoDevice || (status == kSuccess && count == 0)) {
    unavailable("The NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)");
  }
  if (status != kSuccess) {
    const char* text = nullptr;
    find<int(int, const char**)>(library, "cuGetErrorString")(status, &text);
    unavailable(std::string("The NVIDIA driver does not start: ") +
                (text == nullptr ? "error " + std::to_string(status) : text));
  }
  int device = 0, major = 0, minor = 0;
  const auto attribute = find<int(int*, int, int)>(library, "cuDeviceGetAttribute");
  if (find<int(int*, int)>(library, "cuDeviceGet")(&device, 0) != kSuccess ||
      attribute(&major, kMajorAttribute, device) != kSuccess ||
      attribute(&minor, kMinorAttribute, device) != kSuccess) {
    unavailable("The NVIDIA driver does not say what the first GPU is");
  }
  if (major < kOldestMajor) {
    char name[256] = "";
    find<int(char*, int, int)>(library, "cuDeviceGetName")(name, sizeof(name), device);
    unavailable(std::string("The GPU ") + name + " has compute capability " + std::to_string(major) + "." +
                std::to_string(minor) + "; " + std::to_string(kOldestMajor) + ".0 or later is needed");
  }
}

}  // namespace merf::cuda
