// The mutable index of a writable layer: a page table over the blocks of the virtual disk.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "lsmt/format.h"
#include "lsmt/run.h"

namespace obd {

// Look-ups: any thread, lock-free, at any time. Changes: one at a time, the caller's lock orders them.
//
// Leaves of 512 entries, one per 4 KiB block; an entry says unmapped, zeroed, mapped (with the sector where the block's
// eight sectors start), or split (eight entries of one sector each). Above them tables of 512 children; a child is
// absent, a table, or "everything below is zeroed", so that discarding a whole disk touches few entries. Nothing is
// freed or re-used while the index lives, which is what makes look-ups safe without a lock; memory stays bounded
// because a node is never replaced: at most 1/512 of the covered range for leaves and 1/64 for split blocks.
class UpperIndex final {
 public:
  // Covers [0, sectors). REQUIRES: sectors < 2^50.
  explicit UpperIndex(uint64_t sectors);
  ~UpperIndex();
  UpperIndex(const UpperIndex&) = delete;
  UpperIndex& operator=(const UpperIndex&) = delete;

  // Covers more from now on. REQUIRES: no look-up or change at the same time.
  void grow(uint64_t sectors);
  uint64_t coveredSectors() const;

  // REQUIRES: [offset, offset + length) within the covered range, moffset + length within 2^55.
  void map(uint64_t offset, uint64_t length, uint64_t moffset);
  void zero(uint64_t offset, uint64_t length);

  // As MergedIndex::lookup: consecutive runs that cover [begin, end), joined where they follow each other.
  // What lies past the covered range is a gap.
  template <typename Visit>
  bool lookup(uint64_t begin, uint64_t end, Visit&& visit) const {
    Run pending{begin, 0, 0, 0, RunKind::kGap};
    while (begin < end) {
      const Run run = step(begin, end);
      const bool joins = run.kind == pending.kind &&
                         (run.kind != RunKind::kData || run.moffset == pending.moffset + pending.length);
      if (pending.length == 0 || !joins) {
        if (pending.length != 0 && !visit(static_cast<const Run&>(pending))) return false;
        pending = run;
      } else {
        pending.length += run.length;
      }
      begin += run.length;
    }
    return pending.length == 0 || visit(static_cast<const Run&>(pending));
  }

  // The live segments in ascending order, none longer than kSegmentSectorsMax, zeroed ones with `zeroedMoffset`.
  std::vector<Segment> segments(uint64_t zeroedMoffset) const;

  size_t memoryBytes() const { return memoryBytes_.load(std::memory_order_relaxed); }

 private:
  static constexpr uint32_t kFanBits = 9;
  static constexpr uint64_t kFan = uint64_t{1} << kFanBits;
  static constexpr uint32_t kBlockBits = 3;  // 8 sectors
  static constexpr uint64_t kBlockSectors = uint64_t{1} << kBlockBits;

  // An entry of a leaf or split block: two bits of state above the value.
  static constexpr uint64_t kStateShift = 62;
  static constexpr uint64_t kUnmapped = 0;
  static constexpr uint64_t kMapped = uint64_t{1} << kStateShift;
  static constexpr uint64_t kZeroed = uint64_t{2} << kStateShift;
  static constexpr uint64_t kSplit = uint64_t{3} << kStateShift;
  static constexpr uint64_t kStateMask = uint64_t{3} << kStateShift;

  struct Split { std::atomic<uint64_t> sectors[kBlockSectors]; };
  // A leaf's entries, or the children of a table: 0, kAllZeroed or the address of a Node.
  struct Node { std::atomic<uint64_t> entries[kFan]; };
  static constexpr uint64_t kAllZeroed = 1;

  static const Split* splitOf(uint64_t entry) { return reinterpret_cast<const Split*>(entry & ~kStateMask); }
  static const Node* nodeOf(uint64_t child) { return reinterpret_cast<const Node*>(child); }

  static Run runOf(uint64_t entry, uint64_t begin, uint64_t length, uint64_t skip) {
    switch (entry & kStateMask) {
      case kMapped: return {begin, length, (entry & ~kStateMask) + skip, 0, RunKind::kData};
      case kZeroed: return {begin, length, 0, 0, RunKind::kZero};
      default: return {begin, length, 0, 0, RunKind::kGap};
    }
  }

  // The longest stretch from `begin` that one entry decides, cut at `end`.
  Run step(uint64_t begin, uint64_t end) const {
    uint64_t block = begin >> kBlockBits;
    if (block >= coveredBlocks()) return {begin, end - begin, 0, 0, RunKind::kGap};
    const Node* node = root_;
    for (uint32_t level = height_; level > 0; --level) {
      const uint32_t shift = level * kFanBits;
      const uint64_t child = node->entries[(block >> shift) & (kFan - 1)].load(std::memory_order_acquire);
      if (child <= kAllZeroed) {
        const uint64_t blocksEnd = ((block >> shift) + 1) << shift;
        const uint64_t to = std::min(end, blocksEnd << kBlockBits);
        return {begin, to - begin, 0, 0, child == 0 ? RunKind::kGap : RunKind::kZero};
      }
      node = nodeOf(child);
    }
    const uint64_t entry = node->entries[block & (kFan - 1)].load(std::memory_order_acquire);
    const uint64_t skip = begin & (kBlockSectors - 1);
    if ((entry & kStateMask) == kSplit) {
      return runOf(splitOf(entry)->sectors[skip].load(std::memory_order_acquire), begin, 1, 0);
    }
    return runOf(entry, begin, std::min(end - begin, kBlockSectors - skip), skip);
  }

  uint64_t coveredBlocks() const { return uint64_t{1} << ((height_ + 1) * kFanBits); }

  Node* newNode(uint64_t fill);
  Node* leafFor(uint64_t block);
  void setRange(uint64_t offset, uint64_t length, uint64_t state, uint64_t moffset);
  void zeroBlocks(Node& node, uint32_t level, uint64_t first, uint64_t last, uint64_t base);
  void setSectors(std::atomic<uint64_t>& entry, uint64_t from, uint64_t count, uint64_t state, uint64_t moffset);

  Node* root_ = nullptr;
  uint32_t height_ = 0;  // tables above the leaves
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<std::unique_ptr<Split[]>> splitChunks_;
  size_t splitsUsed_ = 0;  // of the last chunk
  std::atomic<size_t> memoryBytes_{0};
};

}  // namespace obd
