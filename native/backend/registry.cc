#include <dlfcn.h>

#include <filesystem>

#include "backend/cuda/driver.h"
#include "backend/plugin.h"
#if defined(MERF_CPU)
#include "backend/cpu/cpu_backend.h"
#endif

namespace merf {
namespace {

// The folder of the library or program that this code is part of: plugins lie beside it.
std::filesystem::path own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) return {};
  return std::filesystem::absolute(info.dli_fname).parent_path();
}

std::shared_ptr<Backend> open_plugin(const std::string& name, const std::string& file, int threads) {
  const std::filesystem::path path = own_folder() / file;
  if (!std::filesystem::exists(path)) {
    throw Error("DEVICE_UNAVAILABLE", "This build of merf has no " + file + " for device " + name);
  }
  // Never closed: tensors that outlive their backend run its code.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error("DEVICE_UNAVAILABLE", "Could not load " + path.string() + ": " + dlerror());
  }
  const auto interface = reinterpret_cast<PluginInterface*>(dlsym(library, kPluginInterfaceSymbol));
  const auto open = reinterpret_cast<OpenPlugin*>(dlsym(library, kOpenPluginSymbol));
  if (interface == nullptr || open == nullptr || interface() != kPluginInterface) {
    throw Error("DEVICE_UNAVAILABLE", path.string() + " belongs to another version of merf");
  }
  std::shared_ptr<Backend> backend;
  open(threads, backend);
  return backend;
}

}  // namespace

std::vector<std::string> backend_names() {
#if defined(MERF_CPU)
  return {"cpu", "cuda", "cuda-emulated"};
#else
  return {"cuda", "cuda-emulated"};
#endif
}

std::shared_ptr<Backend> open_backend(const std::string& name, int threads) {
  if (threads < 0) {
    throw Error("INVALID_ARGUMENT", "Expected 0 or more for threads but received " + std::to_string(threads));
  }
#if defined(MERF_CPU)
  if (name == "cpu") return std::make_shared<CpuBackend>(threads);
#endif
  if (name == "cuda") {
    cuda::require_gpu();
    return open_plugin(name, "merf_cuda.so", threads);
  }
  if (name == "cuda-emulated") return open_plugin(name, "merf_cuda_emulated.so", threads);
  std::string known;
  for (const std::string& each : backend_names()) known += (known.empty() ? "" : ", ") + each;
  throw Error("DEVICE_UNAVAILABLE",
              "Expected one of the devices of merf (" + known + ") for device but received " + name);
}

}  // namespace merf
