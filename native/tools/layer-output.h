// Writes a layer file in the wrappers that were asked for.
#pragma once

#include <functional>
#include <string>

#include "io/sink.h"
#include "zfile/format.h"

namespace obd {

struct LayerFormat {
  bool zfile = false;
  bool tar = false;
  bool rewriteHeader = true;  // of the ZFile
  zfile::Algorithm algorithm = zfile::Algorithm::kLz4;
  uint32_t blockSize = 4096;
  uint32_t threads = 1;
};

struct LayerTarget {
  std::string path;
  bool replace = false;
  uint64_t expectedBytes = 0;  // for the progress line; 0: unknown
};

// Calls `produce` with the first stage of the chain, which it must write and finish; then publishes the file.
// Data that does not compress can make 64 KiB blocks that other readers cannot read: then `produce` is called a second
// time with blocks of 32 KiB, which is said on stderr. So it must be repeatable.
Status writeLayerFile(const LayerTarget& target, const LayerFormat& format,
                      const std::function<Status(Sink&)>& produce);

}  // namespace obd
