// Walking directories whose content is not to be trusted: symbolic links are never followed, mounts never crossed, and
// depth costs memory for names but no descriptors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/result.h"

namespace obd {

// Deletes `path` and everything below. failedPrecondition when `path` is, or something below is, a mount point: found
// beforehand nothing is deleted, found on the way the rest stays. notFound if there is nothing.
// REQUIRES: absolute path; nobody else changes the tree.
Status removeTree(const std::string& path);

struct TreeUsage {
  uint64_t sizeBytes = 0;  // allocated, 512 bytes times st_blocks
  uint64_t inodes = 0;
};

// Counts every inode once, that of `path` too. Entries named in `skip`, at the top, and mount points are left out;
// what vanishes meanwhile as well.
Result<TreeUsage> measureTree(const std::string& path, const std::vector<std::string>& skip);

// fsync of a directory: a rename in it is durable afterwards.
Status syncDirectory(const std::string& path);

}  // namespace obd
