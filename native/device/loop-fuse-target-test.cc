// Invariants, checked on the real kernel (root needed):
//   what is written to the node is what the backend holds, and the other way round, at both sector sizes;
//   discard, write-zeroes and flush reach the backend; its errors reach the caller;
//   a device in use is not stopped unless forced; a stopped device leaves no node, mount or FUSE connection behind.
#include "device/loop-fuse-target.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <random>
#include <set>
#include <stop_token>
#include <thread>

#include "base/units.h"
#include "device/memory-backend.h"

// <sys/sysmacros.h> makes macros of these two names, which are methods of ours.
#undef major
#undef minor

#if defined(__SANITIZE_THREAD__)
// Threads apart have descriptor tables of their own; ThreadSanitizer takes equal numbers for the same descriptor.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() { return "race:runApart\n"; }
// One test starts threads in a forked child.
extern "C" const char* __tsan_default_options();
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }
#endif

namespace obd {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// OBD_SEED if set, else fresh; printed either way, so that a failure can be repeated.
uint64_t testSeed() {
  const char* given = std::getenv("OBD_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  std::printf("OBD_SEED=%lu\n", static_cast<unsigned long>(seed));
  return seed;
}

namespace fs = std::filesystem;

std::string command(const std::string& line) {
  FILE* pipe = ::popen((line + " 2>&1").c_str(), "re");
  if (pipe == nullptr) return "popen failed";
  std::string output;
  std::array<char, 512> chunk{};
  while (const size_t got = std::fread(chunk.data(), 1, chunk.size(), pipe)) output.append(chunk.data(), got);
  const int result = ::pclose(pipe);
  return result == 0 ? "" : line + " -> " + std::to_string(result) + ": " + output;
}

std::string readFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

long queueValue(const LoopFuseTarget& target, const std::string& name) {
  const std::string text = readFile("/sys/block/" + target.path().substr(5) + "/queue/" + name);
  return std::strtol(text.c_str(), nullptr, 10);
}

// A page-aligned buffer, as O_DIRECT wants it.
class Aligned {
 public:
  explicit Aligned(size_t size) : size_(size), bytes_(static_cast<std::byte*>(std::aligned_alloc(4096, size))) {}
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { std::free(bytes_); }
  std::byte* data() { return bytes_; }
  std::span<std::byte> span() { return {bytes_, size_}; }
  void fill(std::mt19937_64& random, size_t length) {
    for (size_t i = 0; i < length; i += 8) {
      const uint64_t word = random();
      std::memcpy(bytes_ + i, &word, 8);
    }
  }

 private:
  size_t size_;
  std::byte* bytes_;
};

// Mounted while it lives, in the namespace of this test process only.
class Mounted {
 public:
  Mounted(const std::string& device, std::string target, unsigned long flags = 0, const char* options = "")
      : target_(std::move(target)) {
    fs::create_directories(target_);
    error_ = ::mount(device.c_str(), target_.c_str(), "ext4", flags, options) == 0 ? 0 : errno;
  }
  Mounted(const Mounted&) = delete;
  Mounted& operator=(const Mounted&) = delete;
  ~Mounted() { unmount(); }
  int error() const { return error_; }
  void unmount() {
    if (error_ == 0) {
      if (::umount2(target_.c_str(), 0) != 0) ::umount2(target_.c_str(), MNT_DETACH);
    }
    error_ = EINVAL;
  }

 private:
  std::string target_;
  int error_;
};

class LoopFuseTargetTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    ASSERT_EQ(::geteuid(), 0U) << "these tests need root";
    // Mounts of this test end with its process, however it ends.
    ASSERT_EQ(::unshare(CLONE_NEWNS), 0);
    ASSERT_EQ(::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr), 0);
  }
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "obd-device-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
    // I/O on a device that this process serves cannot be interrupted: a bug would hang the test for ever, even when it
    // is killed. Cutting the connections turns that into a failure.
    watchdog_ = std::jthread([this](const std::stop_token& stop) {
      std::mutex mutex;
      std::unique_lock lock(mutex);
      std::condition_variable_any expired;
      if (expired.wait_for(lock, stop, std::chrono::seconds(60), [&] { return stop.stop_requested(); })) return;
      ADD_FAILURE() << "hangs";
      abortConnections();
    });
  }
  void TearDown() override {
    watchdog_ = {};
    fs::remove_all(dir_);
    const auto left = findLoops(prefix());
    ASSERT_TRUE(left.isOk()) << left.status().toString();
    EXPECT_TRUE(left.value().empty()) << left.value().front() << " is left behind";
    // FUSE connections need no look: a stop and a session's end wait for workers that end with their connection.
  }

  static std::string prefix() { return "obdtest-" + std::to_string(::getpid()) + "-"; }

  BlockTargetOptions options(uint32_t sectorSizeBytes = 4096, uint32_t threads = 4) {
    BlockTargetOptions made;
    made.sectorSizeBytes = sectorSizeBytes;
    made.threads = threads;
    made.name = prefix() + std::to_string(sequence_++);
    made.runDir = dir_;
    return made;
  }
  std::unique_ptr<LoopFuseTarget> start(BlockBackend& backend, uint32_t sectorSizeBytes = 4096, uint32_t threads = 4) {
    auto target = LoopFuseTarget::start(backend, options(sectorSizeBytes, threads));
    EXPECT_TRUE(target.isOk()) << target.status().toString();
    if (!target.isOk()) return nullptr;
    remember(target.value()->session().connectionId);
    return std::move(target).value();
  }
  bool connectionExists(uint32_t id) {
    const std::string at = dir_ + "-fusectl";
    fs::create_directories(at);
    bool exists = false;
    if (::mount("fusectl", at.c_str(), "fusectl", 0, "") == 0) {
      exists = fs::exists(at + "/" + std::to_string(id));
      ::umount2(at.c_str(), MNT_DETACH);
    }
    fs::remove(at);
    return exists;
  }

  // Private to this test process's mount namespace.
  void abortConnections() {
    const std::string at = dir_ + "-abort";
    fs::create_directories(at);
    if (::mount("fusectl", at.c_str(), "fusectl", 0, "") != 0) return;
    const std::lock_guard lock(connectionsMutex_);
    for (const uint32_t id : connections_) std::ofstream(at + "/" + std::to_string(id) + "/abort") << "1";
    ::umount2(at.c_str(), MNT_DETACH);
    fs::remove(at);
  }

  void remember(uint32_t connectionId) {
    const std::lock_guard lock(connectionsMutex_);
    connections_.push_back(connectionId);
  }

  std::string dir_;
  std::mutex connectionsMutex_;
  std::vector<uint32_t> connections_;  // guarded by connectionsMutex_ while the watchdog lives
  std::jthread watchdog_;
  int sequence_ = 0;
};

