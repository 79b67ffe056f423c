#include "device/loop-device.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#include "base/own-fd.h"

namespace obd {
namespace {

constexpr auto kBindTimeout = std::chrono::seconds(10);
constexpr auto kNodeTimeout = std::chrono::seconds(5);
constexpr auto kFreeTimeout = std::chrono::seconds(10);
constexpr auto kPauseMin = std::chrono::microseconds(100);
constexpr auto kPauseMax = std::chrono::microseconds(5000);
constexpr auto kPollInterval = std::chrono::milliseconds(2);
constexpr size_t kHoldersNamedMax = 3;

using SteadyClock = std::chrono::steady_clock;

int openEintr(const std::string& path, int flags) {
  int fd = -1;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

// Nodes beyond the boot-time ones appear through devtmpfs, a moment after the driver added them.
Result<OwnFd> openNewNode(const std::string& path) {
  const auto deadline = SteadyClock::now() + kNodeTimeout;
  for (;;) {
    OwnFd node(openEintr(path, O_RDWR | O_EXCL));
    if (node.isValid()) return node;
    const int error = errno;
    if (error != ENOENT && error != ENXIO) return fromErrno("open " + path, error);
    if (SteadyClock::now() >= deadline) return unavailable(path + ": the device node does not appear");
    std::this_thread::sleep_for(kPollInterval);
  }
}

// The kernel packs a device number into 64 bits its own way (new_encode_dev).
uint32_t minorOfEncoded(uint64_t device) {
  return static_cast<uint32_t>((device & 0xff) | ((device >> 12) & 0xfff00));
}

std::string labelOf(const loop_info64& info) {
  const auto* text = reinterpret_cast<const char*>(info.lo_file_name);
  return {text, ::strnlen(text, LO_NAME_SIZE)};
}

Result<LoopState> stateOf(int node, const LoopBinding& binding) {
  loop_info64 info = {};
  if (::ioctl(node, LOOP_GET_STATUS64, &info) != 0) {
    if (errno == ENXIO) return LoopState::kGone;
    return fromErrno(binding.path + ": LOOP_GET_STATUS64", errno);
  }
  const bool isOurs = info.lo_inode == binding.backingInode &&
                      minorOfEncoded(info.lo_device) == binding.backingDeviceMinor && labelOf(info) == binding.label;
  return isOurs ? LoopState::kOurs : LoopState::kGone;
}

std::string firstLine(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// For the message only: who has the node open or mounted, as far as /proc shows it. Best effort.
std::string describeHolders(const LoopBinding& binding) {
  std::vector<std::string> found;
  const std::string device = " " + std::to_string(binding.major) + ":" + std::to_string(binding.minor) + " ";
  std::ifstream mounts("/proc/self/mountinfo");
  for (std::string line; found.size() < kHoldersNamedMax && std::getline(mounts, line);) {
    if (line.find(device) == std::string::npos) continue;
    std::istringstream fields(line);
    std::string field;
    for (int i = 0; i < 5; i++) fields >> field;
    found.push_back("mounted at " + field);
  }
  const dev_t wanted = ::makedev(binding.major, binding.minor);
  const auto self = ::getpid();
  if (DIR* proc = ::opendir("/proc"); proc != nullptr) {
    while (const dirent* entry = ::readdir(proc)) {
      if (found.size() >= kHoldersNamedMax) break;
      const long pid = std::strtol(entry->d_name, nullptr, 10);
      if (pid <= 0 || pid == self) continue;
      const std::string base = std::string("/proc/") + entry->d_name;
      DIR* fds = ::opendir((base + "/fd").c_str());
      if (fds == nullptr) continue;
      while (const dirent* fd = ::readdir(fds)) {
        struct stat info = {};
        // stat follows the magic link; only block devices with our number matter, and stat of those never blocks.
        char target[64];
        const ssize_t length = ::readlinkat(::dirfd(fds), fd->d_name, target, sizeof(target));
        if (length < 5 || std::memcmp(target, "/dev/", 5) != 0) continue;
        if (::fstatat(::dirfd(fds), fd->d_name, &info, 0) != 0) continue;
        if (!S_ISBLK(info.st_mode) || info.st_rdev != wanted) continue;
        found.push_back("opened by pid " + std::to_string(pid) + " (" + firstLine(base + "/comm") + ")");
        break;
      }
      ::closedir(fds);
    }
    ::closedir(proc);
  }
  if (found.empty()) return "held in another mount namespace or by the kernel";
  std::string text;
  for (const std::string& holder : found) text += (text.empty() ? "" : ", ") + holder;
  return text;
}

Status busy(const LoopBinding& binding) {
  return failedPrecondition(binding.path + " is in use: " + describeHolders(binding));
}

Status waitUntilGone(const LoopBinding& binding) {
  const auto deadline = SteadyClock::now() + kFreeTimeout;
  for (;;) {
    OBD_ASSIGN_OR_RETURN(const LoopState state, inspectLoop(binding));
    if (state == LoopState::kGone) return Status::ok();
    if (SteadyClock::now() >= deadline) return unavailable(binding.path + ": the loop device does not become free");
    std::this_thread::sleep_for(kPollInterval);
  }
}

}  // namespace

Result<LoopBinding> bindLoop(int backingFd, const LoopOptions& options) {
  struct stat backing = {};
  if (::fstat(backingFd, &backing) != 0) return fromErrno("stat the file below the loop device", errno);
  if (options.label.size() >= LO_NAME_SIZE) return invalidArgument("loop label \"" + options.label + "\" is too long");

  OwnFd control(openEintr("/dev/loop-control", O_RDWR));
  if (!control.isValid()) {
    const int error = errno;
    if (error == ENOENT || error == ENODEV) return unavailable("/dev/loop-control: the kernel has no loop driver");
    return fromErrno("open /dev/loop-control", error);
  }

  loop_config config = {};
  config.fd = static_cast<uint32_t>(backingFd);
  config.block_size = options.sectorSizeBytes;
  config.info.lo_flags = static_cast<uint32_t>(LO_FLAGS_DIRECT_IO) |
                         (options.readOnly ? static_cast<uint32_t>(LO_FLAGS_READ_ONLY) : 0U);
  std::memcpy(config.info.lo_file_name, options.label.data(), options.label.size());

  const auto deadline = SteadyClock::now() + kBindTimeout;
  // Between asking for a free node and taking it, somebody else may be faster: ask again, a little later each time.
  for (auto pause = kPauseMin; SteadyClock::now() < deadline; pause = std::min(2 * pause, kPauseMax)) {
    const int index = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
    if (index < 0) return fromErrno("LOOP_CTL_GET_FREE", errno);
    LoopBinding binding;
    binding.index = static_cast<uint32_t>(index);
    binding.path = "/dev/loop" + std::to_string(index);
    Result<OwnFd> node = openNewNode(binding.path);
    if (!node.isOk() && node.code() != Code::kFailedPrecondition) return node.status();
    const int error = !node.isOk()                                                        ? EBUSY
                      : ::ioctl(node.value().get(), LOOP_CONFIGURE, &config) != 0 ? errno
                                                                                          : 0;
    if (error == EBUSY) {
      std::this_thread::sleep_for(pause);
      continue;
    }
    if (error != 0) return fromErrno(binding.path + ": LOOP_CONFIGURE", error);
    binding.label = options.label;
    binding.backingInode = backing.st_ino;
    binding.backingDeviceMinor = ::minor(backing.st_dev);
    struct stat info = {};
    if (::fstat(node.value().get(), &info) != 0) {
      const Status failed = fromErrno("stat " + binding.path, errno);
      (void)::ioctl(node.value().get(), LOOP_CLR_FD);
      return failed;
    }
    binding.major = ::major(info.st_rdev);
    binding.minor = ::minor(info.st_rdev);
    return binding;
  }
  return unavailable("every free loop device was taken by others, for 10 seconds");
}

Result<LoopState> inspectLoop(const LoopBinding& binding) {
  OwnFd node(openEintr(binding.path, O_RDONLY));
  if (!node.isValid()) {
    if (errno == ENOENT || errno == ENXIO) return LoopState::kGone;
    return fromErrno("open " + binding.path, errno);
  }
  return stateOf(node.get(), binding);
}

Status flushLoop(const LoopBinding& binding) {
  OwnFd node(openEintr(binding.path, O_RDONLY | O_EXCL));
  if (!node.isValid()) {
    if (errno == ENOENT || errno == ENXIO) return Status::ok();
    if (errno == EBUSY) return busy(binding);
    return fromErrno("open " + binding.path, errno);
  }
  OBD_ASSIGN_OR_RETURN(const LoopState state, stateOf(node.get(), binding));
  if (state == LoopState::kGone) return Status::ok();
  if (::fsync(node.get()) != 0) return fromErrno("fsync " + binding.path, errno);
  return Status::ok();
}

Status unbindLoop(const LoopBinding& binding, uint32_t graceMs) {
  const auto deadline = SteadyClock::now() + std::chrono::milliseconds(graceMs);
  for (;;) {
    OwnFd node(openEintr(binding.path, O_RDONLY | O_EXCL));
    if (!node.isValid()) {
      if (errno == ENOENT || errno == ENXIO) return Status::ok();
      if (errno == EBUSY) return busy(binding);
      return fromErrno("open " + binding.path, errno);
    }
    OBD_ASSIGN_OR_RETURN(const LoopState before, stateOf(node.get(), binding));
    if (before == LoopState::kGone) return Status::ok();
    // If we are the only opener this takes the node out of service in one step: nobody can slip in between. If not,
    // the kernel marks it to go on last close, which is not what was asked for: take the mark back.
    if (::ioctl(node.get(), LOOP_CLR_FD) != 0 && errno != ENXIO) {
      return fromErrno(binding.path + ": LOOP_CLR_FD", errno);
    }
    loop_info64 info = {};
    if (::ioctl(node.get(), LOOP_GET_STATUS64, &info) != 0) {
      if (errno != ENXIO) return fromErrno(binding.path + ": LOOP_GET_STATUS64", errno);
      node.reset();  // the kernel lets go of the file in this close
      return waitUntilGone(binding);
    }
    info.lo_flags &= ~static_cast<uint32_t>(LO_FLAGS_AUTOCLEAR);
    if (::ioctl(node.get(), LOOP_SET_STATUS64, &info) != 0) {
      return fromErrno(binding.path + ": LOOP_SET_STATUS64", errno);
    }
    node.reset();
    if (SteadyClock::now() >= deadline) return busy(binding);
    std::this_thread::sleep_for(kPollInterval);
  }
}

Status unbindLoopOnLastClose(const LoopBinding& binding) {
  OwnFd node(openEintr(binding.path, O_RDONLY));
  if (!node.isValid()) {
    if (errno == ENOENT || errno == ENXIO) return Status::ok();
    return fromErrno("open " + binding.path, errno);
  }
  OBD_ASSIGN_OR_RETURN(const LoopState state, stateOf(node.get(), binding));
  if (state == LoopState::kGone) return Status::ok();
  if (::ioctl(node.get(), LOOP_CLR_FD) != 0 && errno != ENXIO) {
    return fromErrno(binding.path + ": LOOP_CLR_FD", errno);
  }
  return Status::ok();
}

Result<std::vector<std::string>> findLoops(const std::string& labelPrefix) {
  DIR* block = ::opendir("/sys/block");
  if (block == nullptr) return fromErrno("open /sys/block", errno);
  std::vector<std::string> found;
  while (const dirent* entry = ::readdir(block)) {
    const std::string name = entry->d_name;
    if (!name.starts_with("loop")) continue;
    // Unbound nodes have no such folder; they are not opened, because opening can wake a prober.
    if (::access(("/sys/block/" + name + "/loop").c_str(), F_OK) != 0) continue;
    OwnFd node(openEintr("/dev/" + name, O_RDONLY));
    if (!node.isValid()) continue;
    loop_info64 info = {};
    if (::ioctl(node.get(), LOOP_GET_STATUS64, &info) != 0) continue;
    if (labelOf(info).starts_with(labelPrefix)) found.push_back("/dev/" + name);
  }
  ::closedir(block);
  std::sort(found.begin(), found.end());
  return found;
}

Status unbindStaleLoop(const std::string& path) {
  OwnFd node(openEintr(path, O_RDONLY));
  if (!node.isValid()) {
    if (errno == ENOENT || errno == ENXIO) return Status::ok();
    return fromErrno("open " + path, errno);
  }
  if (::ioctl(node.get(), LOOP_CLR_FD) != 0 && errno != ENXIO) return fromErrno(path + ": LOOP_CLR_FD", errno);
  return Status::ok();
}

}  // namespace obd
