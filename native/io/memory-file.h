// A sparse file in memory, with the hole granularity of ext4 (4096 bytes). For tests.
#pragma once

#include <map>
#include <shared_mutex>
#include <string>
#include <vector>

#include "io/file.h"

namespace obd {

// Locked by its own mutex: any thread may call.
class MemoryFile final : public File {
 public:
  explicit MemoryFile(std::string name = "memory") : name_(std::move(name)) {}

  Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const override;
  Status pwrite(std::span<const std::byte> data, uint64_t offset) override;
  Status sync() override { return Status::ok(); }
  Result<uint64_t> size() const override;
  Status truncate(uint64_t sizeBytes) override;
  Status punchHole(uint64_t offset, uint64_t length) override;
  Result<uint64_t> seekData(uint64_t offset) const override;
  Result<uint64_t> seekHole(uint64_t offset) const override;
  const std::string& name() const override { return name_; }

  // Everything, holes as zeros. REQUIRES: small enough.
  std::vector<std::byte> contents() const;

 private:
  static constexpr uint64_t kBlock = 4096;

  void zero(uint64_t offset, uint64_t length);

  mutable std::shared_mutex mutex_;
  std::map<uint64_t, std::vector<std::byte>> blocks_;  // block number → kBlock bytes; absent = hole
  uint64_t size_ = 0;
  std::string name_;
};

}  // namespace obd
