// Random access over the decompressed bytes of a ZFile.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "io/file.h"
#include "zfile/format.h"
#include "zfile/jump-table.h"

namespace obd {

// Format: FORMAT.md. Immutable after open(); any thread may read, with scratch memory of its own that it keeps (no
// allocation once warm). Everything that is handed out has had its block checksum verified, where the file has them,
// and its length checked. Every writing method fails with failedPrecondition.
class ZFileReader final : public File {
 public:
  // True if the file starts with a ZFile header, however damaged the rest; false if it is something else or shorter.
  static Result<bool> detect(const File& file);

  // dataLoss: header, trailer or jump table are damaged or disagree; unimplemented: an algorithm, a dictionary or a
  // compressed jump table we do not read.
  static Result<std::unique_ptr<ZFileReader>> open(std::unique_ptr<File> file);

  // dataLoss names the block. Other blocks stay readable. Shortened at the end of the content.
  Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const override;
  Result<uint64_t> size() const override { return record_.originalSize; }
  // The format has no holes: data up to the end.
  Result<uint64_t> seekData(uint64_t offset) const override;
  Result<uint64_t> seekHole(uint64_t offset) const override;
  Status pwrite(std::span<const std::byte> data, uint64_t offset) override;
  Status sync() override { return Status::ok(); }
  Status truncate(uint64_t sizeBytes) override;
  Status punchHole(uint64_t offset, uint64_t length) override;
  const std::string& name() const override { return file_->name(); }

  // The record that was believed: the final header or the trailer.
  const zfile::Record& record() const { return record_; }
  uint64_t blockCount() const { return table_.blockCount(); }
  // Bytes of memory that the jump table takes.
  size_t indexMemoryBytes() const { return table_.memoryBytes(); }

 private:
  ZFileReader(std::unique_ptr<File> file, const zfile::Record& record, zfile::JumpTable table);

  Status readBlocks(uint64_t firstBlock, uint64_t endBlock, uint64_t begin, std::span<std::byte> out) const;
  Status decode(uint64_t block, std::span<const std::byte> stored, std::span<std::byte> out) const;
  // Bytes of the content that block `index` holds.
  size_t contentLength(uint64_t block) const;

  std::unique_ptr<File> file_;
  zfile::Record record_;
  zfile::JumpTable table_;
  uint64_t id_;  // never reused: names this reader in the threads' decoded-block caches
};

}  // namespace obd
