// The bytes of the format document: golden vectors both ways, and one changed field at a time.
#include "lsmt/format.h"

#include "lsmt/layer-reader.h"
#include "lsmt/testing.h"

namespace obd {
namespace {

using namespace testing_lsmt;  // NOLINT(google-build-using-namespace)

std::string hexOf(const Segment& segment) {
  std::array<std::byte, kSegmentBytes> bytes;
  segment.encode(bytes);
  std::string text;
  for (const std::byte b : bytes) {
    constexpr char kDigits[] = "0123456789abcdef";
    text += kDigits[static_cast<size_t>(b) >> 4];
    text += kDigits[static_cast<size_t>(b) & 15];
  }
  EXPECT_EQ(Segment::decode(bytes), segment);
  return text;
}

TEST(Format, SegmentsHaveTheBytesOfTheTestVectors) {
  EXPECT_EQ(hexOf({0, 8, 8}), "00000000000020000800000000000000");
  EXPECT_EQ(hexOf({24, 1, 19}), "18000000000004001300000000000000");
  EXPECT_EQ(hexOf({8, 16, 19, true}), "08000000000040001300000000008000");
  EXPECT_EQ(hexOf({uint64_t{1} << 32, 16, 100, false, 2}), "00000000010040006400000000000002");
  EXPECT_EQ(hexOf(Segment::padding()), "ffffffffffff03000000000000000000");
}

TEST(Format, SegmentFieldsReachTheirLimits) {
  const Segment segment(kPaddingOffset - 1, kSegmentSectorsMax, kMappedOffsetMax, true, 255);
  EXPECT_EQ(segment.offset(), kPaddingOffset - 1);
  EXPECT_EQ(segment.length(), kSegmentSectorsMax);
  EXPECT_EQ(segment.moffset(), kMappedOffsetMax);
  EXPECT_TRUE(segment.zeroed());
  EXPECT_EQ(segment.tag(), 255);
  EXPECT_FALSE(segment.isPadding());
}

TEST(Format, CuttingTheFrontMovesTheMappingUnlessZeroed) {
  EXPECT_EQ(Segment(10, 20, 100).cut(13, 30), Segment(13, 17, 103));
  EXPECT_EQ(Segment(10, 20, 100, true).cut(13, 30), Segment(13, 17, 100, true));
  EXPECT_EQ(Segment(10, 20, 100).cut(10, 12), Segment(10, 2, 100));
}

TEST(Format, UuidsAreParsedInAnyCaseAndWrittenInUpperCase) {
  const auto uuid = Uuid::parse("c0ffee01-1111-4222-8333-00000000000A");
  ASSERT_TRUE(uuid.has_value());
  EXPECT_EQ(uuid->toString(), "C0FFEE01-1111-4222-8333-00000000000A");
  for (const char* bad : {"", "c0ffee01", "c0ffee01-1111-4222-8333-00000000000", "c0ffee01-1111-4222-8333-00000000000G",
                          "c0ffee0111114-222-8333-000000000000a", "c0ffee01-1111-4222-8333-00000000000AA"}) {
    EXPECT_FALSE(Uuid::parse(bad).has_value()) << bad;
  }
}

TEST(Format, NewUuidsAreRandomVersion4) {
  const Uuid one = Uuid::random();
  EXPECT_NE(one, Uuid::random());
  EXPECT_EQ(one.toString()[14], '4');
  EXPECT_NE(std::string("89AB").find(one.toString()[19]), std::string::npos);
}

TEST(Format, AHeaderComesBackAsItWasWritten) {
  LayerHeader header;
  header.flags = kFlagHeader | kFlagData | kFlagSealed;
  header.indexOffset = 0x1122334455667788;
  header.indexSize = 77;
  header.virtualSize = uint64_t{5} << 40;
  header.uuid = Uuid::random();
  header.userTag = std::string(kUserTagMax, 'x');  // the longest needs no NUL
  std::array<std::byte, kHeaderSize> bytes;
  encodeHeader(header, bytes);
  const auto back = decodeHeader(bytes);
  ASSERT_TRUE(back.isOk());
  EXPECT_EQ(back.value().flags, header.flags);
  EXPECT_EQ(back.value().indexOffset, header.indexOffset);
  EXPECT_EQ(back.value().indexSize, header.indexSize);
  EXPECT_EQ(back.value().virtualSize, header.virtualSize);
  EXPECT_EQ(back.value().uuid, header.uuid);
  EXPECT_TRUE(back.value().parentUuid.isNull());
  EXPECT_EQ(back.value().userTag, header.userTag);
}

TEST(Format, UnknownFlagsAreNeitherMindedNorWritten) {
  LayerHeader header;
  header.flags = 0xFFFFFFFF;
  std::array<std::byte, kHeaderSize> bytes;
  encodeHeader(header, bytes);
  EXPECT_EQ(loadLe32(bytes.data() + 28), kFlagHeader | kFlagData | kFlagSealed | kFlagSparse);
  storeLe32(bytes.data() + 28, 0x80000029);
  EXPECT_TRUE(decodeHeader(bytes).isOk());
}

TEST(Format, EveryByteOfBothMagicsCounts) {
  std::array<std::byte, kHeaderSize> bytes;
  encodeHeader({}, bytes);
  for (size_t i = 0; i < 24; ++i) {
    bytes[i] ^= std::byte{1};
    EXPECT_EQ(decodeHeader(bytes).code(), Code::kDataLoss) << i;
    bytes[i] ^= std::byte{1};
  }
  EXPECT_TRUE(decodeHeader(bytes).isOk());
}

TEST(Format, PatchingTheVirtualSizeTouchesEightBytes) {
  std::array<std::byte, kHeaderSize> bytes;
  bytes.fill(std::byte{0x5A});
  patchVirtualSize(bytes, 0x0102030405060708);
  for (size_t i = 0; i < bytes.size(); ++i) {
    const bool inField = i >= 48 && i < 56;
    EXPECT_TRUE(inField || bytes[i] == std::byte{0x5A}) << i;
  }
  EXPECT_EQ(loadLe64(bytes.data() + 48), 0x0102030405060708u);
}

// A layer file with the given entries, 8 sectors of data and a trailer that can be spoilt.
struct RawLayer {
  std::vector<Segment> entries;
  LayerHeader header;
  LayerHeader trailer;

