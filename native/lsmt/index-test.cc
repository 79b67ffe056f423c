// The flat indexes say the same as their plain references, for any arrangement of segments.
#include <map>

#include "lsmt/layer-stack.h"
#include "lsmt/merged-index.h"
#include "lsmt/reference-index.h"
#include "lsmt/testing.h"
#include "lsmt/upper-index.h"

namespace obd {
namespace {

using namespace testing_lsmt;  // NOLINT(google-build-using-namespace)
using Runs = std::vector<obd::Run>;

template <typename Index>
Runs runsOf(const Index& index, uint64_t begin, uint64_t end) {
  Runs runs;
  EXPECT_TRUE(index.lookup(begin, end, [&](const obd::Run& run) {
    runs.push_back(run);
    return true;
  }));
  return runs;
}

uint64_t below(std::mt19937_64& random, uint64_t limit) { return random() % limit; }

// Sorted segments without overlap; `clusters` gather most of them in few places of a wide disk.
std::vector<Segment> randomSegments(std::mt19937_64& random, size_t count, uint64_t maxGap, bool clusters) {
  std::vector<Segment> segments;
  uint64_t at = below(random, 100);
  uint64_t moffset = 8;
  for (size_t i = 0; i < count; ++i) {
    at += below(random, 4) == 0 ? 0 : below(random, maxGap);
    if (clusters && below(random, count / 4 + 1) == 0) at += below(random, uint64_t{1} << 44);
    const uint64_t length = 1 + below(random, below(random, 20) == 0 ? kSegmentSectorsMax : 64);
    if (at + length >= kPaddingOffset) break;
    const bool zeroed = below(random, 4) == 0;
    if (below(random, 3) != 0) moffset = 8 + below(random, 1 << 30);
    segments.emplace_back(at, length, moffset, zeroed, static_cast<uint8_t>(zeroed ? 0 : below(random, 3)));
    moffset = segments.back().mend();
    at += length;
  }
  return segments;
}

TEST(MergedIndex, SaysTheSameAsTheReferenceForAnyArrangement) {
  std::mt19937_64 random(testSeed());
  for (int round = 0; round < (kSanitized ? 30 : 200); ++round) {
    const size_t count = below(random, 2000);
    const std::vector<Segment> segments =
        randomSegments(random, count, round % 3 == 0 ? 2 : 1 + below(random, 5000), round % 2 == 0);
    const MergedIndex index(segments);
    ReferenceIndex reference;
    for (const Segment& segment : segments) reference.insert(segment);
    for (int probe = 0; probe < 200; ++probe) {
      uint64_t begin = below(random, kPaddingOffset);
      if (!segments.empty() && probe % 4 != 0) {
        const Segment& near = segments[below(random, segments.size())];
        begin = near.offset() + below(random, near.length() + 40);
        begin -= std::min(begin, below(random, 20));
      }
      const uint64_t end = begin + 1 + below(random, 3000);
      ASSERT_EQ(runsOf(index, begin, end), reference.lookup(begin, end)) << "round " << round << " at " << begin;
    }
  }
}

TEST(MergedIndex, FindsTheFirstAndTheLastSectorOfTheFormat) {
  const MergedIndex index({Segment(0, 1, 8), Segment(kPaddingOffset - 1, 1, 9)});
  EXPECT_EQ(runsOf(index, 0, 1), (Runs{{0, 1, 8, 0, RunKind::kData}}));
  EXPECT_EQ(runsOf(index, kPaddingOffset - 2, kPaddingOffset),
            (Runs{{kPaddingOffset - 2, 1, 0, 0, RunKind::kGap}, {kPaddingOffset - 1, 1, 9, 0, RunKind::kData}}));
  EXPECT_EQ(runsOf(MergedIndex(), 5, 9), (Runs{{5, 4, 0, 0, RunKind::kGap}}));
}

TEST(MergedIndex, AMillionCrowdedSegmentsBesideOneFarAwayAreStillFound) {
  std::vector<Segment> segments;
  for (uint64_t i = 0; i < 1'000'000; ++i) segments.emplace_back(i * 2, 1, 8 + i);
  segments.emplace_back(kPaddingOffset - 1, 1, 8);
  const MergedIndex index(std::move(segments));
  EXPECT_LE(index.memoryBytes(), size_t{64} << 20);
  for (uint64_t i = 0; i < 1'000'000; i += 997) {
    EXPECT_EQ(index.find(2 * i), i);
    EXPECT_EQ(index.find(2 * i + 1), i + 1);
  }
}

TEST(MergedIndex, StopsWhenTheVisitorSaysSo) {
  const MergedIndex index({Segment(0, 1, 8), Segment(5, 1, 80)});
  int calls = 0;
  EXPECT_FALSE(index.lookup(0, 10, [&](const obd::Run&) { return ++calls < 2; }));
  EXPECT_EQ(calls, 2);
}

TEST(MergeSegments, TheTopmostLayerThatMentionsASectorDecides) {
  std::mt19937_64 random(testSeed());
  for (int round = 0; round < 60; ++round) {
    const size_t layers = 1 + below(random, round == 0 ? kLowersMax : 12);
    std::vector<std::vector<Segment>> own;
    std::vector<std::span<const Segment>> views;
    ReferenceIndex reference;  // bottom first, later ones replace: the same rule by other means
    for (size_t layer = 0; layer < layers; ++layer) own.push_back(randomSegments(random, below(random, 300), 200, false));
    for (size_t layer = 0; layer < layers; ++layer) {
      views.emplace_back(own[layer]);
      for (const Segment& segment : own[layer]) reference.insert(segment.withTag(static_cast<uint8_t>(layer)));
    }
    ASSERT_EQ(mergeSegments(views), reference.segments());
  }
}

TEST(UpperIndex, SaysTheSameAsTheReferenceAfterAnyChanges) {
  std::mt19937_64 random(testSeed());
  for (int round = 0; round < (kSanitized ? 10 : 60); ++round) {
    const uint64_t sectors = round % 3 == 0 ? uint64_t{1} << (13 + below(random, 36)) : 5000 + below(random, 60000);
    UpperIndex index(sectors);
    ReferenceIndex reference;
    // Few hot places, so that blocks split, fill up and are discarded again.
    std::vector<uint64_t> places;
    for (int i = 0; i < 6; ++i) places.push_back(below(random, sectors));
    for (int change = 0; change < 600; ++change) {
      const uint64_t offset = std::min(sectors - 1, places[below(random, places.size())] + below(random, 300));
      uint64_t length = 1 + below(random, below(random, 10) == 0 ? 16000 : 40);
      if (below(random, 3) == 0) length = (length + 7) / 8 * 8;
      length = std::min({length, sectors - offset, kSegmentSectorsMax});
      if (below(random, 3) == 0) {
        if (below(random, 40) == 0) {  // a whole stretch of the disk
          const uint64_t wide = below(random, sectors - offset) + 1;
          index.zero(offset, wide);
          for (uint64_t at = offset; at < offset + wide;) {
            if (wide > kSegmentSectorsMax * 2000) break;
            const uint64_t part = std::min(kSegmentSectorsMax, offset + wide - at);
            reference.insert(Segment(at, part, 8, true));
            at += part;
          }
          if (wide > kSegmentSectorsMax * 2000) {  // too many pieces for the plain map: start both anew
            ASSERT_EQ(runsOf(index, offset, offset + wide), (Runs{{offset, wide, 0, 0, RunKind::kZero}}));
            break;
          }
          continue;
        }
        index.zero(offset, length);
        reference.insert(Segment(offset, length, 8, true));
      } else {
        const uint64_t moffset = 8 + below(random, uint64_t{1} << 50);
        index.map(offset, length, moffset);
        reference.insert(Segment(offset, length, moffset));
      }
      const uint64_t begin = offset - std::min(offset, below(random, 100));
      const uint64_t end = offset + length + below(random, 100);
      ASSERT_EQ(runsOf(index, begin, end), reference.lookup(begin, end)) << "round " << round << " change " << change;
    }
  }
}

TEST(UpperIndex, DiscardingAHugeDiskTouchesAlmostNothing) {
  UpperIndex index(kPaddingOffset);
  const size_t before = index.memoryBytes();
  index.zero(0, kPaddingOffset);
  EXPECT_LE(index.memoryBytes() - before, size_t{64} << 10);
  EXPECT_EQ(runsOf(index, 0, kPaddingOffset), (Runs{{0, kPaddingOffset, 0, 0, RunKind::kZero}}));
  index.map(uint64_t{1} << 40, 8, 100);
  EXPECT_EQ(runsOf(index, (uint64_t{1} << 40) - 1, (uint64_t{1} << 40) + 9),
            (Runs{{(uint64_t{1} << 40) - 1, 1, 0, 0, RunKind::kZero},
                  {uint64_t{1} << 40, 8, 100, 0, RunKind::kData},
                  {(uint64_t{1} << 40) + 8, 1, 0, 0, RunKind::kZero}}));
}

TEST(UpperIndex, GrowsWithoutForgetting) {
  UpperIndex index(8);
  index.map(0, 8, 50);
  index.grow(uint64_t{1} << 45);
  index.zero(uint64_t{1} << 44, 8);
  EXPECT_EQ(runsOf(index, 0, 9), (Runs{{0, 8, 50, 0, RunKind::kData}, {8, 1, 0, 0, RunKind::kGap}}));
  EXPECT_EQ(index.segments(8), (std::vector<Segment>{Segment(0, 8, 50), Segment(uint64_t{1} << 44, 8, 8, true)}));
}

TEST(UpperIndex, MemoryStaysBoundedWhenOnePlaceIsRewrittenForever) {
  UpperIndex index(1 << 20);
  for (int i = 0; i < (kSanitized ? 300 : 20'000); ++i) {
    index.map(1003, 1, 8 + i);
    index.map(1000, 8, 8 + i);
    index.zero(0, 1 << 15);
  }
  EXPECT_LE(index.memoryBytes(), size_t{256} << 10);
}

TEST(UpperIndex, SegmentsNeverExceedTheLengthField) {
  UpperIndex index(1 << 20);
  index.zero(0, 100'000);
  for (uint64_t at = 200'000; at < 300'000; at += 8) index.map(at, 8, at);
  uint64_t covered = 0;
  for (const Segment& segment : index.segments(8)) {
    EXPECT_LE(segment.length(), kSegmentSectorsMax);
    covered += segment.length();
  }
  EXPECT_EQ(covered, 200'000u);
}

}  // namespace
}  // namespace obd
