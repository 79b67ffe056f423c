#include "zfile/jump-table.h"

#include <bit>
#include <string>

#include "zfile/format.h"

namespace obd::zfile {

JumpTable::JumpTable(uint32_t blockSize, uint64_t firstBlockOffset)
    : blockSize_(blockSize),
      groupShift_(static_cast<uint32_t>(std::countr_zero(kGroupSize / blockSize))),
      end_(firstBlockOffset) {
  OBD_ASSERT(isLegalBlockSize(blockSize), "block size");
}

Status JumpTable::append(std::span<const std::byte> entries, bool hasChecksums) {
  OBD_ASSERT(entries.size() % kIndexEntrySize == 0, "whole entries");
  const uint64_t groupMask = (uint64_t{1} << groupShift_) - 1;
  // Twice the block is beyond what either compressor makes of anything; a cap for the buffers that reading needs.
  const uint32_t longest = 2 * blockSize_;
  const uint32_t shortest = hasChecksums ? kChecksumSize + 1 : 1;
  for (size_t at = 0; at < entries.size(); at += kIndexEntrySize) {
    const uint32_t length = loadLittle32(entries.data() + at);
    const uint64_t index = deltas_.size();
    if (length < shortest || length > longest) {
      return dataLoss("jump table: block " + std::to_string(index) + " cannot take " + std::to_string(length) +
                      " bytes");
    }
    if ((index & groupMask) == 0) bases_.push_back(end_);
    const uint64_t delta = end_ - bases_.back();
    if (delta > kMaxGroupDelta) {
      return dataLoss("jump table: block " + std::to_string(index) + " lies too far from the start of its group");
    }
    deltas_.push_back(static_cast<uint16_t>(delta));
    end_ += length;
  }
  return Status::ok();
}

}  // namespace obd::zfile
