// A write-only byte stream: where commit, merge and compress put their output. Stages are chained: layer → ZFile → tar.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/status.h"

namespace obd {

// Confined to one thread. After an error every later call fails with it.
class Sink {
 public:
  Sink() = default;
  Sink(const Sink&) = delete;
  Sink& operator=(const Sink&) = delete;
  virtual ~Sink() = default;

  virtual Status write(std::span<const std::byte> data) = 0;
  // Writes whatever the format puts at its end, finishes the stage below, and makes a file durable. Call exactly once.
  virtual Status finish() = 0;
};

}  // namespace obd
