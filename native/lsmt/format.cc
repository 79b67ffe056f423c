#include "lsmt/format.h"

#include <sys/random.h>

#include <cstring>

namespace obd {
namespace {

constexpr std::array<uint8_t, 8> kMagic0 = {0x4C, 0x53, 0x4D, 0x54, 0x00, 0x01, 0x02, 0x00};
constexpr std::array<uint8_t, 16> kMagic1 = {0x65, 0x7E, 0x63, 0xD2, 0x94, 0x44, 0x08, 0x4C,
                                             0xA2, 0xD2, 0xC8, 0xEC, 0x4F, 0xCF, 0xAE, 0x8A};

constexpr size_t kAtMagic1 = 8;
constexpr size_t kAtSize = 24;
constexpr size_t kAtFlags = 28;
constexpr size_t kAtIndexOffset = 32;
constexpr size_t kAtIndexSize = 40;
constexpr size_t kAtVirtualSize = 48;
constexpr size_t kAtUuid = 56;
constexpr size_t kAtParentUuid = 93;
constexpr size_t kAtVersion = 132;
constexpr size_t kAtSubVersion = 133;
constexpr size_t kAtUserTag = 134;
constexpr size_t kUuidText = 36;
static_assert(kAtUserTag + kUserTagMax == kHeaderFieldBytes);
static_assert(kAtUuid + kUuidText + 1 == kAtParentUuid && kAtParentUuid + kUuidText + 1 == 130);

int hexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::string_view textAt(std::span<const std::byte, kHeaderSize> bytes, size_t at, size_t length) {
  return {reinterpret_cast<const char*>(bytes.data()) + at, length};
}

void putText(std::span<std::byte, kHeaderSize> out, size_t at, std::string_view text) {
  std::memcpy(out.data() + at, text.data(), text.size());
}

}  // namespace

uint64_t loadLe64(const std::byte* at) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = (value << 8) | static_cast<uint64_t>(at[i]);
  return value;
}

uint32_t loadLe32(const std::byte* at) {
  uint32_t value = 0;
  for (int i = 3; i >= 0; --i) value = (value << 8) | static_cast<uint32_t>(at[i]);
  return value;
}

void storeLe64(std::byte* at, uint64_t value) {
  for (int i = 0; i < 8; ++i) at[i] = static_cast<std::byte>(value >> (8 * i));
}

void storeLe32(std::byte* at, uint32_t value) {
  for (int i = 0; i < 4; ++i) at[i] = static_cast<std::byte>(value >> (8 * i));
}

std::string Uuid::toString() const {
  static constexpr char kHex[] = "0123456789ABCDEF";
  std::string text;
  text.reserve(kUuidText);
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kHex[bytes[i] >> 4];
    text += kHex[bytes[i] & 15];
  }
  return text;
}

std::optional<Uuid> Uuid::parse(std::string_view text) {
  if (text.size() != kUuidText) return std::nullopt;
  Uuid uuid;
  size_t at = 0;
  for (size_t i = 0; i < uuid.bytes.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) {
      if (text[at++] != '-') return std::nullopt;
    }
    const int high = hexValue(text[at++]);
    const int low = hexValue(text[at++]);
    if (high < 0 || low < 0) return std::nullopt;
    uuid.bytes[i] = static_cast<uint8_t>((high << 4) | low);
  }
  return uuid;
}

Uuid Uuid::random() {
  Uuid uuid;
  size_t done = 0;
  while (done < uuid.bytes.size()) {
    const ssize_t got = ::getrandom(uuid.bytes.data() + done, uuid.bytes.size() - done, 0);
    if (got > 0) done += static_cast<size_t>(got);  // EINTR is the only failure left at this size
  }
  uuid.bytes[6] = static_cast<uint8_t>((uuid.bytes[6] & 0x0F) | 0x40);
  uuid.bytes[8] = static_cast<uint8_t>((uuid.bytes[8] & 0x3F) | 0x80);
  return uuid;
}

void encodeHeader(const LayerHeader& header, std::span<std::byte, kHeaderSize> out) {
  OBD_ASSERT(header.userTag.size() <= kUserTagMax, "the user tag fits its field");
  std::memset(out.data(), 0, out.size());
  std::memcpy(out.data(), kMagic0.data(), kMagic0.size());
  std::memcpy(out.data() + kAtMagic1, kMagic1.data(), kMagic1.size());
  storeLe32(out.data() + kAtSize, kHeaderFieldBytes);
  storeLe32(out.data() + kAtFlags, header.flags & (kFlagHeader | kFlagData | kFlagSealed | kFlagSparse));
  storeLe64(out.data() + kAtIndexOffset, header.indexOffset);
  storeLe64(out.data() + kAtIndexSize, header.indexSize);
  storeLe64(out.data() + kAtVirtualSize, header.virtualSize);
  putText(out, kAtUuid, header.uuid.toString());
  putText(out, kAtParentUuid, header.parentUuid.toString());
  out[kAtVersion] = std::byte{1};
  out[kAtSubVersion] = std::byte{1};
  putText(out, kAtUserTag, header.userTag);
}

Result<LayerHeader> decodeHeader(std::span<const std::byte, kHeaderSize> bytes) {
  if (std::memcmp(bytes.data(), kMagic0.data(), kMagic0.size()) != 0 ||
      std::memcmp(bytes.data() + kAtMagic1, kMagic1.data(), kMagic1.size()) != 0) {
    return dataLoss("not an LSMT header: wrong magic");
  }
  LayerHeader header;
  header.flags = loadLe32(bytes.data() + kAtFlags);
  header.indexOffset = loadLe64(bytes.data() + kAtIndexOffset);
  header.indexSize = loadLe64(bytes.data() + kAtIndexSize);
  header.virtualSize = loadLe64(bytes.data() + kAtVirtualSize);
  header.uuid = Uuid::parse(textAt(bytes, kAtUuid, kUuidText)).value_or(Uuid{});
  header.parentUuid = Uuid::parse(textAt(bytes, kAtParentUuid, kUuidText)).value_or(Uuid{});
  const std::string_view tag = textAt(bytes, kAtUserTag, kUserTagMax);
  header.userTag = std::string(tag.substr(0, tag.find('\0')));
  return header;
}

void patchVirtualSize(std::span<std::byte, kHeaderSize> header, uint64_t virtualSizeBytes) {
  storeLe64(header.data() + kAtVirtualSize, virtualSizeBytes);
}

void Segment::encode(std::span<std::byte, kSegmentBytes> out) const {
  storeLe64(out.data(), low_);
  storeLe64(out.data() + 8, high_);
}

Segment Segment::decode(std::span<const std::byte, kSegmentBytes> bytes) {
  Segment segment;
  segment.low_ = loadLe64(bytes.data());
  segment.high_ = loadLe64(bytes.data() + 8);
  return segment;
}

}  // namespace obd
