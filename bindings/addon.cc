// The module that lib/native.ts loads.
#include <napi.h>

#include "arguments.h"
#include "backend/backend.h"
#include "cancel_token.h"
#include "environment.h"
#include "native_device.h"
#include "native_model.h"

namespace merf {
namespace {

Napi::Value backends(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Array array = Napi::Array::New(env);
  uint32_t i = 0;
  for (const std::string& name : backend_names()) {
    const Napi::Object object = Napi::Object::New(env);
    object.Set("name", name);
    DeviceInfo device;
    try {
      device = Engine::open(name, 0).backend().info();
      object.Set("available", true);
    } catch (const Error& error) {
      object.Set("available", false);
      object.Set("reason", error.what());
    }
    object.Set("description", device.description);
    object.Set("isa", device.isa);
    object.Set("threads", device.threads);
    object.Set("memoryBytes", static_cast<double>(device.memory_bytes));
    object.Set("fastBf16", device.fast_bf16);
    const Napi::Array libraries = Napi::Array::New(env);
    for (size_t l = 0; l < device.libraries.size(); ++l) {
      const Napi::Array pair = Napi::Array::New(env, 2);
      pair.Set(uint32_t{0}, device.libraries[l].first);
      pair.Set(uint32_t{1}, device.libraries[l].second);
      libraries.Set(static_cast<uint32_t>(l), pair);
    }
    object.Set("libraries", libraries);
    array.Set(i++, object);
  }
  return array;
}

Napi::Value cancel(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    to_cancel(info[0], "token")->request();
    return info.Env().Undefined();
  });
}

Napi::Value use_error_class(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    if (!info[0].IsFunction()) refuse("a class", "errorClass", info[0]);
    Environment::of(info.Env()).error_class = Napi::Persistent(info[0].As<Napi::Function>());
    return info.Env().Undefined();
  });
}

Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  Environment::create(env);
  NativeModel::define(env);
  NativeTensor::define(env);
  NativeDevice::define(env);
  exports.Set("version", MERF_VERSION);
  exports.Set("useErrorClass", Napi::Function::New<use_error_class>(env, "useErrorClass"));
  exports.Set("backends", Napi::Function::New<backends>(env, "backends"));
  exports.Set("createModel", Napi::Function::New<&NativeModel::create>(env, "createModel"));
  exports.Set("openDevice", Napi::Function::New<&NativeDevice::create>(env, "openDevice"));
  exports.Set("createCancelToken", Napi::Function::New<create_cancel_token>(env, "createCancelToken"));
  exports.Set("cancel", Napi::Function::New<cancel>(env, "cancel"));
  return exports;
}

}  // namespace
}  // namespace merf

static Napi::Object initialize_addon(Napi::Env env, Napi::Object exports) {
  return merf::initialize(env, exports);
}
NODE_API_MODULE(NODE_GYP_MODULE_NAME, initialize_addon)
