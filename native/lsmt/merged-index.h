// The index of a whole stack of read-only layers, flat and immutable. Beside it a plain reference that the tests and
// the benchmark compare with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "lsmt/format.h"
#include "lsmt/run.h"

namespace obd {

// Overlays `top` on `below`: top's segments, with every gap filled from below, cut to fit. Neighbours are not joined;
// tags are kept. REQUIRES: both sorted and without overlap.
std::vector<Segment> overlaySegments(std::span<const Segment> top, std::span<const Segment> below);

// One list for the whole stack, bottom first; each segment's tag becomes the number of its layer (0 = bottom).
// REQUIRES: at most kLowersMax layers, each sorted and without overlap.
std::vector<Segment> mergeSegments(std::span<const std::span<const Segment>> layers);

// Immutable: any thread may look up.
//
// Sorted 16-byte segments, and a table that leads from `(sector - first) >> shift` to the first segment ending after
// the bucket's start. A look-up is one load from the table and, on average, less than one step along the segments;
// a crowded bucket is searched by halving, so no arrangement of segments is worse than a binary search.
class MergedIndex final {
 public:
  MergedIndex() = default;
  // REQUIRES: sorted, without overlap, no empty segments; tag = layer number.
  explicit MergedIndex(std::vector<Segment> segments);

  std::span<const Segment> segments() const { return segments_; }
  size_t memoryBytes() const { return segments_.size() * sizeof(Segment) + buckets_.size() * sizeof(uint32_t); }

  // Number of the first segment that ends after `sector`; segments().size() if none.
  size_t find(uint64_t sector) const {
    if (sector < base_) return 0;
    const uint64_t bucket = (sector - base_) >> shift_;
    if (bucket >= bucketCount_) return segments_.size();
    size_t low = buckets_[bucket];
    size_t high = buckets_[bucket + 1];
    while (high - low > kCrowded) {
      const size_t middle = low + (high - low) / 2;
      if (segments_[middle].end() <= sector) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    while (low < high && segments_[low].end() <= sector) ++low;
    return low;
  }

  // Calls visit(const Run&) for consecutive runs that cover [begin, end) exactly; neighbours of one layer whose bytes
  // follow each other are one run. Stops early when visit returns false; returns whether it went to the end.
  template <typename Visit>
  bool lookup(uint64_t begin, uint64_t end, Visit&& visit) const {
    size_t at = find(begin);
    while (begin < end) {
      if (at == segments_.size() || segments_[at].offset() >= end) return visit(Run{begin, end - begin, 0, 0, RunKind::kGap});
      const Segment& segment = segments_[at];
      if (segment.offset() > begin) {
        if (!visit(Run{begin, segment.offset() - begin, 0, 0, RunKind::kGap})) return false;
        begin = segment.offset();
      }
      const bool zeroed = segment.zeroed();
      const uint8_t layer = segment.tag();
      const uint64_t moffset = zeroed ? 0 : segment.moffset() + (begin - segment.offset());
      uint64_t to = segment.end();
      for (++at; to < end && at < segments_.size(); ++at) {
        const Segment& next = segments_[at];
        if (next.offset() != to || next.zeroed() != zeroed) break;
        if (!zeroed && (next.tag() != layer || next.moffset() != moffset + (to - begin))) break;
        to = next.end();
      }
      to = std::min(to, end);
      if (!visit(Run{begin, to - begin, moffset, zeroed ? 0u : layer, zeroed ? RunKind::kZero : RunKind::kData})) return false;
      begin = to;
    }
    return true;
  }

 private:
  static constexpr size_t kCrowded = 8;

  std::vector<Segment> segments_;
  std::vector<uint32_t> buckets_;  // bucketCount_ + 1 entries
  uint64_t base_ = 0;              // first mapped sector
  uint64_t bucketCount_ = 0;
  uint32_t shift_ = 0;
};

}  // namespace obd
