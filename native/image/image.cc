#include "image/image.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "base/own-fd.h"
#include "image/stack.h"

namespace obd {
namespace {

class StackImage final : public Image {
 public:
  StackImage(std::unique_ptr<Stack> stack, bool readOnly)
      : stack_(std::move(stack)), sizeBytes_(stack_->virtualSize()), readOnly_(readOnly) {}

  uint64_t sizeBytes() const override { return sizeBytes_; }
  bool readOnly() const override { return readOnly_; }

  Status read(uint64_t offset, std::span<std::byte> out) override {
    OBD_RETURN_IF_ERROR(check(offset, out.size()));
    return stack_->read(offset, out);
  }
  Status write(uint64_t offset, std::span<const std::byte> data) override {
    OBD_RETURN_IF_ERROR(checkChange(offset, data.size()));
    return stack_->upper()->write(offset, data);
  }
  Status discard(uint64_t offset, uint64_t length) override {
    OBD_RETURN_IF_ERROR(checkChange(offset, length));
    return stack_->upper()->discard(offset, length);
  }
  Status writeZeroes(uint64_t offset, uint64_t length) override { return discard(offset, length); }
  Status flush() override {
    if (stack_ == nullptr) return failedPrecondition("the image is closed");
    return readOnly_ ? Status::ok() : stack_->upper()->flush();
  }
  Status close() override {
    if (stack_ == nullptr) return Status::ok();
    Status status = flush();
    stack_.reset();
    return status;
  }

 private:
  Status check(uint64_t offset, uint64_t length) const {
    if (stack_ == nullptr) return failedPrecondition("the image is closed");
    if (((offset | length) & (kSectorSize - 1)) != 0) return invalidArgument("request is not sector aligned");
    if (offset > sizeBytes_ || length > sizeBytes_ - offset) return invalidArgument("request reaches past the end");
    return Status::ok();
  }
  Status checkChange(uint64_t offset, uint64_t length) const {
    OBD_RETURN_IF_ERROR(check(offset, length));
    if (readOnly_) return fromErrno("the image has no writable layer", EROFS);
    return Status::ok();
  }

  std::unique_ptr<Stack> stack_;  // null: closed. REQUIRES of close(): no request in flight
  const uint64_t sizeBytes_;
  const bool readOnly_;
};

// Best effort: an image that opens is not refused because nobody can be told.
void writeResult(const std::string& path, const std::string& text) {
  if (path.empty()) return;
  const OwnFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | O_NONBLOCK, 0644));
  if (!fd.isValid()) return;
  for (size_t done = 0; done < text.size();) {
    const ssize_t put = ::write(fd.get(), text.data() + done, text.size() - done);
    if (put > 0) {
      done += static_cast<size_t>(put);
    } else if (put == 0 || errno != EINTR) {
      return;
    }
  }
}

}  // namespace

Result<std::unique_ptr<Image>> Image::open(const ImageConfig& config, const ImageOpenOptions& options) {
  StackOptions open;
  open.upper = options.readOnly ? StackOptions::UpperMode::kIgnore : StackOptions::UpperMode::kWrite;
  open.directIo = options.directIo;
  open.flushMarkers = true;
  Result<std::unique_ptr<Stack>> stack = Stack::open(config, open);
  if (!stack.isOk()) {
    writeResult(config.resultFile, "failed:" + resultReason(stack.status()));
    return stack.status();
  }
  const bool readOnly = stack.value()->upper() == nullptr;
  auto image = std::make_unique<StackImage>(std::move(stack).value(), readOnly);
  writeResult(config.resultFile, "success");
  return std::unique_ptr<Image>(std::move(image));
}

}  // namespace obd
