// Invariants: the mount table is read as the kernel writes it, escapes and long lines too; a tree is removed or measured
// without following links, crossing mounts or depending on its depth; a lock has one holder.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "addon/mount-table.h"
#include "addon/process.h"
#include "addon/tree.h"
#include "base/own-fd.h"

namespace obd {
namespace {

namespace fs = std::filesystem;

class AddonHostTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    ASSERT_EQ(::geteuid(), 0U) << "these tests need root";
    // Mounts of this test end with its process.
    ASSERT_EQ(::unshare(CLONE_NEWNS), 0);
    ASSERT_EQ(::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr), 0);
  }
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "obd-addon-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  void TearDown() override {
    for (const std::string& mount : mounts_) ::umount2(mount.c_str(), MNT_DETACH);
    (void)removeTree(dir_);
    EXPECT_FALSE(fs::exists(dir_));
  }
  std::string make(const std::string& name, const std::string& text = "") {
    const std::string path = dir_ + "/" + name;
    fs::create_directories(fs::path(path).parent_path());
    std::ofstream(path) << text;
    return path;
  }
  std::string mountTmpfs(const std::string& name) {
    const std::string path = dir_ + "/" + name;
    fs::create_directories(path);
    EXPECT_TRUE(mountFileSystem("tmpfs", "tmpfs", path, {"size=1m", "nosuid", "noatime"}).isOk());
    mounts_.push_back(path);
    return path;
  }
  std::string dir_;
  std::vector<std::string> mounts_;
};

TEST_F(AddonHostTest, aMountTableLineIsReadWithEscapesAndOptionalFields) {
  const auto table = parseMountTable(
      "36 35 98:0 /mnt1 /mnt\\0402\\134x rw,noatime master:1 shared:2 - ext3 /dev/ro\\011ot rw,errors=continue\n"
      "37 36 0:44 / / ro - overlay over\\054lay ro,lowerdir=/a\\072b:/c\n"
      "38 36 0:45 / /empty rw - tmpfs  rw\n");
  ASSERT_TRUE(table.isOk()) << table.status().toString();
  ASSERT_EQ(table.value().size(), 3U);
  const MountTableEntry& first = table.value()[0];
  EXPECT_EQ(first.mountPoint, "/mnt 2\\x");
  EXPECT_EQ(first.source, "/dev/ro\tot");
  EXPECT_EQ(first.fsType, "ext3");
  EXPECT_EQ(first.deviceMajor, 98U);
  EXPECT_EQ(first.options, (std::vector<std::string>{"rw", "noatime", "errors=continue"}));
  EXPECT_EQ(table.value()[1].options, (std::vector<std::string>{"ro", "lowerdir=/a:b:/c"}));
  EXPECT_EQ(table.value()[1].source, "over,lay");
  EXPECT_EQ(table.value()[2].source, "");
}

TEST_F(AddonHostTest, aMangledMountTableIsRefused) {
  for (const char* text : {"36 35 98:0 /mnt1 /mnt2 rw", "36 35 98 / / rw - a b c", "36 35 a:b / / rw - a b c", "x"}) {
    EXPECT_EQ(parseMountTable(text).code(), Code::kDataLoss) << text;
  }
  EXPECT_EQ(readMountTable("../self").code(), Code::kInvalidArgument);
  EXPECT_EQ(readMountTable("").code(), Code::kInvalidArgument);
  EXPECT_EQ(readMountTable("4194304999").code(), Code::kNotFound);
}

TEST_F(AddonHostTest, mountsAreFoundByTheirRealNamesHoweverLongTheyAre) {
  const std::string at = mountTmpfs("with space\tand \\ " + std::string(200, 'x') + "/" + std::string(200, 'y'));
  const auto table = readMountTable("self");
  ASSERT_TRUE(table.isOk());
  const auto found = std::find_if(table.value().begin(), table.value().end(),
                                  [&](const MountTableEntry& entry) { return entry.mountPoint == at; });
  ASSERT_NE(found, table.value().end());
  EXPECT_EQ(found->fsType, "tmpfs");
  for (const char* option : {"nosuid", "noatime", "size=1024k"}) {
    EXPECT_NE(std::find(found->options.begin(), found->options.end(), option), found->options.end()) << option;
  }
}

