// Writable layers: what survives which death, what a failed call leaves behind, sealing, resizing, and the records only
// we write. Faults injected: the N-th write, sync, truncate or punch fails, with or without a prefix on the file.
#include "lsmt/upper.h"

#include <sys/stat.h>
#include <unistd.h>

#include <thread>

#include "io/file-sink.h"
#include "lsmt/commit.h"
#include "lsmt/flush-marker.h"
#include "lsmt/layer-reader.h"
#include "lsmt/testing.h"

namespace obd {
namespace {

using namespace testing_lsmt;  // NOLINT(google-build-using-namespace)

constexpr uint64_t kSize = 1 << 20;

CreateUpperOptions ofKind(bool sparse, uint64_t size = kSize) {
  CreateUpperOptions options;
  options.virtualSize = size;
  options.sparse = sparse;
  return options;
}

OpenUpperOptions marking(const std::string& boot) {
  OpenUpperOptions options;
  options.flushMarkers = true;
  options.bootId = boot;
  return options;
}

void expectOk(const Status& status) { ASSERT_TRUE(status.isOk()) << status.toString(); }

std::vector<std::byte> readAll(const Upper& upper) {
  std::vector<std::byte> out(upper.virtualSize());
  expectOk(upper.read(0, out));
  return out;
}

int byteAt(const Upper& upper, uint64_t offset) {
  std::array<std::byte, kSectorSize> sector;
  expectOk(upper.read(offset / kSectorSize * kSectorSize, sector));
  return static_cast<int>(sector[offset % kSectorSize]);
}

std::vector<Segment> logOf(const UpperFiles& files) {
  std::vector<Segment> log;
  const std::vector<std::byte> bytes = files.index->contents();
  for (size_t at = kHeaderSize; at + kSegmentBytes <= bytes.size(); at += kSegmentBytes) {
    log.push_back(Segment::decode(std::span(bytes).subspan(at).first<kSegmentBytes>()));
  }
  return log;
}

// One lower layer that holds `value` everywhere.
std::shared_ptr<const LayerStack> lowerOf(int value, uint64_t size = kSize) {
  const UpperFiles files = UpperFiles::create(ofKind(false, size));
  const auto upper = files.open();
  expectOk(upper->write(0, filled(size, value)));
  expectOk(upper->seal());
  std::vector<std::unique_ptr<LayerReader>> layers;
  layers.push_back(LayerReader::open(share(files.data)).value());
  return LayerStack::make(std::move(layers)).value();
}

TEST(AppendUpper, EveryAcknowledgedWriteSurvivesTheDeathOfTheProcess) {
  const UpperFiles files = UpperFiles::create(ofKind(false, 128 << 10));
  const auto upper = files.open();
  for (int i = 1; i <= 50; ++i) {
    expectOk(upper->write(i * 1536, filled(1536, i)));
    const UpperFiles left = files.copy();
    EXPECT_EQ(readAll(*left.open()), readAll(*upper));
  }
}

TEST(AppendUpper, LargeWritesAndDiscardsAreCutSoThatEveryRecordFits) {
  const uint64_t size = 64 << 20;
  const UpperFiles files = UpperFiles::create(ofKind(false, size));
  const auto upper = files.open();
  expectOk(upper->write(0, filled(9 << 20, 1)));
  expectOk(upper->discard(0, size));
  const std::vector<Segment> log = logOf(files);
  std::vector<uint64_t> lengths;
  for (const Segment& record : log) lengths.push_back(record.length());
  EXPECT_EQ(lengths, (std::vector<uint64_t>{8192, 8192, 2048, 16383, 16383, 16383, 16383, 16383, 16383, 16383, 16383, 8}));
  EXPECT_EQ(log[3].moffset(), (kHeaderSize + (9u << 20)) / kSectorSize) << "a discard names the end of the data";
  EXPECT_EQ(upper->stats().liveBytes, 0u);
  EXPECT_EQ(upper->stats().dataBytes, 9u << 20);
}

TEST(AppendUpper, ATornRecordIsIgnoredAndCutAwayWhenOpenedForWriting) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  expectOk(files.open()->write(0, filled(4096, 1)));
  expectOk(files.index->pwrite(filled(7, 0xEE), kHeaderSize + kSegmentBytes));
  const UpperFiles read = files.copy();
  EXPECT_EQ(byteAt(*read.open({.write = false}), 0), 1);
  EXPECT_EQ(read.index->size().value(), kHeaderSize + kSegmentBytes + 7) << "looking changes nothing";

