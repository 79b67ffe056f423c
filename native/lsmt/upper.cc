#include "lsmt/upper.h"

#include <unistd.h>

#include <cstring>
#include <fstream>

#include "io/posix-file.h"
#include "lsmt/upper-base.h"

namespace obd {
namespace {

Status checkVirtualSize(uint64_t virtualSize) {
  if (virtualSize % kSectorSize != 0) return invalidArgument("virtual size is not a multiple of 512");
  if (virtualSize > kVirtualSizeMax) return invalidArgument("virtual size exceeds 2^50 sectors");
  return Status::ok();
}

Status patchHeader(File& file, uint64_t virtualSize) {
  std::array<std::byte, kHeaderSize> bytes;
  OBD_RETURN_IF_ERROR(file.preadExact(bytes, 0));
  const Result<LayerHeader> header = decodeHeader(bytes);
  if (!header.isOk()) return header.status().withContext(file.name());
  patchVirtualSize(bytes, virtualSize);
  return file.pwrite(bytes, 0);
}

}  // namespace

std::string currentBootId() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id;
}

uint64_t hashBootId(const std::string& bootId) {
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
  for (const char c : bootId) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3u;
  return (hash ^ (hash >> 48)) & ((uint64_t{1} << 48) - 1);
}

Status createUpper(File& data, File& index, const CreateUpperOptions& options) {
  OBD_RETURN_IF_ERROR(checkVirtualSize(options.virtualSize));
  if (options.userTag.size() > kUserTagMax) return invalidArgument("user tag longer than 256 bytes");
  LayerHeader header;
  header.flags = kFlagHeader | kFlagData | (options.sparse ? kFlagSparse : 0);
  header.virtualSize = options.virtualSize;
  header.uuid = options.uuid;
  header.parentUuid = options.parentUuid;
  header.userTag = options.userTag;
  std::array<std::byte, kHeaderSize> bytes;
  encodeHeader(header, bytes);
  OBD_RETURN_IF_ERROR(data.pwrite(bytes, 0));
  if (options.sparse) return data.truncate(kHeaderSize + options.virtualSize);

  header.flags = kFlagHeader;
  header.indexOffset = kHeaderSize;
  encodeHeader(header, bytes);
  return index.pwrite(bytes, 0);
}

Status createUpper(const std::string& dataPath, const std::string& indexPath, const CreateUpperOptions& options) {
  const PosixOpen create{.write = true, .create = true, .exclusive = true};
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> data, openPosixFile(dataPath, create));
  Result<std::unique_ptr<File>> index = openPosixFile(indexPath, create);
  Status status = index.status();
  if (status.isOk()) {
    status = createUpper(*data, *index.value(), options);
    if (status.isOk()) status = data->sync();
    if (status.isOk()) status = index.value()->sync();
    if (status.isOk()) status = syncParentDirectory(dataPath);
    if (status.isOk()) status = syncParentDirectory(indexPath);
    if (!status.isOk()) ::unlink(indexPath.c_str());
  }
  if (!status.isOk()) ::unlink(dataPath.c_str());
  return status;
}

Result<std::unique_ptr<Upper>> openUpper(std::unique_ptr<File> data, std::unique_ptr<File> index,
                                         const OpenUpperOptions& options) {
  OBD_ASSERT(options.ioLimitBytes > 0 && options.ioLimitBytes % 4096 == 0 &&
                 options.ioLimitBytes / kSectorSize <= kSegmentSectorsMax,
             "one piece of a write fits one record");
  std::array<std::byte, kHeaderSize> bytes;
  OBD_RETURN_IF_ERROR(data->preadExact(bytes, 0).withContext("header"));
  OBD_ASSIGN_OR_RETURN(const LayerHeader header, decodeHeader(bytes).withContext(data->name()));
  if (!header.isHeader() || !header.isData()) {
    return dataLoss(data->name() + ": header flags are not those of a writable layer");
  }
  if (header.isSealed()) return dataLoss(data->name() + ": a read-only layer, not a writable one");
  if (!checkVirtualSize(header.virtualSize).isOk()) return dataLoss(data->name() + ": impossible virtual size");
  return header.isSparse() ? openSparseUpper(std::move(data), std::move(index), header, options)
                           : openAppendUpper(std::move(data), std::move(index), header, options);
}

