// File over a descriptor of the kernel.
#pragma once

#include <memory>
#include <string>

#include "base/own-fd.h"
#include "io/file.h"

namespace obd {

struct PosixOpen {
  bool write = false;
  bool create = false;     // mode 0600
  bool exclusive = false;  // with create: alreadyExists if it is there
  // O_DIRECT for requests that are aligned (offset, length and address multiples of 4096 or of what the file system
  // asks); others go through the page cache. Ignored where the file system refuses it.
  bool direct = false;
  // posix_fadvise(RANDOM): no read-ahead of our own, the kernel above the device already does it.
  bool randomAccess = false;
};

// Opens with O_CLOEXEC and O_NOCTTY. Only regular files and block devices: anything else is invalidArgument
// (a fifo in place of a layer must not hang us).
Result<std::unique_ptr<File>> openPosixFile(const std::string& path, const PosixOpen& options);

// Takes ownership of an open descriptor.
std::unique_ptr<File> adoptPosixFile(OwnFd fd, std::string name);

// fsync of the directory that holds `path`: makes creation, rename and removal of it durable.
Status syncParentDirectory(const std::string& path);

// What identifies a file's content for sharing: two equal identities are the same unchanged file.
struct FileIdentity {
  uint64_t device = 0, inode = 0, sizeBytes = 0;
  int64_t modifiedNs = 0;
  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};
Result<FileIdentity> identifyFile(const std::string& path);

}  // namespace obd
