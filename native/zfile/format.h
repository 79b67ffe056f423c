// The bytes of a ZFile: header, trailer, jump table. FORMAT.md says the same in prose.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/result.h"

namespace obd::zfile {

inline constexpr size_t kRecordSize = 512;         // header and trailer
inline constexpr uint32_t kRecordFieldsSize = 96;  // the `size` field; what is used of the 512 bytes
inline constexpr size_t kChecksumSize = 4;
inline constexpr size_t kIndexEntrySize = 4;
inline constexpr uint32_t kBlockCrcStart = 100007;
inline constexpr uint32_t kDigestStart = 0;
inline constexpr uint32_t kIndexCrcStart = 0;
inline constexpr uint64_t kMaxBlocks = 1'000'000'000;
inline constexpr uint32_t kMinBlockSize = 4096;
inline constexpr uint32_t kMaxBlockSize = 65536;
// Upstream reads blocks through a buffer of this size: larger ones (possible with 64 KiB blocks) are written by nobody
// who wants to be read, and read by us.
inline constexpr uint32_t kMaxInteroperableBlock = 65536;
// A jump table is addressed in groups of so many uncompressed bytes; within one, offsets stay below 65535.
inline constexpr uint32_t kGroupSize = 65536;
inline constexpr uint32_t kMaxGroupDelta = 65534;

enum class Algorithm : uint8_t { kLz4 = 1, kZstd = 2 };
inline constexpr int kZstdLevel = 3;

// Flag bits. The others are garbage in old files.
inline constexpr uint64_t kFlagHeader = 1U << 0;
inline constexpr uint64_t kFlagData = 1U << 1;
inline constexpr uint64_t kFlagSealed = 1U << 2;
inline constexpr uint64_t kFlagHeaderFinal = 1U << 3;  // this header carries the trailer's values
inline constexpr uint64_t kFlagDigest = 1U << 4;
inline constexpr uint64_t kFlagIndexCompressed = 1U << 5;

inline constexpr uint64_t kFlagsFirstHeader = kFlagHeader | kFlagData | kFlagDigest;
inline constexpr uint64_t kFlagsFinalHeader = kFlagsFirstHeader | kFlagHeaderFinal;
inline constexpr uint64_t kFlagsTrailer = kFlagData | kFlagSealed | kFlagDigest;

// Header or trailer, decoded. `algorithm` is the raw byte: unknown values are refused by the reader, not the decoder.
struct Record {
  uint64_t flags = 0;
  uint64_t indexOffset = 0;
  uint64_t blockCount = 0;
  uint64_t originalSize = 0;
  uint32_t indexCrc = 0;
  uint32_t blockSize = 0;
  uint8_t algorithm = 0;
  uint8_t useDictionary = 0;
  uint32_t dictionarySize = 0;
  bool hasChecksums = false;

  bool has(uint64_t flag) const { return (flags & flag) != 0; }
};

using RecordBytes = std::array<std::byte, kRecordSize>;

// Both magics are there. Says nothing about the rest.
bool hasMagic(std::span<const std::byte> bytes);

// dataLoss if the magics are missing, or bit 4 says there is a digest and it does not match.
// REQUIRES: bytes.size() == kRecordSize.
Result<Record> decodeRecord(std::span<const std::byte> bytes);

// Digest included.
RecordBytes encodeRecord(const Record& record);

bool isLegalBlockSize(uint32_t blockSize);

// Blocks of a source of `sizeBytes`.
uint64_t blockCountFor(uint64_t sizeBytes, uint32_t blockSize);

// The most bytes a block can take in the file, its checksum included, by either algorithm.
size_t maxStoredBlockSize(uint32_t blockSize);

uint32_t loadLittle32(const std::byte* from);
void storeLittle32(std::byte* to, uint32_t value);

}  // namespace obd::zfile
