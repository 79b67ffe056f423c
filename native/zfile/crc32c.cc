#include "zfile/crc32c.h"

#include <array>
#include <bit>
#include <cstring>

#include "base/assert.h"

namespace obd {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // reflected

using Table = std::array<uint32_t, 256>;

constexpr std::array<Table, 8> makeTables() {
  std::array<Table, 8> tables{};
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t t = 1; t < 8; t++) {
    for (size_t byte = 0; byte < 256; byte++) {
      const uint32_t previous = tables[t - 1][byte];
      tables[t][byte] = (previous >> 8) ^ tables[0][previous & 0xff];
    }
  }
  return tables;
}

constexpr std::array<Table, 8> kTables = makeTables();

uint64_t loadLittle64(const std::byte* from) {
  uint64_t value = 0;
  std::memcpy(&value, from, sizeof value);
  static_assert(std::endian::native == std::endian::little, "the supported processors are little-endian");
  return value;
}

}  // namespace

uint32_t crc32cReference(uint32_t start, std::span<const std::byte> data) {
  uint32_t crc = start;
  for (const std::byte byte : data) {
    crc ^= std::to_integer<uint32_t>(byte);
    for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
  }
  return crc;
}

uint32_t crc32cTables(uint32_t start, std::span<const std::byte> data) {
  uint32_t crc = start;
  size_t at = 0;
  for (; at + 8 <= data.size(); at += 8) {
    const uint64_t word = loadLittle64(data.data() + at) ^ crc;
    crc = 0;
    for (size_t byte = 0; byte < 8; byte++) crc ^= kTables[7 - byte][(word >> (8 * byte)) & 0xff];
  }
  for (; at < data.size(); at++) crc = (crc >> 8) ^ kTables[0][(crc ^ std::to_integer<uint32_t>(data[at])) & 0xff];
  return crc;
}

#if defined(__x86_64__)

bool crc32cHasHardware() {
  static const bool has = __builtin_cpu_supports("sse4.2") != 0;
  return has;
}

__attribute__((target("sse4.2"))) uint32_t crc32cHardware(uint32_t start, std::span<const std::byte> data) {
  uint64_t crc = start;
  size_t at = 0;
  for (; at + 8 <= data.size(); at += 8) crc = __builtin_ia32_crc32di(crc, loadLittle64(data.data() + at));
  auto narrow = static_cast<uint32_t>(crc);
  for (; at < data.size(); at++) narrow = __builtin_ia32_crc32qi(narrow, std::to_integer<unsigned char>(data[at]));
  return narrow;
}

#else

bool crc32cHasHardware() { return false; }

uint32_t crc32cHardware(uint32_t, std::span<const std::byte>) { OBD_ASSERT(false, "crc32cHasHardware() was false"); }

#endif

uint32_t crc32cRaw(uint32_t start, std::span<const std::byte> data) {
  return crc32cHasHardware() ? crc32cHardware(start, data) : crc32cTables(start, data);
}

}  // namespace obd
