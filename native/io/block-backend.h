// What a target serves: implemented by image::Image and by test doubles.
#pragma once

#include <cstdint>
#include <span>

#include "base/status.h"

namespace obd {

// The thing that is served: an opened image. All methods may be called by any number of threads at once.
// REQUIRES: offset and length are multiples of 512 and lie within sizeBytes().
class BlockBackend {
 public:
  BlockBackend() = default;
  BlockBackend(const BlockBackend&) = delete;
  BlockBackend& operator=(const BlockBackend&) = delete;
  virtual ~BlockBackend() = default;

  virtual uint64_t sizeBytes() const = 0;
  virtual bool readOnly() const = 0;
  virtual Status read(uint64_t offset, std::span<std::byte> out) = 0;
  // On return the bytes survive the death of this process (page cache or disk), not yet that of the machine.
  virtual Status write(uint64_t offset, std::span<const std::byte> data) = 0;
  // The range reads as zeros afterwards. discard may also free space below; both hide lower layers.
  virtual Status discard(uint64_t offset, uint64_t length) = 0;
  virtual Status writeZeroes(uint64_t offset, uint64_t length) = 0;
  // Everything acknowledged before the call is durable on return. A failure is never forgotten.
  virtual Status flush() = 0;
};

}  // namespace obd
