// The base of our native classes. A method that is called on anything but an object of its class, be it an object of
// another native class, is refused before the receiver is taken for what it is not.
#pragma once

#include <napi.h>

#include <string>

#include "arguments.h"
#include "environment.h"

namespace merf {

// Class has `static constexpr napi_type_tag kTag` and `static constexpr const char* kName`.
template <typename Class>
class TaggedWrap : public Napi::ObjectWrap<Class> {
 public:
  // Marks the object; a constructor calls it last, when nothing can fail any more.
  void tag(const Napi::CallbackInfo& info) const { info.This().As<Napi::Object>().TypeTag(&Class::kTag); }

  static bool is_one(const Napi::Value& value) {
    bool ours = false;
    return value.IsObject() &&
           napi_check_object_type_tag(value.Env(), value, &Class::kTag, &ours) == napi_ok && ours;
  }

  // Takes the place of ObjectWrap's in the callbacks of methods and accessors, which call it with their receiver.
  static Class* Unwrap(const Napi::Object& receiver) {
    return checked(receiver.Env(), [&] {
      if (!is_one(receiver)) refuse(std::string("a ") + Class::kName, "this", receiver);
      return Napi::ObjectWrap<Class>::Unwrap(receiver);
    });
  }

 protected:
  explicit TaggedWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Class>(info) {}
};

}  // namespace merf
