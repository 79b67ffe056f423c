// A writable layer: append-only (data file + index log) or sparse (one file with holes). FORMAT.md says what each
// writes and in which order.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/file.h"
#include "lsmt/format.h"
#include "lsmt/layer-stack.h"
#include "lsmt/upper-index.h"

namespace obd {

struct CreateUpperOptions {
  uint64_t virtualSize = 0;  // bytes, a multiple of 512; 0: taken over from the layers below at stacking
  bool sparse = false;
  Uuid uuid = Uuid::random();
  Uuid parentUuid;  // null: none
  std::string userTag;
};

struct OpenUpperOptions {
  bool write = true;           // false: only look; nothing on disk changes, not even a torn tail
  bool flushMarkers = false;   // write them (FORMAT.md); those found are honoured in any case
  std::string bootId = {};     // with flushMarkers: of the running kernel; tests vary it
  // The overload that takes paths opens the data file with O_DIRECT. Either then starts writes of whole 4 KiB blocks at a
  // multiple of 4096, which wastes up to 3584 bytes after a write that is not.
  bool directIo = false;
  uint64_t ioLimitBytes = 4 * kMiB;  // larger writes are split; a multiple of 4096 below 8 MiB
};

struct UpperStats {
  uint64_t dataBytes = 0;   // in the data file after its header
  uint64_t liveBytes = 0;   // of them still mapped; the rest is garbage (append) or holes (sparse)
  uint64_t logRecords = 0;  // entries of the index log that are not padding
  size_t indexMemoryBytes = 0;
};

// Any number of threads may call any method at once, except where a REQUIRES says otherwise. Overlapping concurrent
// requests are the caller's to order. Offsets and lengths are bytes and multiples of 512, else invalidArgument.
class Upper {
 public:
  Upper() = default;
  Upper(const Upper&) = delete;
  Upper& operator=(const Upper&) = delete;
  virtual ~Upper() = default;

  virtual bool isSparse() const = 0;
  virtual uint64_t virtualSize() const = 0;
  virtual const Uuid& uuid() const = 0;
  virtual const Uuid& parentUuid() const = 0;
  virtual const UpperIndex& index() const = 0;
  virtual const File& dataFile() const = 0;
  virtual UpperStats stats() const = 0;

  // Puts the layer on top of `lower` (borrowed, may be null): an own virtual size of 0 becomes that of the stack and is
  // written into both headers. REQUIRES: before the first request, or with the same content as before.
  virtual Status attachLower(const LayerStack* lower) = 0;

  // The layer's own content over that of the attached lower.
  virtual Status read(uint64_t offset, std::span<std::byte> out) const = 0;
  // On return the bytes survive the death of this process. After an error the range holds, sector by sector, what was
  // there or what was to be written, and nothing else changed. failedPrecondition: sealed or not opened for writing.
  virtual Status write(uint64_t offset, std::span<const std::byte> data) = 0;
  // The range reads as zeros and hides lower layers.
  virtual Status discard(uint64_t offset, uint64_t length) = 0;
  // Everything acknowledged before is durable on return. A failed sync is never forgotten: every later write and flush
  // fails with it.
  virtual Status flush() = 0;
  // Turns the data file into a read-only layer in place and makes it durable; reads go on, writes are refused.
  // Sealing what is sealed succeeds. After a failure or a crash it can be called again.
  virtual Status seal() = 0;
  // Collects index records and writes them `bytes` at a time (a multiple of 16; 0: each at once). What is collected is
  // lost when the process dies. Append-only layers; nothing to do on sparse ones. Not for flushMarkers.
  virtual Status setGroupCommit(size_t bytes) = 0;

  // The live segments in order: what seal and commit write.
  std::vector<Segment> segments() const { return index().segments(kHeaderSectors); }
};

// Both files new, or alreadyExists; they are durable on return, and neither is left behind on failure.
// invalidArgument: size not a multiple of 512 or too large, user tag too long.
Status createUpper(const std::string& dataPath, const std::string& indexPath, const CreateUpperOptions& options);
// The same into empty files. Does not sync.
Status createUpper(File& data, File& index, const CreateUpperOptions& options);

// The header of the data file says which kind it is. dataLoss if a file contradicts the format.
Result<std::unique_ptr<Upper>> openUpper(std::unique_ptr<File> data, std::unique_ptr<File> index,
                                         const OpenUpperOptions& options);
Result<std::unique_ptr<Upper>> openUpper(const std::string& dataPath, const std::string& indexPath,
                                         const OpenUpperOptions& options);

// Rewrites the virtual size in both headers and syncs. Growing needs no more; shrinking leaves mapped segments behind,
// out of reach. REQUIRES: nobody has the layer open.
Status resizeUpper(File& data, File& index, uint64_t virtualSize);

// The first 48 bits of a hash of the running kernel's boot id, and the id itself ("" if it cannot be read).
uint64_t hashBootId(const std::string& bootId);
std::string currentBootId();

}  // namespace obd
