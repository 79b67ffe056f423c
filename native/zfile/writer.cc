#include "zfile/writer.h"

#include <lz4.h>
#include <zstd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

#include "zfile/crc32c.h"

namespace obd {
namespace {

using zfile::Algorithm;
using zfile::kChecksumSize;
using zfile::kIndexEntrySize;

// What is handed to a compressing thread at once: enough to make the hand-over cheap, little enough to stay in cache.
constexpr size_t kChunkSize = 256 * 1024;

// The working memory of one compressing thread.
class Compressor final {
 public:
  explicit Compressor(const ZFileOptions& options) : options_(options) {
    if (options.algorithm == Algorithm::kLz4) {
      lz4_ = std::make_unique<std::byte[]>(static_cast<size_t>(LZ4_sizeofState()));
    } else {
      zstd_ = ZSTD_createCCtx();
    }
  }
  Compressor(const Compressor&) = delete;
  Compressor& operator=(const Compressor&) = delete;
  ~Compressor() { ZSTD_freeCCtx(zstd_); }

  // Stored bytes of one block including its checksum, 0 if the library failed (which is a lack of memory).
  // REQUIRES: room for maxStoredBlockSize() at `to`.
  size_t compress(std::span<const std::byte> block, std::byte* to) {
    const size_t room = zfile::maxStoredBlockSize(options_.blockSize) - kChecksumSize;
    size_t length = 0;
    if (lz4_) {
      // Resets the state each time: what a block becomes never depends on what this thread compressed before.
      const int got = LZ4_compress_fast_extState(
          lz4_.get(), reinterpret_cast<const char*>(block.data()), reinterpret_cast<char*>(to),
          static_cast<int>(block.size()), static_cast<int>(room), 1);
      length = got > 0 ? static_cast<size_t>(got) : 0;
    } else if (zstd_ != nullptr) {
      const size_t got = ZSTD_compressCCtx(zstd_, to, room, block.data(), block.size(), zfile::kZstdLevel);
      length = ZSTD_isError(got) != 0 ? 0 : got;
    }
    if (length != 0 && options_.checksums) {
      zfile::storeLittle32(to + length, crc32cRaw(zfile::kBlockCrcStart, {to, length}));
      length += kChecksumSize;
    }
    return length;
  }

 private:
  const ZFileOptions& options_;
  std::unique_ptr<std::byte[]> lz4_;
  ZSTD_CCtx* zstd_ = nullptr;
};

// A run of whole blocks on its way through.
struct Chunk {
  enum class State : uint8_t { kEmpty, kFilled, kTaken, kDone };

  State state = State::kEmpty;
  std::unique_ptr<std::byte[]> input;
  size_t inputSize = 0;
  std::unique_ptr<std::byte[]> output;
  size_t outputSize = 0;
  std::vector<uint32_t> lengths;  // stored length of each block
  bool failed = false;
};

}  // namespace

// A bounded ring of chunks. The writer fills the slot at `fill`, anybody compresses the oldest filled one, the writer
// takes finished ones out at `drain`, in order. Slots between drain and fill are in use.
class ZFileWriter::Pool final {
 public:
  explicit Pool(const ZFileOptions& options)
      : options_(options), own_(options_), ring_(options.threads > 1 ? 2 * size_t{options.threads} + 2 : 1) {
    const size_t blocks = kChunkSize / options_.blockSize;
    for (Chunk& chunk : ring_) {
      chunk.input = std::make_unique_for_overwrite<std::byte[]>(kChunkSize);
      chunk.output = std::make_unique_for_overwrite<std::byte[]>(blocks * zfile::maxStoredBlockSize(options_.blockSize));
      chunk.lengths.reserve(blocks);
    }
    for (uint32_t i = 1; i < options.threads; i++) helpers_.emplace_back([this] { help(); });
  }

  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    filled_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  Chunk& filling() { return ring_[fill_ % ring_.size()]; }
  bool isFull() const { return fill_ - drain_ == ring_.size(); }
  bool isEmpty() const { return fill_ == drain_; }

