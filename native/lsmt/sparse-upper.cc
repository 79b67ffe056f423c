// The sparse writable layer (formats.md §6): logical byte o is byte o + 4096 of one sparse file. Ours keeps discards over
// lower layers in the index file and never widens a write (FORMAT.md).
#include <algorithm>
#include <cstring>
#include <shared_mutex>

#include "lsmt/upper-base.h"

namespace obd {
namespace {

class SparseUpper final : public UpperBase {
 public:
  SparseUpper(std::unique_ptr<File> data, std::unique_ptr<File> indexFile, LayerHeader header, uint64_t virtualSize,
              const OpenUpperOptions& options)
      : UpperBase(std::move(data), std::move(indexFile), std::move(header), virtualSize, options) {}

  // REQUIRES: called once, before anything else.
  Status load();

  bool isSparse() const override { return true; }
  UpperStats stats() const override;
  Status attachLower(const LayerStack* lower) override { return inheritVirtualSize(lower); }
  Status write(uint64_t offset, std::span<const std::byte> data) override;
  Status discard(uint64_t offset, uint64_t length) override;
  Status flush() override;
  Status seal() override;
  Status setGroupCommit(size_t) override { return Status::ok(); }

 private:
  static constexpr uint64_t kBlock = 4096;  // what a hole is made of
  static constexpr size_t kStripes = 64;

  Status loadDiscards();
  Status loadExtents();
  // One kind of run over the whole range, or not.
  bool isWholly(RunKind kind, uint64_t offset, uint64_t length) const;
  Status writeBlocks(uint64_t offset, std::span<const std::byte> data);
  Status writeWithinBlock(uint64_t offset, std::span<const std::byte> data);
  Status discardBlocks(uint64_t offset, uint64_t length);
  Status recordDiscard(uint64_t offset, uint64_t length);
  void map(uint64_t offset, uint64_t length);
  Status flushLocked();

  std::unique_lock<std::shared_mutex> closeGate();