  const auto upper = files.open();
  EXPECT_EQ(files.index->size().value(), kHeaderSize + kSegmentBytes);
  expectOk(upper->write(4096, filled(4096, 2)));
  const auto again = files.open();
  EXPECT_EQ(byteAt(*again, 0), 1);
  EXPECT_EQ(byteAt(*again, 4096), 2);
}

TEST(AppendUpper, ATornEndOfTheDataIsRoundedUpBeforeTheNextWrite) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  expectOk(files.open()->write(0, filled(512, 1)));
  expectOk(files.data->pwrite(filled(100, 0xEE), kHeaderSize + 512));
  expectOk(files.open()->write(512, filled(512, 2)));
  const auto again = files.open();
  EXPECT_EQ(byteAt(*again, 0), 1);
  EXPECT_EQ(byteAt(*again, 512), 2);
  EXPECT_EQ(byteAt(*again, 1023), 2);
}

TEST(AppendUpper, WithDirectIoBlocksStayOnTheGridAfterAnOddSector) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  OpenUpperOptions direct;
  direct.directIo = true;
  {
    const auto upper = files.open(direct);
    expectOk(upper->write(0, filled(4096, 1)));
    expectOk(upper->write(512, filled(512, 2)));
    expectOk(upper->write(8192, filled(8192, 3)));
    expectOk(upper->write(4096, filled(512, 4)));
  }
  EXPECT_EQ(logOf(files), (std::vector<Segment>{Segment(0, 8, 8), Segment(1, 1, 16), Segment(16, 16, 24), Segment(8, 1, 40)}));
  const auto again = files.open();
  EXPECT_EQ(byteAt(*again, 0), 1);
  EXPECT_EQ(byteAt(*again, 512), 2);
  EXPECT_EQ(byteAt(*again, 8192), 3);
  EXPECT_EQ(byteAt(*again, 4096), 4);
}

// Notes every call in the order it was made.
class NotingFile final : public File {
 public:
  NotingFile(std::shared_ptr<File> below, std::vector<std::string>& notes) : below_(std::move(below)), notes_(notes) {}

  Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const override { return below_->pread(out, offset); }
  Status pwrite(std::span<const std::byte> data, uint64_t offset) override {
    notes_.push_back(name() + ".write");
    return below_->pwrite(data, offset);
  }
  Status sync() override {
    notes_.push_back(name() + ".sync");
    return below_->sync();
  }
  Result<uint64_t> size() const override { return below_->size(); }
  Status truncate(uint64_t sizeBytes) override {
    notes_.push_back(name() + ".truncate");
    return below_->truncate(sizeBytes);
  }
  Status punchHole(uint64_t offset, uint64_t length) override {
    notes_.push_back(name() + ".punch");
    return below_->punchHole(offset, length);
  }
  Result<uint64_t> seekData(uint64_t offset) const override { return below_->seekData(offset); }
  Result<uint64_t> seekHole(uint64_t offset) const override { return below_->seekHole(offset); }
  const std::string& name() const override { return below_->name(); }

 private:
  std::shared_ptr<File> below_;
  std::vector<std::string>& notes_;
};

TEST(Order, DataGoesBeforeTheRecordAndIsDurableBeforeWhatPointsToIt) {
  using Notes = std::vector<std::string>;
  const auto lower = lowerOf(9);
  for (const bool sparse : {false, true}) {
    const UpperFiles files = UpperFiles::create(ofKind(sparse));
    Notes notes;
    const auto upper = openUpper(std::make_unique<NotingFile>(files.data, notes),
                                 std::make_unique<NotingFile>(files.index, notes), marking("A")).value();
    expectOk(upper->attachLower(lower.get()));
    const auto notesOf = [&](const Status& status) {
      expectOk(status);
      return std::exchange(notes, {});
    };
    static_cast<void>(notesOf(upper->flush()));
    EXPECT_EQ(notesOf(upper->write(0, filled(4096, 1))), sparse ? Notes{"data.write"} : (Notes{"data.write", "index.write"}));
    EXPECT_EQ(notesOf(upper->flush()), sparse ? (Notes{"index.sync", "data.sync"})
                                              : (Notes{"data.sync", "index.write", "index.sync"}));
    EXPECT_EQ(notesOf(upper->flush()), Notes{}) << "nothing is new";
    EXPECT_EQ(notesOf(upper->discard(0, 4096)),
              sparse ? (Notes{"index.truncate", "index.write", "index.write", "data.punch"}) : Notes{"index.write"});
    EXPECT_EQ(notesOf(upper->seal()),
              sparse ? (Notes{"index.sync", "data.sync", "data.write", "data.sync", "data.write", "data.truncate", "data.sync"})
                     : (Notes{"data.sync", "index.write", "index.sync", "data.write", "data.sync", "data.write",
                              "data.truncate", "data.sync"}));
  }
}