TEST_F(LoopFuseTargetTest, aFileSystemMadeOnTheDeviceIsThereAfterARemount) {
  MemoryBackend backend(64 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  ASSERT_EQ(command("mkfs.ext4 -q " + target->path()), "");
  const std::string text(3 * kMiB + 17, 'x');
  {
    Mounted mounted(target->path(), dir_ + "/mnt");
    ASSERT_EQ(mounted.error(), 0);
    std::ofstream(dir_ + "/mnt/file", std::ios::binary) << text;
  }
  Mounted mounted(target->path(), dir_ + "/mnt");
  ASSERT_EQ(mounted.error(), 0);
  EXPECT_EQ(readFile(dir_ + "/mnt/file"), text);
  mounted.unmount();
  EXPECT_EQ(command("e2fsck -fn " + target->path()), "");
  EXPECT_GT(target->stats().writeBytes, text.size());
  EXPECT_GT(target->stats().flushOps, 0U);
  EXPECT_EQ(target->stats().errors, 0U);
  const Status stopped = target->stop(false);
  EXPECT_TRUE(stopped.isOk()) << stopped.toString();
}

TEST_F(LoopFuseTargetTest, theFileSystemUnderneathIsSeenInNoMountTable) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  EXPECT_EQ(readFile("/proc/self/mountinfo").find(prefix()), std::string::npos);
  EXPECT_TRUE(connectionExists(connections_.back()));
}

