// An ext4 file system in a writable layer, made without a device.
#pragma once

#include <string>

#include "base/status.h"

namespace obd {

// Formats the whole virtual size of the (new) layer: mkfs.ext4 works on a sparse file in memory, whose data is then
// written into the layer. No journal, 4 KiB blocks, zero UUID. unavailable without mkfs.ext4.
Status makeExt4(const std::string& dataPath, const std::string& indexPath);

}  // namespace obd