TEST(AppendUpper, GroupCommitFillsUpWithPaddingOnFlush) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  const auto upper = files.open();
  expectOk(upper->setGroupCommit(64));
  for (int i = 0; i < 5; ++i) expectOk(upper->write(i * 512, filled(512, i + 1)));
  EXPECT_EQ(logOf(files).size(), 4u) << "one group is written, one record waits";
  expectOk(upper->flush());
  const std::vector<Segment> log = logOf(files);
  ASSERT_EQ(log.size(), 8u);
  for (size_t i = 5; i < 8; ++i) EXPECT_EQ(log[i], Segment::padding());
  EXPECT_EQ(upper->setGroupCommit(20).code(), Code::kInvalidArgument);
  EXPECT_EQ(readAll(*files.open()), readAll(*upper));
}

TEST(FlushMarkers, AreWrittenOnlyWhenSomethingIsNewAndLookLikePadding) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  const auto upper = files.open(marking("A"));
  expectOk(upper->flush());
  expectOk(upper->write(0, filled(4096, 1)));
  expectOk(upper->flush());
  expectOk(upper->flush());
  const std::vector<Segment> log = logOf(files);
  ASSERT_EQ(log.size(), 3u);
  EXPECT_EQ(log[0], sessionMarker(hashBootId("A")));
  EXPECT_EQ(log[2], flushMarker(2));
  EXPECT_TRUE(log[0].isPadding() && log[2].isPadding());
  EXPECT_EQ(log[2].length(), 0u);
}

TEST(FlushMarkers, AnotherProcessUnderTheSameKernelLosesNothing) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  {
    const auto upper = files.open(marking("A"));
    expectOk(upper->write(0, filled(4096, 1)));
    expectOk(upper->flush());
    expectOk(upper->write(4096, filled(4096, 2)));
  }
  const size_t entries = logOf(files).size();
  const auto upper = files.open(marking("A"));
  EXPECT_EQ(byteAt(*upper, 4096), 2);
  EXPECT_EQ(logOf(files).size(), entries) << "the session goes on";
}

TEST(FlushMarkers, AfterTheMachineDiedEverythingBehindTheLastFlushIsCut) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  {
    const auto upper = files.open(marking("A"));
    expectOk(upper->write(0, filled(4096, 1)));
    expectOk(upper->flush());
    expectOk(upper->write(0, filled(4096, 2)));      // in the page cache only
    expectOk(upper->write(8192, filled(4096, 3)));
  }
  EXPECT_EQ(byteAt(*files.copy().open({.write = false, .bootId = "B"}), 0), 1) << "looking cuts only in memory";
  for (int again = 0; again < 3; ++again) {
    // Each boot: what was flushed is there, what follows it is not; and a flush moves the border.
    const auto upper = files.open(marking("B" + std::to_string(again)));
    EXPECT_EQ(byteAt(*upper, 0), 1);
    EXPECT_EQ(byteAt(*upper, 8192), again == 0 ? 0 : 9);
    expectOk(upper->write(8192, filled(4096, 9)));
    expectOk(upper->flush());
    expectOk(upper->write(0, filled(4096, 7)));
  }
}

TEST(FlushMarkers, ARecordThatOutranItsDataIsCutOnlyBehindTheLastFlush) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  {
    const auto upper = files.open(marking("A"));
    expectOk(upper->write(0, filled(4096, 1)));
    expectOk(upper->flush());
    expectOk(upper->write(4096, filled(4096, 2)));
    expectOk(upper->write(8192, filled(4096, 3)));
  }
  const UpperFiles behind = files.copy();
  expectOk(behind.data->truncate(kHeaderSize + 4096 + 512));
  {
    const auto upper = behind.open(marking("A"));
    EXPECT_EQ(byteAt(*upper, 0), 1);
    EXPECT_EQ(byteAt(*upper, 4096), 0);
    EXPECT_EQ(byteAt(*upper, 8192), 0);
    expectOk(upper->write(8192, filled(4096, 4)));
  }
  EXPECT_EQ(byteAt(*behind.open(marking("A")), 8192), 4);

  expectOk(files.data->truncate(kHeaderSize + 512));
  EXPECT_EQ(files.tryOpen(marking("A")).code(), Code::kDataLoss) << "this one was flushed: it must not go silently";
}

TEST(FlushMarkers, ALogOfTheOriginalIsMadeDurableBeforeTheFirstSession) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  expectOk(files.open()->write(0, filled(4096, 1)));  // without markers, as the original does
  static_cast<void>(files.open(marking("A")));
  EXPECT_EQ(logOf(files), (std::vector<Segment>{Segment(0, 8, 8), flushMarker(1), sessionMarker(hashBootId("A"))}));
  EXPECT_EQ(byteAt(*files.open(marking("B")), 0), 1);
}

