// An image: the opened stack of one config.v1.json. Lowers and their merged index are shared by all open images
// that name the same layers in the same order.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "io/block-backend.h"

namespace obd {

struct LowerConfig {
  std::string file;    // wins over everything
  std::string dir;     // searched for overlaybd.commit, .commit, overlaybd.sealed, in this order
  std::string digest;  // remote blob; reading lazily is later work: unimplemented if no local copy is found
  uint64_t sizeBytes = 0;
};

struct UpperConfig {
  std::string data;
  std::string index;
};

// The part of formats.md §14 that the engine acts on. Unknown keys are ignored, values of a wrong type refused.
struct ImageConfig {
  std::string repoBlobUrl;
  std::vector<LowerConfig> lowers;  // bottom first
  UpperConfig upper;                // both empty = read-only
  std::string resultFile;

  bool hasUpper() const { return !upper.data.empty() && !upper.index.empty(); }

  // invalidArgument naming the key; notFound if the file does not exist.
  static Result<ImageConfig> parse(std::string_view json);
  static Result<ImageConfig> load(const std::string& path);
};

struct ImageOpenOptions {
  bool readOnly = false;   // ignore the upper
  bool directIo = false;   // O_DIRECT for raw layer data and the upper's data file
};

class Image : public BlockBackend {
 public:
  // Opens every layer and the upper. Writes "success" or "failed:<reason>" to config.resultFile.
  // notFound, dataLoss, invalidArgument, unimplemented: with "open layer N (path): …" as context.
  static Result<std::unique_ptr<Image>> open(const ImageConfig& config, const ImageOpenOptions& options);

  // Flushes and closes. Idempotent. The destructor closes without reporting.
  virtual Status close() = 0;
};

}  // namespace obd
