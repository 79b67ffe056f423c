// Read-only view of one sealed layer: the LSMT bytes as they are seen through tar and ZFile.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "io/file.h"
#include "lsmt/format.h"

namespace obd {

// Immutable after open(): any thread may read. Owns its file.
class LayerReader final {
 public:
  // dataLoss if header, trailer or index contradict the format; errors of the file as they are.
  static Result<std::unique_ptr<LayerReader>> open(std::unique_ptr<File> file);

  // From the trailer.
  const LayerHeader& info() const { return info_; }
  uint64_t virtualSize() const { return info_.virtualSize; }
  // Sorted, without overlap, without padding.
  std::span<const Segment> segments() const { return segments_; }
  const File& file() const { return *file_; }

  // Bytes of the virtual disk; unmapped ranges, and mapped ones past the end of the file, read as zeros.
  // REQUIRES: offset and out.size() are multiples of 512.
  Status read(uint64_t offset, std::span<std::byte> out) const;

 private:
  LayerReader(std::unique_ptr<File> file, LayerHeader info, std::vector<Segment> segments)
      : file_(std::move(file)), info_(std::move(info)), segments_(std::move(segments)) {}

  std::unique_ptr<File> file_;
  LayerHeader info_;
  std::vector<Segment> segments_;
};

}  // namespace obd
