// A BlockBackend in memory, for tests. Faults it can inject: any operation fails with a chosen status, from a chosen
// call on; operations can be held until released. It records discards, zeroings and counts flushes.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "base/assert.h"
#include "io/block-backend.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace obd {

// An answered request happens before whatever its caller does next, also when that reaches us as another request on
// another thread. The order goes through the kernel, where ThreadSanitizer cannot see it.
class KernelOrder final {
 public:
#if defined(__SANITIZE_THREAD__)
  void acquire() { __tsan_acquire(this); }
  void release() { __tsan_release(this); }
#else
  void acquire() {}
  void release() {}
#endif
};

// Thread rule: all methods from any thread. Memory is reserved lazily, so large sizes cost nothing.
class MemoryBackend final : public BlockBackend {
 public:
  explicit MemoryBackend(uint64_t sizeBytes, bool readOnly = false) : sizeBytes_(sizeBytes), readOnly_(readOnly) {
    void* memory =
        ::mmap(nullptr, sizeBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    OBD_ASSERT(memory != MAP_FAILED, "reserve memory");
    bytes_ = static_cast<std::byte*>(memory);
  }
  ~MemoryBackend() override { ::munmap(bytes_, sizeBytes_); }

  uint64_t sizeBytes() const override { return sizeBytes_; }
  bool readOnly() const override { return readOnly_; }

  Status read(uint64_t offset, std::span<std::byte> out) override {
    OBD_RETURN_IF_ERROR(enter(readFault_, offset, out.size()));
    order_.acquire();
    std::memcpy(out.data(), bytes_ + offset, out.size());
    order_.release();
    return Status::ok();
  }
  Status write(uint64_t offset, std::span<const std::byte> data) override {
    OBD_ASSERT(!readOnly_, "write to a read-only backend");
    OBD_RETURN_IF_ERROR(enter(writeFault_, offset, data.size()));
    order_.acquire();
    std::memcpy(bytes_ + offset, data.data(), data.size());
    order_.release();
    return Status::ok();
  }
  Status discard(uint64_t offset, uint64_t length) override {
    OBD_RETURN_IF_ERROR(enter(discardFault_, offset, length));
    return clear(offset, length, discards_);
  }
  Status writeZeroes(uint64_t offset, uint64_t length) override {
    OBD_RETURN_IF_ERROR(enter(discardFault_, offset, length));
    return clear(offset, length, zeroings_);
  }
  Status flush() override {
    OBD_RETURN_IF_ERROR(enter(flushFault_, 0, 0));
    flushes_.fetch_add(1);
    return Status::ok();
  }

  // An ok status takes the fault away.
  void failReads(Status status) { set(readFault_, std::move(status)); }
  void failWrites(Status status) { set(writeFault_, std::move(status)); }
  void failDiscards(Status status) { set(discardFault_, std::move(status)); }
  void failFlushes(Status status) { set(flushFault_, std::move(status)); }

  // Operations that begin from now on wait for release().
  void hold() {
    const std::lock_guard lock(mutex_);
    held_ = true;
  }
  void release() {
    const std::lock_guard lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }
  // Returns once `count` operations are waiting.
  void awaitHeld(int count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ >= count; });
  }

  using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;
  Ranges discards() {
    const std::lock_guard lock(mutex_);
    return discards_;
  }
  Ranges zeroings() {
    const std::lock_guard lock(mutex_);
    return zeroings_;
  }
  uint64_t flushes() const { return flushes_.load(); }
  // The device's bytes, for one expression: what answered requests left behind, and what later ones find.
  class Bytes final {
   public:
    Bytes(std::span<std::byte> bytes, KernelOrder& order) : bytes_(bytes), order_(order) { order_.acquire(); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    ~Bytes() { order_.release(); }
    std::byte* data() const { return bytes_.data(); }
    std::byte& operator[](size_t at) const { return bytes_[at]; }

   private:
    std::span<std::byte> bytes_;
    KernelOrder& order_;
  };
  Bytes bytes() { return {{bytes_, sizeBytes_}, order_}; }

 private:
  Status enter(const Status& fault, uint64_t offset, uint64_t length) {
    OBD_ASSERT(offset % 512 == 0 && length % 512 == 0 && offset + length <= sizeBytes_, "range outside the device");
    std::unique_lock lock(mutex_);
    if (held_) {
      waiting_++;
      changed_.notify_all();
      changed_.wait(lock, [&] { return !held_; });
      waiting_--;
    }
    return fault;
  }
  void set(Status& fault, Status status) {
    const std::lock_guard lock(mutex_);
    fault = std::move(status);
  }
  Status clear(uint64_t offset, uint64_t length, Ranges& log) {
    const std::lock_guard lock(mutex_);
    order_.acquire();
    std::memset(bytes_ + offset, 0, length);
    order_.release();
    log.emplace_back(offset, length);
    return Status::ok();
  }

  const uint64_t sizeBytes_;
  const bool readOnly_;
  std::byte* bytes_ = nullptr;
  KernelOrder order_;
  std::atomic<uint64_t> flushes_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false;
  int waiting_ = 0;
  Status readFault_, writeFault_, discardFault_, flushFault_;
  Ranges discards_, zeroings_;
};

}  // namespace obd