Result<std::unique_ptr<Upper>> openUpper(const std::string& dataPath, const std::string& indexPath,
                                         const OpenUpperOptions& options) {
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> data,
                       openPosixFile(dataPath, {.write = options.write, .direct = options.directIo, .randomAccess = true}));
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> index, openPosixFile(indexPath, {.write = options.write}));
  return openUpper(std::move(data), std::move(index), options);
}

Status resizeUpper(File& data, File& index, uint64_t virtualSize) {
  OBD_RETURN_IF_ERROR(checkVirtualSize(virtualSize));
  std::array<std::byte, kHeaderSize> bytes;
  OBD_RETURN_IF_ERROR(data.preadExact(bytes, 0));
  OBD_ASSIGN_OR_RETURN(const LayerHeader header, decodeHeader(bytes).withContext(data.name()));
  if (!header.isHeader() || !header.isData() || header.isSealed()) {
    return failedPrecondition(data.name() + ": not a writable layer");
  }
  OBD_ASSIGN_OR_RETURN(const uint64_t indexBytes, index.size());
  if (indexBytes >= kHeaderSize) {
    OBD_RETURN_IF_ERROR(patchHeader(index, virtualSize));
    OBD_RETURN_IF_ERROR(index.sync());
  } else if (!header.isSparse()) {
    return dataLoss(index.name() + ": no header");
  }
  OBD_RETURN_IF_ERROR(patchHeader(data, virtualSize));
  if (header.isSparse()) OBD_RETURN_IF_ERROR(data.truncate(kHeaderSize + virtualSize));
  return data.sync();
}

Result<LayerHeader> readIndexHeader(const File& index) {
  std::array<std::byte, kHeaderSize> bytes;
  OBD_RETURN_IF_ERROR(index.preadExact(bytes, 0).withContext("index header"));
  OBD_ASSIGN_OR_RETURN(LayerHeader header, decodeHeader(bytes).withContext(index.name()));
  if (!header.isHeader() || header.isData() || header.isSealed() || header.indexOffset != kHeaderSize) {
    return dataLoss(index.name() + ": header is not that of an index log");
  }
  if (!checkVirtualSize(header.virtualSize).isOk()) return dataLoss(index.name() + ": impossible virtual size");
  return header;
}

Status UpperBase::checkRange(uint64_t offset, uint64_t length) const {
  if (((offset | length) & (kSectorSize - 1)) != 0) return invalidArgument("request is not sector aligned");
  if (offset > virtualSize_ || length > virtualSize_ - offset) return invalidArgument("request reaches past the end");
  return Status::ok();
}

Status UpperBase::checkChange(uint64_t offset, uint64_t length) const {
  OBD_RETURN_IF_ERROR(checkRange(offset, length));
  if (!writable_) return failedPrecondition("the layer is open for reading only");
  if (sealed_.load(std::memory_order_acquire)) return failedPrecondition("the layer is sealed");
  return stickyFailure();
}

Status UpperBase::stickyFailure() const {
  if (!failed_.load(std::memory_order_acquire)) return Status::ok();
  const std::lock_guard lock(failureMutex_);
  return failure_.withContext("an earlier flush failed");
}

Status UpperBase::fail(Status status) {
  const std::lock_guard lock(failureMutex_);
  if (failure_.isOk()) failure_ = status;
  failed_.store(true, std::memory_order_release);
  return status;
}

Status UpperBase::inheritVirtualSize(const LayerStack* lower) {
  lower_ = lower;
  if (virtualSize_ != 0 || lower == nullptr) return Status::ok();
  const uint64_t inherited = lower->virtualSize();
  OBD_RETURN_IF_ERROR(checkVirtualSize(inherited));
  if (writable_ && inherited != 0) OBD_RETURN_IF_ERROR(resizeUpper(*data_, *indexFile_, inherited));
  virtualSize_ = inherited;
  index_.grow(inherited / kSectorSize);
  return Status::ok();
}

