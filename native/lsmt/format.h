// The bytes of an LSMT file: header, trailer, index entry, UUID. Encoded and decoded field by field; nothing on disk is
// ever reinterpreted in place. What we write beyond the original's use of the format: FORMAT.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/result.h"
#include "base/units.h"

namespace obd {

inline constexpr size_t kHeaderSize = 4096;         // header and trailer alike
inline constexpr uint64_t kHeaderSectors = kHeaderSize / kSectorSize;
inline constexpr uint32_t kHeaderFieldBytes = 390;  // what the "size" field says
inline constexpr size_t kUserTagMax = 256;
inline constexpr size_t kSegmentBytes = 16;
inline constexpr uint64_t kPaddingOffset = (uint64_t{1} << 50) - 1;   // marks an entry every loader skips
inline constexpr uint64_t kMappedOffsetMax = (uint64_t{1} << 55) - 1;
inline constexpr uint64_t kSegmentSectorsMax = 16383;
inline constexpr uint64_t kLayerEntriesMax = 1'000'000;               // padding included
inline constexpr uint64_t kLogRecordsMax = 128'000'000;               // also of a merged index
inline constexpr size_t kLowersMax = 255;
inline constexpr uint64_t kVirtualSizeMax = (kPaddingOffset - 1) * kSectorSize;

inline constexpr uint32_t kFlagHeader = 1u << 0;  // clear: trailer
inline constexpr uint32_t kFlagData = 1u << 1;    // clear: index file
inline constexpr uint32_t kFlagSealed = 1u << 2;
inline constexpr uint32_t kFlagSparse = 1u << 4;

// 16 bytes, compared by value. Unparsable text is "absent" to the format, hence optional.
struct Uuid {
  std::array<uint8_t, 16> bytes{};

  bool isNull() const { return bytes == std::array<uint8_t, 16>{}; }
  std::string toString() const;  // upper case, 8-4-4-4-12
  static std::optional<Uuid> parse(std::string_view text);
  static Uuid random();  // version 4
  friend bool operator==(const Uuid&, const Uuid&) = default;
};

// The fields of a header or trailer that carry meaning.
struct LayerHeader {
  uint32_t flags = 0;
  uint64_t indexOffset = 0;  // bytes
  uint64_t indexSize = 0;    // entries
  uint64_t virtualSize = 0;  // bytes
  Uuid uuid;
  Uuid parentUuid;
  std::string userTag;

  bool isHeader() const { return (flags & kFlagHeader) != 0; }
  bool isData() const { return (flags & kFlagData) != 0; }
  bool isSealed() const { return (flags & kFlagSealed) != 0; }
  bool isSparse() const { return (flags & kFlagSparse) != 0; }
};

// REQUIRES: userTag.size() <= kUserTagMax.
void encodeHeader(const LayerHeader& header, std::span<std::byte, kHeaderSize> out);
// dataLoss if a magic is wrong. Flags are the caller's to judge; unknown ones are kept and harmless.
Result<LayerHeader> decodeHeader(std::span<const std::byte, kHeaderSize> bytes);
// Only the virtual size changes; whatever else the 4096 bytes hold stays.
void patchVirtualSize(std::span<std::byte, kHeaderSize> header, uint64_t virtualSizeBytes);

// One index entry: logical sectors [offset, end) are at moffset... of the layer's own file, or read as zeros.
class Segment {
 public:
  constexpr Segment() = default;
  // REQUIRES: every value within its bit field.
  constexpr Segment(uint64_t offset, uint64_t length, uint64_t moffset, bool zeroed = false, uint8_t tag = 0)
      : low_(offset | (length << 50)),
        high_(moffset | (uint64_t{zeroed} << 55) | (uint64_t{tag} << 56)) {}
  static constexpr Segment padding(uint8_t tag = 0, uint64_t moffset = 0) {
    return {kPaddingOffset, 0, moffset, false, tag};
  }

  constexpr uint64_t offset() const { return low_ & kPaddingOffset; }
  constexpr uint64_t length() const { return low_ >> 50; }
  constexpr uint64_t end() const { return offset() + length(); }
  constexpr uint64_t moffset() const { return high_ & kMappedOffsetMax; }
  // Where the bytes of the next sector would be: does not advance when zeroed.
  constexpr uint64_t mend() const { return zeroed() ? moffset() : moffset() + length(); }
  constexpr bool zeroed() const { return ((high_ >> 55) & 1) != 0; }
  constexpr uint8_t tag() const { return static_cast<uint8_t>(high_ >> 56); }
  constexpr bool isPadding() const { return offset() == kPaddingOffset; }

  // The part within [from, to). REQUIRES: offset() <= from < to <= end().
  constexpr Segment cut(uint64_t from, uint64_t to) const {
    return {from, to - from, zeroed() ? moffset() : moffset() + (from - offset()), zeroed(), tag()};
  }
  constexpr Segment withTag(uint8_t tag) const { return {offset(), length(), moffset(), zeroed(), tag}; }

  void encode(std::span<std::byte, kSegmentBytes> out) const;
  static Segment decode(std::span<const std::byte, kSegmentBytes> bytes);
  friend constexpr bool operator==(const Segment&, const Segment&) = default;

 private:
  uint64_t low_ = 0;   // offset 0..49, length 50..63
  uint64_t high_ = 0;  // moffset 0..54, zeroed 55, tag 56..63
};
static_assert(sizeof(Segment) == kSegmentBytes);

// Little-endian loads and stores.
uint64_t loadLe64(const std::byte* at);
uint32_t loadLe32(const std::byte* at);
void storeLe64(std::byte* at, uint64_t value);
void storeLe32(std::byte* at, uint32_t value);

}  // namespace obd
