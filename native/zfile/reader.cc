#include "zfile/reader.h"

#include <lz4.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <vector>

#include "zfile/crc32c.h"

namespace obd {
namespace {

using zfile::Algorithm;
using zfile::kChecksumSize;
using zfile::kIndexEntrySize;
using zfile::kMaxBlockSize;
using zfile::kRecordSize;

// Stored bytes fetched by one pread of the file below. At least one block of the longest kind fits.
constexpr size_t kSpanSize = 256 * 1024;
static_assert(kSpanSize >= 2 * kMaxBlockSize);

// Blocks of which only a part was asked for, decoded and kept: a sequential reader of 4 KiB pieces decodes a 64 KiB
// block once. A few, because one thread reads several layers of a stack in turn.
constexpr size_t kKeptBlocks = 4;

struct KeptBlock {
  uint64_t reader = 0;  // 0 = empty
  uint64_t block = 0;
  uint64_t lastUse = 0;
  std::unique_ptr<std::byte[]> bytes;
};

// One per reading thread, made at its first read and freed when it ends.
struct Scratch {
  std::unique_ptr<std::byte[]> stored = std::make_unique_for_overwrite<std::byte[]>(kSpanSize);
  std::array<KeptBlock, kKeptBlocks> kept;
  uint64_t uses = 0;
  ZSTD_DCtx* zstd = nullptr;

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ZSTD_freeDCtx(zstd); }

  const KeptBlock* find(uint64_t reader, uint64_t block) {
    for (KeptBlock& candidate : kept) {
      if (candidate.reader == reader && candidate.block == block) {
        candidate.lastUse = ++uses;
        return &candidate;
      }
    }
    return nullptr;
  }

  // The least recently used slot, empty until the caller names it.
  KeptBlock& evict() {
    KeptBlock& oldest = *std::min_element(
        kept.begin(), kept.end(), [](const KeptBlock& a, const KeptBlock& b) { return a.lastUse < b.lastUse; });
    if (!oldest.bytes) oldest.bytes = std::make_unique_for_overwrite<std::byte[]>(kMaxBlockSize);
    oldest.reader = 0;
    oldest.lastUse = ++uses;
    return oldest;
  }
};

Scratch& scratchOfThisThread() {
  thread_local Scratch scratch;
  return scratch;
}

uint64_t nextReaderId() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

Status readOnlyError(const File& file) { return failedPrecondition(file.name() + ": a ZFile is read-only"); }

// Header or trailer at `offset`.
Result<zfile::Record> readRecord(const File& file, uint64_t offset) {
  std::array<std::byte, kRecordSize> bytes{};
  OBD_RETURN_IF_ERROR(file.preadExact(bytes, offset));
  return zfile::decodeRecord(bytes);
}

struct Layout {
  zfile::Record record;
  uint64_t indexLimit = 0;  // the jump table ends here at the latest
};

// Finds the record that counts (§9.5, steps 1 and 2).
Result<Layout> findRecord(const File& file, uint64_t fileSize) {
  OBD_ASSIGN_OR_RETURN(const zfile::Record header, readRecord(file, 0).withContext("header"));
  if (!header.has(zfile::kFlagHeader)) return dataLoss("header: marked as a trailer");
  if (header.has(zfile::kFlagHeaderFinal)) return Layout{header, fileSize};
  if (!header.has(zfile::kFlagData)) return dataLoss("header: not of a data file");
  if (fileSize < 2 * kRecordSize) return dataLoss("ends before a trailer");
  OBD_ASSIGN_OR_RETURN(const zfile::Record trailer,
                       readRecord(file, fileSize - kRecordSize).withContext("trailer"));
  if (trailer.has(zfile::kFlagHeader) || !trailer.has(zfile::kFlagData) || !trailer.has(zfile::kFlagSealed)) {
    return dataLoss("trailer: flags are not those of a trailer");
  }
  return Layout{trailer, fileSize - kRecordSize};
}

Status checkRecord(const Layout& layout) {
  const zfile::Record& record = layout.record;
  // Old files (no digest) have garbage in the bits above 4.
  if (record.has(zfile::kFlagDigest) && record.has(zfile::kFlagIndexCompressed)) {
    return unimplemented("compressed jump table");
  }
  if (record.algorithm != static_cast<uint8_t>(Algorithm::kLz4) &&
      record.algorithm != static_cast<uint8_t>(Algorithm::kZstd)) {
    return unimplemented("compression algorithm " + std::to_string(record.algorithm));
  }
  if (record.useDictionary != 0) return unimplemented("compression with a dictionary");
  if (!zfile::isLegalBlockSize(record.blockSize)) {
    return dataLoss("block size " + std::to_string(record.blockSize));
  }
  if (record.blockCount > zfile::kMaxBlocks) {
    return dataLoss("jump table of " + std::to_string(record.blockCount) + " blocks");
  }
  if (zfile::blockCountFor(record.originalSize, record.blockSize) != record.blockCount) {
    return dataLoss(std::to_string(record.blockCount) + " blocks for " + std::to_string(record.originalSize) +
                    " bytes");
  }
  const uint64_t firstBlock = kRecordSize + uint64_t{record.dictionarySize};
  if (record.indexOffset < firstBlock || record.indexOffset > layout.indexLimit ||
      record.blockCount * kIndexEntrySize > layout.indexLimit - record.indexOffset) {
    return dataLoss("jump table lies outside the file");
  }
  return Status::ok();
}

Result<zfile::JumpTable> readJumpTable(const File& file, const zfile::Record& record) {
  zfile::JumpTable table(record.blockSize, kRecordSize + uint64_t{record.dictionarySize});
  // Piece by piece, so that a table that lies about its length costs no more memory than it has sound entries.
  uint64_t left = record.blockCount * kIndexEntrySize;
  std::vector<std::byte> piece(static_cast<size_t>(std::min<uint64_t>(left, 64 * 1024)));
  uint32_t crc = zfile::kIndexCrcStart;
  uint64_t at = record.indexOffset;
  while (left > 0) {
    const std::span<std::byte> part(piece.data(), static_cast<size_t>(std::min<uint64_t>(left, piece.size())));
    OBD_RETURN_IF_ERROR(file.preadExact(part, at).withContext("jump table"));
    crc = crc32cRaw(crc, part);
    OBD_RETURN_IF_ERROR(table.append(part, record.hasChecksums));
    left -= part.size();
    at += part.size();
  }
  if (record.has(zfile::kFlagDigest) && crc != record.indexCrc) {
    return dataLoss("jump table: checksum does not match");
  }
  if (table.end() > record.indexOffset) return dataLoss("jump table: blocks reach into the jump table");
  table.shrink();
  return table;
}

}  // namespace

