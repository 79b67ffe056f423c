// Invariants: every implementation computes the same function, and it is the one the format document gives vectors for.
#include "zfile/crc32c.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string_view>
#include <vector>

namespace obd {
namespace {

std::span<const std::byte> bytesOf(std::string_view text) { return std::as_bytes(std::span(text)); }

TEST(Crc32c, GivesTheVectorsOfTheFormatDocument) {
  const std::vector<std::byte> zeros(32);
  for (auto* crc : {crc32cReference, crc32cTables, crc32cRaw}) {
    EXPECT_EQ(crc(0, bytesOf("123456789")), 0x58E3FA20U);
    EXPECT_EQ(crc(100007, bytesOf("123456789")), 0x3C9BD4E0U);
    EXPECT_EQ(crc(100007, zeros), 0x28250FD2U);
    EXPECT_EQ(crc(0, zeros), 0U);
    // The ordinary CRC-32C is this one between two inversions.
    EXPECT_EQ(~crc(~0U, bytesOf("123456789")), 0xE3069283U);
  }
}

TEST(Crc32c, EveryImplementationAgreesWithTheReferenceAtEveryLengthAndAlignment) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  std::vector<std::byte> data(600);
  for (std::byte& byte : data) byte = static_cast<std::byte>(random());
  for (size_t start = 0; start < 9; start++) {
    for (size_t length = 0; length < 300; length++) {
      const std::span<const std::byte> part = std::span(data).subspan(start, length);
      const auto initial = static_cast<uint32_t>(random());
      const uint32_t expected = crc32cReference(initial, part);
      ASSERT_EQ(crc32cTables(initial, part), expected) << start << "+" << length;
      ASSERT_EQ(crc32cRaw(initial, part), expected) << start << "+" << length;
      if (crc32cHasHardware()) {
        ASSERT_EQ(crc32cHardware(initial, part), expected) << start << "+" << length;
      }
    }
  }
}

TEST(Crc32c, ChainsOverPieces) {
  const std::string_view text = "the quick brown fox jumps over the lazy dog";
  const uint32_t whole = crc32cRaw(7, bytesOf(text));
  for (size_t cut = 0; cut <= text.size(); cut++) {
    EXPECT_EQ(crc32cRaw(crc32cRaw(7, bytesOf(text.substr(0, cut))), bytesOf(text.substr(cut))), whole);
  }
}

}  // namespace
}  // namespace obd
