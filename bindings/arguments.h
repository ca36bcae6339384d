// Checks of what JavaScript hands over. Every failure throws Error("INVALID_ARGUMENT") in one form:
// "Expected <what> for <argument> but received <what was there>".
#pragma once

#include <napi.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/tensor.h"

namespace merf {

std::string describe(const Napi::Value& value);
[[noreturn]] void refuse(const std::string& expected, const std::string& argument,
                         const std::string& received);
[[noreturn]] void refuse(const std::string& expected, const std::string& argument,
                         const Napi::Value& received);

// `name` is what the message calls the argument.
Napi::Object to_object(const Napi::Value& value, const std::string& name);
std::string to_text(const Napi::Value& value, const std::string& name);
bool to_bool(const Napi::Value& value, const std::string& name);
int64_t to_integer(const Napi::Value& value, const std::string& name, int64_t least, int64_t most);
double to_number(const Napi::Value& value, const std::string& name, double least, double most);
// A finite float32.
float to_float(const Napi::Value& value, const std::string& name);
uint64_t to_uint64(const Napi::Value& value, const std::string& name);  // of a bigint
// One of `choices`; returns which.
size_t to_choice(const Napi::Value& value, const std::string& name, const std::vector<std::string>& choices);
Napi::Array to_array(const Napi::Value& value, const std::string& name);
// Positive extents, at most 4 of them, whose product fits a tensor.
std::vector<int64_t> to_shape(const Napi::Value& value, const std::string& name);

// Copies, so that the caller may do with the array what it likes.
std::vector<int32_t> to_int32s(const Napi::Value& value, const std::string& name);
std::vector<uint32_t> to_uint32s(const Napi::Value& value, const std::string& name);
std::vector<float> to_floats(const Napi::Value& value, const std::string& name);
std::string to_bytes(const Napi::Value& value, const std::string& name);  // of a Uint8Array

// Further checks of the content.
template <typename T>
void check_length(const std::vector<T>& values, const std::string& name, size_t length,
                  const std::string& same_as) {
  if (values.size() == length) return;
  refuse(std::to_string(length) + " elements, as many as " + same_as, name, std::to_string(values.size()));
}
// least <= every element < end
void check_range(const std::vector<int32_t>& values, const std::string& name, int64_t least, int64_t end);
void check_finite(const std::vector<float>& values, const std::string& name);
// NaN stands for a value that is missing.
void check_finite_or_nan(const std::vector<float>& values, const std::string& name);
// i < visible_until[i] <= T, and the stretches [i, visible_until[i]) are nested.
void check_visible_until(const std::vector<int32_t>& visible_until, const std::string& name);
// Rising by at most 1 from 0.
void check_sequences(const std::vector<int32_t>& sequences, const std::string& name);

// Results. Large ones are handed over without a copy.
Napi::Float32Array to_float32_array(Napi::Env env, std::vector<float> values);
Napi::Int32Array to_int32_array(Napi::Env env, std::vector<int32_t> values);

}  // namespace merf
