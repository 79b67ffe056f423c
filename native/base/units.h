// Bytes and sectors are different types: mixing them does not compile.
#pragma once

#include <compare>
#include <cstdint>

namespace obd {

inline constexpr uint64_t kSectorSize = 512;
inline constexpr uint32_t kSectorShift = 9;
inline constexpr uint64_t kKiB = 1024;
inline constexpr uint64_t kMiB = 1024 * kKiB;
inline constexpr uint64_t kGiB = 1024 * kMiB;

// A count or position in 512-byte sectors.
struct Sectors {
  uint64_t value = 0;
  constexpr Sectors() = default;
  constexpr explicit Sectors(uint64_t v) : value(v) {}
  constexpr uint64_t bytes() const { return value << kSectorShift; }
  // REQUIRES: a multiple of 512 where exactness matters; rounds down.
  static constexpr Sectors fromBytes(uint64_t bytes) { return Sectors(bytes >> kSectorShift); }
  friend constexpr auto operator<=>(Sectors, Sectors) = default;
  friend constexpr Sectors operator+(Sectors a, Sectors b) { return Sectors(a.value + b.value); }
  friend constexpr Sectors operator-(Sectors a, Sectors b) { return Sectors(a.value - b.value); }
};

}  // namespace obd