  RawLayer() {
    entries.emplace_back(0, 8, 8);
    header.flags = kFlagHeader | kFlagData | kFlagSealed;
    trailer.flags = kFlagData | kFlagSealed;
    trailer.virtualSize = 1 << 20;
    trailer.indexOffset = 8192;
    trailer.indexSize = 1;
  }
  Status open() const {
    auto file = std::make_unique<MemoryFile>("layer");
    std::array<std::byte, kHeaderSize> bytes;
    encodeHeader(header, bytes);
    EXPECT_TRUE(file->pwrite(bytes, 0).isOk());
    EXPECT_TRUE(file->pwrite(filled(4096, 7), 4096).isOk());
    for (size_t i = 0; i < entries.size(); ++i) {
      std::array<std::byte, kSegmentBytes> entry;
      entries[i].encode(entry);
      EXPECT_TRUE(file->pwrite(entry, 8192 + i * kSegmentBytes).isOk());
    }
    encodeHeader(trailer, bytes);
    EXPECT_TRUE(file->pwrite(bytes, 8192 + entries.size() * kSegmentBytes).isOk());
    return LayerReader::open(std::move(file)).status();
  }
};

TEST(LayerReader, RefusesEachContradictionOfTheFormat) {
  EXPECT_TRUE(RawLayer().open().isOk());
  const auto refuses = [](const char* what, auto&& spoil) {
    RawLayer layer;
    spoil(layer);
    EXPECT_EQ(layer.open().code(), Code::kDataLoss) << what;
  };
  refuses("header is a trailer", [](RawLayer& l) { l.header.flags &= ~kFlagHeader; });
  refuses("header of an index file", [](RawLayer& l) { l.header.flags &= ~kFlagData; });
  refuses("trailer is a header", [](RawLayer& l) { l.trailer.flags |= kFlagHeader; });
  refuses("trailer of an index file", [](RawLayer& l) { l.trailer.flags &= ~kFlagData; });
  refuses("not sealed", [](RawLayer& l) { l.trailer.flags &= ~kFlagSealed; });
  refuses("too many entries", [](RawLayer& l) { l.trailer.indexSize = kLayerEntriesMax + 1; });
  refuses("one entry too many", [](RawLayer& l) { l.trailer.indexSize = 2; });
  refuses("index behind the trailer", [](RawLayer& l) { l.trailer.indexOffset = 1 << 30; });
  refuses("index offset near 2^64", [](RawLayer& l) { l.trailer.indexOffset = UINT64_MAX - 8; });
  refuses("virtual size near 2^64", [](RawLayer& l) { l.trailer.virtualSize = UINT64_MAX - 511; });
  refuses("data in the header", [](RawLayer& l) { l.entries[0] = Segment(0, 8, 7); });
  refuses("data in the index", [](RawLayer& l) { l.entries[0] = Segment(0, 9, 8); });
  refuses("data far away", [](RawLayer& l) { l.entries[0] = Segment(0, 8, kMappedOffsetMax); });
  refuses("zeroed in the header", [](RawLayer& l) { l.entries[0] = Segment(0, 8, 7, true); });
  refuses("zeroed behind the data", [](RawLayer& l) { l.entries[0] = Segment(0, 8, 17, true); });
  refuses("past sector 2^50", [](RawLayer& l) { l.entries[0] = Segment(kPaddingOffset - 4, 8, 8); });
  refuses("overlap", [](RawLayer& l) {
    l.entries = {Segment(0, 8, 8), Segment(7, 1, 8)};
    l.trailer.indexSize = 2;
  });
}

TEST(LayerReader, AcceptsWhatTheFormatAllows) {
  RawLayer zeroed;
  zeroed.entries[0] = Segment(0, 8, 16, true);  // moffset may be the end of the data
  EXPECT_TRUE(zeroed.open().isOk());
  RawLayer padded;  // wherever it stands
  padded.entries = {Segment::padding(), Segment(0, 4, 8), Segment::padding(0xF1, 12), Segment(4, 4, 8)};
  padded.trailer.indexSize = 4;
  EXPECT_TRUE(padded.open().isOk());
  RawLayer empty;
  empty.entries = {};
  empty.trailer.indexSize = 0;
  EXPECT_TRUE(empty.open().isOk());
}

}  // namespace
}  // namespace obd
