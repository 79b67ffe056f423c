#include "device/loop-fuse-target.h"

#include <algorithm>
#include <chrono>

#include "device/apart.h"

namespace obd {
namespace {

constexpr uint32_t kThreadsMax = 64;
constexpr size_t kNameMax = 63;  // what the loop driver keeps of a label
// udev probes a node whenever a writer closes it; that must not make a detach fail.
constexpr uint32_t kProberGraceMs = 500;
constexpr uint32_t kEndTimeoutMs = 10000;
// A forced stop gives data this long to become durable before it cuts the connection.
constexpr auto kForcedFlushTimeout = std::chrono::seconds(3);

Status check(const BlockBackend& backend, const BlockTargetOptions& options) {
  if (options.sectorSizeBytes != 512 && options.sectorSizeBytes != 4096) {
    return invalidArgument("sector size " + std::to_string(options.sectorSizeBytes) + " is neither 512 nor 4096");
  }
  if (options.threads == 0 || options.threads > kThreadsMax) {
    return invalidArgument("thread count " + std::to_string(options.threads) + " is not within 1 and 64");
  }
  if (options.name.empty() || options.name.size() > kNameMax || options.name == "." || options.name == ".." ||
      options.name.find('/') != std::string::npos || options.name.find('\0') != std::string::npos) {
    return invalidArgument("device name \"" + options.name + "\" is not a file name of at most 63 bytes");
  }
  const uint64_t sizeBytes = backend.sizeBytes();
  if (sizeBytes == 0 || sizeBytes % options.sectorSizeBytes != 0) {
    return invalidArgument("image size " + std::to_string(sizeBytes) + " is not a multiple of the sector size " +
                           std::to_string(options.sectorSizeBytes));
  }
  // Linux keeps file sizes in signed 64 bits.
  if (sizeBytes > static_cast<uint64_t>(INT64_MAX)) return invalidArgument("image size is beyond 2^63");
  return Status::ok();
}

}  // namespace

LoopFuseTarget::LoopFuseTarget(BlockBackend& backend, std::unique_ptr<FuseSession> session, LoopBinding loop)
    : backend_(backend), session_(std::move(session)), loop_(std::move(loop)) {}

Result<std::unique_ptr<LoopFuseTarget>> LoopFuseTarget::start(BlockBackend& backend,
                                                              const BlockTargetOptions& options) {
  OBD_RETURN_IF_ERROR(check(backend, options));
  OBD_ASSIGN_OR_RETURN(auto session,
                       FuseSession::start(backend, options.name, options.sectorSizeBytes, options.threads));
  LoopBinding loop;
  OBD_RETURN_IF_ERROR(session->withFile([&](int file) -> Status {
    LoopOptions loopOptions;
    loopOptions.label = options.name;
    loopOptions.sectorSizeBytes = options.sectorSizeBytes;
    loopOptions.readOnly = backend.readOnly();
    OBD_ASSIGN_OR_RETURN(loop, bindLoop(file, loopOptions));
    return Status::ok();
  }));
  return std::unique_ptr<LoopFuseTarget>(new LoopFuseTarget(backend, std::move(session), std::move(loop)));
}

LoopFuseTarget::~LoopFuseTarget() { (void)stop(true); }

std::future<Status> LoopFuseTarget::release(uint32_t graceMs) const {
  return runApart(-1, [loop = loop_, graceMs]() -> Status {
    OBD_RETURN_IF_ERROR(flushLoop(loop));
    return unbindLoop(loop, graceMs);
  });
}

Status LoopFuseTarget::stop(bool force) {
  const std::lock_guard lock(stopping_);
  if (stopped_) return Status::ok();

  Status durable;
  // With the server gone (connection aborted, node unbound by an operator) there is nobody to answer a flush.
  bool orderly = session_->isAlive();
  if (orderly) {
    std::future<Status> released = release(force ? 0 : kProberGraceMs);
    if (force && released.wait_for(kForcedFlushTimeout) != std::future_status::ready) {
      (void)session_->abort();  // the flush ends with EIO
    }
    durable = released.get();
    if (!durable.isOk() && !force) return std::move(durable).withContext("stop " + loop_.path);
    orderly = durable.isOk();
  }
  if (!orderly) {
    (void)session_->abort();
    (void)runApart(-1, [loop = loop_] { return unbindLoopOnLastClose(loop); }).get();
  }
  if (!session_->join(kEndTimeoutMs)) {
    (void)session_->abort();
    session_->join(FuseSession::kForever);
  }
  stopped_ = true;
  // Nothing can write any more. What a holder or a late writer left behind the last flush is flushed now; a failure
  // of the first attempt is repeated by the backend, which never forgets one.
  if (!backend_.readOnly()) durable = backend_.flush();
  return std::move(durable).withContext("stop " + loop_.path);
}

}  // namespace obd
