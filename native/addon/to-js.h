// Values across the border. Reading an argument of the wrong type throws a JavaScript error with code invalid-argument.
#pragma once

#include <napi.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace obd::addon {

inline Napi::Error toError(Napi::Env env, const Status& status) {
  Napi::Error error = Napi::Error::New(env, status.message());
  error.Set("code", Napi::String::New(env, std::string(codeName(status.code()))));
  error.Set("errno", Napi::Number::New(env, status.systemErrno()));
  return error;
}

inline Napi::Value toJs(Napi::Env env, uint64_t value) { return Napi::BigInt::New(env, value); }
inline Napi::Value toJs(Napi::Env env, uint32_t value) { return Napi::Number::New(env, value); }
inline Napi::Value toJs(Napi::Env env, int32_t value) { return Napi::Number::New(env, value); }
inline Napi::Value toJs(Napi::Env env, bool value) { return Napi::Boolean::New(env, value); }
inline Napi::Value toJs(Napi::Env env, const std::string& value) { return Napi::String::New(env, value); }
inline Napi::Value toJs(Napi::Env env, const std::vector<std::string>& values) {
  Napi::Array array = Napi::Array::New(env, values.size());
  for (size_t i = 0; i < values.size(); i++) array.Set(static_cast<uint32_t>(i), toJs(env, values[i]));
  return array;
}

[[noreturn]] inline void throwBadArgument(Napi::Env env, const std::string& what) {
  throw toError(env, invalidArgument(what));
}

inline std::string stringFrom(const Napi::Value& value, const char* name) {
  if (!value.IsString()) throwBadArgument(value.Env(), std::string(name) + " must be a string");
  std::string text = value.As<Napi::String>();
  // Below this line strings become C strings: a NUL would name another file than the one that was checked.
  if (text.find('\0') != std::string::npos) throwBadArgument(value.Env(), std::string(name) + " must not contain NUL");
  return text;
}
inline bool boolFrom(const Napi::Value& value, const char* name) {
  if (!value.IsBoolean()) throwBadArgument(value.Env(), std::string(name) + " must be a boolean");
  return value.As<Napi::Boolean>();
}
inline uint64_t uint64From(const Napi::Value& value, const char* name) {
  bool lossless = false;
  const uint64_t number = value.IsBigInt() ? value.As<Napi::BigInt>().Uint64Value(&lossless) : 0;
  if (!lossless) throwBadArgument(value.Env(), std::string(name) + " must be a bigint from 0 to 2^64 - 1");
  return number;
}
inline uint32_t uint32From(const Napi::Value& value, const char* name) {
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1;
  if (!(number >= 0 && number <= 4294967295.0) || number != static_cast<double>(static_cast<uint32_t>(number))) {
    throwBadArgument(value.Env(), std::string(name) + " must be a whole number from 0 to 2^32 - 1");
  }
  return static_cast<uint32_t>(number);
}
inline std::vector<std::string> stringsFrom(const Napi::Value& value, const char* name) {
  if (!value.IsArray()) throwBadArgument(value.Env(), std::string(name) + " must be an array of strings");
  const auto array = value.As<Napi::Array>();
  std::vector<std::string> strings;
  for (uint32_t i = 0; i < array.Length(); i++) strings.push_back(stringFrom(array.Get(i), name));
  return strings;
}
inline Napi::Object objectFrom(const Napi::Value& value, const char* name) {
  if (!value.IsObject()) throwBadArgument(value.Env(), std::string(name) + " must be an object");
  return value.As<Napi::Object>();
}

}  // namespace obd::addon
