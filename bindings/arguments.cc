#include "arguments.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace merf {
namespace {

constexpr size_t kCopiedBytes = size_t{64} << 10;

std::string number_text(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  if (value == std::floor(value) && std::abs(value) < 1e15)
    return std::to_string(static_cast<int64_t>(value));
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

const char* array_name(napi_typedarray_type type) {
  switch (type) {
    case napi_int8_array:
      return "Int8Array";
    case napi_uint8_array:
      return "Uint8Array";
    case napi_uint8_clamped_array:
      return "Uint8ClampedArray";
    case napi_int16_array:
      return "Int16Array";
    case napi_uint16_array:
      return "Uint16Array";
    case napi_int32_array:
      return "Int32Array";
    case napi_uint32_array:
      return "Uint32Array";
    case napi_float32_array:
      return "Float32Array";
    case napi_float64_array:
      return "Float64Array";
    case napi_bigint64_array:
      return "BigInt64Array";
    case napi_biguint64_array:
      return "BigUint64Array";
    default:
      return "TypedArray";
  }
}

struct View {
  const void* data = nullptr;
  size_t length = 0;
};

View to_view(const Napi::Value& value, const std::string& name, napi_typedarray_type type) {
  if (!value.IsTypedArray()) refuse(array_name(type), name, value);
  napi_typedarray_type actual;
  View view;
  void* data = nullptr;
  if (napi_get_typedarray_info(value.Env(), value, &actual, &view.length, &data, nullptr, nullptr) !=
          napi_ok ||
      actual != type) {
    refuse(array_name(type), name, value);
  }
  view.data = data;
  return view;
}

template <typename T>
std::vector<T> to_vector(const Napi::Value& value, const std::string& name, napi_typedarray_type type) {
  const View view = to_view(value, name, type);
  std::vector<T> out(view.length);
  if (view.length > 0) std::memcpy(out.data(), view.data, view.length * sizeof(T));
  return out;
}

template <typename Array, typename T>
Array to_js_array(Napi::Env env, std::vector<T> values) {
  const size_t bytes = values.size() * sizeof(T);
  if (bytes > kCopiedBytes) {
    auto* owned = new std::vector<T>(std::move(values));
    napi_value buffer;
    const napi_status status = napi_create_external_arraybuffer(
        env, owned->data(), bytes,
        [](napi_env, void*, void* hint) { delete static_cast<std::vector<T>*>(hint); }, owned, &buffer);
    if (status == napi_ok) return Array::New(env, owned->size(), Napi::ArrayBuffer(env, buffer), 0);
    values = std::move(*owned);
    delete owned;
  }
  Array array = Array::New(env, values.size());
  if (bytes > 0) std::memcpy(array.Data(), values.data(), bytes);
  return array;
}

}  // namespace

std::string describe(const Napi::Value& value) {
  if (value.IsEmpty() || value.IsUndefined()) return "undefined";
  if (value.IsNull()) return "null";
  if (value.IsBoolean()) return value.As<Napi::Boolean>().Value() ? "true" : "false";
  if (value.IsNumber()) return number_text(value.As<Napi::Number>().DoubleValue());
  if (value.IsString()) {
    std::string text = value.As<Napi::String>().Utf8Value();
    if (text.size() > 60) text = text.substr(0, 60) + "...";
    return "\"" + text + "\" of type string";
  }
  if (value.IsBigInt()) return "a bigint";
  if (value.IsSymbol()) return "a symbol";
  if (value.IsFunction()) return "a function";
  if (value.IsTypedArray()) {
    const Napi::TypedArray array = value.As<Napi::TypedArray>();
    return std::string(array_name(array.TypedArrayType())) + " of length " +
           std::to_string(array.ElementLength());
  }
  if (value.IsArray()) return "an array of length " + std::to_string(value.As<Napi::Array>().Length());
  return "an object";
}

void refuse(const std::string& expected, const std::string& argument, const std::string& received) {
  throw Error("INVALID_ARGUMENT", "Expected " + expected + " for " + argument + " but received " + received);
}
void refuse(const std::string& expected, const std::string& argument, const Napi::Value& received) {
  refuse(expected, argument, describe(received));
}

Napi::Object to_object(const Napi::Value& value, const std::string& name) {
  if (!value.IsObject() || value.IsFunction()) refuse("an object", name, value);
  return value.As<Napi::Object>();
}

std::string to_text(const Napi::Value& value, const std::string& name) {
  if (!value.IsString()) refuse("a string", name, value);
  return value.As<Napi::String>().Utf8Value();
}

bool to_bool(const Napi::Value& value, const std::string& name) {
  if (!value.IsBoolean()) refuse("a boolean", name, value);
  return value.As<Napi::Boolean>().Value();
}

int64_t to_integer(const Napi::Value& value, const std::string& name, int64_t least, int64_t most) {
  const auto expected = [&] {
    return "an integer from " + std::to_string(least) + " to " + std::to_string(most);
  };
  if (!value.IsNumber()) refuse(expected(), name, value);
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!(number >= static_cast<double>(least) && number <= static_cast<double>(most)) ||
      number != std::floor(number)) {
    refuse(expected(), name, value);
  }
  return static_cast<int64_t>(number);
}

double to_number(const Napi::Value& value, const std::string& name, double least, double most) {
  const auto expected = [&] {
    if (std::isfinite(least) && std::isfinite(most)) {
      return "a number from " + number_text(least) + " to " + number_text(most);
    }
    return std::isfinite(least) ? "a finite number of at least " + number_text(least)
                                : std::string("a finite number");
  };
  if (!value.IsNumber()) refuse(expected(), name, value);
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!std::isfinite(number) || number < least || number > most) refuse(expected(), name, value);
  return number;
}

