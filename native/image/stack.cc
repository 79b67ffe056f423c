#include "image/stack.h"

#include <sys/stat.h>

#include <array>
#include <cerrno>

#include "image/layer-cache.h"

namespace obd {
namespace {

// formats.md §13, in this order; the first that exists is taken, whatever is in it.
constexpr std::array<const char*, 3> kLocalNames = {"/overlaybd.commit", "/.commit", "/overlaybd.sealed"};

Result<std::string> locateLower(const LowerConfig& lower, const std::string& repoBlobUrl, size_t number) {
  const std::string context = "open layer " + std::to_string(number);
  if (!lower.file.empty()) return lower.file;
  if (!lower.dir.empty()) {
    for (const char* name : kLocalNames) {
      std::string path = lower.dir + name;
      struct stat st {};
      if (::stat(path.c_str(), &st) == 0) return path;
      if (errno != ENOENT && errno != ENOTDIR) return fromErrno(path, errno).withContext(context);
    }
  }
  if (lower.digest.empty()) return notFound(context + " (" + lower.dir + "): no local copy and no digest");
  if (repoBlobUrl.empty()) return invalidArgument(context + " (" + lower.digest + "): empty repoBlobUrl");
  return unimplemented(context + " (" + lower.digest + "): no local copy, and reading from a registry is not supported");
}

}  // namespace

Result<std::unique_ptr<Stack>> Stack::open(const ImageConfig& config, const StackOptions& options) {
  std::vector<std::string> paths;
  paths.reserve(config.lowers.size());
  for (const LowerConfig& lower : config.lowers) {
    OBD_ASSIGN_OR_RETURN(std::string path, locateLower(lower, config.repoBlobUrl, paths.size()));
    paths.push_back(std::move(path));
  }
  OBD_ASSIGN_OR_RETURN(std::shared_ptr<const LayerStack> lowers, sharedLayerCache().open(paths, options.directIo));

  std::unique_ptr<Upper> upper;
  if (config.hasUpper() && options.upper != StackOptions::UpperMode::kIgnore) {
    const std::string context = "open upper (" + config.upper.data + ")";
    OpenUpperOptions open;
    open.write = options.upper == StackOptions::UpperMode::kWrite;
    open.flushMarkers = options.flushMarkers && open.write;
    open.directIo = options.directIo;
    OBD_ASSIGN_OR_RETURN(upper, openUpper(config.upper.data, config.upper.index, open).withContext(context));
    OBD_RETURN_IF_ERROR(upper->attachLower(paths.empty() ? nullptr : lowers.get()).withContext(context));
  }
  if (paths.empty() && upper == nullptr) return invalidArgument("config: neither lowers nor a usable upper");
  auto stack = std::unique_ptr<Stack>(new Stack(std::move(lowers), std::move(upper)));
  if (stack->virtualSize() == 0) return invalidArgument("config: no layer has a virtual size");
  if (stack->virtualSize() % kSectorSize != 0) return dataLoss("config: the virtual size is not a multiple of 512");
  return stack;
}

std::string resultReason(const Status& status) {
  // Our contexts start with what was attempted ("open layer 2 (path): …"); the original's reasons say it failed.
  const std::string& message = status.message();
  return message.starts_with("open ") ? "failed to " + message : message;
}

}  // namespace obd
