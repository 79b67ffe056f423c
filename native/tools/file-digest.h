// The digest of a file, as registries write it.
#pragma once

#include <string>

#include "base/result.h"

namespace obd {

// "sha256:<hex>".
Result<std::string> fileDigest(const std::string& path);

}  // namespace obd
