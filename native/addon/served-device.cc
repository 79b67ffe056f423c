#include "addon/served-device.h"

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

}  // namespace

ServedDevice::ServedDevice(std::unique_ptr<Image> image, std::unique_ptr<LoopFuseTarget> target)
    : image_(std::move(image)),
      target_(std::move(target)),
      sizeBytes_(image_->sizeBytes()),
      readOnly_(image_->readOnly()) {}

Result<std::shared_ptr<ServedDevice>> ServedDevice::attach(const AttachOptions& options) {
  OBD_ASSIGN_OR_RETURN(const ImageConfig config, ImageConfig::load(options.configPath));
  ImageOpenOptions open;
  open.readOnly = options.readOnly;
  open.directIo = options.directIo;
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<Image> image, Image::open(config, open));
  auto target = LoopFuseTarget::start(*image, options.target);
  if (!target.isOk()) {
    reportFailure(config.resultFile, target.status());
    return target.status();
  }
  return std::shared_ptr<ServedDevice>(new ServedDevice(std::move(image), std::move(target).value()));
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
  return stopped.isOk() ? closed.withContext("close the image of " + target_->path()) : stopped;
}

void ServedDevice::abandon() {
  if (stop(false).isOk() || isStopped()) return;
  // Kept for good: there is nobody left who could stop it later.
  new std::shared_ptr<ServedDevice>(shared_from_this());
}

}  // namespace obd
