#include "image/layer-cache.h"

#include <algorithm>

#include "zfile/layer-file.h"

namespace obd {
namespace {

std::string layerContext(size_t number, const std::string& path) {
  return "open layer " + std::to_string(number) + " (" + path + ")";
}

Result<std::vector<FileIdentity>> identifyAll(const std::vector<std::string>& paths) {
  std::vector<FileIdentity> identities;
  identities.reserve(paths.size());
  for (size_t i = 0; i < paths.size(); ++i) {
    OBD_ASSIGN_OR_RETURN(const FileIdentity identity, identifyFile(paths[i]).withContext(layerContext(i, paths[i])));
    identities.push_back(identity);
  }
  return identities;
}

Result<std::unique_ptr<LayerReader>> openLayer(const std::string& path, bool directIo) {
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> file, openLayerFile(path, directIo));
  return LayerReader::open(std::move(file));
}

}  // namespace

LayerCache& sharedLayerCache() {
  static LayerCache cache;
  return cache;
}

std::shared_ptr<const LayerStack> LayerCache::find(const Key& key) const {
  for (const Entry& entry : entries_) {
    if (entry.key == key) {
      if (auto stack = entry.stack.lock()) return stack;
    }
  }
  return nullptr;
}

Result<std::shared_ptr<const LayerStack>> LayerCache::open(const std::vector<std::string>& paths, bool directIo) {
  if (paths.size() > kLowersMax) return invalidArgument("more than " + std::to_string(kLowersMax) + " layers");
  OBD_ASSIGN_OR_RETURN(std::vector<FileIdentity> identities, identifyAll(paths));
  const Key key{std::move(identities), directIo};
  {
    const std::lock_guard lock(mutex_);
    if (auto stack = find(key)) return stack;
  }

  std::vector<std::unique_ptr<LayerReader>> layers;
  layers.reserve(paths.size());
  for (size_t i = 0; i < paths.size(); ++i) {
    OBD_ASSIGN_OR_RETURN(std::unique_ptr<LayerReader> layer,
                         openLayer(paths[i], directIo).withContext(layerContext(i, paths[i])));
    layers.push_back(std::move(layer));
  }
  OBD_ASSIGN_OR_RETURN(std::shared_ptr<const LayerStack> made, LayerStack::make(std::move(layers)));

  // A file that changed while it was opened is served to this caller but not offered to others.
  const Result<std::vector<FileIdentity>> after = identifyAll(paths);
  if (!after.isOk() || after.value() != key.files) return made;
  const std::lock_guard lock(mutex_);
  if (auto stack = find(key)) return stack;  // somebody was faster
  std::erase_if(entries_, [](const Entry& entry) { return entry.stack.expired(); });
  entries_.push_back({key, made});
  return made;
}

size_t LayerCache::liveStacks() const {
  const std::lock_guard lock(mutex_);
  return static_cast<size_t>(
      std::count_if(entries_.begin(), entries_.end(), [](const Entry& entry) { return !entry.stack.expired(); }));
}

}  // namespace obd
