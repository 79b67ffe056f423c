#include "io/posix-file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace obd {
namespace {

// Linux moves at most this many bytes in one call; asking for less keeps the arithmetic away from SSIZE_MAX.
constexpr size_t kTransferMax = size_t{1} << 30;

class PosixFile final : public File {
 public:
  PosixFile(OwnFd fd, OwnFd directFd, size_t directAlignment, std::string name)
      : fd_(std::move(fd)), directFd_(std::move(directFd)), directAlignment_(directAlignment), name_(std::move(name)) {}

  Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const override {
    OBD_RETURN_IF_ERROR(checkRange(offset, out.size()));
    const int fd = fdFor(out.data(), out.size(), offset);
    size_t done = 0;
    while (done < out.size()) {
      const size_t want = std::min(out.size() - done, kTransferMax);
      const ssize_t got = ::pread(fd, out.data() + done, want, static_cast<off_t>(offset + done));
      if (got < 0) {
        if (errno == EINTR) continue;
        return fromErrno(name_ + ": read at " + std::to_string(offset + done), errno);
      }
      if (got == 0) break;
      done += static_cast<size_t>(got);
      // A short direct read leaves an unaligned rest: only the end of the file does that.
      if (fd == directFd_.get() && static_cast<size_t>(got) < want) break;
    }
    return done;
  }

  Status pwrite(std::span<const std::byte> data, uint64_t offset) override {
    OBD_RETURN_IF_ERROR(checkRange(offset, data.size()));
    int fd = fdFor(data.data(), data.size(), offset);
    size_t done = 0;
    while (done < data.size()) {
      const size_t want = std::min(data.size() - done, kTransferMax);
      const ssize_t put = ::pwrite(fd, data.data() + done, want, static_cast<off_t>(offset + done));
      if (put < 0) {
        if (errno == EINTR) continue;
        return fromErrno(name_ + ": write at " + std::to_string(offset + done), errno);
      }
      if (put == 0) return fromErrno(name_ + ": write at " + std::to_string(offset + done), ENOSPC);
      done += static_cast<size_t>(put);
      if (static_cast<size_t>(put) < want) fd = fd_.get();  // the rest may be unaligned
    }
    return Status::ok();
  }

  Status sync() override {
    if (const int failed = syncErrno_.load(std::memory_order_acquire); failed != 0) {
      return fromErrno(name_ + ": an earlier sync failed", failed);
    }
    while (::fdatasync(fd_.get()) != 0) {
      if (errno == EINTR) continue;
      const int failed = errno;
      syncErrno_.store(failed, std::memory_order_release);
      return fromErrno(name_ + ": sync", failed);
    }
    return Status::ok();
  }

  Result<uint64_t> size() const override {
    struct stat st {};
    if (::fstat(fd_.get(), &st) != 0) return fromErrno(name_ + ": stat", errno);
    if (S_ISBLK(st.st_mode)) {
      const off_t end = ::lseek(fd_.get(), 0, SEEK_END);
      if (end < 0) return fromErrno(name_ + ": size", errno);
      return static_cast<uint64_t>(end);
    }
    return static_cast<uint64_t>(st.st_size);
  }

  Status truncate(uint64_t sizeBytes) override {
    OBD_RETURN_IF_ERROR(checkRange(sizeBytes, 0));
    while (::ftruncate(fd_.get(), static_cast<off_t>(sizeBytes)) != 0) {
      if (errno != EINTR) return fromErrno(name_ + ": truncate to " + std::to_string(sizeBytes), errno);
    }
    return Status::ok();
  }

  Status punchHole(uint64_t offset, uint64_t length) override {
    OBD_RETURN_IF_ERROR(checkRange(offset, length));
    if (length == 0) return Status::ok();
    while (::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                       static_cast<off_t>(length)) != 0) {
      if (errno != EINTR) return fromErrno(name_ + ": punch hole at " + std::to_string(offset), errno);
    }
    return Status::ok();
  }

  Result<uint64_t> seekData(uint64_t offset) const override { return seek(offset, SEEK_DATA); }
  Result<uint64_t> seekHole(uint64_t offset) const override { return seek(offset, SEEK_HOLE); }
  const std::string& name() const override { return name_; }