float to_float(const Napi::Value& value, const std::string& name) {
  constexpr double most = std::numeric_limits<float>::max();
  if (!value.IsNumber()) refuse("a finite number", name, value);
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!(std::abs(number) <= most)) refuse("a finite number", name, value);
  return static_cast<float>(number);
}

uint64_t to_uint64(const Napi::Value& value, const std::string& name) {
  if (!value.IsBigInt()) refuse("a bigint from 0 to 2^64 - 1", name, value);
  bool lossless = false;
  const uint64_t number = value.As<Napi::BigInt>().Uint64Value(&lossless);
  if (!lossless) refuse("a bigint from 0 to 2^64 - 1", name, "one outside of it");
  return number;
}

size_t to_choice(const Napi::Value& value, const std::string& name, const std::vector<std::string>& choices) {
  if (value.IsString()) {
    const std::string text = value.As<Napi::String>().Utf8Value();
    for (size_t i = 0; i < choices.size(); ++i) {
      if (choices[i] == text) return i;
    }
  }
  std::string list;
  for (size_t i = 0; i < choices.size(); ++i)
    list += (i == 0 ? "" : i + 1 == choices.size() ? " or " : ", ") + choices[i];
  refuse(list, name, value);
}

Napi::Array to_array(const Napi::Value& value, const std::string& name) {
  if (!value.IsArray()) refuse("an array", name, value);
  return value.As<Napi::Array>();
}

std::vector<int64_t> to_shape(const Napi::Value& value, const std::string& name) {
  const Napi::Array array = to_array(value, name);
  // An element's getter may change the length.
  const uint32_t length = array.Length();
  if (length < 1 || length > 4) refuse("1 to 4 extents", name, value);
  std::vector<int64_t> shape;
  int64_t size = 1;
  for (uint32_t i = 0; i < length; ++i) {
    shape.push_back(to_integer(array.Get(i), name + "[" + std::to_string(i) + "]", 1, int64_t{1} << 40));
    if (__builtin_mul_overflow(size, shape.back(), &size) || size > int64_t{1} << 40) {
      refuse("at most 2^40 elements", name, "more");
    }
  }
  return shape;
}

std::vector<int32_t> to_int32s(const Napi::Value& value, const std::string& name) {
  return to_vector<int32_t>(value, name, napi_int32_array);
}
std::vector<uint32_t> to_uint32s(const Napi::Value& value, const std::string& name) {
  return to_vector<uint32_t>(value, name, napi_uint32_array);
}
std::vector<float> to_floats(const Napi::Value& value, const std::string& name) {
  return to_vector<float>(value, name, napi_float32_array);
}
std::string to_bytes(const Napi::Value& value, const std::string& name) {
  const View view = to_view(value, name, napi_uint8_array);
  return view.length == 0 ? std::string() : std::string(static_cast<const char*>(view.data), view.length);
}

void check_range(const std::vector<int32_t>& values, const std::string& name, int64_t least, int64_t end) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= least && values[i] < end) continue;
    refuse("integers from " + std::to_string(least) + " to " + std::to_string(end - 1), name,
           std::to_string(values[i]) + " at index " + std::to_string(i));
  }
}

void check_finite(const std::vector<float>& values, const std::string& name) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i])) continue;
    refuse("finite numbers", name, number_text(values[i]) + " at index " + std::to_string(i));
  }
}

void check_finite_or_nan(const std::vector<float>& values, const std::string& name) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isinf(values[i])) continue;
    refuse("finite numbers, or NaN for those that are missing", name,
           number_text(values[i]) + " at index " + std::to_string(i));
  }
}

void check_visible_until(const std::vector<int32_t>& visible_until, const std::string& name) {
  const int64_t tokens = static_cast<int64_t>(visible_until.size());
  std::vector<int32_t> open;  // the ends of the stretches that token i is in
  for (int64_t i = 0; i < tokens; ++i) {
    const int32_t end = visible_until[static_cast<size_t>(i)];
    if (end <= i || end > tokens) {
      refuse("an index after the token's own and at most " + std::to_string(tokens), name,
             std::to_string(end) + " at index " + std::to_string(i));
    }
    while (!open.empty() && open.back() <= i) open.pop_back();
    if (!open.empty() && end > open.back()) {
      refuse("nested subtrees", name,
             std::to_string(end) + " at index " + std::to_string(i) + ", inside of one that ends at " +
                 std::to_string(open.back()));
    }
    open.push_back(end);
  }
}

void check_sequences(const std::vector<int32_t>& sequences, const std::string& name) {
  int32_t last = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const bool right = i == 0 ? sequences[i] == 0 : sequences[i] == last || sequences[i] == last + 1;
    if (!right) {
      refuse("numbers that rise from 0 by at most 1", name,
             std::to_string(sequences[i]) + " at index " + std::to_string(i));
    }
    last = sequences[i];
  }
}

Napi::Float32Array to_float32_array(Napi::Env env, std::vector<float> values) {
  return to_js_array<Napi::Float32Array>(env, std::move(values));
}
Napi::Int32Array to_int32_array(Napi::Env env, std::vector<int32_t> values) {
  return to_js_array<Napi::Int32Array>(env, std::move(values));
}

}  // namespace merf
