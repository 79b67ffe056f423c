// The append-only writable layer (formats.md §5) with the flush markers of FORMAT.md.
#include <algorithm>
#include <cstring>

#include "lsmt/flush-marker.h"
#include "lsmt/upper-base.h"

namespace obd {
namespace {

// What one pass over a log finds out before any record is believed.
struct LogSurvey {
  uint64_t entries = 0;        // whole 16-byte entries in the file
  uint64_t durableEntries = 0;  // that many from the start had their data durable
  std::optional<uint64_t> session;  // boot hash of the last session
  bool hasMarkers = false;
  bool foreignTail = false;  // the original wrote after our last marker
  bool hasRecords = false;
};

Result<LogSurvey> surveyLog(const File& index) {
  OBD_ASSIGN_OR_RETURN(const uint64_t size, index.size());
  LogSurvey survey;
  survey.entries = (size - kHeaderSize) / kSegmentBytes;
  if (survey.entries > kLogRecordsMax) return dataLoss(index.name() + ": more than 128000000 records");
  OBD_RETURN_IF_ERROR(forEachRecord(index, survey.entries, [&](uint64_t number, const Segment& entry) {
    if (!entry.isPadding()) {
      survey.hasRecords = true;
      // The original leaves the number of layers below in the tag, we write 0.
      if (survey.hasMarkers && entry.tag() != 0) survey.foreignTail = true;
    } else if (entry.tag() == kFlushMarkerTag) {
      survey.hasMarkers = true;
      survey.foreignTail = false;
      survey.durableEntries = std::max(survey.durableEntries, std::min(entry.moffset(), number));
    } else if (entry.tag() == kSessionMarkerTag) {
      survey.hasMarkers = true;
      survey.session = entry.moffset();
    }
    return Status::ok();
  }));
  return survey;
}

class AppendUpper final : public UpperBase {
 public:
  AppendUpper(std::unique_ptr<File> data, std::unique_ptr<File> indexFile, LayerHeader header, uint64_t virtualSize,
              const OpenUpperOptions& options)
      : UpperBase(std::move(data), std::move(indexFile), std::move(header), virtualSize, options),
        blockAlign_(options.directIo ? 4096 : kSectorSize) {}

  ~AppendUpper() override {
    const std::lock_guard lock(logMutex_);
    static_cast<void>(writeCollected());  // as far as it goes: nobody was promised these records
  }

  // REQUIRES: called once, before anything else.
  Status replay(const OpenUpperOptions& options);

  bool isSparse() const override { return false; }
  UpperStats stats() const override;
  Status attachLower(const LayerStack* lower) override { return inheritVirtualSize(lower); }
  Status write(uint64_t offset, std::span<const std::byte> data) override;
  Status discard(uint64_t offset, uint64_t length) override;
  Status flush() override;
  Status seal() override;
  Status setGroupCommit(size_t bytes) override;

 private:
  static constexpr uint64_t kClosed = uint64_t{1} << 63;  // in dataEnd_: no more room is given out
  static constexpr size_t kRecordsPerWrite = 64;

  Status startSession(const LogSurvey& survey, bool cut, uint64_t bootHash);
  Status writePiece(uint64_t offset, std::span<const std::byte> data);
  Status appendEntries(std::span<const Segment> entries);
  Status appendBytes(std::span<const std::byte> bytes);
  Status writeCollected();
  Status flushLocked();
  uint64_t logEntries() const { return (logEnd_ - kHeaderSize) / kSegmentBytes; }

  // Whole blocks start at a multiple of it: one write of a single sector would otherwise put all later ones off the
  // grid that direct I/O needs.
  const uint64_t blockAlign_;
  // Next free byte of the data file. Room is reserved without a lock; seal closes it with kClosed.
  std::atomic<uint64_t> dataEnd_{kHeaderSize};

  // Orders records and index changes; held for one short write to the page cache.
  mutable std::mutex logMutex_;
  uint64_t logEnd_ = kHeaderSize;       // bytes; a whole entry
  uint64_t writtenEnd_ = kHeaderSize;   // data up to here is known to be in the file, but for holes of failed writes
  uint64_t records_ = 0;                // entries that are not padding
  uint64_t changes_ = 1;                // counts acknowledged changes; starts ahead of flushedChanges_ because records
                                        // found in the log may not be durable
  std::vector<std::byte> collected_;    // group commit
  size_t groupBytes_ = 0;
  bool markers_ = false;

