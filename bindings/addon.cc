// The module that lib/native.ts loads.
#include <napi.h>

#include "arguments.h"
#include "backend/backend.h"
#include "cancel_token.h"
#include "environment.h"
#include "model_arguments.h"
#include "native_device.h"
#include "native_model.h"

namespace merf {
namespace {

// What a device is, or why it cannot be used.
Napi::Object describe(Napi::Env env, const std::string& name) {
  const Napi::Object object = Napi::Object::New(env);
  object.Set("name", name);
  DeviceInfo device;
  int64_t free_bytes = 0;
  std::string reason;
  try {
    const Backend& backend = Engine::open(name, 0).backend();
    free_bytes = backend.memory_free();
    if (const auto retries = backend.memory_retries()) {
      object.Set("memoryRetries", static_cast<double>(*retries));
    }
    device = backend.info();
  } catch (const std::exception& error) {
    reason = error.what();
    object.Set("reason", reason);
  }
  object.Set("available", reason.empty());
  object.Set("description", device.description);
  object.Set("isa", device.isa);
  object.Set("threads", device.threads);
  object.Set("memoryBytes", static_cast<double>(device.memory_bytes));
  object.Set("freeBytes", static_cast<double>(free_bytes));
  object.Set("fastBf16", device.fast_bf16);
  object.Set("exact", device.exact);
  const Napi::Array libraries = Napi::Array::New(env);
  for (size_t l = 0; l < device.libraries.size(); ++l) {
    const Napi::Array pair = Napi::Array::New(env, 2);
    pair.Set(uint32_t{0}, device.libraries[l].first);
    pair.Set(uint32_t{1}, device.libraries[l].second);
    libraries.Set(static_cast<uint32_t>(l), pair);
  }
  object.Set("libraries", libraries);
  return object;
}

Napi::Value device_names(const Napi::CallbackInfo& info) {
  const Napi::Array array = Napi::Array::New(info.Env());
  uint32_t i = 0;
  for (const std::string& name : backend_names()) array.Set(i++, name);
  return array;
}

Napi::Value describe_device(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value { return describe(info.Env(), to_text(info[0], "name")); });
}

Napi::Value compute_loss_weights(const Napi::CallbackInfo& info) {
  return checked(info.Env(), [&]() -> Napi::Value {
    const Napi::Object object = to_object(info[0], "arguments");
    const auto sequences = to_int32s(object.Get("sequences"), "arguments.sequences");
    check_sequences(sequences, "arguments.sequences");
    return to_float32_array(info.Env(), to_loss_weights(object, "arguments", sequences));
  });
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
  exports.Set("deviceNames", Napi::Function::New<device_names>(env, "deviceNames"));
  exports.Set("describeDevice", Napi::Function::New<describe_device>(env, "describeDevice"));
  exports.Set("createModel", Napi::Function::New<&NativeModel::create>(env, "createModel"));
  exports.Set("openDevice", Napi::Function::New<&NativeDevice::create>(env, "openDevice"));
  exports.Set("lossWeights", Napi::Function::New<compute_loss_weights>(env, "lossWeights"));
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