ZFileReader::ZFileReader(std::unique_ptr<File> file, const zfile::Record& record, zfile::JumpTable table)
    : file_(std::move(file)), record_(record), table_(std::move(table)), id_(nextReaderId()) {}

Result<bool> ZFileReader::detect(const File& file) {
  std::array<std::byte, kRecordSize> bytes{};
  OBD_ASSIGN_OR_RETURN(const size_t got, file.pread(bytes, 0));
  if (!zfile::hasMagic(std::span(bytes).first(got))) return false;
  // Bit 0 clear means a trailer stands first: not a ZFile. The flags' lowest byte is at 32.
  return got >= 33 && (bytes[32] & std::byte{zfile::kFlagHeader}) != std::byte{0};
}

Result<std::unique_ptr<ZFileReader>> ZFileReader::open(std::unique_ptr<File> file) {
  const auto openIt = [&]() -> Result<std::unique_ptr<ZFileReader>> {
    OBD_ASSIGN_OR_RETURN(const uint64_t fileSize, file->size());
    OBD_ASSIGN_OR_RETURN(const Layout layout, findRecord(*file, fileSize));
    OBD_RETURN_IF_ERROR(checkRecord(layout));
    OBD_ASSIGN_OR_RETURN(zfile::JumpTable table, readJumpTable(*file, layout.record));
    return std::unique_ptr<ZFileReader>(new ZFileReader(std::move(file), layout.record, std::move(table)));
  };
  const std::string context = file->name() + ": ZFile";
  return openIt().withContext(context);
}

size_t ZFileReader::contentLength(uint64_t block) const {
  const uint64_t begin = block * record_.blockSize;
  return static_cast<size_t>(std::min<uint64_t>(record_.blockSize, record_.originalSize - begin));
}

Result<size_t> ZFileReader::pread(std::span<std::byte> out, uint64_t offset) const {
  if (offset >= record_.originalSize || out.empty()) return size_t{0};
  const auto length = static_cast<size_t>(std::min<uint64_t>(out.size(), record_.originalSize - offset));
  const uint64_t blockSize = record_.blockSize;
  const uint64_t endBlock = (offset + length - 1) / blockSize + 1;
  size_t done = 0;
  uint64_t block = offset / blockSize;
  while (block < endBlock) {
    // As many whole blocks as one span of stored bytes takes.
    const uint64_t spanBegin = table_.block(block).offset;
    uint64_t next = block + 1;
    while (next < endBlock) {
      const zfile::JumpTable::Extent extent = table_.block(next);
      if (extent.offset + extent.length - spanBegin > kSpanSize) break;
      next++;
    }
    const size_t part = static_cast<size_t>(std::min<uint64_t>(next * blockSize - (offset + done), length - done));
    OBD_RETURN_IF_ERROR(readBlocks(block, next, offset + done, out.subspan(done, part)));
    done += part;
    block = next;
  }
  return done;
}