  // Writers share it, a discard has it alone: otherwise a hole could be punched under a block just written and its
  // index entry outlive it. A shared_mutex lets a stream of writers starve who wants it alone, so while somebody waits
  // new writers queue behind the turnstile.
  std::shared_mutex discardGate_;
  std::mutex turnstile_;
  std::atomic<int> waiting_{0};
  // A write into part of a block that is not wholly here reads the rest from below and writes the whole block: two such
  // writes into one block must not lose each other's half.
  std::array<std::mutex, kStripes> stripes_;
  std::mutex indexMutex_;  // orders changes of index_
  uint64_t logEnd_ = 0;    // bytes of the index file that count: 0, or the header and whole records. With discardGate_
  std::atomic<uint64_t> records_{0};
  std::atomic<uint64_t> changes_{1};
  std::mutex flushMutex_;
  uint64_t flushedChanges_ = 0;
};

Status SparseUpper::load() {
  OBD_RETURN_IF_ERROR(loadDiscards());
  return loadExtents();
}

Status SparseUpper::loadDiscards() {
  OBD_ASSIGN_OR_RETURN(const uint64_t size, indexFile_->size());
  if (size < kHeaderSize) return Status::ok();  // the form of the original, or a header that was never finished
  const Result<LayerHeader> header = readIndexHeader(*indexFile_);
  if (!header.isOk()) return header.status();
  const uint64_t count = (size - kHeaderSize) / kSegmentBytes;
  if (count > kLogRecordsMax) return dataLoss(indexFile_->name() + ": more than 128000000 records");
  logEnd_ = kHeaderSize + count * kSegmentBytes;
  const uint64_t reachable = virtualSize_ / kSectorSize;
  return forEachRecord(*indexFile_, count, [&](uint64_t number, const Segment& record) {
    if (record.isPadding()) return Status::ok();
    if (!record.zeroed() || record.end() > kPaddingOffset || record.moffset() != record.offset() + kHeaderSectors) {
      return dataLoss(indexFile_->name() + ": record " + std::to_string(number) + " is not a discard of a sparse layer");
    }
    ++records_;
    const uint64_t end = std::min(record.end(), reachable);
    if (record.offset() < end) index_.zero(record.offset(), end - record.offset());
    return Status::ok();
  });
}

Status SparseUpper::loadExtents() {
  OBD_ASSIGN_OR_RETURN(const uint64_t size, data_->size());
  // What follows the content (a sealed end) is not content; a cut sector reads as zeros behind the cut.
  const uint64_t end = std::min(roundUp(size, kSectorSize), kHeaderSize + virtualSize_);
  for (uint64_t at = kHeaderSize; at < end;) {
    OBD_ASSIGN_OR_RETURN(const uint64_t begin, data_->seekData(at));
    if (begin >= std::min(size, end)) break;
    OBD_ASSIGN_OR_RETURN(const uint64_t hole, data_->seekHole(begin));
    const uint64_t from = begin / kSectorSize;
    const uint64_t to = std::min(roundUp(hole, kSectorSize), end) / kSectorSize;
    if (to <= from) return ioError(data_->name() + ": the file system reports an extent that ends before it starts");
    index_.map(from - kHeaderSectors, to - from, from);
    at = to * kSectorSize;
  }
  return Status::ok();
}

UpperStats SparseUpper::stats() const {
  UpperStats stats;
  stats.dataBytes = virtualSize_;
  stats.liveBytes = liveBytes();
  stats.logRecords = records_.load(std::memory_order_relaxed);
  stats.indexMemoryBytes = index_.memoryBytes();
  return stats;
}

bool SparseUpper::isWholly(RunKind kind, uint64_t offset, uint64_t length) const {
  bool wholly = true;
  static_cast<void>(index_.lookup(offset / kSectorSize, (offset + length) / kSectorSize, [&](const Run& run) {
    wholly = run.kind == kind;
    return wholly;
  }));
  return wholly;
}

void SparseUpper::map(uint64_t offset, uint64_t length) {
  const std::lock_guard lock(indexMutex_);
  index_.map(offset / kSectorSize, length / kSectorSize, offset / kSectorSize + kHeaderSectors);
}

Status SparseUpper::write(uint64_t offset, std::span<const std::byte> data) {
  if (waiting_.load(std::memory_order_relaxed) != 0) {
    const std::lock_guard turn(turnstile_);
  }
  const std::shared_lock gate(discardGate_);
  OBD_RETURN_IF_ERROR(checkChange(offset, data.size()));
  while (!data.empty()) {
    const uint64_t inBlock = offset % kBlock;
    const bool whole = inBlock == 0 && data.size() >= kBlock;
    const uint64_t length = whole ? std::min<uint64_t>(data.size() / kBlock * kBlock, ioLimit_)
                                  : std::min<uint64_t>(data.size(), kBlock - inBlock);
    OBD_RETURN_IF_ERROR(whole ? writeBlocks(offset, data.first(length)) : writeWithinBlock(offset, data.first(length)));
    changes_.fetch_add(1);
    offset += length;
    data = data.subspan(length);
  }
  return Status::ok();
}

Status SparseUpper::writeBlocks(uint64_t offset, std::span<const std::byte> data) {
  if (Status status = data_->pwrite(data, offset + kHeaderSize); !status.isOk()) {
    // Blocks that were holes become holes again: a reopened layer must not take a half-written one for content.
    static_cast<void>(index_.lookup(offset / kSectorSize, (offset + data.size()) / kSectorSize, [&](const Run& run) {
      if (run.kind != RunKind::kData) {
        static_cast<void>(data_->punchHole(run.offset * kSectorSize + kHeaderSize, run.length * kSectorSize));
      }
      return true;
    }));
    return std::move(status).withContext("data");
  }
  if (!isWholly(RunKind::kData, offset, data.size())) map(offset, data.size());
  return Status::ok();
}

Status SparseUpper::writeWithinBlock(uint64_t offset, std::span<const std::byte> data) {
  const uint64_t start = offset / kBlock * kBlock;
  const uint64_t length = std::min(kBlock, virtualSize_ - start);
  if (isWholly(RunKind::kData, start, length)) return data_->pwrite(data, offset + kHeaderSize).withContext("data");

  const std::lock_guard stripe(stripes_[start / kBlock % kStripes]);
  alignas(kBlock) std::array<std::byte, kBlock> bytes;
  const std::span<std::byte> block = std::span(bytes).first(length);
  OBD_RETURN_IF_ERROR(read(start, block).withContext("copy up the rest of a block"));
  std::memcpy(block.data() + (offset - start), data.data(), data.size());
  return writeBlocks(start, block);
}

std::unique_lock<std::shared_mutex> SparseUpper::closeGate() {
  waiting_.fetch_add(1);
  const std::lock_guard turn(turnstile_);
  std::unique_lock gate(discardGate_);
  waiting_.fetch_sub(1);
  return gate;
}

Status SparseUpper::discard(uint64_t offset, uint64_t length) {
  const std::unique_lock gate = closeGate();
  OBD_RETURN_IF_ERROR(checkChange(offset, length));
  const uint64_t end = offset + length;
  const uint64_t wholeEnd = end == virtualSize_ ? end : end / kBlock * kBlock;
  static constexpr std::array<std::byte, kBlock> kZeros{};
  for (uint64_t at = offset; at < end;) {
    changes_.fetch_add(1);
    if (at % kBlock == 0 && at < wholeEnd) {
      OBD_RETURN_IF_ERROR(discardBlocks(at, wholeEnd - at));
      at = wholeEnd;
      continue;
    }
    const uint64_t part = std::min(end - at, kBlock - at % kBlock);
    const bool zeroAlready = isWholly(RunKind::kZero, at, part) || (lower_ == nullptr && isWholly(RunKind::kGap, at, part));
    if (!zeroAlready) OBD_RETURN_IF_ERROR(writeWithinBlock(at, std::span(kZeros).first(part)));
    at += part;
  }
  return Status::ok();
}

// Record, hole, index: a crash in between leaves what was there, because an extent outweighs a record on reopening.
// REQUIRES: discardGate_ held alone.
Status SparseUpper::discardBlocks(uint64_t offset, uint64_t length) {
  if (isWholly(RunKind::kZero, offset, length)) return Status::ok();
  if (lower_ != nullptr) OBD_RETURN_IF_ERROR(recordDiscard(offset, length));
  OBD_RETURN_IF_ERROR(data_->punchHole(offset + kHeaderSize, length).withContext("discard"));
  const std::lock_guard lock(indexMutex_);
  index_.zero(offset / kSectorSize, length / kSectorSize);
  return Status::ok();
}

// REQUIRES: discardGate_ held alone.
Status SparseUpper::recordDiscard(uint64_t offset, uint64_t length) {
  if (logEnd_ == 0) {
    LayerHeader header = header_;
    header.flags = kFlagHeader;
    header.indexOffset = kHeaderSize;
    header.virtualSize = virtualSize_;
    std::array<std::byte, kHeaderSize> bytes;
    encodeHeader(header, bytes);
    OBD_RETURN_IF_ERROR(indexFile_->truncate(0).withContext("index log"));
    OBD_RETURN_IF_ERROR(indexFile_->pwrite(bytes, 0).withContext("index log"));
    logEnd_ = kHeaderSize;
  }
  std::array<std::byte, 64 * kSegmentBytes> bytes;
  const uint64_t end = (offset + length) / kSectorSize;
  for (uint64_t at = offset / kSectorSize; at < end;) {
    size_t used = 0;
    for (; at < end && used < bytes.size(); used += kSegmentBytes) {
      const uint64_t part = std::min(end - at, kSegmentSectorsMax);
      Segment(at, part, at + kHeaderSectors, true).encode(std::span(bytes).subspan(used).first<kSegmentBytes>());
      at += part;
    }
    if (Status status = indexFile_->pwrite(std::span(bytes).first(used), logEnd_); !status.isOk()) {
      static_cast<void>(indexFile_->truncate(logEnd_));
      return std::move(status).withContext("index log");
    }
    logEnd_ += used;
    records_.fetch_add(used / kSegmentBytes);
  }
  return Status::ok();
}

Status SparseUpper::flush() {
  const std::lock_guard lock(flushMutex_);
  return flushLocked();
}

// REQUIRES: flushMutex_ held. The log first: a hole whose record is lost would show the lower layers.
Status SparseUpper::flushLocked() {
  OBD_RETURN_IF_ERROR(stickyFailure());
  if (!writable_) return Status::ok();
  const uint64_t changes = changes_.load();
  if (changes == flushedChanges_) return Status::ok();
  if (Status status = indexFile_->sync(); !status.isOk()) return fail(std::move(status).withContext("flush: index"));
  if (Status status = data_->sync(); !status.isOk()) return fail(std::move(status).withContext("flush: data"));
  flushedChanges_ = changes;
  return Status::ok();
}

Status SparseUpper::seal() {
  const std::lock_guard flushLock(flushMutex_);
  const std::unique_lock gate = closeGate();
  if (!writable_) return failedPrecondition("the layer is open for reading only");
  OBD_RETURN_IF_ERROR(stickyFailure());
  if (sealed_.load()) return Status::ok();
  OBD_RETURN_IF_ERROR(flushLocked());
  const std::vector<Segment> live = segments();
  OBD_ASSIGN_OR_RETURN(const bool done, endsSealed(live));
  const uint64_t contentEnd = kHeaderSize + virtualSize_;
  Status status = done ? data_->sync() : writeSealedEnd(contentEnd, live);
  if (!status.isOk()) {
    static_cast<void>(data_->truncate(contentEnd));
    return status;
  }
  sealed_.store(true, std::memory_order_release);
  return status;
}

}  // namespace

Result<std::unique_ptr<Upper>> openSparseUpper(std::unique_ptr<File> data, std::unique_ptr<File> index,
                                               const LayerHeader& header, const OpenUpperOptions& options) {
  auto upper = std::make_unique<SparseUpper>(std::move(data), std::move(index), header, header.virtualSize, options);
  OBD_RETURN_IF_ERROR(upper->load());
  return std::unique_ptr<Upper>(std::move(upper));
}

}  // namespace obd