  // One flush or seal at a time; who waited finds its work done.
  std::mutex flushMutex_;
  uint64_t flushedChanges_ = 0;
};

Status AppendUpper::replay(const OpenUpperOptions& options) {
  OBD_ASSIGN_OR_RETURN(const uint64_t dataSize, data_->size());
  OBD_ASSIGN_OR_RETURN(const uint64_t indexSize, indexFile_->size());
  OBD_ASSIGN_OR_RETURN(const LogSurvey survey, surveyLog(*indexFile_));
  const std::string bootId = options.bootId.empty() ? currentBootId() : options.bootId;
  const uint64_t bootHash = hashBootId(bootId);

  uint64_t limit = survey.entries;
  const bool machineDied = survey.session.has_value() && !bootId.empty() && *survey.session != bootHash;
  if (machineDied && !survey.foreignTail) limit = std::min(limit, survey.durableEntries);

  const uint64_t endOfData = dataSize / kSectorSize;
  const uint64_t reachable = virtualSize_ == 0 ? kPaddingOffset : virtualSize_ / kSectorSize;
  uint64_t accepted = limit;
  OBD_RETURN_IF_ERROR(forEachRecord(*indexFile_, limit, [&](uint64_t number, const Segment& record) {
    if (number >= accepted || record.isPadding()) return Status::ok();
    const bool inRange = record.end() <= kPaddingOffset && record.moffset() >= kHeaderSectors &&
                         (record.zeroed() ? record.moffset() <= endOfData
                                          : record.moffset() < endOfData && record.mend() <= endOfData);
    if (!inRange) {
      if (!survey.hasMarkers || number < survey.durableEntries) {
        return dataLoss(indexFile_->name() + ": record " + std::to_string(number) + " points outside the data");
      }
      accepted = number;  // it outran its data, and nobody was promised it
      return Status::ok();
    }
    ++records_;
    const uint64_t end = std::min(record.end(), reachable);
    if (record.length() == 0 || record.offset() >= end) return Status::ok();
    if (end > index_.coveredSectors()) index_.grow(end);
    if (record.zeroed()) {
      index_.zero(record.offset(), end - record.offset());
    } else {
      index_.map(record.offset(), end - record.offset(), record.moffset());
    }
    return Status::ok();
  }));

  dataEnd_.store(roundUp(dataSize, kSectorSize));
  writtenEnd_ = dataSize;
  logEnd_ = kHeaderSize + accepted * kSegmentBytes;
  if (!writable_) return Status::ok();
  const bool cut = accepted < survey.entries;
  if (logEnd_ != indexSize) OBD_RETURN_IF_ERROR(indexFile_->truncate(logEnd_).withContext("cut the torn log"));
  // A log that has markers keeps getting them: records behind the last one count as lost when the machine dies.
  markers_ = options.flushMarkers || survey.hasMarkers;
  if (markers_) OBD_RETURN_IF_ERROR(startSession(survey, cut, bootHash).withContext("start a session in the log"));
  return Status::ok();
}

Status AppendUpper::startSession(const LogSurvey& survey, bool cut, uint64_t bootHash) {
  if (survey.session == bootHash && !cut) return Status::ok();
  const std::lock_guard lock(logMutex_);
  // Records from before our first marker, or of the original, become durable now: from here on only what a marker
  // vouches for outlives the machine. What a cut left over is durable already.
  const bool vouch = !cut && records_ > 0 && (!survey.hasMarkers || survey.foreignTail);
  if (vouch) {
    if (Status status = data_->sync(); !status.isOk()) return fail(std::move(status));
  }
  std::vector<Segment> entries;
  const uint64_t durable = vouch ? logEntries() : std::min(logEntries(), survey.durableEntries);
  if (durable > 0) entries.push_back(flushMarker(durable));
  entries.push_back(sessionMarker(bootHash));
  OBD_RETURN_IF_ERROR(appendEntries(entries));
  if (durable > 0) {
    if (Status status = indexFile_->sync(); !status.isOk()) return fail(std::move(status));
  }
  return Status::ok();
}

UpperStats AppendUpper::stats() const {
  UpperStats stats;
  {
    const std::lock_guard lock(logMutex_);
    stats.dataBytes = (dataEnd_.load() & ~kClosed) - kHeaderSize;
    stats.logRecords = records_;
  }
  stats.liveBytes = liveBytes();
  stats.indexMemoryBytes = index_.memoryBytes();
  return stats;
}

// REQUIRES: logMutex_ held. All or nothing: a partly written tail is taken back.
Status AppendUpper::appendBytes(std::span<const std::byte> bytes) {
  Status status = indexFile_->pwrite(bytes, logEnd_);
  if (!status.isOk()) {
    // Should this fail too, the next record overwrites the same place, and replay ignores a torn last record.
    static_cast<void>(indexFile_->truncate(logEnd_));
    return std::move(status).withContext("index log");
  }
  logEnd_ += bytes.size();
  return Status::ok();
}

// REQUIRES: logMutex_ held, at most kRecordsPerWrite entries.
Status AppendUpper::appendEntries(std::span<const Segment> entries) {
  std::array<std::byte, kRecordsPerWrite * kSegmentBytes> bytes;
  const std::span<std::byte> used = std::span(bytes).first(entries.size() * kSegmentBytes);
  for (size_t i = 0; i < entries.size(); ++i) entries[i].encode(used.subspan(i * kSegmentBytes).first<kSegmentBytes>());
  if (groupBytes_ == 0) return appendBytes(used);

  for (size_t at = 0; at < used.size(); at += kSegmentBytes) {
    const std::span<std::byte> entry = used.subspan(at, kSegmentBytes);
    collected_.insert(collected_.end(), entry.begin(), entry.end());
    if (collected_.size() < groupBytes_) continue;
    if (Status status = appendBytes(collected_); !status.isOk()) {
      collected_.resize(collected_.size() - kSegmentBytes);
      return status;
    }
    collected_.clear();
  }
  return Status::ok();
}

// Fills the rest of the group with padding and writes it. REQUIRES: logMutex_ held.
Status AppendUpper::writeCollected() {
  if (collected_.empty()) return Status::ok();
  const size_t used = collected_.size();
  collected_.resize(groupBytes_);
  for (size_t at = used; at < groupBytes_; at += kSegmentBytes) {
    Segment::padding().encode(std::span(collected_).subspan(at).first<kSegmentBytes>());
  }
  Status status = appendBytes(collected_);
  collected_.resize(status.isOk() ? 0 : used);
  return status;
}

Status AppendUpper::setGroupCommit(size_t bytes) {
  if (bytes % kSegmentBytes != 0) return invalidArgument("group of a size that is not a multiple of 16");
  const std::lock_guard lock(logMutex_);
  if (markers_ && bytes != 0) return failedPrecondition("flush markers need every record in the log at once");
  OBD_RETURN_IF_ERROR(writeCollected());
  groupBytes_ = bytes;
  collected_.reserve(bytes);
  return Status::ok();
}

Status AppendUpper::write(uint64_t offset, std::span<const std::byte> data) {
  OBD_RETURN_IF_ERROR(checkChange(offset, data.size()));
  while (!data.empty()) {
    const std::span<const std::byte> piece = data.first(std::min<uint64_t>(data.size(), ioLimit_));
    OBD_RETURN_IF_ERROR(writePiece(offset, piece));
    offset += piece.size();
    data = data.subspan(piece.size());
  }
  return Status::ok();
}

Status AppendUpper::writePiece(uint64_t offset, std::span<const std::byte> data) {
  uint64_t end = dataEnd_.load(std::memory_order_relaxed);
  uint64_t at = 0;
  do {
    if ((end & kClosed) != 0) return failedPrecondition("the layer is sealed");
    at = data.size() % blockAlign_ == 0 ? roundUp(end, blockAlign_) : end;
  } while (!dataEnd_.compare_exchange_weak(end, at + data.size(), std::memory_order_relaxed));

  if (Status status = data_->pwrite(data, at); !status.isOk()) {
    // Gives the room back if nobody reserved behind us; otherwise it stays as garbage no record names.
    uint64_t expected = at + data.size();
    dataEnd_.compare_exchange_strong(expected, at, std::memory_order_relaxed);
    return std::move(status).withContext("data");
  }

  const Segment record(offset / kSectorSize, data.size() / kSectorSize, at / kSectorSize);
  const std::lock_guard lock(logMutex_);
  if (sealed_.load(std::memory_order_relaxed)) return failedPrecondition("the layer is sealed");
  writtenEnd_ = std::max(writtenEnd_, at + data.size());
  OBD_RETURN_IF_ERROR(appendEntries({&record, 1}));
  index_.map(record.offset(), record.length(), record.moffset());
  ++records_;
  ++changes_;
  return Status::ok();
}

Status AppendUpper::discard(uint64_t offset, uint64_t length) {
  OBD_RETURN_IF_ERROR(checkChange(offset, length));
  uint64_t begin = offset / kSectorSize;
  const uint64_t end = begin + length / kSectorSize;
  while (begin < end) {
    // The lock is given up between batches, so that discarding a whole disk does not hold up writers for long.
    const std::lock_guard lock(logMutex_);
    if (sealed_.load(std::memory_order_relaxed)) return failedPrecondition("the layer is sealed");
    std::array<Segment, kRecordsPerWrite> batch;
    size_t count = 0;
    uint64_t at = begin;
    for (; at < end && count < batch.size(); ++count) {
      const uint64_t part = std::min(end - at, kSegmentSectorsMax);
      batch[count] = Segment(at, part, writtenEnd_ / kSectorSize, true);
      at += part;
    }
    OBD_RETURN_IF_ERROR(appendEntries(std::span(batch).first(count)));
    index_.zero(begin, at - begin);
    records_ += count;
    ++changes_;
    begin = at;
  }
  return Status::ok();
}

Status AppendUpper::flush() {
  const std::lock_guard lock(flushMutex_);
  return flushLocked();
}

// REQUIRES: flushMutex_ held.
Status AppendUpper::flushLocked() {
  OBD_RETURN_IF_ERROR(stickyFailure());
  if (!writable_) return Status::ok();
  uint64_t entries = 0;
  uint64_t changes = 0;
  bool markers = false;
  {
    const std::lock_guard lock(logMutex_);
    if (changes_ == flushedChanges_) return Status::ok();
    OBD_RETURN_IF_ERROR(writeCollected());
    entries = logEntries();  // the data of these is in the file: a record follows its data
    changes = changes_;
    markers = markers_ && records_ > 0;
  }
  if (Status status = data_->sync(); !status.isOk()) return fail(std::move(status).withContext("flush: data"));
  if (markers) {
    const Segment marker = flushMarker(entries);
    const std::lock_guard lock(logMutex_);
    OBD_RETURN_IF_ERROR(appendEntries({&marker, 1}).withContext("flush: marker"));
  }
  if (Status status = indexFile_->sync(); !status.isOk()) return fail(std::move(status).withContext("flush: index"));
  flushedChanges_ = changes;
  return Status::ok();
}

Status AppendUpper::seal() {
  const std::lock_guard flushLock(flushMutex_);
  if (!writable_) return failedPrecondition("the layer is open for reading only");
  OBD_RETURN_IF_ERROR(stickyFailure());
  if (sealed_.load()) return Status::ok();

  // First no more room, then no more records: what is in the index now is all there will be.
  const uint64_t end = dataEnd_.fetch_or(kClosed);
  std::vector<Segment> live;
  {
    const std::lock_guard lock(logMutex_);
    sealed_.store(true);
    live = segments();
  }
  const auto finish = [&]() -> Status {
    OBD_RETURN_IF_ERROR(flushLocked());
    OBD_ASSIGN_OR_RETURN(const bool done, endsSealed(live));
    if (done) return data_->sync();
    OBD_ASSIGN_OR_RETURN(const uint64_t size, data_->size());
    return writeSealedEnd(std::max(end, roundUp(size, kSectorSize)), live);
  };
  Status status = finish();
  if (!status.isOk()) {
    // Writable again. Whatever was written of the end goes, or stays as garbage behind the data.
    static_cast<void>(data_->truncate(end));
    const std::lock_guard lock(logMutex_);
    sealed_.store(false);
    dataEnd_.store(end);
  }
  return status;
}

}  // namespace

Result<std::unique_ptr<Upper>> openAppendUpper(std::unique_ptr<File> data, std::unique_ptr<File> index,
                                               const LayerHeader& header, const OpenUpperOptions& options) {
  OBD_ASSIGN_OR_RETURN(const LayerHeader indexHeader, readIndexHeader(*index));
  LayerHeader merged = header;
  merged.uuid = indexHeader.uuid;
  auto upper = std::make_unique<AppendUpper>(std::move(data), std::move(index), std::move(merged),
                                             indexHeader.virtualSize, options);
  OBD_RETURN_IF_ERROR(upper->replay(options));
  return std::unique_ptr<Upper>(std::move(upper));
}

}  // namespace obd