Status UpperBase::read(uint64_t offset, std::span<std::byte> out) const {
  OBD_RETURN_IF_ERROR(checkRange(offset, out.size()));
  const uint64_t begin = offset / kSectorSize;
  Status status;
  static_cast<void>(index_.lookup(begin, begin + out.size() / kSectorSize, [&](const Run& run) {
    const std::span<std::byte> part = out.subspan((run.offset - begin) * kSectorSize, run.length * kSectorSize);
    if (run.kind == RunKind::kData) {
      status = data_->preadZeroFill(part, run.moffset * kSectorSize);
    } else if (run.kind == RunKind::kGap && lower_ != nullptr) {
      status = lower_->read(run.offset * kSectorSize, part);
    } else {
      std::memset(part.data(), 0, part.size());
    }
    return status.isOk();
  }));
  return status;
}

uint64_t UpperBase::liveBytes() const {
  uint64_t sectors = 0;
  static_cast<void>(index_.lookup(0, index_.coveredSectors(), [&](const Run& run) {
    if (run.kind == RunKind::kData) sectors += run.length;
    return true;
  }));
  return sectors * kSectorSize;
}

LayerHeader UpperBase::trailerFor(uint64_t indexOffset, uint64_t entries) const {
  LayerHeader trailer;
  trailer.flags = kFlagData | kFlagSealed | (isSparse() ? kFlagSparse : 0);
  trailer.indexOffset = indexOffset;
  trailer.indexSize = entries;
  trailer.virtualSize = virtualSize_;
  trailer.uuid = header_.uuid;
  trailer.parentUuid = header_.parentUuid;
  return trailer;
}

namespace {

std::vector<std::byte> encodeSegments(std::span<const Segment> segments) {
  std::vector<std::byte> bytes(roundUp(segments.size() * kSegmentBytes, kSectorSize));
  for (size_t i = 0; i < segments.size(); ++i) {
    segments[i].encode(std::span(bytes).subspan(i * kSegmentBytes).first<kSegmentBytes>());
  }
  return bytes;
}

}  // namespace

Result<bool> UpperBase::endsSealed(std::span<const Segment> segments) const {
  OBD_ASSIGN_OR_RETURN(const uint64_t size, data_->size());
  const std::vector<std::byte> wanted = encodeSegments(segments);
  if (size < kHeaderSize + wanted.size() + kHeaderSize) return false;
  const uint64_t indexOffset = size - kHeaderSize - wanted.size();
  std::array<std::byte, kHeaderSize> found;
  std::array<std::byte, kHeaderSize> trailer;
  encodeHeader(trailerFor(indexOffset, segments.size()), trailer);
  OBD_RETURN_IF_ERROR(data_->preadExact(found, size - kHeaderSize));
  if (found != trailer) return false;
  std::vector<std::byte> index(wanted.size());
  OBD_RETURN_IF_ERROR(data_->preadExact(index, indexOffset));
  return index == wanted;
}

Status UpperBase::writeSealedEnd(uint64_t indexOffset, std::span<const Segment> segments) {
  if (segments.size() > kLayerEntriesMax) {
    return {Code::kResourceExhausted, std::to_string(segments.size()) + " segments, a read-only layer holds " +
                                          std::to_string(kLayerEntriesMax)};
  }
  const std::vector<std::byte> bytes = encodeSegments(segments);
  if (!bytes.empty()) OBD_RETURN_IF_ERROR(data_->pwrite(bytes, indexOffset).withContext("seal: index"));
  if (Status status = data_->sync(); !status.isOk()) return fail(std::move(status).withContext("seal"));
  std::array<std::byte, kHeaderSize> trailer;
  encodeHeader(trailerFor(indexOffset, segments.size()), trailer);
  const uint64_t end = indexOffset + bytes.size();
  OBD_RETURN_IF_ERROR(data_->pwrite(trailer, end).withContext("seal: trailer"));
  OBD_RETURN_IF_ERROR(data_->truncate(end + kHeaderSize).withContext("seal"));
  if (Status status = data_->sync(); !status.isOk()) return fail(std::move(status).withContext("seal"));
  return Status::ok();
}

}  // namespace obd
