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

struct Plugin {
  std::string path;
  void* library = nullptr;
};

// Loads the plugin, which runs nothing of it yet.
Plugin load_plugin(const std::string& name, const std::string& file) {
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
  if (interface == nullptr || interface() != kPluginInterface) {
    throw Error("DEVICE_UNAVAILABLE", path.string() + " belongs to another version of merf");
  }
  return {path.string(), library};
}

template <typename Function>
Function* find(const Plugin& plugin, const char* symbol) {
  const auto function = reinterpret_cast<Function*>(dlsym(plugin.library, symbol));
  if (function == nullptr) throw Error("DEVICE_UNAVAILABLE", plugin.path + " lacks " + symbol);
  return function;
}

std::shared_ptr<Backend> open_plugin(const Plugin& plugin, int threads) {
  std::shared_ptr<Backend> backend;
  find<OpenPlugin>(plugin, kOpenPluginSymbol)(threads, backend);
  return backend;
}

// What the machine lacks is said first, then what this build does.
std::shared_ptr<Backend> open_cuda(int threads) {
  constexpr int kOldestDriver = 12000;  // no build of merf runs on an older one
  Plugin plugin;
  try {
    plugin = load_plugin("cuda", "merf_cuda.so");
  } catch (const Error&) {
    cuda::require_gpu(kOldestDriver);
    throw;
  }
  cuda::require_gpu(find<PluginDriver>(plugin, kPluginDriverSymbol)());
  return open_plugin(plugin, threads);
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
  if (name == "cuda") return open_cuda(threads);
  if (name == "cuda-emulated") return open_plugin(load_plugin(name, "merf_cuda_emulated.so"), threads);
  std::string known;
  for (const std::string& each : backend_names()) known += (known.empty() ? "" : ", ") + each;
  throw Error("DEVICE_UNAVAILABLE",
              "Expected one of the devices of merf (" + known + ") for device but received " + name);
}

}  // namespace merf
