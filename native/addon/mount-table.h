// The kernel's mount table, and mounting.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace obd {

struct MountTableEntry {
  std::string mountPoint;
  std::string source;
  std::string fsType;
  uint32_t deviceMajor = 0;
  uint32_t deviceMinor = 0;
  std::vector<std::string> options;  // of the mount, then those of the file system
};

// Text of a mountinfo file (proc(5)). dataLoss naming the line.
Result<std::vector<MountTableEntry>> parseMountTable(std::string_view text);

// Of one process; "self" or a number, else invalidArgument. notFound: no such process.
Result<std::vector<MountTableEntry>> readMountTable(const std::string& pid);

// mount(2) with options as mount(8) spells them: known words become flags, the others go to the file system.
// A read-only bind takes the two steps the kernel wants; it is undone if the second fails.
Status mountFileSystem(const std::string& type, const std::string& source, const std::string& target,
                       const std::vector<std::string>& options);

// umount2(2), never following a symbolic link at the end of `target`.
Status unmountFileSystem(const std::string& target, bool detach);

}  // namespace obd
