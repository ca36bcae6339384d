// The opaque object by which JavaScript asks running work to stop.
#pragma once

#include <napi.h>

#include <memory>

#include "arguments.h"
#include "model/cancel.h"

namespace merf {

// Marks our objects, so that no other wrapped object is taken for one of them.
constexpr napi_type_tag kCancelTokenTag = {0x6d6572662d63616e, 0x63656c2d746f6b65};

inline Napi::Value create_cancel_token(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object token = Napi::Object::New(env);
  auto* cancel = new std::shared_ptr<Cancel>(std::make_shared<Cancel>());
  napi_wrap(
      env, token, cancel,
      [](napi_env, void* data, void*) { delete static_cast<std::shared_ptr<Cancel>*>(data); }, nullptr,
      nullptr);
  napi_type_tag_object(env, token, &kCancelTokenTag);
  return token;
}

inline std::shared_ptr<Cancel> to_cancel(const Napi::Value& value, const std::string& name) {
  bool ours = false;
  void* data = nullptr;
  if (value.IsObject() &&
      napi_check_object_type_tag(value.Env(), value, &kCancelTokenTag, &ours) == napi_ok && ours &&
      napi_unwrap(value.Env(), value, &data) == napi_ok) {
    return *static_cast<std::shared_ptr<Cancel>*>(data);
  }
  refuse("a cancel token", name, value);
}

// One that nobody can request where none is given.
inline std::shared_ptr<Cancel> to_optional_cancel(const Napi::Value& value, const std::string& name) {
  return value.IsUndefined() ? std::make_shared<Cancel>() : to_cancel(value, name);
}

}  // namespace merf
