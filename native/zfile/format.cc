#include "zfile/format.h"

#include <lz4.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "zfile/crc32c.h"

namespace obd::zfile {
namespace {

constexpr std::array<uint8_t, 24> kMagic = {0x5A, 0x46, 0x69, 0x6C, 0x65, 0x00, 0x01, 0x00, 0x74, 0x75, 0x6A, 0x69,
                                            0x2E, 0x79, 0x79, 0x66, 0x40, 0x41, 0x6C, 0x69, 0x62, 0x61, 0x62, 0x61};

// Byte positions in a record.
constexpr size_t kAtSize = 24, kAtDigest = 28, kAtFlags = 32, kAtIndexOffset = 40, kAtBlockCount = 48,
                 kAtOriginalSize = 56, kAtIndexCrc = 64, kAtBlockSize = 72, kAtAlgorithm = 76, kAtUseDictionary = 78,
                 kAtDictionarySize = 84, kAtVerify = 88;
static_assert(kAtVerify < kRecordFieldsSize && kRecordFieldsSize < kRecordSize);

uint64_t loadLittle64(const std::byte* from) {
  return uint64_t{loadLittle32(from)} | uint64_t{loadLittle32(from + 4)} << 32;
}

void storeLittle64(std::byte* to, uint64_t value) {
  storeLittle32(to, static_cast<uint32_t>(value));
  storeLittle32(to + 4, static_cast<uint32_t>(value >> 32));
}

uint32_t digestOf(std::span<const std::byte> bytes) {
  constexpr std::array<std::byte, 4> kZero{};
  uint32_t crc = crc32cRaw(kDigestStart, bytes.first(kAtDigest));
  crc = crc32cRaw(crc, kZero);
  return crc32cRaw(crc, bytes.subspan(kAtDigest + kZero.size()));
}

}  // namespace

uint32_t loadLittle32(const std::byte* from) {
  return std::to_integer<uint32_t>(from[0]) | std::to_integer<uint32_t>(from[1]) << 8 |
         std::to_integer<uint32_t>(from[2]) << 16 | std::to_integer<uint32_t>(from[3]) << 24;
}

void storeLittle32(std::byte* to, uint32_t value) {
  for (unsigned i = 0; i < 4; i++) to[i] = static_cast<std::byte>(value >> (8 * i));
}

bool hasMagic(std::span<const std::byte> bytes) {
  return bytes.size() >= kMagic.size() && std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0;
}

Result<Record> decodeRecord(std::span<const std::byte> bytes) {
  OBD_ASSERT(bytes.size() == kRecordSize, "a record is 512 bytes");
  if (!hasMagic(bytes)) return dataLoss("no ZFile magic");
  const std::byte* at = bytes.data();
  Record record;
  record.flags = loadLittle64(at + kAtFlags);
  record.indexOffset = loadLittle64(at + kAtIndexOffset);
  record.blockCount = loadLittle64(at + kAtBlockCount);
  record.originalSize = loadLittle64(at + kAtOriginalSize);
  record.indexCrc = loadLittle32(at + kAtIndexCrc);
  record.blockSize = loadLittle32(at + kAtBlockSize);
  record.algorithm = std::to_integer<uint8_t>(at[kAtAlgorithm]);
  record.useDictionary = std::to_integer<uint8_t>(at[kAtUseDictionary]);
  record.dictionarySize = loadLittle32(at + kAtDictionarySize);
  record.hasChecksums = at[kAtVerify] != std::byte{0};
  if (record.has(kFlagDigest) && digestOf(bytes) != loadLittle32(at + kAtDigest)) {
    return dataLoss("ZFile record digest does not match");
  }
  return record;
}

RecordBytes encodeRecord(const Record& record) {
  RecordBytes bytes{};
  std::byte* at = bytes.data();
  std::memcpy(at, kMagic.data(), kMagic.size());
  storeLittle32(at + kAtSize, kRecordFieldsSize);
  storeLittle64(at + kAtFlags, record.flags);
  storeLittle64(at + kAtIndexOffset, record.indexOffset);
  storeLittle64(at + kAtBlockCount, record.blockCount);
  storeLittle64(at + kAtOriginalSize, record.originalSize);
  storeLittle32(at + kAtIndexCrc, record.indexCrc);
  storeLittle32(at + kAtBlockSize, record.blockSize);
  at[kAtAlgorithm] = std::byte{record.algorithm};
  at[kAtUseDictionary] = std::byte{record.useDictionary};
  storeLittle32(at + kAtDictionarySize, record.dictionarySize);
  at[kAtVerify] = record.hasChecksums ? std::byte{1} : std::byte{0};
  storeLittle32(at + kAtDigest, digestOf(bytes));
  return bytes;
}

bool isLegalBlockSize(uint32_t blockSize) {
  return blockSize >= kMinBlockSize && blockSize <= kMaxBlockSize && (blockSize & (blockSize - 1)) == 0;
}

uint64_t blockCountFor(uint64_t sizeBytes, uint32_t blockSize) {
  return sizeBytes / blockSize + (sizeBytes % blockSize != 0 ? 1 : 0);
}

size_t maxStoredBlockSize(uint32_t blockSize) {
  const auto lz4 = static_cast<size_t>(LZ4_COMPRESSBOUND(static_cast<int>(blockSize)));
  return std::max(lz4, ZSTD_compressBound(blockSize)) + kChecksumSize;
}

}  // namespace obd::zfile
