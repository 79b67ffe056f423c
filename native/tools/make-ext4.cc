#include "tools/make-ext4.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "io/posix-file.h"
#include "lsmt/upper.h"
#include "tools/child-process.h"

namespace obd {

Status makeExt4(const std::string& dataPath, const std::string& indexPath) {
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<Upper> upper, openUpper(dataPath, indexPath, {}));
  OwnFd fd(::memfd_create("overlaybd-mkfs", MFD_CLOEXEC));
  if (!fd.isValid()) return fromErrno("memfd_create", errno);
  const std::string path = "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(fd.get());
  const std::unique_ptr<File> disk = adoptPosixFile(std::move(fd), "file system in memory");
  OBD_RETURN_IF_ERROR(disk->truncate(upper->virtualSize()));
  // The discard tells mkfs that the inode tables are zero already, so they are neither written nor left for later.
  OBD_RETURN_IF_ERROR(runProgram(
      {"mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "5", "-U",
       "00000000-0000-0000-0000-000000000000", "-O",
       "none,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,"
       "extra_isize",
       "-E", "discard,hash_seed=00000000-0000-0000-0000-000000000000", path}));
  constexpr uint64_t kPiece = 1024 * 1024;
  std::vector<std::byte> buffer(kPiece);
  const uint64_t size = upper->virtualSize();
  uint64_t at = 0;
  while (true) {
    OBD_ASSIGN_OR_RETURN(at, disk->seekData(at));
    if (at >= size) break;
    OBD_ASSIGN_OR_RETURN(const uint64_t hole, disk->seekHole(at));
    const std::span<std::byte> piece(buffer.data(), static_cast<size_t>(std::min({kPiece, hole - at, size - at})));
    OBD_RETURN_IF_ERROR(disk->preadExact(piece, at));
    OBD_RETURN_IF_ERROR(upper->write(at, piece));
    at += piece.size();
  }
  return upper->flush();
}

}  // namespace obd
