#include "io/file-sink.h"

#include <cstring>

#include "base/units.h"

namespace obd {
namespace {
constexpr size_t kBufferSize = 1 * kMiB;
}

FileSink::FileSink(File& file, uint64_t startOffset)
    : file_(file), offset_(startOffset), buffer_(std::make_unique<std::byte[]>(kBufferSize)) {}

Status FileSink::write(std::span<const std::byte> data) {
  if (data.empty() || !failure_.isOk()) return failure_;
  if (data.size() > kBufferSize - used_) OBD_RETURN_IF_ERROR(flushBuffer());
  if (data.size() >= kBufferSize) {
    failure_ = file_.pwrite(data, offset_);
    if (failure_.isOk()) offset_ += data.size();
    return failure_;
  }
  std::memcpy(buffer_.get() + used_, data.data(), data.size());
  used_ += data.size();
  return Status::ok();
}

Status FileSink::finish() {
  OBD_RETURN_IF_ERROR(failure_);
  OBD_RETURN_IF_ERROR(flushBuffer());
  failure_ = file_.sync();
  return failure_;
}

Status FileSink::flushBuffer() {
  if (used_ == 0) return Status::ok();
  failure_ = file_.pwrite({buffer_.get(), used_}, offset_);
  if (!failure_.isOk()) return failure_;
  offset_ += used_;
  used_ = 0;
  return Status::ok();
}

}  // namespace obd