TEST_F(AddonHostTest, aReadOnlyBindRefusesWrites) {
  make("source/file", "text");
  const std::string target = dir_ + "/target";
  fs::create_directories(target);
  ASSERT_TRUE(mountFileSystem("bind", dir_ + "/source", target, {"rbind", "ro"}).isOk());
  mounts_.push_back(target);
  EXPECT_EQ(::open((target + "/file").c_str(), O_WRONLY | O_CLOEXEC), -1);
  EXPECT_EQ(errno, EROFS);
}

TEST_F(AddonHostTest, unmountingWhatIsNotMountedIsInvalidArgumentWithItsErrno) {
  const Status status = unmountFileSystem(dir_, false);
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_EQ(status.systemErrno(), EINVAL);
  const std::string at = mountTmpfs("m");
  OwnFd open(::open((at + "/f").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600));
  EXPECT_EQ(unmountFileSystem(at, false).code(), Code::kFailedPrecondition);
  open.reset();
  EXPECT_TRUE(unmountFileSystem(at, false).isOk());
}

TEST_F(AddonHostTest, tooManyOptionsAreRefusedNotCut) {
  fs::create_directories(dir_ + "/m");
  EXPECT_EQ(mountFileSystem("tmpfs", "tmpfs", dir_ + "/m", {std::string(5000, 'x')}).code(), Code::kInvalidArgument);
}

TEST_F(AddonHostTest, aTreeIsRemovedWhateverItHolds) {
  make("t/a/file", "1");
  make("t/b/c/d/e/f", "2");
  make("outside", "stays");
  fs::create_symlink(dir_ + "/outside", dir_ + "/t/a/link");
  fs::create_directory_symlink(dir_, dir_ + "/t/up");
  ASSERT_EQ(::mkfifo((dir_ + "/t/fifo").c_str(), 0600), 0);
  const Status status = removeTree(dir_ + "/t/");
  EXPECT_TRUE(status.isOk()) << status.toString();
  EXPECT_FALSE(fs::exists(dir_ + "/t"));
  EXPECT_TRUE(fs::exists(dir_ + "/outside"));
  EXPECT_EQ(removeTree(dir_ + "/t").code(), Code::kNotFound);
}

