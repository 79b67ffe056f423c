// Invariants: posix and memory files agree on every operation; faults fail when told; a failed sync is final.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <random>

#include "io/faulty-file.h"
#include "io/file-sink.h"
#include "io/memory-file.h"
#include "base/units.h"
#include "io/posix-file.h"

namespace obd {
namespace {

class TempPath final {
 public:
  TempPath() {
    char path[] = "obd-io-test-XXXXXX";
    const int fd = mkstemp(path);
    EXPECT_GE(fd, 0);
    ::close(fd);
    path_ = path;
  }
  ~TempPath() { ::unlink(path_.c_str()); }
  const std::string& get() const { return path_; }

 private:
  std::string path_;
};

std::vector<std::byte> pattern(size_t length, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> out(length);
  for (auto& b : out) b = static_cast<std::byte>(random());
  return out;
}

TEST(File, MemoryFileBehavesLikeAFileOfTheKernel) {
  const unsigned seed = 20261122;
  std::printf("seed %u\n", seed);
  std::mt19937 random(seed);
  const TempPath path;
  auto real = openPosixFile(path.get(), {.write = true});
  ASSERT_TRUE(real.isOk()) << real.status().toString();
  MemoryFile memory;
  constexpr uint64_t kSpan = 256 * 1024;
  for (int i = 0; i < 2000; ++i) {
    const uint64_t offset = random() % kSpan;
    const size_t length = random() % 20000 + 1;
    switch (random() % 5) {
      case 0:
      case 1: {
        const auto data = pattern(length, random());
        ASSERT_TRUE(real.value()->pwrite(data, offset).isOk());
        ASSERT_TRUE(memory.pwrite(data, offset).isOk());
        break;
      }
      case 2:
        ASSERT_TRUE(real.value()->punchHole(offset, length).isOk());
        ASSERT_TRUE(memory.punchHole(offset, length).isOk());
        break;
      case 3:
        if (random() % 4 == 0) {
          ASSERT_TRUE(real.value()->truncate(offset).isOk());
          ASSERT_TRUE(memory.truncate(offset).isOk());
        }
        break;
      default: {
        std::vector<std::byte> a(length), b(length);
        const auto gotA = real.value()->pread(a, offset);
        const auto gotB = memory.pread(b, offset);
        ASSERT_TRUE(gotA.isOk() && gotB.isOk());
        ASSERT_EQ(gotA.value(), gotB.value());
        ASSERT_EQ(a, b);
        break;
      }
    }
    ASSERT_EQ(real.value()->size().value(), memory.size().value());
  }
}

TEST(File, HolesAreFoundWhereNothingWasWritten) {
  const TempPath path;
  auto real = openPosixFile(path.get(), {.write = true});
  ASSERT_TRUE(real.isOk());
  MemoryFile memory;
  for (File* file : {real.value().get(), static_cast<File*>(&memory)}) {
    ASSERT_TRUE(file->truncate(1 * kMiB).isOk());
    ASSERT_TRUE(file->pwrite(pattern(4096, 1), 64 * kKiB).isOk());
    EXPECT_EQ(file->seekData(0).value(), 64 * kKiB);
    EXPECT_EQ(file->seekHole(64 * kKiB).value(), 68 * kKiB);
    EXPECT_EQ(file->seekData(68 * kKiB).value(), 1 * kMiB);
  }
}

TEST(File, AlignedDirectRequestsAndUnalignedOnesSeeTheSameBytes) {
  const TempPath path;
  auto file = openPosixFile(path.get(), {.write = true, .direct = true});
  ASSERT_TRUE(file.isOk());
  void* raw = nullptr;
  ASSERT_EQ(posix_memalign(&raw, 4096, 65536), 0);
  const std::unique_ptr<void, decltype(&free)> owner(raw, &free);
  const std::span<std::byte> aligned(static_cast<std::byte*>(raw), 65536);
  const auto data = pattern(65536, 7);
  std::memcpy(aligned.data(), data.data(), data.size());
  ASSERT_TRUE(file.value()->pwrite(aligned, 0).isOk());
  ASSERT_TRUE(file.value()->pwrite(pattern(100, 8), 65536).isOk());
  std::vector<std::byte> out(65536);
  ASSERT_TRUE(file.value()->preadExact(out, 0).isOk());
  EXPECT_EQ(out, data);
  std::memset(aligned.data(), 0, aligned.size());
  ASSERT_TRUE(file.value()->preadExact(aligned, 0).isOk());
  EXPECT_EQ(std::memcmp(aligned.data(), data.data(), data.size()), 0);
  EXPECT_EQ(file.value()->preadExact(aligned, 4096).code(), Code::kDataLoss);
}

TEST(File, RefusesWhatIsNotAFile) {
  EXPECT_EQ(openPosixFile("/dev/null", {}).code(), Code::kInvalidArgument);
  EXPECT_EQ(openPosixFile("/", {}).code(), Code::kInvalidArgument);
  EXPECT_EQ(openPosixFile("does-not-exist", {}).code(), Code::kNotFound);
  EXPECT_EQ(openPosixFile("", {}).code(), Code::kInvalidArgument);
  const TempPath path;
  EXPECT_EQ(openPosixFile(path.get(), {.write = true, .create = true, .exclusive = true}).code(), Code::kAlreadyExists);
}

TEST(File, OffsetsBeyondTwoToTheSixtyThreeAreRefused) {
  const TempPath path;
  auto file = openPosixFile(path.get(), {.write = true});
  std::vector<std::byte> one(1);
  EXPECT_EQ(file.value()->pread(one, UINT64_MAX).code(), Code::kInvalidArgument);
  EXPECT_EQ(file.value()->pwrite(one, UINT64_MAX).code(), Code::kInvalidArgument);
}

TEST(FaultyFile, FailsTheCallItWasToldToAndLeavesThePrefix) {
  FaultPlan plan;
  plan.kind = FaultPlan::Kind::kWrite;
  plan.failAt = 1;
  plan.prefixBytes = 3;
  plan.errnoValue = ENOSPC;
  FaultyFile file(std::make_unique<MemoryFile>(), plan);
  ASSERT_TRUE(file.pwrite(pattern(10, 1), 0).isOk());
  EXPECT_EQ(file.pwrite(pattern(10, 2), 10).code(), Code::kNoSpace);
  EXPECT_EQ(file.size().value(), 13u);
  EXPECT_TRUE(file.pwrite(pattern(10, 3), 13).isOk());
}

TEST(FileSink, WritesEverythingInOrderAndKeepsItsFirstFailure) {
  MemoryFile memory;
  FileSink sink(memory);
  std::vector<std::byte> all;
  for (size_t length : {size_t{1}, size_t{70000}, size_t{3 << 20}, size_t{17}}) {
    const auto part = pattern(length, static_cast<unsigned>(length));
    ASSERT_TRUE(sink.write(part).isOk());
    all.insert(all.end(), part.begin(), part.end());
  }
  EXPECT_EQ(sink.position(), all.size());
  ASSERT_TRUE(sink.finish().isOk());
  EXPECT_EQ(memory.contents(), all);

  FaultPlan plan;
  plan.kind = FaultPlan::Kind::kWrite;
  plan.failAt = 0;
  FaultyFile faulty(std::make_unique<MemoryFile>(), plan);
  FileSink failing(faulty);
  EXPECT_EQ(failing.write(pattern(2 << 20, 1)).code(), Code::kIo);
  EXPECT_EQ(failing.write(pattern(1, 1)).code(), Code::kIo);
  EXPECT_EQ(failing.finish().code(), Code::kIo);
}

}  // namespace
}  // namespace obd
