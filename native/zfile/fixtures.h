// For tests only: the golden files under testdata/fixtures, and what their manifest says of them.
#pragma once

#include <openssl/evp.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "base/assert.h"
#include "io/file.h"
#include "io/memory-file.h"

namespace obd::fixtures {

inline std::string pathOf(const std::string& relative) { return std::string(OBD_TESTDATA) + "/fixtures/" + relative; }

inline std::vector<std::byte> readWhole(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  OBD_ASSERT(in.good(), path.c_str());
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  std::vector<std::byte> bytes(text.size());
  for (size_t i = 0; i < text.size(); i++) bytes[i] = static_cast<std::byte>(text[i]);
  return bytes;
}

inline nlohmann::json manifest() {
  std::ifstream in(pathOf("manifest.json"));
  OBD_ASSERT(in.good(), "the fixtures' manifest");
  return nlohmann::json::parse(in);
}

inline nlohmann::json caseOf(const std::string& id) {
  const nlohmann::json all = manifest();
  for (const nlohmann::json& one : all.at("cases")) {
    if (one.at("id") == id) return one;
  }
  OBD_ASSERT(false, id.c_str());
}

// A copy in memory, to be read or damaged.
inline std::unique_ptr<MemoryFile> memoryFile(std::span<const std::byte> bytes, const std::string& name = "memory") {
  auto file = std::make_unique<MemoryFile>(name);
  const Status status = file->pwrite(bytes, 0);
  OBD_ASSERT(status.isOk(), "memory file");
  return file;
}

class Sha256 final {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    OBD_ASSERT(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1, "sha256");
  }
  void add(std::span<const std::byte> bytes) {
    OBD_ASSERT(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1, "sha256");
  }
  std::string hex() {
    std::vector<unsigned char> digest(32);
    OBD_ASSERT(EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) == 1, "sha256");
    std::string text;
    for (const unsigned char byte : digest) {
      char pair[3];
      std::snprintf(pair, sizeof pair, "%02x", byte);
      text += pair;
    }
    return text;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context_;
};

inline std::string sha256(std::span<const std::byte> bytes) {
  Sha256 hash;
  hash.add(bytes);
  return hash.hex();
}

}  // namespace obd::fixtures
