// The read-only layers of an image and their merged index.
#pragma once

#include <memory>
#include <vector>

#include "lsmt/layer-reader.h"
#include "lsmt/merged-index.h"

namespace obd {

// Immutable: any thread may read; shared by all devices of an image. Owns its layers, bottom first.
class LayerStack final {
 public:
  // invalidArgument above kLowersMax layers; resourceExhausted if the merged index grows past kLogRecordsMax.
  static Result<std::shared_ptr<const LayerStack>> make(std::vector<std::unique_ptr<LayerReader>> layers);

  size_t size() const { return layers_.size(); }
  const LayerReader& layer(size_t number) const { return *layers_[number]; }
  const MergedIndex& index() const { return index_; }
  // Of the topmost layer that has one; 0 if none has.
  uint64_t virtualSize() const { return virtualSize_; }

  // Sectors no layer mentions read as zeros. REQUIRES: offset and out.size() are multiples of 512.
  Status read(uint64_t offset, std::span<std::byte> out) const;

 private:
  LayerStack(std::vector<std::unique_ptr<LayerReader>> layers, std::vector<Segment> merged);

  std::vector<std::unique_ptr<LayerReader>> layers_;
  MergedIndex index_;
  uint64_t virtualSize_ = 0;
};

}  // namespace obd
