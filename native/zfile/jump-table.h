// Where each block of a ZFile lies, kept in little more than two bytes a block: a 64-bit base for every 64 KiB of
// uncompressed bytes and a 16-bit distance from it for each block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/result.h"

namespace obd::zfile {

class JumpTable final {
 public:
  // REQUIRES: isLegalBlockSize(blockSize).
  JumpTable(uint32_t blockSize, uint64_t firstBlockOffset);

  // Takes the next stored lengths, as they stand in the file (checksum included).
  // dataLoss naming the block: a length that no block can have, or that this form cannot address (§9.3).
  Status append(std::span<const std::byte> entries, bool hasChecksums);

  uint64_t blockCount() const { return deltas_.size(); }
  // End of the last block.
  uint64_t end() const { return end_; }

  struct Extent {
    uint64_t offset = 0;
    uint32_t length = 0;
  };
  // REQUIRES: index < blockCount().
  Extent block(uint64_t index) const {
    const uint64_t begin = offsetOf(index);
    const uint64_t next = index + 1 < deltas_.size() ? offsetOf(index + 1) : end_;
    return {begin, static_cast<uint32_t>(next - begin)};
  }

  size_t memoryBytes() const {
    return deltas_.capacity() * sizeof(uint16_t) + bases_.capacity() * sizeof(uint64_t);
  }
  void shrink() {
    deltas_.shrink_to_fit();
    bases_.shrink_to_fit();
  }

 private:
  uint64_t offsetOf(uint64_t index) const { return bases_[index >> groupShift_] + deltas_[index]; }

  uint32_t blockSize_;
  uint32_t groupShift_;  // log2 of the blocks in a group
  uint64_t end_;
  std::vector<uint64_t> bases_;
  std::vector<uint16_t> deltas_;
};

}  // namespace obd::zfile