TEST(FlushMarkers, RecordsTheOriginalAddedBehindOursAreKept) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  {
    const auto upper = files.open(marking("A"));
    expectOk(upper->write(0, filled(4096, 1)));
    expectOk(upper->flush());
  }
  // As the original writes: data, then a record that carries the number of layers below.
  const uint64_t end = files.data->size().value();
  expectOk(files.data->pwrite(filled(4096, 5), end));
  std::array<std::byte, kSegmentBytes> record;
  Segment(8, 8, end / kSectorSize, false, 2).encode(record);
  expectOk(files.index->pwrite(record, files.index->size().value()));
  for (const char* boot : {"B", "C", "D"}) EXPECT_EQ(byteAt(*files.open(marking(boot)), 4096), 5) << boot;
}

TEST(FlushMarkers, ALogThatHasThemKeepsGettingThem) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  expectOk(files.open(marking("A"))->write(0, filled(4096, 1)));
  {
    OpenUpperOptions tool;  // does not ask for markers
    tool.bootId = "A";
    const auto upper = files.open(tool);
    expectOk(upper->write(4096, filled(4096, 2)));
    expectOk(upper->flush());
  }
  const auto upper = files.open(marking("B"));
  EXPECT_EQ(byteAt(*upper, 0), 1);
  EXPECT_EQ(byteAt(*upper, 4096), 2);
}

TEST(SparseUpper, DiscardsOverLowerLayersSurviveReopening) {
  const auto lower = lowerOf(9);
  const UpperFiles files = UpperFiles::create(ofKind(true));
  std::vector<std::byte> before;
  {
    const auto upper = files.open();
    expectOk(upper->attachLower(lower.get()));
    expectOk(upper->write(0, filled(16384, 1)));
    expectOk(upper->discard(4096, 8192));
    expectOk(upper->discard(65536, 512));     // a part of a block
    expectOk(upper->discard(100 * 4096, 4096 * 50));
    expectOk(upper->write(101 * 4096, filled(4096, 3)));
    before = readAll(*upper);
  }
  EXPECT_EQ(before[0], std::byte{1});
  EXPECT_EQ(before[4096], std::byte{0});
  EXPECT_EQ(before[65536], std::byte{0});
  EXPECT_EQ(before[65536 + 512], std::byte{9});
  EXPECT_EQ(before[100 * 4096], std::byte{0});
  EXPECT_EQ(before[101 * 4096], std::byte{3});
  EXPECT_EQ(before[200 * 4096], std::byte{9});
  const auto upper = files.open();
  expectOk(upper->attachLower(lower.get()));
  EXPECT_EQ(readAll(*upper), before);

  // Sealed, the discards are in the index of the layer itself.
  expectOk(upper->seal());
  std::vector<std::unique_ptr<LayerReader>> layers;
  auto sealed = LayerReader::open(share(files.data));
  ASSERT_TRUE(sealed.isOk()) << sealed.status().toString();
  size_t zeroed = 0;
  for (const Segment& segment : sealed.value()->segments()) zeroed += segment.zeroed();
  EXPECT_GE(zeroed, 2u);
}

TEST(SparseUpper, AWriteOfOneSectorDoesNotHideTheRestOfItsBlock) {
  const auto lower = lowerOf(9);
  const UpperFiles files = UpperFiles::create(ofKind(true));
  for (int reopen = 0; reopen < 2; ++reopen) {
    const auto upper = files.open();
    expectOk(upper->attachLower(lower.get()));
    if (reopen == 0) expectOk(upper->write(3 * 512, filled(512, 1)));
    EXPECT_EQ(byteAt(*upper, 2 * 512), 9);
    EXPECT_EQ(byteAt(*upper, 3 * 512), 1);
    EXPECT_EQ(byteAt(*upper, 4 * 512), 9);
    EXPECT_EQ(byteAt(*upper, 4096), 9);
  }
}

TEST(SparseUpper, AHeaderOfTheLogThatWasNeverFinishedIsAnEmptyLog) {
  const auto lower = lowerOf(9);
  const UpperFiles files = UpperFiles::create(ofKind(true));
  expectOk(files.index->pwrite(filled(100, 0x4C), 0));
  const auto upper = files.open();
  expectOk(upper->attachLower(lower.get()));
  expectOk(upper->discard(0, 4096));
  EXPECT_EQ(logOf(files), (std::vector<Segment>{Segment(0, 8, 8, true)}));
}

