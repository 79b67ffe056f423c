#include "lsmt/upper-index.h"

#include "base/assert.h"

namespace obd {
namespace {
constexpr size_t kSplitsPerChunk = 256;
}

UpperIndex::UpperIndex(uint64_t sectors) {
  root_ = newNode(0);
  grow(sectors);
}

UpperIndex::~UpperIndex() = default;

uint64_t UpperIndex::coveredSectors() const { return coveredBlocks() << kBlockBits; }

void UpperIndex::grow(uint64_t sectors) {
  OBD_ASSERT(sectors <= kPaddingOffset, "the index covers what the format can name");
  while (coveredSectors() < sectors) {
    Node* const above = newNode(0);
    above->entries[0].store(reinterpret_cast<uint64_t>(root_), std::memory_order_release);
    root_ = above;
    ++height_;
  }
}

UpperIndex::Node* UpperIndex::newNode(uint64_t fill) {
  nodes_.push_back(std::make_unique<Node>());
  memoryBytes_.fetch_add(sizeof(Node), std::memory_order_relaxed);
  Node* const node = nodes_.back().get();
  for (auto& entry : node->entries) entry.store(fill, std::memory_order_relaxed);
  return node;
}

void UpperIndex::map(uint64_t offset, uint64_t length, uint64_t moffset) { setRange(offset, length, kMapped, moffset); }
void UpperIndex::zero(uint64_t offset, uint64_t length) { setRange(offset, length, kZeroed, 0); }

// The leaf that holds `block`, made if need be.
UpperIndex::Node* UpperIndex::leafFor(uint64_t block) {
  Node* node = root_;
  for (uint32_t level = height_; level > 0; --level) {
    auto& child = node->entries[(block >> (level * kFanBits)) & (kFan - 1)];
    const uint64_t value = child.load(std::memory_order_relaxed);
    if (value > kAllZeroed) {
      node = reinterpret_cast<Node*>(value);
      continue;
    }
    // A new node says what its parent said about the whole, so that readers see no difference when it appears.
    const uint64_t fill = value == 0 ? 0 : (level == 1 ? kZeroed : kAllZeroed);
    Node* const made = newNode(fill);
    child.store(reinterpret_cast<uint64_t>(made), std::memory_order_release);
    node = made;
  }
  return node;
}

void UpperIndex::setSectors(std::atomic<uint64_t>& entry, uint64_t from, uint64_t count, uint64_t state,
                            uint64_t moffset) {
  const uint64_t old = entry.load(std::memory_order_relaxed);
  Split* split = nullptr;
  if ((old & kStateMask) == kSplit) {
    split = reinterpret_cast<Split*>(old & ~kStateMask);
  } else {
    if (splitChunks_.empty() || splitsUsed_ == kSplitsPerChunk) {
      splitChunks_.push_back(std::make_unique<Split[]>(kSplitsPerChunk));
      memoryBytes_.fetch_add(kSplitsPerChunk * sizeof(Split), std::memory_order_relaxed);
      splitsUsed_ = 0;
    }
    split = &splitChunks_.back()[splitsUsed_++];
    for (uint64_t i = 0; i < kBlockSectors; ++i) {
      split->sectors[i].store((old & kStateMask) == kMapped ? old + i : old, std::memory_order_relaxed);
    }
  }
  for (uint64_t i = 0; i < count; ++i) {
    split->sectors[from + i].store(state == kMapped ? state | (moffset + i) : state, std::memory_order_release);
  }
  if ((old & kStateMask) != kSplit) {
    entry.store(kSplit | reinterpret_cast<uint64_t>(split), std::memory_order_release);
  }
}

// Zeroes blocks [first, last] of the part of the table below `node`, whose first block is `base`.
void UpperIndex::zeroBlocks(Node& node, uint32_t level, uint64_t first, uint64_t last, uint64_t base) {
  const uint32_t shift = level * kFanBits;
  for (uint64_t slot = (first - base) >> shift; slot <= (last - base) >> shift; ++slot) {
    auto& entry = node.entries[slot];
    const uint64_t value = entry.load(std::memory_order_relaxed);
    if (level == 0) {
      if ((value & kStateMask) == kSplit) {
        setSectors(entry, 0, kBlockSectors, kZeroed, 0);
      } else {
        entry.store(kZeroed, std::memory_order_release);
      }
      continue;
    }
    const uint64_t slotFirst = base + (slot << shift);
    const uint64_t slotLast = slotFirst + ((uint64_t{1} << shift) - 1);
    const uint64_t from = std::max(first, slotFirst);
    const uint64_t to = std::min(last, slotLast);
    if (value == kAllZeroed) continue;
    if (value == 0 && from == slotFirst && to == slotLast) {
      entry.store(kAllZeroed, std::memory_order_release);
      continue;
    }
    Node* child = reinterpret_cast<Node*>(value);
    if (value == 0) {
      child = newNode(0);
      entry.store(reinterpret_cast<uint64_t>(child), std::memory_order_release);
    }
    zeroBlocks(*child, level - 1, from, to, slotFirst);
  }
}

void UpperIndex::setRange(uint64_t offset, uint64_t length, uint64_t state, uint64_t moffset) {
  if (length == 0) return;
  const uint64_t end = offset + length;
  OBD_ASSERT(end <= coveredSectors(), "the index covers the range");
  constexpr uint64_t kInBlock = kBlockSectors - 1;

  // Whole blocks of zeros go by subtree; everything else by block.
  if (state == kZeroed) {
    const uint64_t firstWhole = (offset + kInBlock) >> kBlockBits;
    const uint64_t endWhole = end >> kBlockBits;
    if (firstWhole < endWhole) {
      const uint64_t head = (firstWhole << kBlockBits) - offset;
      const uint64_t tail = end & kInBlock;
      if (head > 0) setSectors(leafFor(offset >> kBlockBits)->entries[(offset >> kBlockBits) & (kFan - 1)],
                               offset & kInBlock, head, state, 0);
      zeroBlocks(*root_, height_, firstWhole, endWhole - 1, 0);
      if (tail > 0) setSectors(leafFor(endWhole)->entries[endWhole & (kFan - 1)], 0, tail, state, 0);
      return;
    }
  }

  Node* leaf = nullptr;
  for (uint64_t at = offset; at < end;) {
    const uint64_t block = at >> kBlockBits;
    const uint64_t slot = block & (kFan - 1);
    if (leaf == nullptr || slot == 0) leaf = leafFor(block);
    auto& entry = leaf->entries[slot];
    const uint64_t from = at & kInBlock;
    const uint64_t count = std::min(end - at, kBlockSectors - from);
    const uint64_t target = moffset + (at - offset);
    if (count == kBlockSectors && (entry.load(std::memory_order_relaxed) & kStateMask) != kSplit) {
      entry.store(state == kMapped ? state | target : state, std::memory_order_release);
    } else {
      setSectors(entry, from, count, state, target);
    }
    at += count;
  }
}

std::vector<Segment> UpperIndex::segments(uint64_t zeroedMoffset) const {
  std::vector<Segment> out;
  static_cast<void>(lookup(0, coveredSectors(), [&](const Run& run) {
    if (run.kind == RunKind::kGap) return true;
    const bool zeroed = run.kind == RunKind::kZero;
    for (uint64_t done = 0; done < run.length;) {
      const uint64_t length = std::min(run.length - done, kSegmentSectorsMax);
      out.emplace_back(run.offset + done, length, zeroed ? zeroedMoffset : run.moffset + done, zeroed);
      done += length;
    }
    return true;
  }));
  return out;
}

}  // namespace obd
