#include "lsmt/merged-index.h"

#include <bit>

namespace obd {

std::vector<Segment> overlaySegments(std::span<const Segment> top, std::span<const Segment> below) {
  std::vector<Segment> merged;
  merged.reserve(top.size() + below.size());
  size_t at = 0;
  uint64_t covered = 0;  // everything before this sector is decided
  const auto fillTo = [&](uint64_t limit) {
    for (; at < below.size(); ++at) {
      const Segment& segment = below[at];
      const uint64_t from = std::max(segment.offset(), covered);
      if (from >= limit) return;
      const uint64_t to = std::min(segment.end(), limit);
      if (from < to) merged.push_back(segment.cut(from, to));
      if (segment.end() > limit) return;  // its rest may show behind the next segment of the top
    }
  };
  for (const Segment& segment : top) {
    fillTo(segment.offset());
    merged.push_back(segment);
    covered = segment.end();
  }
  fillTo(UINT64_MAX);
  return merged;
}

std::vector<Segment> mergeSegments(std::span<const std::span<const Segment>> layers) {
  // Overlaying is associative, so halving costs log(layers) passes instead of one per layer.
  struct Merger {
    std::span<const std::span<const Segment>> layers;

    std::vector<Segment> range(size_t first, size_t last) const {
      if (first == last) return {};
      if (last - first == 1) {
        std::vector<Segment> tagged;
        tagged.reserve(layers[first].size());
        for (const Segment& segment : layers[first]) tagged.push_back(segment.withTag(static_cast<uint8_t>(first)));
        return tagged;
      }
      const size_t middle = first + (last - first) / 2;
      return overlaySegments(range(middle, last), range(first, middle));
    }
  };
  OBD_ASSERT(layers.size() <= kLowersMax, "a layer number fits the tag");
  return Merger{layers}.range(0, layers.size());
}

MergedIndex::MergedIndex(std::vector<Segment> segments) : segments_(std::move(segments)) {
  OBD_ASSERT(segments_.size() < UINT32_MAX, "a segment number fits the table");
  segments_.shrink_to_fit();
  if (segments_.empty()) return;
  base_ = segments_.front().offset();
  const uint64_t span = segments_.back().end() - base_;
  // About four buckets per segment: most then hold one border or none. No more buckets than sectors.
  const uint64_t wanted = std::min<uint64_t>(std::bit_ceil(segments_.size()) * 4, std::bit_ceil(span));
  while ((span >> shift_) > wanted) ++shift_;
  bucketCount_ = ((span - 1) >> shift_) + 1;

  buckets_.resize(bucketCount_ + 1);
  uint32_t at = 0;
  for (uint64_t bucket = 0; bucket < bucketCount_; ++bucket) {
    const uint64_t start = base_ + (bucket << shift_);
    while (segments_[at].end() <= start) ++at;  // ends: the last segment ends behind the last bucket's start
    buckets_[bucket] = at;
  }
  buckets_[bucketCount_] = static_cast<uint32_t>(segments_.size());
}

}  // namespace obd
