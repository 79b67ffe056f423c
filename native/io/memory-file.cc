#include "io/memory-file.h"

#include <algorithm>
#include <cstring>
#include <mutex>

namespace obd {

Result<size_t> MemoryFile::pread(std::span<std::byte> out, uint64_t offset) const {
  const std::shared_lock lock(mutex_);
  if (offset >= size_) return size_t{0};
  const size_t length = static_cast<size_t>(std::min<uint64_t>(out.size(), size_ - offset));
  for (size_t done = 0; done < length;) {
    const uint64_t block = (offset + done) / kBlock;
    const size_t start = static_cast<size_t>((offset + done) % kBlock);
    const size_t part = std::min(length - done, static_cast<size_t>(kBlock) - start);
    const auto found = blocks_.find(block);
    if (found == blocks_.end()) {
      std::memset(out.data() + done, 0, part);
    } else {
      std::memcpy(out.data() + done, found->second.data() + start, part);
    }
    done += part;
  }
  return length;
}

Status MemoryFile::pwrite(std::span<const std::byte> data, uint64_t offset) {
  const std::unique_lock lock(mutex_);
  for (size_t done = 0; done < data.size();) {
    const uint64_t block = (offset + done) / kBlock;
    const size_t start = static_cast<size_t>((offset + done) % kBlock);
    const size_t part = std::min(data.size() - done, static_cast<size_t>(kBlock) - start);
    auto& bytes = blocks_[block];
    if (bytes.empty()) bytes.resize(kBlock);
    std::memcpy(bytes.data() + start, data.data() + done, part);
    done += part;
  }
  size_ = std::max(size_, offset + data.size());
  return Status::ok();
}

Result<uint64_t> MemoryFile::size() const {
  const std::shared_lock lock(mutex_);
  return size_;
}

Status MemoryFile::truncate(uint64_t sizeBytes) {
  const std::unique_lock lock(mutex_);
  if (sizeBytes < size_) {
    blocks_.erase(blocks_.lower_bound((sizeBytes + kBlock - 1) / kBlock), blocks_.end());
    if (sizeBytes % kBlock != 0) {
      if (const auto last = blocks_.find(sizeBytes / kBlock); last != blocks_.end()) {
        std::memset(last->second.data() + sizeBytes % kBlock, 0, static_cast<size_t>(kBlock - sizeBytes % kBlock));
      }
    }
  }
  size_ = sizeBytes;
  return Status::ok();
}

Status MemoryFile::punchHole(uint64_t offset, uint64_t length) {
  const std::unique_lock lock(mutex_);
  zero(offset, length);
  return Status::ok();
}

void MemoryFile::zero(uint64_t offset, uint64_t length) {
  const uint64_t end = offset + length;
  for (auto it = blocks_.lower_bound(offset / kBlock); it != blocks_.end() && it->first * kBlock < end;) {
    const uint64_t blockStart = it->first * kBlock;
    const uint64_t from = std::max(offset, blockStart);
    const uint64_t to = std::min(end, blockStart + kBlock);
    if (to <= from) { ++it; continue; }
    if (to - from == kBlock) {
      it = blocks_.erase(it);
    } else {
      std::memset(it->second.data() + (from - blockStart), 0, static_cast<size_t>(to - from));
      ++it;
    }
  }
}

Result<uint64_t> MemoryFile::seekData(uint64_t offset) const {
  const std::shared_lock lock(mutex_);
  const auto it = blocks_.lower_bound(offset / kBlock);
  if (it == blocks_.end()) return size_;
  return std::min(size_, std::max(offset, it->first * kBlock));
}

Result<uint64_t> MemoryFile::seekHole(uint64_t offset) const {
  const std::shared_lock lock(mutex_);
  uint64_t block = offset / kBlock;
  auto it = blocks_.find(block);
  if (it == blocks_.end()) return std::min(size_, offset);
  while (it != blocks_.end() && it->first == block) {
    ++it;
    ++block;
  }
  return std::min(size_, block * kBlock);
}

std::vector<std::byte> MemoryFile::contents() const {
  const Result<uint64_t> length = size();
  std::vector<std::byte> out(static_cast<size_t>(length.value()));
  const Result<size_t> got = pread(out, 0);
  OBD_ASSERT(got.isOk() && got.value() == out.size(), "memory file reads whole");
  return out;
}

}  // namespace obd