TEST_F(LoopFuseTargetTest, directIoOfAnySizeIsTheBackendsBytesAtBothSectorSizes) {
  const uint64_t seed = testSeed();
  for (const uint32_t sector : {512U, 4096U}) {
    MemoryBackend backend(32 * kMiB);
    auto target = start(backend, sector);
    ASSERT_NE(target, nullptr);
    EXPECT_EQ(queueValue(*target, "logical_block_size"), sector);
    EXPECT_EQ(readFile("/sys/block/" + target->path().substr(5) + "/loop/dio"), "1\n");
    OwnFd node(::open(target->path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
    ASSERT_TRUE(node.isValid());
    std::mt19937_64 random(seed);
    Aligned data(2 * kMiB);
    for (int round = 0; round < (kSanitized ? 40 : 200); round++) {
      // Half of the sizes are small, where sector and page arithmetic differ.
      const uint64_t most = round % 2 == 0 ? 16 : 2 * kMiB / sector;
      const uint64_t length = sector * (1 + random() % most);
      const uint64_t offset = sector * (random() % ((32 * kMiB - length) / sector));
      data.fill(random, length);
      ASSERT_EQ(::pwrite(node.get(), data.data(), length, static_cast<off_t>(offset)), static_cast<ssize_t>(length));
      ASSERT_EQ(std::memcmp(backend.bytes().data() + offset, data.data(), length), 0) << "write at " << offset;
      const uint64_t from = sector * (random() % ((32 * kMiB - length) / sector));
      ASSERT_EQ(::pread(node.get(), data.data(), length, static_cast<off_t>(from)), static_cast<ssize_t>(length));
      ASSERT_EQ(std::memcmp(backend.bytes().data() + from, data.data(), length), 0) << "read at " << from;
    }
    if (sector == 4096) {
      EXPECT_EQ(::pwrite(node.get(), data.data(), 512, 0), -1);
      EXPECT_EQ(errno, EINVAL);
    }
    node.reset();
    EXPECT_TRUE(target->stop(false).isOk());
  }
}

TEST_F(LoopFuseTargetTest, theLastSectorIsReachableAndNothingBehindIt) {
  MemoryBackend backend(8 * kMiB + 512);
  auto target = start(backend, 512);
  ASSERT_NE(target, nullptr);
  OwnFd node(::open(target->path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
  uint64_t size = 0;
  ASSERT_EQ(::ioctl(node.get(), BLKGETSIZE64, &size), 0);
  EXPECT_EQ(size, 8 * kMiB + 512);
  Aligned data(4096);
  std::memset(data.data(), 0x5a, 4096);
  EXPECT_EQ(::pwrite(node.get(), data.data(), 512, 8 * kMiB), 512);
  EXPECT_EQ(backend.bytes()[8 * kMiB + 511], std::byte{0x5a});
  EXPECT_EQ(::pread(node.get(), data.data(), 1024, 8 * kMiB), 512);
}

TEST_F(LoopFuseTargetTest, discardZeroingAndFlushReachTheBackend) {
  for (const uint32_t sector : {512U, 4096U}) {
    MemoryBackend backend(64 * kMiB);
    auto target = start(backend, sector);
    ASSERT_NE(target, nullptr);
    EXPECT_EQ(queueValue(*target, "discard_granularity"), 4096);
    EXPECT_GE(queueValue(*target, "discard_max_bytes"), 1L << 30);
    std::memset(backend.bytes().data(), 0xff, 8 * kMiB);
    OwnFd node(::open(target->path().c_str(), O_RDWR | O_CLOEXEC));

    std::array<uint64_t, 2> range = {1 * kMiB, 2 * kMiB};
    ASSERT_EQ(::ioctl(node.get(), BLKDISCARD, range.data()), 0);
    ASSERT_EQ(backend.discards().size(), 1U);
    EXPECT_EQ(backend.discards()[0], std::pair(1 * kMiB, 2 * kMiB));

    range = {4 * kMiB, 1 * kMiB};
    ASSERT_EQ(::ioctl(node.get(), BLKZEROOUT, range.data()), 0);
    ASSERT_EQ(backend.zeroings().size(), 1U);
    EXPECT_EQ(backend.zeroings()[0], std::pair(4 * kMiB, 1 * kMiB));

    ASSERT_EQ(::fallocate(node.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 6 * kMiB, 4096), 0);
    const MemoryBackend::Ranges discards = backend.discards();
    const MemoryBackend::Ranges zeroings = backend.zeroings();
    EXPECT_EQ(discards.size() + zeroings.size(), 3U);
    EXPECT_EQ(backend.bytes()[6 * kMiB], std::byte{0});

    const uint64_t before = backend.flushes();
    ASSERT_EQ(::fsync(node.get()), 0);
    EXPECT_GT(backend.flushes(), before);
    EXPECT_EQ(target->stats().discardOps, 3U);
    EXPECT_EQ(target->stats().discardBytes, 3 * kMiB + 4096);
  }
}

TEST_F(LoopFuseTargetTest, fstrimOfAFileSystemDiscardsWhatWasDeleted) {
  MemoryBackend backend(64 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  ASSERT_EQ(command("mkfs.ext4 -q -E nodiscard " + target->path()), "");
  Mounted mounted(target->path(), dir_ + "/mnt");
  ASSERT_EQ(mounted.error(), 0);
  ASSERT_EQ(command("fstrim " + dir_ + "/mnt"), "");
  EXPECT_GT(target->stats().discardBytes, 32 * kMiB);
}

TEST_F(LoopFuseTargetTest, aReadOnlyDeviceRefusesWritesAndServesReads) {
  MemoryBackend backend(8 * kMiB, /*readOnly=*/true);
  backend.bytes()[4096] = std::byte{7};
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  {
    // The kernel lets a read-only node be opened for writing; the write is refused.
    OwnFd writer(::open(target->path().c_str(), O_RDWR | O_CLOEXEC));
    EXPECT_EQ(::pwrite(writer.get(), "x", 1, 0), -1);
    EXPECT_EQ(errno, EPERM);
  }
  OwnFd node(::open(target->path().c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
  ASSERT_TRUE(node.isValid());
  int readOnly = 0;
  ASSERT_EQ(::ioctl(node.get(), BLKROGET, &readOnly), 0);
  EXPECT_EQ(readOnly, 1);
  Aligned data(4096);
  ASSERT_EQ(::pread(node.get(), data.data(), 4096, 4096), 4096);
  EXPECT_EQ(data.span()[0], std::byte{7});
  std::array<uint64_t, 2> range = {0, 4096};
  EXPECT_EQ(::ioctl(node.get(), BLKDISCARD, range.data()), -1);
  node.reset();
  EXPECT_TRUE(target->stop(false).isOk());
  EXPECT_EQ(backend.flushes(), 0U);
}

TEST_F(LoopFuseTargetTest, manyThreadsOfDirectIoSeeTheirOwnWrites) {
  constexpr int kThreads = 8;
  constexpr uint64_t kShare = 4 * kMiB;
  const uint64_t seed = testSeed();
  MemoryBackend backend(kThreads * kShare);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; t++) {
    threads.emplace_back([&, t] {
      OwnFd node(::open(target->path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
      std::mt19937_64 random(seed + static_cast<uint64_t>(t));
      Aligned mine(256 * kKiB);
      Aligned back(256 * kKiB);
      for (int round = 0; round < (kSanitized ? 15 : 60); round++) {
        const uint64_t length = 4096 * (1 + random() % 64);
        const uint64_t offset = static_cast<uint64_t>(t) * kShare + 4096 * (random() % ((kShare - length) / 4096 + 1));
        mine.fill(random, length);
        const bool good =
            ::pwrite(node.get(), mine.data(), length, static_cast<off_t>(offset)) == static_cast<ssize_t>(length) &&
            ::pread(node.get(), back.data(), length, static_cast<off_t>(offset)) == static_cast<ssize_t>(length) &&
            std::memcmp(mine.data(), back.data(), length) == 0;
        if (!good) wrong++;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST_F(LoopFuseTargetTest, severalRequestsOfOneDeviceAreServedAtOnce) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend, 4096, 3);
  ASSERT_NE(target, nullptr);
  backend.hold();
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; i++) {
    readers.emplace_back([&, i] {
      OwnFd node(::open(target->path().c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
      Aligned data(4096);
      EXPECT_EQ(::pread(node.get(), data.data(), 4096, i * 4096), 4096);
    });
  }
  backend.awaitHeld(3);
  backend.release();
  for (std::thread& reader : readers) reader.join();
}

TEST_F(LoopFuseTargetTest, aMountedDeviceIsNotStoppedAndGoesOn) {
  MemoryBackend backend(64 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  ASSERT_EQ(command("mkfs.ext4 -q " + target->path()), "");
  {
    Mounted mounted(target->path(), dir_ + "/mnt");
    ASSERT_EQ(mounted.error(), 0);
    const Status refused = target->stop(false);
    EXPECT_EQ(refused.code(), Code::kFailedPrecondition) << refused.toString();
    EXPECT_NE(refused.message().find(dir_ + "/mnt"), std::string::npos) << refused.toString();
    std::ofstream(dir_ + "/mnt/after") << "still here";
    const OwnFd root(::open((dir_ + "/mnt").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    ASSERT_EQ(::syncfs(root.get()), 0);
    EXPECT_EQ(readFile(dir_ + "/mnt/after"), "still here");
  }
  const Status stopped = target->stop(false);
  EXPECT_TRUE(stopped.isOk()) << stopped.toString();
  EXPECT_TRUE(target->stop(false).isOk()) << "stop is idempotent";
}

TEST_F(LoopFuseTargetTest, aRawOpenerKeepsTheDeviceAndIsNamed) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  // A child holds the node open until its stdin ends.
  std::array<int, 2> input{};
  ASSERT_EQ(::pipe2(input.data(), O_CLOEXEC), 0);
  std::array<int, 2> ready{};
  ASSERT_EQ(::pipe2(ready.data(), O_CLOEXEC), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(input[1]);
    const int fd = ::open(target->path().c_str(), O_RDONLY);
    char byte = fd >= 0 ? 'y' : 'n';
    if (::write(ready[1], &byte, 1) != 1) ::_exit(1);
    while (::read(input[0], &byte, 1) > 0) {
    }
    ::_exit(0);
  }
  ASSERT_GT(child, 0);
  char byte = 'n';
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  ASSERT_EQ(byte, 'y');

  const Status refused = target->stop(false);
  EXPECT_EQ(refused.code(), Code::kFailedPrecondition) << refused.toString();
  EXPECT_NE(refused.message().find("pid " + std::to_string(child)), std::string::npos) << refused.toString();
  {
    OwnFd node(::open(target->path().c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
    Aligned data(4096);
    EXPECT_EQ(::pread(node.get(), data.data(), 4096, 0), 4096) << "still in service";
  }
  ::close(input[1]);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  ::close(input[0]);
  ::close(ready[0]);
  ::close(ready[1]);
  // The refusal must not have left a mark that unbinds the node at the child's close.
  const auto left = findLoops(prefix());
  ASSERT_EQ(left.value().size(), 1U);
  EXPECT_TRUE(target->stop(false).isOk());
}

TEST_F(LoopFuseTargetTest, aForcedStopFailsTheHoldersIoAndFreesTheNodeAtItsClose) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  OwnFd node(::open(target->path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
  ASSERT_TRUE(target->stop(true).isOk());
  Aligned data(4096);
  EXPECT_EQ(::pread(node.get(), data.data(), 4096, 0), -1);
  EXPECT_EQ(errno, EIO);
  EXPECT_EQ(findLoops(prefix()).value().size(), 1U);
  node.reset();
  EXPECT_TRUE(findLoops(prefix()).value().empty());
}

TEST_F(LoopFuseTargetTest, aForcedStopFreesARequestThatIsInFlight) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  backend.hold();
  int readErrno = 0;
  std::thread reader([&] {
    OwnFd node(::open(target->path().c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
    Aligned data(4096);
    readErrno = ::pread(node.get(), data.data(), 4096, 0) < 0 ? errno : 0;
  });
  backend.awaitHeld(1);
  std::thread stopper([&] { EXPECT_TRUE(target->stop(true).isOk()); });
  reader.join();  // the abort answers it although the backend does not
  EXPECT_EQ(readErrno, EIO);
  backend.release();
  stopper.join();
}

TEST_F(LoopFuseTargetTest, whatWasWrittenBufferedIsFlushedByAStop) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  OwnFd node(::open(target->path().c_str(), O_RDWR | O_CLOEXEC));
  const std::string text(4096, 'q');
  ASSERT_EQ(::pwrite(node.get(), text.data(), text.size(), 12288), 4096);
  node.reset();
  ASSERT_TRUE(target->stop(false).isOk());
  EXPECT_EQ(std::memcmp(backend.bytes().data() + 12288, text.data(), text.size()), 0);
  EXPECT_GT(backend.flushes(), 0U);
}

TEST_F(LoopFuseTargetTest, errorsOfTheBackendReachTheCaller) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  OwnFd node(::open(target->path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
  Aligned data(4096);
  std::memset(data.data(), 1, 4096);

  backend.failReads(dataLoss("checksum"));
  EXPECT_EQ(::pread(node.get(), data.data(), 4096, 0), -1);
  EXPECT_EQ(errno, EIO);
  backend.failReads(Status::ok());
  EXPECT_EQ(::pread(node.get(), data.data(), 4096, 0), 4096);

  backend.failWrites(fromErrno("append", ENOSPC));
  EXPECT_EQ(::pwrite(node.get(), data.data(), 4096, 0), -1);
  EXPECT_EQ(errno, ENOSPC);
  backend.failWrites(Status::ok());
  EXPECT_EQ(::pwrite(node.get(), data.data(), 4096, 0), 4096);

  // These two would be taken for "nothing to do" by the loop driver and by FUSE.
  for (const int error : {EINVAL, ENOSYS, EIO}) {
    backend.failFlushes(fromErrno("fdatasync", error));
    EXPECT_EQ(::fsync(node.get()), -1) << error;
    EXPECT_EQ(errno, EIO);
  }
  backend.failFlushes(Status::ok());
  EXPECT_EQ(::fsync(node.get()), 0);

  backend.failDiscards(ioError("punch"));
  std::array<uint64_t, 2> range = {0, 4096};
  EXPECT_EQ(::ioctl(node.get(), BLKDISCARD, range.data()), -1);
  backend.failDiscards(Status::ok());
  EXPECT_EQ(::ioctl(node.get(), BLKDISCARD, range.data()), 0);
  EXPECT_EQ(target->stats().errors, 6U);
}

TEST_F(LoopFuseTargetTest, aDeviceWhoseFlushFailsStaysInServiceUnlessForced) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  {
    OwnFd node(::open(target->path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
    Aligned data(4096);
    std::memset(data.data(), 1, 4096);
    ASSERT_EQ(::pwrite(node.get(), data.data(), 4096, 0), 4096);
  }
  backend.failFlushes(ioError("lost"));
  EXPECT_FALSE(target->stop(false).isOk());
  EXPECT_EQ(findLoops(prefix()).value().size(), 1U);
  EXPECT_FALSE(target->stop(true).isOk());
  EXPECT_TRUE(findLoops(prefix()).value().empty());
}

TEST_F(LoopFuseTargetTest, sixteenDevicesServeAtOnce) {
  std::vector<std::unique_ptr<MemoryBackend>> backends;
  std::vector<std::unique_ptr<LoopFuseTarget>> targets;
  std::set<std::string> paths;
  for (int i = 0; i < 16; i++) {
    backends.push_back(std::make_unique<MemoryBackend>(8 * kMiB));
    backends.back()->bytes()[0] = static_cast<std::byte>(i);
    targets.push_back(start(*backends.back(), 4096, 2));
    ASSERT_NE(targets.back(), nullptr);
    paths.insert(targets.back()->path());
  }
  EXPECT_EQ(paths.size(), 16U);
  for (int i = 0; i < 16; i++) {
    OwnFd node(::open(targets[static_cast<size_t>(i)]->path().c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
    Aligned data(4096);
    ASSERT_EQ(::pread(node.get(), data.data(), 4096, 0), 4096);
    EXPECT_EQ(data.span()[0], static_cast<std::byte>(i));
    struct stat info = {};
    ASSERT_EQ(::fstat(node.get(), &info), 0);
    EXPECT_EQ(::gnu_dev_major(info.st_rdev), targets[static_cast<size_t>(i)]->major());
    EXPECT_EQ(::gnu_dev_minor(info.st_rdev), targets[static_cast<size_t>(i)]->minor());
  }
  for (auto& target : targets) EXPECT_TRUE(target->stop(false).isOk());
}

TEST_F(LoopFuseTargetTest, devicesStartAndStopFromManyThreadsAtOnce) {
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; t++) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 5; round++) {
        MemoryBackend backend(8 * kMiB);
        BlockTargetOptions made;
        made.threads = 2;
        made.name = prefix() + "t" + std::to_string(t) + "r" + std::to_string(round);
        auto target = LoopFuseTarget::start(backend, made);
        if (!target.isOk()) {
          failures++;
          ADD_FAILURE() << target.status().toString();
          continue;
        }
        const Status stopped = target.value()->stop(false);
        if (!stopped.isOk()) {
          failures++;
          ADD_FAILURE() << stopped.toString();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures.load(), 0);
}

TEST_F(LoopFuseTargetTest, wrongOptionsAreRefusedAndLeaveNothing) {
  MemoryBackend backend(8 * kMiB);
  const auto codeOf = [&](auto change) {
    BlockTargetOptions made = options();
    change(made);
    return LoopFuseTarget::start(backend, made).code();
  };
  EXPECT_EQ(codeOf([](auto& o) { o.sectorSizeBytes = 1024; }), Code::kInvalidArgument);
  EXPECT_EQ(codeOf([](auto& o) { o.threads = 0; }), Code::kInvalidArgument);
  EXPECT_EQ(codeOf([](auto& o) { o.threads = 1000; }), Code::kInvalidArgument);
  EXPECT_EQ(codeOf([](auto& o) { o.name = "a/b"; }), Code::kInvalidArgument);
  EXPECT_EQ(codeOf([](auto& o) { o.name = ""; }), Code::kInvalidArgument);
  EXPECT_EQ(codeOf([](auto& o) { o.name = std::string(64, 'n'); }), Code::kInvalidArgument);
  MemoryBackend odd(8 * kMiB + 512);
  EXPECT_EQ(LoopFuseTarget::start(odd, options(4096)).code(), Code::kInvalidArgument);
}

TEST_F(LoopFuseTargetTest, aStartThatFailsHalfWayIsUndone) {
  MemoryBackend backend(8 * kMiB);
  // The session is up and the file open; binding fails because the node refuses the label.
  auto session = FuseSession::start(backend, prefix() + "half", 4096, 2);
  ASSERT_TRUE(session.isOk()) << session.status().toString();
  remember(session.value()->parameters().connectionId);
  const Status bound = session.value()->withFile([&](int file) {
    LoopOptions tooLong;
    tooLong.label = std::string(64, 'x');
    EXPECT_EQ(bindLoop(file, tooLong).code(), Code::kInvalidArgument);
    LoopOptions badSector;
    badSector.label = prefix() + "half";
    badSector.sectorSizeBytes = 3;
    return bindLoop(file, badSector).status();
  });
  EXPECT_FALSE(bound.isOk());
  EXPECT_TRUE(session.value()->join(5000)) << "the workers end with the last open file";
}

TEST_F(LoopFuseTargetTest, aSessionWhoseFileIsHeldElsewhereIsAbortedWhenItEnds) {
  MemoryBackend backend(8 * kMiB);
  auto session = FuseSession::start(backend, prefix() + "held", 4096, 2);
  ASSERT_TRUE(session.isOk());
  LoopBinding loop;
  const Status bound = session.value()->withFile([&](int file) -> Status {
    LoopOptions label;
    label.label = prefix() + "held";
    OBD_ASSIGN_OR_RETURN(loop, bindLoop(file, label));
    return Status::ok();
  });
  ASSERT_TRUE(bound.isOk()) << bound.toString();
  std::move(session).value().reset();
  {
    OwnFd node(::open(loop.path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
    Aligned data(4096);
    EXPECT_EQ(::pread(node.get(), data.data(), 4096, 0), -1);
    EXPECT_EQ(errno, EIO);
  }
  EXPECT_TRUE(unbindLoop(loop, 0).isOk());
}

// A process that dies while it flushes its own device must still be reaped, and its device fail instead of hang.
TEST_F(LoopFuseTargetTest, aProcessKilledWhileItStopsItsDeviceIsReaped) {
  std::array<int, 2> ready{};
  ASSERT_EQ(::pipe2(ready.data(), O_CLOEXEC), 0);
  const std::string name = prefix() + "killed";
  const pid_t child = ::fork();
  if (child == 0) {
    MemoryBackend backend(8 * kMiB);
    BlockTargetOptions made;
    made.name = name;
    auto target = LoopFuseTarget::start(backend, made);
    if (!target.isOk()) ::_exit(1);
    backend.hold();
    std::thread stopper([&] { (void)target.value()->stop(false); });
    backend.awaitHeld(1);  // the flush of the stop
    if (::write(ready[1], "y", 1) != 1) ::_exit(1);
    for (;;) ::pause();
  }
  ASSERT_GT(child, 0);
  ::close(ready[1]);
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  ::close(ready[0]);
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  const auto left = findLoops(name);
  ASSERT_TRUE(left.isOk());
  for (const std::string& path : left.value()) EXPECT_TRUE(unbindStaleLoop(path).isOk());
}

TEST_F(LoopFuseTargetTest, outOfDescriptorsIsATypedErrorAndTheSameCallWorksAfterwards) {
  MemoryBackend backend(8 * kMiB);
  std::vector<OwnFd> taken;
  for (;;) {
    OwnFd fd(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    if (!fd.isValid()) break;
    taken.push_back(std::move(fd));
  }
  // Leaves room for one, two, … descriptors, so that every step of start() is the one that fails.
  for (int room = 0; room < 5; room++) {
    const auto refused = LoopFuseTarget::start(backend, options());
    if (refused.isOk()) break;
    EXPECT_EQ(refused.code(), Code::kResourceExhausted) << "room " << room << ": " << refused.status().toString();
    taken.pop_back();
  }
  taken.clear();
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
}

TEST_F(LoopFuseTargetTest, aNodeUnboundBehindOurBackIsNotTakenFromItsNewOwner) {
  MemoryBackend backend(8 * kMiB);
  auto target = start(backend);
  ASSERT_NE(target, nullptr);
  ASSERT_TRUE(unbindStaleLoop(target->path()).isOk());
  MemoryBackend other(8 * kMiB);
  auto successor = start(other);
  ASSERT_NE(successor, nullptr);
  EXPECT_TRUE(target->stop(false).isOk());
  OwnFd node(::open(successor->path().c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
  Aligned data(4096);
  EXPECT_EQ(::pread(node.get(), data.data(), 4096, 0), 4096);
}

TEST_F(LoopFuseTargetTest, attachAndDetachTakeMilliseconds) {
  std::vector<double> attach;
  std::vector<double> detach;
  const auto now = [] { return std::chrono::steady_clock::now(); };
  const auto ms = [](auto from, auto to) { return std::chrono::duration<double, std::milli>(to - from).count(); };
  for (int i = 0; i < 30; i++) {
    MemoryBackend backend(1 * kGiB);
    const auto a = now();
    auto target = start(backend);
    ASSERT_NE(target, nullptr);
    const auto b = now();
    ASSERT_TRUE(target->stop(false).isOk());
    const auto c = now();
    attach.push_back(ms(a, b));
    detach.push_back(ms(b, c));
  }
  std::sort(attach.begin(), attach.end());
  std::sort(detach.begin(), detach.end());
  std::printf("attach p50 %.2f ms max %.2f ms, detach p50 %.2f ms max %.2f ms\n", attach[15], attach.back(), detach[15],
              detach.back());
}

}  // namespace
}  // namespace obd
