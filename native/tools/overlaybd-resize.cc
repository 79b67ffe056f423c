// overlaybd-resize: changes the size of a writable image that nobody uses, and of the file system in it.
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "device/loop-fuse-target.h"
#include "image/image.h"
#include "image/stack.h"
#include "io/posix-file.h"
#include "lsmt/upper.h"
#include "tools/child-process.h"
#include "tools/tool.h"

namespace {

using namespace obd;

enum class FileSystem { kNone, kExt, kXfs, kUnknown };

const char* nameOf(FileSystem fileSystem) {
  switch (fileSystem) {
    case FileSystem::kNone: return "no file system";
    case FileSystem::kExt: return "ext file system";
    case FileSystem::kXfs: return "xfs";
    case FileSystem::kUnknown: return "unknown content";
  }
  return "";
}

// By the magic numbers within the first 2 KiB.
Result<FileSystem> detectFileSystem(const Stack& stack) {
  std::array<std::byte, 4096> start{};
  if (stack.virtualSize() < start.size()) return FileSystem::kNone;
  OBD_RETURN_IF_ERROR(stack.read(0, start));
  if (std::memcmp(start.data(), "XFSB", 4) == 0) return FileSystem::kXfs;
  if (start[1080] == std::byte{0x53} && start[1081] == std::byte{0xEF}) return FileSystem::kExt;
  const bool empty = start[0] == std::byte{0} && std::memcmp(start.data(), start.data() + 1, start.size() - 1) == 0;
  return empty ? FileSystem::kNone : FileSystem::kUnknown;
}

Status rewriteSize(const ImageConfig& config, uint64_t sizeBytes) {
  PosixOpen writing;
  writing.write = true;
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> data, openPosixFile(config.upper.data, writing));
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> index, openPosixFile(config.upper.index, writing));
  return resizeUpper(*data, *index, sizeBytes).withContext(config.upper.data);
}

// Serves the image as a device of this process while `work` runs on it.
Status withDevice(const ImageConfig& config, const std::function<Status(const std::string& device)>& work) {
  ImageConfig quiet = config;
  quiet.resultFile.clear();  // this is not an attach that anybody waits for
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<Image> image, Image::open(quiet, {}));
  BlockTargetOptions options;
  options.sectorSizeBytes = 512;  // any file system mounts on it
  options.name = "overlaybd-resize";
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<LoopFuseTarget> target, LoopFuseTarget::start(*image, options));
  const Status done = work(target->path());
  const Status stopped = target->stop(false);
  OBD_RETURN_IF_ERROR(done);
  OBD_RETURN_IF_ERROR(stopped);
  return image->close();
}

Status resizeExt(const std::string& device, uint64_t sizeBytes) {
  OBD_RETURN_IF_ERROR(runProgram({"e2fsck", "-f", "-p", device}, {0, 1}));
  return runProgram({"resize2fs", device, std::to_string(sizeBytes / 1024) + "K"});
}

// xfs grows while it is mounted; a place for that, and nobody else sees it.
Status growXfs(const std::string& device) {
  std::string place = "/tmp/overlaybd-resize-XXXXXX";
  if (::mkdtemp(place.data()) == nullptr) return fromErrno(place, errno);
  Status status;
  if (::mount(device.c_str(), place.c_str(), "xfs", 0, "nouuid") != 0) {
    status = fromErrno("mount " + device, errno);
  } else {
    status = runProgram({"xfs_growfs", "-d", place});
    if (::umount2(place.c_str(), 0) != 0 && status.isOk()) status = fromErrno("unmount " + place, errno);
  }
  ::rmdir(place.c_str());
  return status;
}

Status run(const CLI::App& app, const std::string& configPath, const std::string& sizeGib) {
  if (app.count("--config") == 0) return invalidArgument("expects --config");
  if (app.count("--size") == 0) return invalidArgument("expects --size");
  OBD_ASSIGN_OR_RETURN(const uint64_t wanted, parseSizeGib("--size", sizeGib));
  if (wanted == 0) return invalidArgument("--size: 0 is no size");
  OBD_ASSIGN_OR_RETURN(const ImageConfig config, ImageConfig::load(configPath));
  if (!config.hasUpper()) return failedPrecondition(configPath + ": has no writable layer");

  uint64_t current = 0;
  FileSystem fileSystem = FileSystem::kNone;
  {
    OBD_ASSIGN_OR_RETURN(const std::unique_ptr<Stack> stack, Stack::open(config, {}));
    current = stack->virtualSize();
    OBD_ASSIGN_OR_RETURN(fileSystem, detectFileSystem(*stack));
  }
  std::cerr << configPath << ": " << current << " bytes, " << nameOf(fileSystem) << "; to " << wanted << " bytes\n";

  if (wanted < current) {
    // The file system first: what lies beyond the new end is lost afterwards.
    if (fileSystem == FileSystem::kXfs) return failedPrecondition("xfs cannot be made smaller");
    if (fileSystem == FileSystem::kUnknown) return failedPrecondition("unknown content cannot be made smaller safely");
    if (fileSystem == FileSystem::kExt) {
      OBD_RETURN_IF_ERROR(withDevice(config, [&](const std::string& device) { return resizeExt(device, wanted); }));
    }
    OBD_RETURN_IF_ERROR(rewriteSize(config, wanted));
  } else {
    if (wanted > current) OBD_RETURN_IF_ERROR(rewriteSize(config, wanted));
    // Also when the disk has the size already: an earlier run may have come no further.
    if (fileSystem == FileSystem::kExt) {
      OBD_RETURN_IF_ERROR(withDevice(config, [&](const std::string& device) { return resizeExt(device, wanted); }));
    } else if (fileSystem == FileSystem::kXfs) {
      OBD_RETURN_IF_ERROR(withDevice(config, growXfs));
    } else if (fileSystem == FileSystem::kUnknown) {
      std::cerr << "note: only the disk was made larger\n";
    }
  }
  std::cout << "overlaybd-resize has resized to " << sizeGib << " GiB SUCCESSFULLY\n";
  return Status::ok();
}

}  // namespace

int main(int argc, char** argv) {
  std::string config;
  std::string size;
  std::string service;
  CLI::App* app = nullptr;
  return runTool(
      argc, argv,
      {"overlaybd-resize",
       "Changes the size of a writable image that nobody uses, and of the ext or xfs file system in it."},
      [&](CLI::App& cli) {
        app = &cli;
        cli.add_option("--config", config, "config.v1.json of the image (required)");
        cli.add_option("--size", size, "new size in whole GiB (required)");
        cli.add_option("--service_config_path", service, "accepted, without effect");
      },
      [&] { return run(*app, config, size); });
}
