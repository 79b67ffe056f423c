// Opened stacks of read-only layers, shared by everyone in the process who names the same files in the same order.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "io/posix-file.h"
#include "lsmt/layer-stack.h"

namespace obd {

// Locked by its mutex, which is never held while a layer is opened. Holds no stack alive: the last image to close
// lets its layers go.
class LayerCache final {
 public:
  // `paths` bottom first. Errors name the layer: "open layer N (path): …".
  Result<std::shared_ptr<const LayerStack>> open(const std::vector<std::string>& paths, bool directIo);

  size_t liveStacks() const;

 private:
  struct Key {
    std::vector<FileIdentity> files;
    bool directIo = false;
    friend bool operator==(const Key&, const Key&) = default;
  };
  struct Entry {
    Key key;
    std::weak_ptr<const LayerStack> stack;
  };

  std::shared_ptr<const LayerStack> find(const Key& key) const;  // REQUIRES: mutex_ held

  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
};

// The one of this process.
LayerCache& sharedLayerCache();

}  // namespace obd
