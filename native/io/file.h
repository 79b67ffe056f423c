// THE SEAM. Everything the engine reads or writes goes through File, so that the operating system is a parameter:
// posix (real), memory, faulty and recording (tests).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/result.h"

namespace obd {

// A random-access file. Any number of threads may call any method at once; overlapping concurrent writes are the
// caller's to order. Offsets and sizes are bytes.
class File {
 public:
  File() = default;
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  virtual ~File() = default;

  // Reads up to out.size() bytes; fewer only at the end of the file, 0 past it. Retries EINTR and short reads.
  virtual Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const = 0;
  // Writes all of `data`, extending the file. On error an unknown prefix may be on the file.
  virtual Status pwrite(std::span<const std::byte> data, uint64_t offset) = 0;
  // Data and the metadata needed to read it are durable on return. A failure is sticky: every later sync of this
  // File fails too, because the kernel reports a lost write only once.
  virtual Status sync() = 0;
  virtual Result<uint64_t> size() const = 0;
  virtual Status truncate(uint64_t sizeBytes) = 0;
  // Deallocates, keeping the size; the range reads as zeros afterwards.
  virtual Status punchHole(uint64_t offset, uint64_t length) = 0;
  // First offset >= `offset` that holds data / lies in a hole; size() if there is none. (SEEK_DATA, SEEK_HOLE)
  virtual Result<uint64_t> seekData(uint64_t offset) const = 0;
  virtual Result<uint64_t> seekHole(uint64_t offset) const = 0;
  // For messages: usually the path.
  virtual const std::string& name() const = 0;

  // Exactly out.size() bytes, else dataLoss "…: ends at N".
  Status preadExact(std::span<std::byte> out, uint64_t offset) const;
  // Bytes past the end of the file read as zeros.
  Status preadZeroFill(std::span<std::byte> out, uint64_t offset) const;
};

}  // namespace obd
