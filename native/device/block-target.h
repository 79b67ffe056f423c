// What serves a BlockBackend to the kernel or a VM. Later transports (ublk, nbd, vhost-user) implement the same class.
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"
#include "io/block-backend.h"

namespace obd {

struct BlockTargetOptions {
  uint32_t sectorSizeBytes = 4096;  // 512 or 4096: the logical block size shown to the kernel
  uint32_t threads = 4;             // request threads of this device
  std::string name;                 // shows in thread names and /proc/mounts, e.g. "overlaybd-12"
  std::string runDir;               // directory for transient mount points, created if missing
};

struct BlockTargetStats {
  uint64_t readOps = 0, readBytes = 0;
  uint64_t writeOps = 0, writeBytes = 0;
  uint64_t discardOps = 0, discardBytes = 0;
  uint64_t flushOps = 0;
  uint64_t errors = 0;
};

// One served device. start() of the concrete class returns when the device can be opened; destroy stops it.
class BlockTarget {
 public:
  BlockTarget() = default;
  BlockTarget(const BlockTarget&) = delete;
  BlockTarget& operator=(const BlockTarget&) = delete;
  virtual ~BlockTarget() = default;  // like stop(/*force=*/true), errors ignored

  // "/dev/loop7", or the path of a socket.
  virtual const std::string& path() const = 0;
  virtual uint32_t major() const = 0;
  virtual uint32_t minor() const = 0;
  virtual BlockTargetStats stats() const = 0;
  // Ends service. failedPrecondition, and still serving, when somebody holds the device open and !force.
  // Idempotent.
  virtual Status stop(bool force) = 0;
};

}  // namespace obd