 private:
  static Status checkRange(uint64_t offset, uint64_t length) {
    constexpr uint64_t kMax = static_cast<uint64_t>(INT64_MAX);
    if (offset > kMax || length > kMax - offset) return invalidArgument("file range exceeds 2^63");
    return Status::ok();
  }

  int fdFor(const void* address, size_t length, uint64_t offset) const {
    if (!directFd_.isValid()) return fd_.get();
    const uint64_t mix = reinterpret_cast<uintptr_t>(address) | length | offset;
    return (mix & (directAlignment_ - 1)) == 0 ? directFd_.get() : fd_.get();
  }

  // lseek moves the descriptor's position, which nobody here uses.
  Result<uint64_t> seek(uint64_t offset, int whence) const {
    OBD_RETURN_IF_ERROR(checkRange(offset, 0));
    const off_t found = ::lseek(fd_.get(), static_cast<off_t>(offset), whence);
    if (found >= 0) return static_cast<uint64_t>(found);
    if (errno == ENXIO) return size();  // at or past the end, or no data up to it
    return fromErrno(name_ + ": seek", errno);
  }

  OwnFd fd_;
  OwnFd directFd_;
  size_t directAlignment_;
  std::string name_;
  std::atomic<int> syncErrno_{0};
};

}  // namespace

Status File::preadExact(std::span<std::byte> out, uint64_t offset) const {
  OBD_ASSIGN_OR_RETURN(const size_t got, pread(out, offset));
  if (got < out.size()) return dataLoss(name() + ": ends at " + std::to_string(offset + got));
  return Status::ok();
}

Status File::preadZeroFill(std::span<std::byte> out, uint64_t offset) const {
  OBD_ASSIGN_OR_RETURN(const size_t got, pread(out, offset));
  if (got < out.size()) std::memset(out.data() + got, 0, out.size() - got);
  return Status::ok();
}

Result<std::unique_ptr<File>> openPosixFile(const std::string& path, const PosixOpen& options) {
  if (path.empty() || path.find('\0') != std::string::npos) return invalidArgument("empty path or NUL in a path");
  int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK | (options.write ? O_RDWR : O_RDONLY);
  if (options.create) flags |= O_CREAT;
  if (options.exclusive) flags |= O_EXCL;
  OwnFd fd(::open(path.c_str(), flags, 0600));
  if (!fd.isValid()) return fromErrno(path, errno);

  struct stat st {};
  if (::fstat(fd.get(), &st) != 0) return fromErrno(path, errno);
  if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) return invalidArgument(path + ": not a regular file");

  if (options.randomAccess) {
    // Advice only: a file system that ignores it still reads correctly.
    static_cast<void>(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_RANDOM));
  }
  OwnFd directFd;
  if (options.direct) {
    const int directFlags = O_CLOEXEC | O_NOCTTY | O_DIRECT | (options.write ? O_RDWR : O_RDONLY);
    directFd = OwnFd(::open(path.c_str(), directFlags));  // refused (EINVAL) where there is no direct I/O: buffered then
  }
  constexpr size_t kDirectAlignment = 4096;  // satisfies every device and file system we meet
  return std::unique_ptr<File>(new PosixFile(std::move(fd), std::move(directFd), kDirectAlignment, path));
}

std::unique_ptr<File> adoptPosixFile(OwnFd fd, std::string name) {
  return std::make_unique<PosixFile>(std::move(fd), OwnFd(), size_t{1}, std::move(name));
}

Status syncParentDirectory(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  const std::string parent = slash == std::string::npos ? "." : (slash == 0 ? "/" : path.substr(0, slash));
  const OwnFd fd(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.isValid()) return fromErrno(parent, errno);
  while (::fsync(fd.get()) != 0) {
    if (errno != EINTR) return fromErrno(parent + ": sync", errno);
  }
  return Status::ok();
}

Result<FileIdentity> identifyFile(const std::string& path) {
  struct stat st {};
  if (::stat(path.c_str(), &st) != 0) return fromErrno(path, errno);
  return FileIdentity{st.st_dev, st.st_ino, static_cast<uint64_t>(st.st_size),
                      static_cast<int64_t>(st.st_mtim.tv_sec) * 1'000'000'000 + st.st_mtim.tv_nsec};
}

}  // namespace obd