TEST_F(AddonHostTest, aTreeDeeperThanAnyPathNameIsMeasuredAndRemoved) {
  constexpr int kDepth = 1000;
  const std::string name(20, 'd');
  fs::create_directories(dir_ + "/deep");
  OwnFd at(::open((dir_ + "/deep").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  for (int i = 0; i < kDepth; i++) {
    ASSERT_EQ(::mkdirat(at.get(), name.c_str(), 0700), 0);
    at = OwnFd(::openat(at.get(), name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    ASSERT_TRUE(at.isValid());
  }
  at.reset();
  const auto usage = measureTree(dir_ + "/deep", {});
  ASSERT_TRUE(usage.isOk()) << usage.status().toString();
  EXPECT_EQ(usage.value().inodes, kDepth + 1U);
  const Status removed = removeTree(dir_ + "/deep");
  EXPECT_TRUE(removed.isOk()) << removed.toString();
}

TEST_F(AddonHostTest, aWideTreeIsRemoved) {
  for (int i = 0; i < 80; i++) make("wide/" + std::to_string(i) + "/x/y", "z");
  EXPECT_TRUE(removeTree(dir_ + "/wide").isOk());
}

TEST_F(AddonHostTest, aTreeWithAMountInsideIsNotTouched) {
  make("t/first/file", "1");
  const std::string at = mountTmpfs("t/second/m");
  std::ofstream(at + "/precious") << "x";
  const Status status = removeTree(dir_ + "/t");
  EXPECT_EQ(status.code(), Code::kFailedPrecondition) << status.toString();
  EXPECT_NE(status.message().find(at), std::string::npos);
  EXPECT_TRUE(fs::exists(dir_ + "/t/first/file"));
  EXPECT_TRUE(fs::exists(at + "/precious"));
  EXPECT_EQ(removeTree(at).code(), Code::kFailedPrecondition);
}

TEST_F(AddonHostTest, onlySomethingBelowTheRootCanBeRemoved) {
  for (const char* path : {"/", "", "relative", "/tmp/..", "//"}) {
    EXPECT_EQ(removeTree(path).code(), Code::kInvalidArgument) << path;
  }
}

TEST_F(AddonHostTest, usageCountsEveryInodeOnceAndLeavesOutMountsAndSkipped) {
  const std::string big(64 * 1024, 'x');
  make("t/one", big);
  fs::create_hard_link(dir_ + "/t/one", dir_ + "/t/two");
  make("t/sub/three", big);
  make("t/skipped/four", big);
  make("t/sub/skipped", "");  // only names at the top are skipped
  const std::string at = mountTmpfs("t/m");
  std::ofstream(at + "/five") << big;
  // Blocks are allocated late unless asked for.
  for (const char* name : {"/t/one", "/t/sub/three"}) {
    const OwnFd file(::open((dir_ + name).c_str(), O_RDONLY | O_CLOEXEC));
    ASSERT_EQ(::fsync(file.get()), 0);
  }
  const auto usage = measureTree(dir_ + "/t", {"skipped"});
  ASSERT_TRUE(usage.isOk()) << usage.status().toString();
  // t, one = two, sub, sub/three, sub/skipped
  EXPECT_EQ(usage.value().inodes, 5U);
  EXPECT_GE(usage.value().sizeBytes, 2 * big.size());
  EXPECT_LE(usage.value().sizeBytes, 2 * big.size() + 5 * 4096);
}

TEST_F(AddonHostTest, aLockHasOneHolder) {
  const auto first = lockForLife(dir_ + "/lock");
  ASSERT_TRUE(first.isOk());
  EXPECT_TRUE(first.value());
  const auto second = lockForLife(dir_ + "/lock");
  ASSERT_TRUE(second.isOk());
  EXPECT_FALSE(second.value());
  EXPECT_EQ(lockForLife(dir_ + "/absent/lock").code(), Code::kNotFound);
}

TEST_F(AddonHostTest, thePeerOfASocketIsThisProcess) {
  std::array<int, 2> pair{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()), 0);
  const auto peer = peerCredentials(pair[0]);
  ASSERT_TRUE(peer.isOk());
  EXPECT_EQ(peer.value().pid, ::getpid());
  EXPECT_EQ(peer.value().uid, 0U);
  ::close(pair[0]);
  ::close(pair[1]);
  EXPECT_FALSE(peerCredentials(-1).isOk());
}

TEST_F(AddonHostTest, aNotificationArrivesAsOneDatagram) {
  const std::string path = dir_ + "/notify";
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  OwnFd server(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(::bind(server.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_TRUE(notifyServiceManager(path, "READY=1\nSTATUS=serving").isOk());
  std::array<char, 64> text{};
  const ssize_t got = ::recv(server.get(), text.data(), text.size(), 0);
  EXPECT_EQ(std::string(text.data(), static_cast<size_t>(got)), "READY=1\nSTATUS=serving");
  EXPECT_EQ(notifyServiceManager("relative", "x").code(), Code::kInvalidArgument);
  EXPECT_FALSE(notifyServiceManager(dir_ + "/nobody", "x").isOk());
}

TEST_F(AddonHostTest, theClockCountsNanosecondsOfToday) {
  const uint64_t first = clockRealtimeNs();
  EXPECT_GT(first, 1'700'000'000'000'000'000U);
  EXPECT_GE(clockRealtimeNs(), first);
}

}  // namespace
}  // namespace obd
