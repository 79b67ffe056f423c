#include <nlohmann/json.hpp>

#include "image/image.h"
#include "io/posix-file.h"
#include "lsmt/format.h"

namespace obd {
namespace {

using nlohmann::json;

constexpr uint64_t kConfigBytesMax = 16 * kMiB;

Status wrongType(const std::string& key, const char* expected) {
  return invalidArgument("config: " + key + " is not " + expected);
}

// Absent keys leave `out` as it is.
Status takeString(const json& object, const std::string& prefix, const char* key, std::string& out) {
  const auto found = object.find(key);
  if (found == object.end()) return Status::ok();
  if (!found->is_string()) return wrongType(prefix + key, "a string");
  out = found->get<std::string>();
  if (out.find('\0') != std::string::npos) return invalidArgument("config: " + prefix + key + " contains NUL");
  return Status::ok();
}

Status takeBool(const json& object, const char* key, bool& out) {
  const auto found = object.find(key);
  if (found == object.end()) return Status::ok();
  if (!found->is_boolean()) return wrongType(key, "a boolean");
  out = found->get<bool>();
  return Status::ok();
}

// Reading such a layer as a plain one would give wrong content.
Status refuseTurboOci(const json& object, const std::string& prefix, std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    std::string value;
    OBD_RETURN_IF_ERROR(takeString(object, prefix, key, value));
    if (!value.empty()) return unimplemented("config: " + prefix + key + ": turboOCI layers are not supported");
  }
  return Status::ok();
}

Result<LowerConfig> parseLower(const json& value, const std::string& prefix) {
  if (!value.is_object()) return wrongType(prefix.substr(0, prefix.size() - 1), "an object");
  LowerConfig lower;
  OBD_RETURN_IF_ERROR(takeString(value, prefix, "file", lower.file));
  OBD_RETURN_IF_ERROR(takeString(value, prefix, "dir", lower.dir));
  OBD_RETURN_IF_ERROR(takeString(value, prefix, "digest", lower.digest));
  if (const auto size = value.find("size"); size != value.end()) {
    if (!size->is_number_unsigned()) return wrongType(prefix + "size", "an unsigned number");
    lower.sizeBytes = size->get<uint64_t>();
  }
  OBD_RETURN_IF_ERROR(refuseTurboOci(value, prefix, {"targetFile", "targetDigest", "gzipIndex"}));
  return lower;
}

}  // namespace

Result<ImageConfig> ImageConfig::parse(std::string_view text) {
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return invalidArgument("config: not valid JSON");
  if (!root.is_object()) return wrongType("the document", "an object");

  ImageConfig config;
  OBD_RETURN_IF_ERROR(takeString(root, "", "repoBlobUrl", config.repoBlobUrl));
  OBD_RETURN_IF_ERROR(takeString(root, "", "resultFile", config.resultFile));
  if (const auto lowers = root.find("lowers"); lowers != root.end()) {
    if (!lowers->is_array()) return wrongType("lowers", "an array");
    // One more than a stack holds: the last may be an acceleration layer.
    if (lowers->size() > kLowersMax + 1) {
      return invalidArgument("config: lowers has " + std::to_string(lowers->size()) + " layers, at most " +
                             std::to_string(kLowersMax));
    }
    for (const json& lower : *lowers) {
      const std::string prefix = "lowers[" + std::to_string(config.lowers.size()) + "].";
      OBD_ASSIGN_OR_RETURN(LowerConfig parsed, parseLower(lower, prefix));
      config.lowers.push_back(std::move(parsed));
    }
  }
  if (const auto upper = root.find("upper"); upper != root.end()) {
    if (!upper->is_object()) return wrongType("upper", "an object");
    OBD_RETURN_IF_ERROR(takeString(*upper, "upper.", "data", config.upper.data));
    OBD_RETURN_IF_ERROR(takeString(*upper, "upper.", "index", config.upper.index));
    OBD_RETURN_IF_ERROR(refuseTurboOci(*upper, "upper.", {"target", "gzipIndex"}));
  }

  bool acceleration = false;
  std::string tracePath;
  OBD_RETURN_IF_ERROR(takeBool(root, "accelerationLayer", acceleration));
  OBD_RETURN_IF_ERROR(takeString(root, "", "recordTracePath", tracePath));
  if (acceleration && !tracePath.empty()) {
    return invalidArgument("config: accelerationLayer and recordTracePath exclude each other");
  }
  // It carries a trace to replay, no part of the disk.
  if (acceleration && !config.lowers.empty()) config.lowers.pop_back();
  if (config.lowers.size() > kLowersMax) {
    return invalidArgument("config: lowers has more than " + std::to_string(kLowersMax) + " layers");
  }
  return config;
}

Result<ImageConfig> ImageConfig::load(const std::string& path) {
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> file, openPosixFile(path, {}));
  OBD_ASSIGN_OR_RETURN(const uint64_t size, file->size());
  if (size > kConfigBytesMax) return invalidArgument(path + ": larger than 16 MiB");
  std::string text(size, '\0');
  OBD_RETURN_IF_ERROR(file->preadExact(std::as_writable_bytes(std::span(text)), 0));
  return parse(text).withContext(path);
}

}  // namespace obd
