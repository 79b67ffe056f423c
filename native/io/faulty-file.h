// A File that fails on command. For tests. Faults it can inject: the N-th call of one kind, or every call from the
// N-th on, fails with a chosen errno; a failing write may put a prefix on the file first (a torn or short write).
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "io/file.h"

namespace obd {

// Shared by all files of one test, so that "the N-th write of the whole operation" can be counted.
struct FaultPlan {
  enum class Kind { kNone, kRead, kWrite, kSync, kTruncate, kPunch };
  Kind kind = Kind::kNone;
  int64_t failAt = -1;           // 0-based count of calls of `kind`; -1 = never
  bool fromThereOn = false;
  int errnoValue = 5;            // EIO
  size_t prefixBytes = 0;        // of a failing write that still reaches the file
  std::atomic<int64_t> calls{0};  // calls of `kind` seen so far

  bool hit(Kind called) {
    if (called != kind) return false;
    const int64_t n = calls.fetch_add(1);
    return failAt >= 0 && (n == failAt || (fromThereOn && n >= failAt));
  }
};

// Thread rule: that of the file below.
class FaultyFile final : public File {
 public:
  FaultyFile(std::unique_ptr<File> below, FaultPlan& plan) : below_(std::move(below)), plan_(plan) {}

  Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const override {
    if (plan_.hit(FaultPlan::Kind::kRead)) return fromErrno(name() + ": read (injected)", plan_.errnoValue);
    return below_->pread(out, offset);
  }
  Status pwrite(std::span<const std::byte> data, uint64_t offset) override {
    if (plan_.hit(FaultPlan::Kind::kWrite)) {
      const size_t prefix = plan_.prefixBytes < data.size() ? plan_.prefixBytes : data.size();
      if (prefix > 0) OBD_RETURN_IF_ERROR(below_->pwrite(data.first(prefix), offset));
      return fromErrno(name() + ": write (injected)", plan_.errnoValue);
    }
    return below_->pwrite(data, offset);
  }
  Status sync() override {
    if (plan_.hit(FaultPlan::Kind::kSync)) return fromErrno(name() + ": sync (injected)", plan_.errnoValue);
    return below_->sync();
  }
  Result<uint64_t> size() const override { return below_->size(); }
  Status truncate(uint64_t sizeBytes) override {
    if (plan_.hit(FaultPlan::Kind::kTruncate)) return fromErrno(name() + ": truncate (injected)", plan_.errnoValue);
    return below_->truncate(sizeBytes);
  }
  Status punchHole(uint64_t offset, uint64_t length) override {
    if (plan_.hit(FaultPlan::Kind::kPunch)) return fromErrno(name() + ": punch (injected)", plan_.errnoValue);
    return below_->punchHole(offset, length);
  }
  Result<uint64_t> seekData(uint64_t offset) const override { return below_->seekData(offset); }
  Result<uint64_t> seekHole(uint64_t offset) const override { return below_->seekHole(offset); }
  const std::string& name() const override { return below_->name(); }

 private:
  std::unique_ptr<File> below_;
  FaultPlan& plan_;
};

}  // namespace obd
