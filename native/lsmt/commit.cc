#include "lsmt/commit.h"

#include <algorithm>

namespace obd {
namespace {

constexpr uint64_t kPieceSectors = 64;  // one entry before merging
constexpr uint64_t kPaddingGroup = 256;
constexpr size_t kCopyBytes = 1 * kMiB;
constexpr uint8_t kUpperTag = kLowersMax;  // lowers are 0..254

// §7.1, step 3: greedily from the front, by pieces of at most 64 sectors counted from the start of each segment.
class EntryList {
 public:
  void add(const Segment& segment) {
    if (segment.zeroed()) {
      append({segment.offset(), segment.length(), next_, true});
      return;
    }
    for (uint64_t done = 0; done < segment.length();) {
      const uint64_t length = std::min(segment.length() - done, kPieceSectors);
      append({segment.offset() + done, length, next_});
      next_ += length;
      done += length;
    }
  }

  std::vector<Segment>& entries() { return entries_; }
  uint64_t endSector() const { return next_; }

 private:
  void append(const Segment& piece) {
    if (!entries_.empty()) {
      const Segment& last = entries_.back();
      const uint64_t length = last.length() + piece.length();
      if (last.end() == piece.offset() && last.mend() == piece.moffset() && last.zeroed() == piece.zeroed() &&
          length < kSegmentSectorsMax) {
        entries_.back() = Segment(last.offset(), length, last.moffset(), last.zeroed());
        return;
      }
    }
    entries_.push_back(piece);
  }

  std::vector<Segment> entries_;
  uint64_t next_ = kHeaderSectors;
};

struct Source {
  std::vector<Segment> segments;
  uint64_t virtualSize = 0;
  Uuid parentUuid;
};

// Reads what follows itself in one file in large pieces.
template <typename FileOf>
Status copyData(const std::vector<Segment>& segments, FileOf&& fileOf, Sink& out) {
  const auto buffer = std::make_unique<std::byte[]>(kCopyBytes);
  for (size_t i = 0; i < segments.size();) {
    const Segment& first = segments[i];
    if (first.zeroed()) { ++i; continue; }
    uint64_t end = first.mend();
    size_t next = i + 1;
    while (next < segments.size() && (segments[next].zeroed() || (segments[next].tag() == first.tag() &&
                                                                  segments[next].moffset() == end))) {
      if (!segments[next].zeroed()) end = segments[next].mend();
      ++next;
    }
    const File& file = fileOf(first.tag());
    for (uint64_t at = first.moffset() * kSectorSize; at < end * kSectorSize;) {
      const size_t length = static_cast<size_t>(std::min<uint64_t>(kCopyBytes, end * kSectorSize - at));
      const std::span<std::byte> part(buffer.get(), length);
      OBD_RETURN_IF_ERROR(file.preadZeroFill(part, at));
      OBD_RETURN_IF_ERROR(out.write(part));
      at += length;
    }
    i = next;
  }
  return Status::ok();
}

template <typename FileOf>
Result<CommitStats> commitSource(const Source& source, const CommitOptions& options, FileOf&& fileOf, Sink& out) {
  if (options.userTag.size() > kUserTagMax) return invalidArgument("commit message longer than 256 bytes");
  EntryList list;
  for (const Segment& segment : source.segments) list.add(segment);
  std::vector<Segment>& entries = list.entries();
  CommitStats stats;
  stats.entries = entries.size();
  const uint64_t padded = (entries.size() + kPaddingGroup - 1) / kPaddingGroup * kPaddingGroup;
  if (padded > kLayerEntriesMax) {
    return Status(Code::kResourceExhausted, "the layer would need " + std::to_string(entries.size()) +
                                                " index entries, at most " + std::to_string(kLayerEntriesMax) +
                                                " can be read back");
  }
  entries.resize(padded, Segment::padding());

  LayerHeader header;
  header.flags = kFlagHeader | kFlagData | kFlagSealed;
  header.virtualSize = source.virtualSize;
  header.uuid = options.uuid.value_or(Uuid{});
  header.parentUuid = options.parentUuid.value_or(source.parentUuid);
  header.userTag = options.userTag;
  std::array<std::byte, kHeaderSize> bytes;
  encodeHeader(header, bytes);
  OBD_RETURN_IF_ERROR(out.write(bytes));

  OBD_RETURN_IF_ERROR(copyData(source.segments, fileOf, out));

  std::array<std::byte, kPaddingGroup * kSegmentBytes> group;
  for (size_t first = 0; first < padded; first += kPaddingGroup) {
    for (size_t i = 0; i < kPaddingGroup; ++i) {
      entries[first + i].encode(std::span(group).subspan(i * kSegmentBytes).template first<kSegmentBytes>());
    }
    OBD_RETURN_IF_ERROR(out.write(group));
  }

  stats.dataBytes = (list.endSector() - kHeaderSectors) * kSectorSize;
  header.flags = kFlagData | kFlagSealed;
  header.indexOffset = list.endSector() * kSectorSize;
  header.indexSize = padded;
  encodeHeader(header, bytes);
  OBD_RETURN_IF_ERROR(out.write(bytes));
  OBD_RETURN_IF_ERROR(out.finish());
  stats.layerBytes = header.indexOffset + padded * kSegmentBytes + kHeaderSize;
  return stats;
}

}  // namespace

Result<CommitStats> commitUpper(const Upper& upper, const CommitOptions& options, Sink& out) {
  const Source source{upper.segments(), upper.virtualSize(), upper.parentUuid()};
  return commitSource(source, options, [&](uint8_t) -> const File& { return upper.dataFile(); }, out);
}

Result<CommitStats> commitLayer(const LayerReader& layer, const CommitOptions& options, Sink& out) {
  const Source source{{layer.segments().begin(), layer.segments().end()}, layer.virtualSize(), layer.info().parentUuid};
  return commitSource(source, options, [&](uint8_t) -> const File& { return layer.file(); }, out);
}

Result<CommitStats> commitStack(const LayerStack& lowers, const Upper* upper, const CommitOptions& options, Sink& out) {
  Source source;
  const std::span<const Segment> below = lowers.index().segments();
  source.virtualSize = lowers.virtualSize();
  if (upper == nullptr) {
    source.segments.assign(below.begin(), below.end());
  } else {
    std::vector<Segment> top = upper->segments();
    for (Segment& segment : top) segment = segment.withTag(kUpperTag);
    source.segments = overlaySegments(top, below);
    if (upper->virtualSize() != 0) source.virtualSize = upper->virtualSize();
  }
  if (lowers.size() > 0) {
    source.parentUuid = lowers.layer(0).info().parentUuid;
  } else if (upper != nullptr) {
    source.parentUuid = upper->parentUuid();
  }
  const auto fileOf = [&](uint8_t tag) -> const File& {
    return tag == kUpperTag ? upper->dataFile() : lowers.layer(tag).file();
  };
  return commitSource(source, options, fileOf, out);
}

}  // namespace obd
