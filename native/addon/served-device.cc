#include "addon/served-device.h"

#include <fcntl.h>
#include <sys/file.h>

#include <cerrno>
#include <span>

#include "image/stack.h"
#include "io/posix-file.h"

namespace obd {
namespace {

// The image is open, but the kernel did not take it: the "success" that opening wrote is wrong now. Best effort.
void reportFailure(const std::string& resultFile, const Status& status) {
  if (resultFile.empty()) return;
  PosixOpen how;
  how.write = true;
  how.create = true;
  auto file = openPosixFile(resultFile, how);
  if (!file.isOk()) return;
  const std::string text = "failed:" + resultReason(status);
  if (file.value()->truncate(0).isOk()) (void)file.value()->pwrite(std::as_bytes(std::span(text)), 0);
}

// Two devices that append to one layer would destroy it. The lock ends with the process, however it ends, so it also
// fences a dying predecessor that still writes.
Result<OwnFd> lockUpper(const std::string& path) {
  OwnFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (!file.isValid()) return fromErrno("open " + path, errno);
  if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return failedPrecondition(path + ": another device has this layer in use");
    return fromErrno("lock " + path, errno);
  }
  return file;
}

}  // namespace

ServedDevice::ServedDevice(OwnFd upperLock, std::unique_ptr<Image> image, std::unique_ptr<LoopFuseTarget> target)
    : upperLock_(std::move(upperLock)),
      image_(std::move(image)),
      target_(std::move(target)),
      sizeBytes_(image_->sizeBytes()),
      readOnly_(image_->readOnly()) {}

Result<std::shared_ptr<ServedDevice>> ServedDevice::attach(const AttachOptions& options) {
  OBD_ASSIGN_OR_RETURN(const ImageConfig config, ImageConfig::load(options.configPath));
  OwnFd upperLock;
  if (!options.readOnly && config.hasUpper()) {
    auto locked = lockUpper(config.upper.data);
    if (!locked.isOk()) {
      reportFailure(config.resultFile, locked.status());
      return locked.status();
    }
    upperLock = std::move(locked).value();
  }
  ImageOpenOptions open;
  open.readOnly = options.readOnly;
  open.directIo = options.directIo;
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<Image> image, Image::open(config, open));
  auto target = LoopFuseTarget::start(*image, options.target);
  if (!target.isOk()) {
    reportFailure(config.resultFile, target.status());
    return target.status();
  }
  return std::shared_ptr<ServedDevice>(new ServedDevice(std::move(upperLock), std::move(image), std::move(target).value()));
}

Status ServedDevice::flush() {
  const std::lock_guard lock(closing_);
  if (isStopped()) return failedPrecondition("device " + target_->path() + " is stopped");
  return image_->flush().withContext("flush " + target_->path());
}

Status ServedDevice::stop(bool force) {
  const std::lock_guard lock(closing_);
  Status stopped = target_->stop(force);
  if (!isStopped()) return stopped;
  const Status closed = image_->close();
  // Unlocked, not only closed: a child being started elsewhere in the process may hold a copy for a moment.
  if (upperLock_.isValid()) (void)::flock(upperLock_.get(), LOCK_UN);
  upperLock_.reset();
  return stopped.isOk() ? closed.withContext("close the image of " + target_->path()) : stopped;
}

void ServedDevice::abandon() {
  if (stop(false).isOk() || isStopped()) return;
  // Kept for good: there is nobody left who could stop it later.
  new std::shared_ptr<ServedDevice>(shared_from_this());
}

}  // namespace obd
