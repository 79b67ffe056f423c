#include "lsmt/layer-stack.h"

#include <cstring>

namespace obd {

LayerStack::LayerStack(std::vector<std::unique_ptr<LayerReader>> layers, std::vector<Segment> merged)
    : layers_(std::move(layers)), index_(std::move(merged)) {
  for (const auto& layer : layers_) {
    if (layer->virtualSize() != 0) virtualSize_ = layer->virtualSize();
  }
}

Result<std::shared_ptr<const LayerStack>> LayerStack::make(std::vector<std::unique_ptr<LayerReader>> layers) {
  if (layers.size() > kLowersMax) {
    return invalidArgument(std::to_string(layers.size()) + " layers, at most " + std::to_string(kLowersMax));
  }
  std::vector<std::span<const Segment>> indexes;
  indexes.reserve(layers.size());
  uint64_t entries = 0;
  for (const auto& layer : layers) {
    indexes.push_back(layer->segments());
    entries += layer->segments().size();
  }
  // Overlaying n and m entries gives at most n + m + min(n, m): the sum is a sound guard before the memory is asked for.
  if (entries > kLogRecordsMax) return Status(Code::kResourceExhausted, "the merged index is too large");
  std::vector<Segment> merged = mergeSegments(indexes);
  return std::shared_ptr<const LayerStack>(new LayerStack(std::move(layers), std::move(merged)));
}

Status LayerStack::read(uint64_t offset, std::span<std::byte> out) const {
  const uint64_t begin = offset / kSectorSize;
  Status status;
  static_cast<void>(index_.lookup(begin, begin + out.size() / kSectorSize, [&](const Run& run) {
    const std::span<std::byte> part = out.subspan((run.offset - begin) * kSectorSize, run.length * kSectorSize);
    if (run.kind == RunKind::kData) {
      status = layers_[run.layer]->file().preadZeroFill(part, run.moffset * kSectorSize);
      return status.isOk();
    }
    std::memset(part.data(), 0, part.size());
    return true;
  }));
  return status;
}

}  // namespace obd
