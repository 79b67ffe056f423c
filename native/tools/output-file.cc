#include "tools/output-file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "io/posix-file.h"

namespace obd {
namespace {

constexpr mode_t kMode = 0644;  // less the umask; what the tar header says of the file

std::string directoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

Result<std::unique_ptr<OutputFile>> OutputFile::create(const std::string& path, bool replace) {
  struct stat existing {};
  if (::lstat(path.c_str(), &existing) == 0) {
    if (!replace) return alreadyExists(path + ": exists (-f replaces it)");
    if (!S_ISREG(existing.st_mode) && !S_ISLNK(existing.st_mode)) {
      return invalidArgument(path + ": exists and is not a regular file");
    }
  } else if (errno != ENOENT) {
    return fromErrno(path, errno);
  }
  std::unique_ptr<OutputFile> output(new OutputFile(path, replace));
  OBD_RETURN_IF_ERROR(output->openPartial());
  return output;
}

std::string OutputFile::partialPath() const { return path_ + ".partial-" + std::to_string(::getpid()); }

Status OutputFile::openPartial() {
  OwnFd fd(::open(directoryOf(path_).c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, kMode));
  if (!fd.isValid()) {
    if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL) return fromErrno(directoryOf(path_), errno);
    named_.emplace(partialPath());
    fd = OwnFd(::open(partialPath().c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, kMode));
    if (!fd.isValid()) {
      Status status = fromErrno(partialPath(), errno);
      named_.reset();
      return status;
    }
  }
  fd_ = fd.get();
  file_ = adoptPosixFile(std::move(fd), path_);
  return Status::ok();
}

Status OutputFile::publish() {
  OBD_RETURN_IF_ERROR(file_->sync());
  if (!named_) {
    // A file without a name cannot be put over another one: it first gets a name of its own.
    named_.emplace(partialPath());
    const std::string self = "/proc/self/fd/" + std::to_string(fd_);
    if (::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, partialPath().c_str(), AT_SYMLINK_FOLLOW) != 0) {
      Status status = fromErrno(partialPath(), errno);
      named_.reset();
      return status;
    }
  }
  const std::string partial = partialPath();
  if (replace_) {
    if (::rename(partial.c_str(), path_.c_str()) != 0) return fromErrno(path_, errno);
  } else {
    if (::link(partial.c_str(), path_.c_str()) != 0) return fromErrno(path_, errno);
    if (::unlink(partial.c_str()) != 0) return fromErrno(partial, errno);
  }
  named_.reset();
  return syncParentDirectory(path_);
}

OutputFile::~OutputFile() {
  if (named_) ::unlink(partialPath().c_str());
}

}  // namespace obd
