#include "lsmt/layer-reader.h"

#include <algorithm>
#include <cstring>

namespace obd {
namespace {

Result<std::vector<Segment>> readIndex(const File& file, const LayerHeader& trailer, uint64_t trailerOffset) {
  if (trailer.indexSize > kLayerEntriesMax) {
    return dataLoss("trailer claims " + std::to_string(trailer.indexSize) + " index entries");
  }
  const uint64_t indexBytes = trailer.indexSize * kSegmentBytes;
  if (trailer.indexOffset > trailerOffset || indexBytes > trailerOffset - trailer.indexOffset) {
    return dataLoss("the index does not fit before the trailer");
  }
  std::vector<std::byte> bytes(indexBytes);
  OBD_RETURN_IF_ERROR(file.preadExact(bytes, trailer.indexOffset).withContext("index"));

  std::vector<Segment> segments;
  segments.reserve(trailer.indexSize);
  const uint64_t endOfData = trailer.indexOffset / kSectorSize;
  for (uint64_t i = 0; i < trailer.indexSize; ++i) {
    const Segment segment =
        Segment::decode(std::span<const std::byte>(bytes).subspan(i * kSegmentBytes).first<kSegmentBytes>());
    if (segment.isPadding()) continue;
    const std::string entry = "index entry " + std::to_string(i);
    if (segment.end() > kPaddingOffset) return dataLoss(entry + " reaches past sector 2^50");
    if (!segments.empty() && segments.back().end() > segment.offset()) {
      return dataLoss(entry + " overlaps or precedes the one before it");
    }
    const bool inRange = segment.moffset() >= kHeaderSectors &&
                         (segment.zeroed() ? segment.moffset() <= endOfData
                                           : segment.moffset() < endOfData && segment.mend() > kHeaderSectors &&
                                                 segment.mend() <= endOfData);
    if (!inRange) return dataLoss(entry + " points outside the data");
    if (segment.length() > 0) segments.push_back(segment);
  }
  return segments;
}

}  // namespace

Result<std::unique_ptr<LayerReader>> LayerReader::open(std::unique_ptr<File> file) {
  std::array<std::byte, kHeaderSize> bytes;
  OBD_RETURN_IF_ERROR(file->preadExact(bytes, 0).withContext("header"));
  OBD_ASSIGN_OR_RETURN(const LayerHeader header, decodeHeader(bytes).withContext(file->name()));
  if (!header.isHeader() || !header.isData()) return dataLoss(file->name() + ": header flags are not those of a layer");

  OBD_ASSIGN_OR_RETURN(const uint64_t size, file->size());
  if (size < 2 * kHeaderSize) return dataLoss(file->name() + ": too short for a trailer");
  const uint64_t trailerOffset = size - kHeaderSize;
  OBD_RETURN_IF_ERROR(file->preadExact(bytes, trailerOffset).withContext("trailer"));
  OBD_ASSIGN_OR_RETURN(LayerHeader trailer, decodeHeader(bytes).withContext(file->name() + ": trailer"));
  if (trailer.isHeader() || !trailer.isData() || !trailer.isSealed()) {
    return dataLoss(file->name() + ": trailer flags are not those of a sealed layer");
  }
  if (trailer.virtualSize > kVirtualSizeMax) return dataLoss(file->name() + ": virtual size exceeds 2^50 sectors");
  OBD_ASSIGN_OR_RETURN(std::vector<Segment> segments,
                       readIndex(*file, trailer, trailerOffset).withContext(file->name()));
  return std::unique_ptr<LayerReader>(new LayerReader(std::move(file), std::move(trailer), std::move(segments)));
}

Status LayerReader::read(uint64_t offset, std::span<std::byte> out) const {
  uint64_t at = offset / kSectorSize;
  const uint64_t end = at + out.size() / kSectorSize;
  auto segment = std::partition_point(segments_.begin(), segments_.end(), [&](const Segment& s) { return s.end() <= at; });
  while (at < end) {
    const bool found = segment != segments_.end() && segment->offset() < end;
    const uint64_t gapEnd = found ? std::max(at, segment->offset()) : end;
    std::span<std::byte> part = out.subspan((at - offset / kSectorSize) * kSectorSize);
    if (gapEnd > at) {
      std::memset(part.data(), 0, (gapEnd - at) * kSectorSize);
      at = gapEnd;
      continue;
    }
    const uint64_t to = std::min(end, segment->end());
    part = part.first((to - at) * kSectorSize);
    if (segment->zeroed()) {
      std::memset(part.data(), 0, part.size());
    } else {
      OBD_RETURN_IF_ERROR(file_->preadZeroFill(part, segment->cut(at, to).moffset() * kSectorSize));
    }
    at = to;
    ++segment;
  }
  return Status::ok();
}

}  // namespace obd