// Fills `out` with the content from byte `begin`, all of which lies in blocks [firstBlock, endBlock).
Status ZFileReader::readBlocks(uint64_t firstBlock, uint64_t endBlock, uint64_t begin, std::span<std::byte> out) const {
  Scratch& scratch = scratchOfThisThread();
  const uint64_t blockSize = record_.blockSize;

  // Copies what is wanted of a decoded block that is wanted only in part.
  const auto copyPart = [&](uint64_t block, const std::byte* content) {
    const uint64_t from = std::max(begin, block * blockSize);
    const uint64_t to = std::min(begin + out.size(), block * blockSize + contentLength(block));
    std::memcpy(out.data() + (from - begin), content + (from - block * blockSize), static_cast<size_t>(to - from));
  };

  // Only the outer blocks can be wanted in part; those may be at hand already.
  while (firstBlock < endBlock) {
    const KeptBlock* kept = scratch.find(id_, firstBlock);
    if (kept == nullptr) break;
    copyPart(firstBlock++, kept->bytes.get());
  }
  if (endBlock - firstBlock > 1) {
    if (const KeptBlock* kept = scratch.find(id_, endBlock - 1)) copyPart(--endBlock, kept->bytes.get());
  }
  if (firstBlock == endBlock) return Status::ok();

  const uint64_t spanBegin = table_.block(firstBlock).offset;
  const zfile::JumpTable::Extent last = table_.block(endBlock - 1);
  const std::span<std::byte> span(scratch.stored.get(), static_cast<size_t>(last.offset + last.length - spanBegin));
  if (Status status = file_->preadExact(span, spanBegin); !status.isOk()) {
    return std::move(status).withContext("ZFile blocks " + std::to_string(firstBlock) + ".." +
                                         std::to_string(endBlock - 1));
  }
  for (uint64_t block = firstBlock; block < endBlock; block++) {
    const zfile::JumpTable::Extent extent = table_.block(block);
    const std::span<const std::byte> stored =
        span.subspan(static_cast<size_t>(extent.offset - spanBegin), extent.length);
    const uint64_t contentBegin = block * blockSize;
    const size_t contentSize = contentLength(block);
    if (contentBegin >= begin && contentBegin + contentSize <= begin + out.size()) {
      OBD_RETURN_IF_ERROR(decode(block, stored, out.subspan(static_cast<size_t>(contentBegin - begin), contentSize)));
      continue;
    }
    KeptBlock& slot = scratch.evict();
    OBD_RETURN_IF_ERROR(decode(block, stored, std::span(slot.bytes.get(), contentSize)));
    slot.reader = id_;
    slot.block = block;
    copyPart(block, slot.bytes.get());
  }
  return Status::ok();
}

Status ZFileReader::decode(uint64_t block, std::span<const std::byte> stored, std::span<std::byte> out) const {
  const auto damaged = [&](const char* what) {
    return dataLoss(file_->name() + ": ZFile block " + std::to_string(block) + ": " + what);
  };
  if (record_.hasChecksums) {
    const size_t compressed = stored.size() - kChecksumSize;
    const uint32_t expected = zfile::loadLittle32(stored.data() + compressed);
    stored = stored.first(compressed);
    if (crc32cRaw(zfile::kBlockCrcStart, stored) != expected) return damaged("checksum does not match");
  }
  if (record_.algorithm == static_cast<uint8_t>(Algorithm::kLz4)) {
    const int got = LZ4_decompress_safe(reinterpret_cast<const char*>(stored.data()),
                                        reinterpret_cast<char*>(out.data()), static_cast<int>(stored.size()),
                                        static_cast<int>(out.size()));
    if (got < 0) return damaged("lz4 data is malformed");
    if (static_cast<size_t>(got) != out.size()) return damaged("decompresses to a wrong length");
    return Status::ok();
  }
  Scratch& scratch = scratchOfThisThread();
  if (scratch.zstd == nullptr) scratch.zstd = ZSTD_createDCtx();
  if (scratch.zstd == nullptr) return Status(Code::kResourceExhausted, "no memory for zstd");
  const size_t got = ZSTD_decompressDCtx(scratch.zstd, out.data(), out.size(), stored.data(), stored.size());
  if (ZSTD_isError(got) != 0) return damaged(ZSTD_getErrorName(got));
  if (got != out.size()) return damaged("decompresses to a wrong length");
  return Status::ok();
}

Result<uint64_t> ZFileReader::seekData(uint64_t offset) const { return std::min(offset, record_.originalSize); }
Result<uint64_t> ZFileReader::seekHole(uint64_t) const { return record_.originalSize; }
Status ZFileReader::pwrite(std::span<const std::byte>, uint64_t) { return readOnlyError(*file_); }
Status ZFileReader::truncate(uint64_t) { return readOnlyError(*file_); }
Status ZFileReader::punchHole(uint64_t, uint64_t) { return readOnlyError(*file_); }

}  // namespace obd
