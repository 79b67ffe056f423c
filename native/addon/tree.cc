#include "addon/tree.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <set>
#include <utility>

#include "addon/mount-table.h"
#include "base/own-fd.h"

namespace obd {
namespace {

struct DirCloser {
  void operator()(DIR* dir) const { ::closedir(dir); }
};
using Dir = std::unique_ptr<DIR, DirCloser>;

// EXDEV: `name` is a mount point.
OwnFd openDirectory(int parent, const std::string& name, uint64_t resolve) {
  open_how how = {};
  how.flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
  how.resolve = resolve | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
  long fd = -1;
  do {
    fd = ::syscall(SYS_openat2, parent, name.c_str(), &how, sizeof(how));
  } while (fd < 0 && (errno == EINTR || errno == EAGAIN));
  return OwnFd(static_cast<int>(fd));
}

OwnFd openChild(int parent, const std::string& name) { return openDirectory(parent, name, RESOLVE_BENEATH); }

// Where a walk is: the open directory, and what leads back up.
class Cursor final {
 public:
  explicit Cursor(OwnFd root) : here_(std::move(root)) {}

  int fd() const { return here_.get(); }
  bool isAtTop() const { return path_.empty(); }
  const std::string& name() const { return path_.back().name; }
  // For messages: where it is, or an entry there, below the root of the walk.
  std::string describe(const std::string& entry = "") const {
    std::string text;
    const size_t first = path_.size() > 8 ? path_.size() - 8 : 0;
    for (size_t i = first; i < path_.size(); i++) {
      text += '/';
      text += path_[i].name;
    }
    if (!entry.empty()) {
      text += '/';
      text += entry;
    }
    return text;
  }

  Status enter(const std::string& name, OwnFd child) {
    struct stat above = {};
    if (::fstat(here_.get(), &above) != 0) return fromErrno("stat" + describe(), errno);
    path_.push_back({name, above.st_dev, above.st_ino});
    here_ = std::move(child);
    return Status::ok();
  }
  // Returns the name of the directory that was left.
  Result<std::string> leave() {
    Step step = std::move(path_.back());
    path_.pop_back();
    OwnFd above = openDirectory(here_.get(), "..", 0);
    if (!above.isValid()) return fromErrno("leave " + step.name, errno);
    struct stat info = {};
    if (::fstat(above.get(), &info) != 0) return fromErrno("stat of the folder of " + step.name, errno);
    if (info.st_dev != step.device || info.st_ino != step.inode) {
      return failedPrecondition("folder " + step.name + " was moved during the walk");
    }
    here_ = std::move(above);
    return std::move(step.name);
  }

