#include "tools/file-digest.h"

#include <openssl/evp.h>

#include <array>
#include <memory>
#include <vector>

#include "io/posix-file.h"

namespace obd {

Result<std::string> fileDigest(const std::string& path) {
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> file, openPosixFile(path, {}));
  const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  if (!context || EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) return unavailable("SHA-256");
  std::vector<std::byte> buffer(1024 * 1024);
  uint64_t at = 0;
  while (true) {
    OBD_ASSIGN_OR_RETURN(const size_t got, file->pread(buffer, at));
    if (got == 0) break;
    if (EVP_DigestUpdate(context.get(), buffer.data(), got) != 1) return unavailable("SHA-256");
    at += got;
  }
  std::array<unsigned char, 32> digest{};
  if (EVP_DigestFinal_ex(context.get(), digest.data(), nullptr) != 1) return unavailable("SHA-256");
  std::string text = "sha256:";
  for (const unsigned char byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

}  // namespace obd
