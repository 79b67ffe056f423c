// The opened layers of a config: what an image serves, and what export and merge walk over.
#pragma once

#include <memory>
#include <string>

#include "image/image.h"
#include "lsmt/layer-stack.h"
#include "lsmt/upper.h"

namespace obd {

struct StackOptions {
  enum class UpperMode { kIgnore, kRead, kWrite };
  UpperMode upper = UpperMode::kRead;
  bool directIo = false;
  bool flushMarkers = false;  // with kWrite
};

// Any number of threads may read. Lowers are shared with every other stack of this process that names the same files.
class Stack final {
 public:
  // As Image::open, without writing the result file.
  static Result<std::unique_ptr<Stack>> open(const ImageConfig& config, const StackOptions& options);

  uint64_t virtualSize() const { return upper_ != nullptr ? upper_->virtualSize() : lowers_->virtualSize(); }
  const std::shared_ptr<const LayerStack>& lowers() const { return lowers_; }
  Upper* upper() const { return upper_.get(); }  // null: none configured or ignored

  // REQUIRES: offset and out.size() are multiples of 512 and lie within virtualSize().
  Status read(uint64_t offset, std::span<std::byte> out) const {
    return upper_ != nullptr ? upper_->read(offset, out) : lowers_->read(offset, out);
  }

  // Calls visit(const Run&) for consecutive runs that cover sectors [begin, end): kData must be read, kZero and kGap
  // read as zeros. moffset and layer say nothing to the caller. Stops early, with false, when visit returns false.
  template <typename Visit>
  bool forEachRun(uint64_t begin, uint64_t end, Visit&& visit) const {
    if (upper_ == nullptr) return lowers_->index().lookup(begin, end, visit);
    return upper_->index().lookup(begin, end, [&](const Run& run) {
      return run.kind == RunKind::kGap ? lowers_->index().lookup(run.offset, run.end(), visit) : visit(run);
    });
  }

 private:
  Stack(std::shared_ptr<const LayerStack> lowers, std::unique_ptr<Upper> upper)
      : lowers_(std::move(lowers)), upper_(std::move(upper)) {}

  std::shared_ptr<const LayerStack> lowers_;  // before upper_, which borrows it
  std::unique_ptr<Upper> upper_;
};

// The reason as the original words it in the result file.
std::string resultReason(const Status& status);

}  // namespace obd