TEST(Upper, AVirtualSizeOfZeroIsTakenOverFromBelowAndStored) {
  for (const bool sparse : {false, true}) {
    const auto lower = lowerOf(9);
    const UpperFiles files = UpperFiles::create(ofKind(sparse, 0));
    {
      const auto upper = files.open();
      EXPECT_EQ(upper->write(0, filled(512, 1)).code(), Code::kInvalidArgument);
      expectOk(upper->attachLower(lower.get()));
      EXPECT_EQ(upper->virtualSize(), kSize);
      expectOk(upper->write(kSize - 4096, filled(4096, 1)));
    }
    EXPECT_EQ(files.open()->virtualSize(), kSize);
    EXPECT_EQ(byteAt(*files.open(), kSize - 1), 1);
  }
}

TEST(Upper, RequestsOffTheSectorGridOrPastTheEndAreRefused) {
  for (const bool sparse : {false, true}) {
    const UpperFiles files = UpperFiles::create(ofKind(sparse));
    const auto upper = files.open();
    EXPECT_EQ(upper->write(1, filled(512, 1)).code(), Code::kInvalidArgument);
    EXPECT_EQ(upper->write(0, filled(511, 1)).code(), Code::kInvalidArgument);
    EXPECT_EQ(upper->write(kSize, filled(512, 1)).code(), Code::kInvalidArgument);
    EXPECT_EQ(upper->write(UINT64_MAX - 511, filled(512, 1)).code(), Code::kInvalidArgument);
    EXPECT_EQ(upper->discard(512, UINT64_MAX - 511).code(), Code::kInvalidArgument);
    EXPECT_EQ(upper->discard(kSize - 512, 1024).code(), Code::kInvalidArgument);
    expectOk(upper->write(kSize, {}));
  }
}

TEST(Upper, ResizingRewritesBothHeaders) {
  for (const bool sparse : {false, true}) {
    const UpperFiles files = UpperFiles::create(ofKind(sparse));
    expectOk(files.open()->write(kSize - 512, filled(512, 1)));
    expectOk(resizeUpper(*files.data, *files.index, 4 * kSize));
    {
      const auto upper = files.open();
      EXPECT_EQ(upper->virtualSize(), 4 * kSize);
      EXPECT_EQ(byteAt(*upper, kSize - 1), 1);
      EXPECT_EQ(byteAt(*upper, kSize), 0);
      expectOk(upper->write(4 * kSize - 512, filled(512, 2)));
    }
    expectOk(resizeUpper(*files.data, *files.index, kSize));
    EXPECT_EQ(files.open()->virtualSize(), kSize);
    EXPECT_EQ(byteAt(*files.open(), kSize - 1), 1);
    EXPECT_EQ(resizeUpper(*files.data, *files.index, 1000).code(), Code::kInvalidArgument);
    EXPECT_EQ(resizeUpper(*files.data, *files.index, UINT64_MAX - 511).code(), Code::kInvalidArgument);
  }
}

TEST(Upper, SealingIsIdempotentAlsoAcrossReopening) {
  const auto lower = lowerOf(9);
  for (const bool sparse : {false, true}) {
    const UpperFiles files = UpperFiles::create(ofKind(sparse));
    {
      const auto upper = files.open();
      expectOk(upper->attachLower(lower.get()));
      expectOk(upper->write(0, filled(3 * 512, 1)));
      expectOk(upper->discard(8192, 4096));
      expectOk(upper->seal());
      expectOk(upper->seal());
      EXPECT_EQ(upper->write(0, filled(512, 2)).code(), Code::kFailedPrecondition);
      EXPECT_EQ(upper->discard(0, 512).code(), Code::kFailedPrecondition);
      EXPECT_EQ(byteAt(*upper, 0), 1);
      expectOk(upper->flush());
    }
    const std::vector<std::byte> sealed = files.data->contents();
    expectOk(files.open()->seal());
    EXPECT_EQ(files.data->contents(), sealed);
    EXPECT_TRUE(LayerReader::open(share(files.data)).isOk());
  }
}

TEST(Upper, SealingCutShortAnywhereCanBeDoneAgain) {
  for (const bool sparse : {false, true}) {
    for (int64_t cut = 0; cut < 6; ++cut) {
      for (const auto kind : {FaultPlan::Kind::kWrite, FaultPlan::Kind::kSync, FaultPlan::Kind::kTruncate}) {
        FaultPlan plan;
        plan.kind = kind;
        plan.prefixBytes = 100;
        const UpperFiles files = UpperFiles::create(ofKind(sparse));
        UpperFiles left;
        bool failed = false;
        {
          auto upper = openUpper(std::make_unique<FaultyFile>(share(files.data), plan),
                                 std::make_unique<FaultyFile>(share(files.index), plan), {}).value();
          expectOk(upper->write(512, filled(4096, 1)));
          plan.calls = 0;
          plan.failAt = cut;
          failed = !upper->seal().isOk();
          left = files.copy();
          plan.failAt = -1;
          if (failed && kind != FaultPlan::Kind::kSync) {
            expectOk(upper->write(8192, filled(512, 2)));  // still a writable layer
            expectOk(upper->seal());
            EXPECT_EQ(byteAt(*upper, 8192), 2);
            EXPECT_TRUE(LayerReader::open(share(files.data)).isOk());
          } else if (failed) {
            EXPECT_FALSE(upper->seal().isOk()) << "a failed sync is never forgotten";
          }
        }
        // The process died right there.
        const auto again = left.open();
        expectOk(again->seal());
        const auto layer = LayerReader::open(share(left.data));
        ASSERT_TRUE(layer.isOk()) << layer.status().toString();
        std::vector<std::byte> out(8192);
        expectOk(layer.value()->read(0, out));
        EXPECT_EQ(out[511], std::byte{0});
        EXPECT_EQ(out[512], std::byte{1});
        EXPECT_EQ(out[4607], std::byte{1});
      }
    }
  }
}

