// An image and the target that serves it, as one thing with one life.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "base/own-fd.h"
#include "device/loop-fuse-target.h"
#include "image/image.h"

namespace obd {

struct AttachOptions {
  std::string configPath;
  bool readOnly = false;
  bool directIo = false;
  BlockTargetOptions target;
};

// Any thread may call any method; calls that wait for the kernel take long, so not the JavaScript thread.
class ServedDevice final : public std::enable_shared_from_this<ServedDevice> {
 public:
  // Opens the image and serves it. The reason of a failure is also in the config's resultFile.
  // failedPrecondition when another device, of any process, has the writable layer in use.
  static Result<std::shared_ptr<ServedDevice>> attach(const AttachOptions& options);

  const LoopFuseTarget& target() const { return *target_; }
  uint64_t sizeBytes() const { return sizeBytes_; }
  bool readOnly() const { return readOnly_; }
  BlockTargetStats stats() const { return target_->stats(); }
  bool isStopped() const { return target_->isStopped(); }

  // failedPrecondition, naming the device, once stopped.
  Status flush();
  // As LoopFuseTarget::stop; closes the image when service has ended. Idempotent.
  Status stop(bool force);
  // The end of a handle nobody stopped: garbage collection, or the end of the JavaScript environment. Stops an idle
  // device; one that is held open goes on until the process ends, because its holders' data is worth more than order.
  void abandon();

 private:
  ServedDevice(OwnFd upperLock, std::unique_ptr<Image> image, std::unique_ptr<LoopFuseTarget> target);

  std::mutex closing_;
  OwnFd upperLock_;  // the writable layer's data file, locked; invalid for read-only devices
  std::unique_ptr<Image> image_;  // outlives target_
  std::unique_ptr<LoopFuseTarget> target_;
  const uint64_t sizeBytes_;
  const bool readOnly_;
};

}  // namespace obd