  void submit() {
    {
      const std::lock_guard lock(mutex_);
      filling().state = Chunk::State::kFilled;
      fill_++;
    }
    filled_.notify_one();
  }

  // The oldest chunk, compressed: by a helper, or here and now if none has begun with it. While a helper is at it,
  // this thread compresses a later one instead of waiting. REQUIRES: !isEmpty().
  Chunk& oldest() {
    Chunk& chunk = ring_[drain_ % ring_.size()];
    std::unique_lock lock(mutex_);
    while (chunk.state != Chunk::State::kDone) {
      if (Chunk* next = takeFilled()) {
        lock.unlock();
        compress(*next, own_);
        lock.lock();
        next->state = Chunk::State::kDone;
      } else {
        done_.wait(lock);
      }
    }
    return chunk;
  }

  bool oldestIsDone() {
    const std::lock_guard lock(mutex_);
    return ring_[drain_ % ring_.size()].state == Chunk::State::kDone;
  }

  void release() {
    Chunk& chunk = ring_[drain_ % ring_.size()];
    chunk.state = Chunk::State::kEmpty;
    chunk.inputSize = 0;
    drain_++;
  }

 private:
  // REQUIRES: mutex_ held.
  Chunk* takeFilled() {
    if (take_ == fill_) return nullptr;
    Chunk& chunk = ring_[take_++ % ring_.size()];
    chunk.state = Chunk::State::kTaken;
    return &chunk;
  }

  void help() {
    Compressor compressor(options_);
    std::unique_lock lock(mutex_);
    while (true) {
      Chunk* chunk = takeFilled();
      if (chunk != nullptr) {
        lock.unlock();
        compress(*chunk, compressor);
        lock.lock();
        chunk->state = Chunk::State::kDone;
        done_.notify_one();
      } else if (stopping_) {
        return;
      } else {
        filled_.wait(lock);
      }
    }
  }

  void compress(Chunk& chunk, Compressor& compressor) const {
    chunk.lengths.clear();
    chunk.outputSize = 0;
    chunk.failed = false;
    for (size_t at = 0; at < chunk.inputSize; at += options_.blockSize) {
      const size_t size = std::min<size_t>(options_.blockSize, chunk.inputSize - at);
      const size_t length = compressor.compress({chunk.input.get() + at, size}, chunk.output.get() + chunk.outputSize);
      if (length == 0) {
        chunk.failed = true;
        return;
      }
      chunk.lengths.push_back(static_cast<uint32_t>(length));
      chunk.outputSize += length;
    }
  }

