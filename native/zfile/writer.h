// Compresses a byte stream into a ZFile.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "io/file.h"
#include "io/sink.h"
#include "zfile/format.h"

namespace obd {

struct ZFileOptions {
  zfile::Algorithm algorithm = zfile::Algorithm::kLz4;
  uint32_t blockSize = 4096;  // 4096, 8192, 16384, 32768 or 65536
  bool checksums = true;
  // Threads that compress, the writing one included. The output does not depend on it. 0 counts as 1.
  uint32_t threads = 1;
  // Write blocks that take more than 65536 bytes in the file, which the original cannot read. Possible with 64 KiB
  // blocks of incompressible data only; without this they are an error, see blockTooLarge().
  bool allowLargeBlocks = false;
  // Once all is written and durable, put the final values into the header, which is at `headerOffset` of this file.
  // Borrowed. Null: the header stays as it is and readers use the trailer.
  File* rewriteHeaderIn = nullptr;
  uint64_t headerOffset = 0;
};

// Format: FORMAT.md. Confined to one thread (its helpers are its own). Borrows `below`, which must outlive it.
// The bytes depend on the input and the format options alone.
class ZFileWriter final : public Sink {
 public:
  // REQUIRES: zfile::isLegalBlockSize(options.blockSize).
  ZFileWriter(Sink& below, const ZFileOptions& options);
  ~ZFileWriter() override;

  // What the stage below reports, or failedPrecondition when a block is too large. Blocks may be written below later
  // than the call that filled them.
  Status write(std::span<const std::byte> data) override;
  // Jump table and trailer, finish() of the stage below, then the rewritten header, synced.
  Status finish() override;

  // The failure was a block of more than 65536 stored bytes: the same input with blocks of 32 KiB has none.
  bool blockTooLarge() const { return blockTooLarge_; }

 private:
  class Pool;

  Status fail(Status status);
  Status submitChunk();
  Status drainOne();

  Sink& below_;
  ZFileOptions options_;
  std::unique_ptr<Pool> pool_;
  std::vector<std::byte> index_;  // the jump table so far, as it will be written
  uint64_t originalSize_ = 0;
  uint64_t position_ = 0;  // bytes given to the stage below
  bool headerWritten_ = false;
  bool finished_ = false;
  bool blockTooLarge_ = false;
  Status failure_;
};

}  // namespace obd
