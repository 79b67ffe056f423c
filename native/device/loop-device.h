// The kernel's loop driver: binds a regular file to a block device node and lets go of it again.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/result.h"

namespace obd {

// A bound loop device. Says which file it was bound to, so that a node that was unbound and taken by somebody else
// behind our back is never mistaken for ours.
struct LoopBinding {
  uint32_t index = 0;
  std::string path;  // /dev/loop<index>
  uint32_t major = 0;
  uint32_t minor = 0;
  // Device numbers of ended file systems are used again, so only the three together tell files apart.
  uint32_t backingDeviceMinor = 0;
  uint64_t backingInode = 0;
  std::string label;
};

struct LoopOptions {
  std::string label;  // unique on this machine, shown by losetup; at most 63 bytes
  uint32_t sectorSizeBytes = 4096;
  bool readOnly = false;
};

// Binds `backingFd` to a free node with direct I/O; adds nodes when all are taken. The kernel keeps the file open.
// unavailable if there is no loop driver or no node appears.
Result<LoopBinding> bindLoop(int backingFd, const LoopOptions& options);

enum class LoopState : uint8_t {
  kOurs,     // bound to the file of the binding
  kGone,     // unbound, or bound to another file
};
Result<LoopState> inspectLoop(const LoopBinding& binding);

// Writes back what the node's page cache holds and flushes the file below. Returns at once when the node is gone.
// failedPrecondition when an exclusive holder (a mounted file system) exists: it does its own flushing.
Status flushLoop(const LoopBinding& binding);

// Unbinds and returns once the node is free. failedPrecondition, naming holders, and still bound, when somebody else
// has it open. Openers that are not exclusive (a prober) get `graceMs` to leave.
Status unbindLoop(const LoopBinding& binding, uint32_t graceMs);

// Tells the kernel to unbind when the last holder closes. Never waits.
Status unbindLoopOnLastClose(const LoopBinding& binding);

// Paths of bound nodes whose label begins with `labelPrefix`.
Result<std::vector<std::string>> findLoops(const std::string& labelPrefix);
// Unbinds one of them, whatever it is bound to; nodes that are held open go when their last holder closes.
// REQUIRES: the caller knows that nobody serves it any more.
Status unbindStaleLoop(const std::string& path);

}  // namespace obd