TEST(Upper, AFailedSyncIsNeverForgotten) {
  for (const bool sparse : {false, true}) {
    for (int64_t which = 0; which < 2; ++which) {
      FaultPlan plan;
      plan.kind = FaultPlan::Kind::kSync;
      const UpperFiles files = UpperFiles::create(ofKind(sparse));
      auto upper = openUpper(std::make_unique<FaultyFile>(share(files.data), plan),
                             std::make_unique<FaultyFile>(share(files.index), plan), {}).value();
      expectOk(upper->write(0, filled(4096, 1)));
      plan.calls = 0;
      plan.failAt = which;
      EXPECT_EQ(upper->flush().code(), Code::kIo);
      for (int i = 0; i < 3; ++i) {
        EXPECT_EQ(upper->flush().code(), Code::kIo);
        EXPECT_EQ(upper->write(0, filled(4096, 2)).code(), Code::kIo);
        EXPECT_EQ(upper->discard(0, 4096).code(), Code::kIo);
        EXPECT_EQ(upper->seal().code(), Code::kIo);
      }
      EXPECT_EQ(byteAt(*upper, 0), 1) << "reading goes on";
    }
  }
}

// A fixed script; at each of its writes, syncs aside, the disk is full once. Whatever fails leaves every sector old or
// new, and the same call works once there is room again; a process that dies right then finds the same.
TEST(Upper, AFullDiskAtAnyWriteLosesNothing) {
  constexpr uint64_t kSmall = 64 << 10;
  const auto lower = lowerOf(9, kSmall);
  for (int variant = 0; variant < 3; ++variant) {
    const bool sparse = variant == 2;
    for (const auto kind : {FaultPlan::Kind::kWrite, FaultPlan::Kind::kPunch}) {
      for (const size_t prefix : {size_t{0}, size_t{5}, size_t{512}, size_t{1536}}) {
        for (int64_t at = 0;; ++at) {
          FaultPlan plan;
          plan.kind = kind;
          plan.errnoValue = ENOSPC;
          plan.prefixBytes = prefix;
          const UpperFiles files = UpperFiles::create(ofKind(sparse, kSmall));
          const OpenUpperOptions options = variant == 1 ? marking("A") : OpenUpperOptions{};
          auto upper = openUpper(std::make_unique<FaultyFile>(share(files.data), plan),
                                 std::make_unique<FaultyFile>(share(files.index), plan), options).value();
          expectOk(upper->attachLower(lower.get()));
          std::vector<std::byte> model = filled(kSmall, 9);
          plan.calls = 0;
          plan.failAt = at;
          bool failedOnce = false;
          const auto change = [&](uint64_t offset, uint64_t length, int value) {
            const auto call = [&] {
              return value == 0 ? upper->discard(offset, length) : upper->write(offset, filled(length, value));
            };
            const Status first = call();
            if (!first.isOk()) {
              failedOnce = true;
              ASSERT_EQ(first.code(), Code::kNoSpace) << first.toString();
              for (const bool reopened : {false, true}) {
                const UpperFiles left = files.copy();
                const auto other = reopened ? left.open({.write = false, .bootId = "A"}) : nullptr;
                if (other) expectOk(other->attachLower(lower.get()));
                const std::vector<std::byte> now = readAll(other ? *other : *upper);
                for (uint64_t i = 0; i < kSmall; i += kSectorSize) {
                  if (i >= offset && i < offset + length) {
                    // A sparse write in place may have been torn within what it overwrote; never elsewhere.
                    const bool eitherOr = now[i] == model[i] || now[i] == static_cast<std::byte>(value);
                    ASSERT_TRUE(eitherOr || sparse) << "sector " << i / kSectorSize;
                  } else {
                    ASSERT_EQ(now[i], model[i]) << "sector " << i / kSectorSize << " at " << at << " reopened " << reopened;
                  }
                }
              }
              expectOk(call());
            }
            std::fill_n(model.begin() + offset, length, static_cast<std::byte>(value));
            ASSERT_EQ(readAll(*upper), model);
          };
          change(0, 8192, 1);
          change(512, 1024, 2);
          change(4096, 4096, 0);
          change(6 * 4096 + 512, 512, 3);
          change(6 * 4096 + 1024, 512, 0);
          change(4096 * 2 + 512, 4096 * 3, 0);
          change(4096 * 3, 4096 * 2, 4);
          if (Status status = upper->flush(); !status.isOk()) {
            failedOnce = true;
            expectOk(upper->flush());
          }
          upper.reset();
          OpenUpperOptions again = options;
          const auto reopened = files.open(again);
          expectOk(reopened->attachLower(lower.get()));
          ASSERT_EQ(readAll(*reopened), model) << "variant " << variant << " fault " << at;
          if (!failedOnce) break;
          ASSERT_LT(at, 100);
        }
      }
    }
  }
}

