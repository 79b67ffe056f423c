// The last stage of a chain of sinks: bytes into a File, one after the other.
#pragma once

#include "io/file.h"
#include "io/sink.h"

namespace obd {

// Borrows `file`, which must outlive the sink. Collects small writes so that the file sees large ones.
class FileSink final : public Sink {
 public:
  explicit FileSink(File& file, uint64_t startOffset = 0);

  Status write(std::span<const std::byte> data) override;
  // Writes what is collected and syncs the file.
  Status finish() override;
  // Bytes accepted so far.
  uint64_t position() const { return offset_ + used_; }

 private:
  Status flushBuffer();

  File& file_;
  uint64_t offset_;
  std::unique_ptr<std::byte[]> buffer_;
  size_t used_ = 0;
  Status failure_;
};

}  // namespace obd