 private:
  struct Step {
    std::string name;
    dev_t device;  // of the directory above
    ino_t inode;
  };
  OwnFd here_;
  std::vector<Step> path_;
};

Result<Dir> list(int fd) {
  // A description of its own: reading must begin at the start.
  OwnFd own(::openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!own.isValid()) return fromErrno("open folder", errno);
  Dir dir(::fdopendir(own.get()));
  if (dir == nullptr) return fromErrno("read folder", errno);
  (void)own.release();
  return dir;
}

// The next entry that is not "." or ".."; null at the end. Errors in errno, 0 if none.
const dirent* next(DIR* dir) {
  for (;;) {
    errno = 0;
    const dirent* entry = ::readdir(dir);
    if (entry == nullptr) return nullptr;
    if (std::strcmp(entry->d_name, ".") != 0 && std::strcmp(entry->d_name, "..") != 0) return entry;
  }
}

Status mountMet(const std::string& where) { return failedPrecondition(where + " is a mount point"); }

// Deletes what can be deleted at once in the cursor's directory. The name of the first folder that is not empty, or "".
Result<std::string> removeEntries(const Cursor& at) {
  OBD_ASSIGN_OR_RETURN(const Dir dir, list(at.fd()));
  while (const dirent* entry = next(dir.get())) {
    const std::string name = entry->d_name;
    if (entry->d_type != DT_DIR) {
      if (::unlinkat(at.fd(), name.c_str(), 0) == 0 || errno == ENOENT) continue;
      if (errno == EBUSY) return mountMet(at.describe(name));
      if (errno != EISDIR) return fromErrno("remove " + at.describe(name), errno);
    }
    if (::unlinkat(at.fd(), name.c_str(), AT_REMOVEDIR) == 0 || errno == ENOENT) continue;
    if (errno == ENOTEMPTY || errno == EEXIST) return name;
    if (errno == EBUSY) return mountMet(at.describe(name));
    return fromErrno("remove " + at.describe(name), errno);
  }
  if (errno != 0) return fromErrno("read folder " + at.describe(), errno);
  return std::string();
}

Status refuseMountsBelow(const std::string& path) {
  char* resolved = ::realpath(path.c_str(), nullptr);
  if (resolved == nullptr) return fromErrno(path, errno);
  const std::string real = resolved;
  std::free(resolved);
  OBD_ASSIGN_OR_RETURN(const auto mounts, readMountTable("self"));
  for (const MountTableEntry& mount : mounts) {
    if (mount.mountPoint == real || mount.mountPoint.starts_with(real + "/")) return mountMet(mount.mountPoint);
  }
  return Status::ok();
}

}  // namespace

Status removeTree(const std::string& path) {
  std::string trimmed = path;
  while (trimmed.size() > 1 && trimmed.back() == '/') trimmed.pop_back();
  const size_t slash = trimmed.rfind('/');
  const std::string name = slash == std::string::npos ? "" : trimmed.substr(slash + 1);
  if (trimmed.empty() || trimmed.front() != '/' || name.empty() || name == "." || name == "..") {
    return invalidArgument("\"" + path + "\" is not the absolute path of something below the root");
  }
  const std::string above = slash == 0 ? "/" : trimmed.substr(0, slash);
  const OwnFd parent(::open(above.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!parent.isValid()) return fromErrno("open " + above, errno);
  struct stat info = {};
  if (::fstatat(parent.get(), name.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0) return fromErrno(path, errno);
  if (!S_ISDIR(info.st_mode)) {
    if (::unlinkat(parent.get(), name.c_str(), 0) != 0) {
      return errno == EBUSY ? mountMet(path) : fromErrno("remove " + path, errno);
    }
    return Status::ok();
  }
  OBD_RETURN_IF_ERROR(refuseMountsBelow(trimmed));
  OwnFd root = openChild(parent.get(), name);
  if (!root.isValid()) return errno == EXDEV ? mountMet(path) : fromErrno("open " + path, errno);
  Cursor at(std::move(root));
  for (;;) {
    OBD_ASSIGN_OR_RETURN(const std::string inner, removeEntries(at).withContext(path));
    if (!inner.empty()) {
      OwnFd child = openChild(at.fd(), inner);
      if (!child.isValid()) {
        const std::string where = path + at.describe(inner);
        return errno == EXDEV ? mountMet(where) : fromErrno("open " + where, errno);
      }
      OBD_RETURN_IF_ERROR(at.enter(inner, std::move(child)));
      continue;
    }
    if (at.isAtTop()) break;
    OBD_ASSIGN_OR_RETURN(const std::string left, at.leave());
    if (::unlinkat(at.fd(), left.c_str(), AT_REMOVEDIR) != 0 && errno != ENOENT) {
      const std::string where = path + at.describe(left);
      return errno == EBUSY ? mountMet(where) : fromErrno("remove " + where, errno);
    }
  }
  if (::unlinkat(parent.get(), name.c_str(), AT_REMOVEDIR) != 0) {
    return errno == EBUSY ? mountMet(path) : fromErrno("remove " + path, errno);
  }
  return Status::ok();
}

Result<TreeUsage> measureTree(const std::string& path, const std::vector<std::string>& skip) {
  OwnFd root(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!root.isValid()) return fromErrno("open " + path, errno);
  TreeUsage usage;
  std::set<std::pair<uint64_t, uint64_t>> linked;  // files that have more than one name

  struct statx top = {};
  if (::statx(root.get(), "", AT_EMPTY_PATH, STATX_BASIC_STATS, &top) != 0) return fromErrno("stat " + path, errno);
  usage.inodes = 1;
  usage.sizeBytes = top.stx_blocks * 512;

  Cursor at(std::move(root));
  std::vector<std::vector<std::string>> pending;  // folders still to visit, per level
  const auto visit = [&]() -> Status {
    OBD_ASSIGN_OR_RETURN(const Dir dir, list(at.fd()));
    std::vector<std::string> folders;
    while (const dirent* entry = next(dir.get())) {
      std::string name = entry->d_name;
      if (at.isAtTop() && std::find(skip.begin(), skip.end(), name) != skip.end()) continue;
      struct statx info = {};
      if (::statx(at.fd(), name.c_str(), AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_BASIC_STATS, &info) != 0) {
        if (errno == ENOENT) continue;
        return fromErrno("stat " + at.describe(name), errno);
      }
      if ((info.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0) continue;
      const bool isDir = S_ISDIR(info.stx_mode);
      if (!isDir && info.stx_nlink > 1 &&
          !linked.emplace((uint64_t{info.stx_dev_major} << 32) | info.stx_dev_minor, info.stx_ino).second) {
        continue;
      }
      usage.inodes++;
      usage.sizeBytes += info.stx_blocks * 512;
      if (isDir) folders.push_back(std::move(name));
    }
    if (errno != 0) return fromErrno("read folder " + at.describe(), errno);
    pending.push_back(std::move(folders));
    return Status::ok();
  };

  OBD_RETURN_IF_ERROR(visit().withContext(path));
  while (!pending.empty()) {
    if (pending.back().empty()) {
      pending.pop_back();
      if (pending.empty()) break;
      OBD_ASSIGN_OR_RETURN(const std::string left, at.leave().withContext(path));
      continue;
    }
    const std::string name = std::move(pending.back().back());
    pending.back().pop_back();
    OwnFd child = openChild(at.fd(), name);
    if (!child.isValid()) {
      if (errno == ENOENT || errno == EXDEV || errno == ENOTDIR) continue;
      return fromErrno("open " + path + at.describe(name), errno);
    }
    OBD_RETURN_IF_ERROR(at.enter(name, std::move(child)).withContext(path));
    OBD_RETURN_IF_ERROR(visit().withContext(path));
  }
  return usage;
}

Status syncDirectory(const std::string& path) {
  const OwnFd dir(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir.isValid()) return fromErrno("open " + path, errno);
  if (::fsync(dir.get()) != 0) return fromErrno("fsync " + path, errno);
  return Status::ok();
}

}  // namespace obd
