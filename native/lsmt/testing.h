// For tests only: files that outlive the layer that owns them, seeds, and the fixtures' payload.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "io/faulty-file.h"
#include "io/memory-file.h"
#include "lsmt/upper.h"

namespace obd::testing_lsmt {

// An owning handle that leaves the file to others too: what the test looks at after the layer is gone.
class SharedFile final : public File {
 public:
  explicit SharedFile(std::shared_ptr<File> below) : below_(std::move(below)) {}

  Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const override { return below_->pread(out, offset); }
  Status pwrite(std::span<const std::byte> data, uint64_t offset) override { return below_->pwrite(data, offset); }
  Status sync() override { return below_->sync(); }
  Result<uint64_t> size() const override { return below_->size(); }
  Status truncate(uint64_t sizeBytes) override { return below_->truncate(sizeBytes); }
  Status punchHole(uint64_t offset, uint64_t length) override { return below_->punchHole(offset, length); }
  Result<uint64_t> seekData(uint64_t offset) const override { return below_->seekData(offset); }
  Result<uint64_t> seekHole(uint64_t offset) const override { return below_->seekHole(offset); }
  const std::string& name() const override { return below_->name(); }

 private:
  std::shared_ptr<File> below_;
};

inline std::unique_ptr<File> share(std::shared_ptr<File> file) { return std::make_unique<SharedFile>(std::move(file)); }

// A copy that later changes of the original do not reach: what a crash leaves behind. Holes stay holes.
inline std::shared_ptr<MemoryFile> copyOf(const MemoryFile& file) {
  auto copy = std::make_shared<MemoryFile>(file.name());
  const uint64_t size = file.size().value();
  for (uint64_t at = 0; at < size;) {
    const uint64_t begin = file.seekData(at).value();
    if (begin >= size) break;
    const uint64_t end = file.seekHole(begin).value();
    std::vector<std::byte> bytes(end - begin);
    EXPECT_TRUE(file.preadExact(bytes, begin).isOk());
    EXPECT_TRUE(copy->pwrite(bytes, begin).isOk());
    at = end;
  }
  EXPECT_TRUE(copy->truncate(size).isOk());
  return copy;
}

// The two files of a writable layer.
struct UpperFiles {
  std::shared_ptr<MemoryFile> data = std::make_shared<MemoryFile>("data");
  std::shared_ptr<MemoryFile> index = std::make_shared<MemoryFile>("index");

  static UpperFiles create(const CreateUpperOptions& options) {
    UpperFiles files;
    const Status status = createUpper(*files.data, *files.index, options);
    EXPECT_TRUE(status.isOk()) << status.toString();
    return files;
  }
  UpperFiles copy() const { return {copyOf(*data), copyOf(*index)}; }
  Result<std::unique_ptr<Upper>> tryOpen(const OpenUpperOptions& options = {}) const {
    return openUpper(share(data), share(index), options);
  }
  std::unique_ptr<Upper> open(const OpenUpperOptions& options = {}) const {
    Result<std::unique_ptr<Upper>> upper = tryOpen(options);
    EXPECT_TRUE(upper.isOk()) << upper.status().toString();
    return std::move(upper).value();
  }
};

// OBD_SEED if set, else fresh; printed either way, so that a failure can be repeated.
inline uint64_t testSeed() {
  const char* given = std::getenv("OBD_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  std::cout << "OBD_SEED=" << seed << std::endl;
  return seed;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// The payload of the fixtures' ops.json (README.md there).
inline std::vector<std::byte> fixturePayload(uint64_t seed, size_t length, const std::string& kind) {
  std::vector<std::byte> out(length);
  for (size_t sector = 0; sector < length / kSectorSize; ++sector) {
    std::byte* const at = out.data() + sector * kSectorSize;
    uint64_t state = seed * 0x9E3779B97F4A7C15u + sector;
    const auto draw = [&state] {
      state += 0x9E3779B97F4A7C15u;
      uint64_t z = state;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
      return z ^ (z >> 31);
    };
    if (kind == "rand" || kind == "mix") {
      const size_t draws = kind == "rand" ? 64 : 8;
      for (size_t i = 0; i < draws; ++i) storeLe64(at + 8 * i, draw());
      if (kind == "mix") std::memset(at + 64, static_cast<int>((7 * sector + seed) % 256), 448);
    } else if (kind == "fill") {
      std::memset(at, static_cast<int>((7 * sector + 13 * (sector / 256) + seed) % 256), kSectorSize);
    } else {
      EXPECT_EQ(kind, "zero");
    }
  }
  return out;
}

inline std::vector<std::byte> filled(size_t length, int value) {
  return std::vector<std::byte>(length, static_cast<std::byte>(value));
}

}  // namespace obd::testing_lsmt
