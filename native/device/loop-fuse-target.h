// Transport loop-fuse: a FUSE connection exposing the image as one file, and a loop device with direct I/O over it.
// Works on any kernel with FUSE and loop; needs CAP_SYS_ADMIN.
#pragma once

#include <atomic>
#include <future>
#include <memory>
#include <mutex>
#include <string>

#include "device/block-target.h"
#include "device/fuse-session.h"
#include "device/loop-device.h"

namespace obd {

// Thread rule: any thread, except one that serves a device, may call any method.
class LoopFuseTarget final : public BlockTarget {
 public:
  // Returns when the device can be opened; everything done is undone on failure. Borrows `backend`, which must outlive
  // the target. The transport shows no mount anywhere, so `options.runDir` is not used.
  // invalidArgument: sector size, name, thread count, or a size that is not a multiple of the sector size.
  // unavailable, permissionDenied, resourceExhausted: the kernel refused.
  static Result<std::unique_ptr<LoopFuseTarget>> start(BlockBackend& backend, const BlockTargetOptions& options);
  ~LoopFuseTarget() override;

  const std::string& path() const override { return loop_.path; }
  uint32_t major() const override { return loop_.major; }
  uint32_t minor() const override { return loop_.minor; }
  BlockTargetStats stats() const override { return session_->stats(); }
  const FuseParameters& session() const { return session_->parameters(); }
  // Not forced: a failing flush also leaves the device in service, so that nothing is lost in silence.
  // Forced: service always ends, further I/O of holders fails; a bad status says that not all is durable. Waits for
  // backend calls in flight.
  // A node that is still open then stays bound to the dead file until its last holder closes it.
  Status stop(bool force) override;
  // True once the service has ended, whatever the last stop() said about durability.
  bool isStopped() const { return stopped_.load(); }

 private:
  LoopFuseTarget(BlockBackend& backend, std::unique_ptr<FuseSession> session, LoopBinding loop);

  // Flushes and unbinds the node. On a thread apart: it waits for our own device.
  std::future<Status> release(uint32_t graceMs) const;

  BlockBackend& backend_;
  std::unique_ptr<FuseSession> session_;
  const LoopBinding loop_;
  std::mutex stopping_;
  std::atomic<bool> stopped_{false};  // set under stopping_
};

}  // namespace obd