TEST(CreateUpper, MakesBothFilesOrNone) {
  const std::string folder = ::testing::TempDir() + "/obd-create-" + std::to_string(::getpid());
  ASSERT_EQ(::mkdir(folder.c_str(), 0700), 0);
  const std::string data = folder + "/data";
  const std::string index = folder + "/index";
  expectOk(createUpper(data, index, ofKind(false)));
  EXPECT_EQ(createUpper(data, folder + "/other", ofKind(false)).code(), Code::kAlreadyExists);
  EXPECT_EQ(createUpper(folder + "/other", index, ofKind(false)).code(), Code::kAlreadyExists);
  EXPECT_NE(::access((folder + "/other").c_str(), F_OK), 0);
  EXPECT_EQ(createUpper(folder + "/a", folder + "/b", ofKind(false, 1000)).code(), Code::kInvalidArgument);
  EXPECT_NE(::access((folder + "/a").c_str(), F_OK), 0);
  {
    const auto upper = openUpper(data, index, OpenUpperOptions{});
    ASSERT_TRUE(upper.isOk()) << upper.status().toString();
    expectOk(upper.value()->write(0, filled(4096, 1)));
    expectOk(upper.value()->flush());
  }
  EXPECT_EQ(byteAt(*openUpper(data, index, OpenUpperOptions{}).value(), 0), 1);
  ::unlink(data.c_str());
  ::unlink(index.c_str());
  ::rmdir(folder.c_str());
}

TEST(Commit, RefusesMoreEntriesThanCanBeReadBackBeforeWritingAnything) {
  const UpperFiles files = UpperFiles::create(ofKind(false, uint64_t{4} << 30));
  // Every second sector discarded on a log made by hand: a million writes would only make the test slow.
  std::vector<std::byte> log(1'000'001 * kSegmentBytes);
  for (uint64_t i = 0; i < 1'000'001; ++i) {
    Segment(2 * i, 1, 8, true).encode(std::span(log).subspan(i * kSegmentBytes).first<kSegmentBytes>());
  }
  expectOk(files.index->pwrite(log, kHeaderSize));
  const auto upper = files.open();
  MemoryFile out;
  FileSink sink(out);
  EXPECT_EQ(commitUpper(*upper, {}, sink).code(), Code::kResourceExhausted);
  EXPECT_EQ(out.size().value(), 0u);
  EXPECT_EQ(upper->seal().code(), Code::kResourceExhausted);
  expectOk(upper->write(0, filled(512, 1)));
}

TEST(Commit, RefusesALongMessage) {
  const UpperFiles files = UpperFiles::create(ofKind(false));
  MemoryFile out;
  FileSink sink(out);
  CommitOptions options;
  options.userTag = std::string(257, 'x');
  EXPECT_EQ(commitUpper(*files.open(), options, sink).code(), Code::kInvalidArgument);
}

// Sectors carry a stamp in every word, so that a mix of two writes in one sector shows.
void stamp(std::span<std::byte> bytes, uint64_t value) {
  for (size_t at = 0; at < bytes.size(); at += 8) storeLe64(bytes.data() + at, value);
}

bool isUniform(std::span<const std::byte> sector) {
  return std::memcmp(sector.data(), sector.data() + 8, kSectorSize - 8) == 0;
}