  const ZFileOptions options_;
  Compressor own_;
  std::vector<Chunk> ring_;
  uint64_t fill_ = 0;   // written by the writing thread under mutex_
  uint64_t take_ = 0;   // guarded by mutex_
  uint64_t drain_ = 0;  // the writing thread's own
  bool stopping_ = false;
  std::mutex mutex_;
  std::condition_variable filled_;
  std::condition_variable done_;
  std::vector<std::thread> helpers_;
};

ZFileWriter::ZFileWriter(Sink& below, const ZFileOptions& options) : below_(below), options_(options) {
  OBD_ASSERT(zfile::isLegalBlockSize(options.blockSize), "block size");
  options_.threads = std::max<uint32_t>(options_.threads, 1);
  pool_ = std::make_unique<Pool>(options_);
}

ZFileWriter::~ZFileWriter() = default;

Status ZFileWriter::fail(Status status) {
  if (!status.isOk()) failure_ = status;
  return status;
}

Status ZFileWriter::write(std::span<const std::byte> data) {
  OBD_ASSERT(!finished_, "write after finish");
  if (!failure_.isOk()) return failure_;
  while (!data.empty()) {
    Chunk& chunk = pool_->filling();
    const size_t part = std::min(data.size(), kChunkSize - chunk.inputSize);
    std::memcpy(chunk.input.get() + chunk.inputSize, data.data(), part);
    chunk.inputSize += part;
    originalSize_ += part;
    data = data.subspan(part);
    if (chunk.inputSize == kChunkSize) OBD_RETURN_IF_ERROR(submitChunk());
  }
  return Status::ok();
}

// Leaves a free slot to fill.
Status ZFileWriter::submitChunk() {
  pool_->submit();
  while (pool_->isFull() || (!pool_->isEmpty() && pool_->oldestIsDone())) OBD_RETURN_IF_ERROR(drainOne());
  return Status::ok();
}

Status ZFileWriter::drainOne() {
  if (!headerWritten_) {
    zfile::Record header;
    header.flags = zfile::kFlagsFirstHeader;
    header.blockSize = options_.blockSize;
    header.algorithm = static_cast<uint8_t>(options_.algorithm);
    header.hasChecksums = options_.checksums;
    OBD_RETURN_IF_ERROR(fail(below_.write(zfile::encodeRecord(header))));
    position_ = zfile::kRecordSize;
    headerWritten_ = true;
  }
  Chunk& chunk = pool_->oldest();
  if (chunk.failed) return fail(Status(Code::kResourceExhausted, "no memory to compress with"));
  for (const uint32_t length : chunk.lengths) {
    if (length > zfile::kMaxInteroperableBlock && !options_.allowLargeBlocks) {
      blockTooLarge_ = true;
      return fail(failedPrecondition("ZFile block " + std::to_string(index_.size() / kIndexEntrySize) + " takes " +
                                     std::to_string(length) +
                                     " bytes, more than the 65536 that other readers can read; use smaller blocks"));
    }
    if (index_.size() / kIndexEntrySize == zfile::kMaxBlocks) return fail(invalidArgument("ZFile: too many blocks"));
    index_.resize(index_.size() + kIndexEntrySize);
    zfile::storeLittle32(index_.data() + index_.size() - kIndexEntrySize, length);
  }
  if (chunk.outputSize > 0) OBD_RETURN_IF_ERROR(fail(below_.write({chunk.output.get(), chunk.outputSize})));
  position_ += chunk.outputSize;
  pool_->release();
  return Status::ok();
}

Status ZFileWriter::finish() {
  OBD_ASSERT(!finished_, "finish twice");
  finished_ = true;
  if (!failure_.isOk()) return failure_;
  // The last, partly filled chunk. An empty one writes the header of an empty file.
  pool_->submit();
  while (!pool_->isEmpty()) OBD_RETURN_IF_ERROR(drainOne());

  zfile::Record record;
  record.flags = zfile::kFlagsTrailer;
  record.indexOffset = position_;
  record.blockCount = index_.size() / kIndexEntrySize;
  record.originalSize = originalSize_;
  record.indexCrc = crc32cRaw(zfile::kIndexCrcStart, index_);
  record.blockSize = options_.blockSize;
  record.algorithm = static_cast<uint8_t>(options_.algorithm);
  record.hasChecksums = options_.checksums;
  if (!index_.empty()) OBD_RETURN_IF_ERROR(fail(below_.write(index_)));
  OBD_RETURN_IF_ERROR(fail(below_.write(zfile::encodeRecord(record))));
  OBD_RETURN_IF_ERROR(fail(below_.finish()));
  if (options_.rewriteHeaderIn != nullptr) {
    record.flags = zfile::kFlagsFinalHeader;
    OBD_RETURN_IF_ERROR(fail(options_.rewriteHeaderIn->pwrite(zfile::encodeRecord(record), options_.headerOffset)));
    OBD_RETURN_IF_ERROR(fail(options_.rewriteHeaderIn->sync()));
  }
  return Status::ok();
}

}  // namespace obd
