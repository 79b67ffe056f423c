// What both kinds of writable layer share: files, header facts, the index, reading, and the failure that is never
// forgotten. Internal to lsmt.
#pragma once

#include <atomic>
#include <mutex>

#include "lsmt/upper.h"

namespace obd {

class UpperBase : public Upper {
 public:
  uint64_t virtualSize() const final { return virtualSize_; }
  const Uuid& uuid() const final { return header_.uuid; }
  const Uuid& parentUuid() const final { return header_.parentUuid; }
  const UpperIndex& index() const final { return index_; }
  const File& dataFile() const final { return *data_; }
  Status read(uint64_t offset, std::span<std::byte> out) const final;

 protected:
  UpperBase(std::unique_ptr<File> data, std::unique_ptr<File> indexFile, LayerHeader header, uint64_t virtualSize,
            const OpenUpperOptions& options)
      : data_(std::move(data)),
        indexFile_(std::move(indexFile)),
        header_(std::move(header)),
        virtualSize_(virtualSize),
        writable_(options.write),
        ioLimit_(options.ioLimitBytes),
        index_(virtualSize / kSectorSize) {}

  Status checkRange(uint64_t offset, uint64_t length) const;
  // Also: opened for writing, not sealed, no sync has failed.
  Status checkChange(uint64_t offset, uint64_t length) const;
  Status stickyFailure() const;
  // Remembers the first failure; returns `status`.
  Status fail(Status status);
  Status inheritVirtualSize(const LayerStack* lower);
  uint64_t liveBytes() const;
  // The trailer of §7.2: flags, uuid, parent and size of this layer, nothing else.
  LayerHeader trailerFor(uint64_t indexOffset, uint64_t entries) const;
  // Writes index and trailer at `indexOffset`, syncing between, so that a trailer never precedes what it names. Does
  // nothing when exactly this is there already. Keeps the file as it was (but for its length) on failure.
  Status writeSealedEnd(uint64_t indexOffset, std::span<const Segment> segments);
  // Whether the file already ends in an index of exactly these segments and a trailer.
  Result<bool> endsSealed(std::span<const Segment> segments) const;

  const std::unique_ptr<File> data_;
  const std::unique_ptr<File> indexFile_;
  const LayerHeader header_;  // of the data file; the uuid is that of the index file where it has a header
  uint64_t virtualSize_;
  const bool writable_;
  const uint64_t ioLimit_;
  const LayerStack* lower_ = nullptr;
  UpperIndex index_;
  std::atomic<bool> sealed_{false};

 private:
  std::atomic<bool> failed_{false};
  mutable std::mutex failureMutex_;
  Status failure_;  // guarded by failureMutex_
};

// Opens one kind; the header of the data file has been read and names it.
Result<std::unique_ptr<Upper>> openAppendUpper(std::unique_ptr<File> data, std::unique_ptr<File> index,
                                               const LayerHeader& header, const OpenUpperOptions& options);
Result<std::unique_ptr<Upper>> openSparseUpper(std::unique_ptr<File> data, std::unique_ptr<File> index,
                                               const LayerHeader& header, const OpenUpperOptions& options);

// The header of an index file: dataLoss unless its flags are those of an unsealed log.
Result<LayerHeader> readIndexHeader(const File& index);

// Calls visit(number, segment) for entries [0, count) of a log, read in large pieces; ends at a bad Status.
template <typename Visit>
Status forEachRecord(const File& index, uint64_t count, Visit&& visit) {
  constexpr uint64_t kBatch = 65536;
  std::vector<std::byte> bytes(std::min(count, kBatch) * kSegmentBytes);
  for (uint64_t first = 0; first < count; first += kBatch) {
    const uint64_t batch = std::min(count - first, kBatch);
    const std::span<std::byte> part = std::span(bytes).first(batch * kSegmentBytes);
    OBD_RETURN_IF_ERROR(index.preadExact(part, kHeaderSize + first * kSegmentBytes));
    for (uint64_t i = 0; i < batch; ++i) {
      const std::span<const std::byte> entry = part.subspan(i * kSegmentBytes);
      OBD_RETURN_IF_ERROR(visit(first + i, Segment::decode(entry.first<kSegmentBytes>())));
    }
  }
  return Status::ok();
}

constexpr uint64_t roundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace obd