TEST(Threads, ReadersAndWritersOfOneLayerNeverSeeAMixedSector) {
  const uint64_t seed = testSeed();
  const auto lower = lowerOf(0);
  for (const bool sparse : {false, true}) {
    const UpperFiles files = UpperFiles::create(ofKind(sparse));
    const auto upper = files.open(marking("A"));
    expectOk(upper->attachLower(lower.get()));
    constexpr int kWriters = 3;
    const int rounds = kSanitized ? 400 : 4000;
    constexpr uint64_t kShared = 64 * 1024;                    // everybody writes here
    constexpr uint64_t kOwn = (kSize - kShared) / kWriters / 4096 * 4096;
    std::vector<std::vector<std::byte>> models(kWriters, std::vector<std::byte>(kOwn));
    std::atomic<bool> done{false};
    std::atomic<int> mixed{0};
    std::vector<std::thread> threads;
    for (int writer = 0; writer < kWriters; ++writer) {
      threads.emplace_back([&, writer] {
        std::mt19937_64 random(seed + static_cast<uint64_t>(writer));
        std::vector<std::byte> bytes(16 * kSectorSize);
        for (int i = 0; i < rounds; ++i) {
          const size_t length = (1 + random() % 16) * kSectorSize;
          const std::span<std::byte> part = std::span(bytes).first(length);
          stamp(part, random());
          if (i % 3 == 0) {
            EXPECT_TRUE(upper->write(random() % ((kShared - length) / kSectorSize) * kSectorSize, part).isOk());
            continue;
          }
          // Own ranges begin anywhere in a block, so neighbours share blocks.
          const uint64_t base = kShared + static_cast<uint64_t>(writer) * kOwn;
          const uint64_t at = random() % ((kOwn - length) / kSectorSize) * kSectorSize;
          if (i % 7 == 0) std::memset(part.data(), 0, length);
          EXPECT_TRUE((i % 7 == 0 ? upper->discard(base + at, length) : upper->write(base + at, part)).isOk());
          std::memcpy(models[writer].data() + at, part.data(), length);
          EXPECT_TRUE(i % 50 != 0 || upper->flush().isOk());
          std::vector<std::byte> back(length);
          EXPECT_TRUE(upper->read(base + at, back).isOk());
          EXPECT_EQ(std::memcmp(back.data(), part.data(), length), 0);
        }
      });
    }
    threads.emplace_back([&] {
      std::mt19937_64 random(seed + 99);
      std::vector<std::byte> bytes(32 * kSectorSize);
      while (!done.load()) {
        const uint64_t at = random() % ((kSize - bytes.size()) / kSectorSize) * kSectorSize;
        EXPECT_TRUE(upper->read(at, bytes).isOk());
        for (size_t i = 0; i < bytes.size(); i += kSectorSize) {
          mixed += !isUniform(std::span(bytes).subspan(i, kSectorSize));
        }
      }
    });
    for (int i = 0; i < kWriters; ++i) threads[i].join();
    done = true;
    threads.back().join();
    EXPECT_EQ(mixed.load(), 0);
    const std::vector<std::byte> live = readAll(*upper);
    for (int writer = 0; writer < kWriters; ++writer) {
      EXPECT_EQ(std::memcmp(live.data() + kShared + static_cast<uint64_t>(writer) * kOwn, models[writer].data(), kOwn), 0);
    }
    const auto again = files.open(marking("A"));
    expectOk(again->attachLower(lower.get()));
    EXPECT_EQ(readAll(*again), live);
  }
}

TEST(Threads, SealingWhileOthersWriteKeepsExactlyWhatWasAcknowledged) {
  for (const bool sparse : {false, true}) {
    const UpperFiles files = UpperFiles::create(ofKind(sparse));
    const auto upper = files.open();
    constexpr int kWriters = 3;
    std::array<std::atomic<uint64_t>, kWriters> acknowledged{};
    std::vector<std::thread> threads;
    for (int writer = 0; writer < kWriters; ++writer) {
      threads.emplace_back([&, writer] {
        std::vector<std::byte> bytes(4096);
        for (uint64_t i = 1;; ++i) {
          stamp(bytes, i);
          const Status status = upper->write(static_cast<uint64_t>(writer) * 4096, bytes);
          if (!status.isOk()) {
            EXPECT_EQ(status.code(), Code::kFailedPrecondition);
            return;
          }
          acknowledged[writer] = i;
        }
      });
    }
    while (acknowledged[0] < 50 || acknowledged[1] < 50 || acknowledged[2] < 50) std::this_thread::yield();
    expectOk(upper->seal());
    for (std::thread& thread : threads) thread.join();
    const auto layer = LayerReader::open(share(files.data));
    ASSERT_TRUE(layer.isOk()) << layer.status().toString();
    for (int writer = 0; writer < kWriters; ++writer) {
      std::array<std::byte, kSectorSize> sector;
      expectOk(layer.value()->read(static_cast<uint64_t>(writer) * 4096, sector));
      EXPECT_EQ(loadLe64(sector.data()), acknowledged[writer].load());
    }
  }
}

}  // namespace
}  // namespace obd
