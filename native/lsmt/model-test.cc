// A stack is an array of bytes: seeded random operations against a flat array, on every kind of writable layer, with
// reopening, sealing, flattening and commits on the way.
#include <chrono>

#include "io/file-sink.h"
#include "lsmt/commit.h"
#include "lsmt/testing.h"

namespace obd {
namespace {

using namespace testing_lsmt;  // NOLINT(google-build-using-namespace)

constexpr uint64_t kDiskSectors = 3001;  // neither a multiple of a block nor of a leaf
constexpr uint64_t kDiskBytes = kDiskSectors * kSectorSize;

class Model {
 public:
  Model(uint64_t seed, bool sparse, bool markers) : random_(seed), sparse_(sparse), markers_(markers), disk_(kDiskBytes) {
    newUpper();
  }

  void run(uint64_t operations) {
    for (uint64_t i = 0; i < operations && !::testing::Test::HasFatalFailure(); ++i) {
      const uint64_t dice = random_() % 10'000;
      if (dice < 4700) {
        write();
      } else if (dice < 6200) {
        discard();
      } else if (dice < 9600) {
        read();
      } else if (dice < 9980) {
        expectOk(upper_->flush());
      } else if (dice < 9990) {
        reopen();
      } else if (dice < 9997) {
        sealAndStack();
      } else {
        flatten();
      }
    }
    compareAll();
  }

  size_t reopened = 0, sealed = 0, flattened = 0;

 private:
  void expectOk(const Status& status) { ASSERT_TRUE(status.isOk()) << status.toString(); }

  OpenUpperOptions options() const {
    OpenUpperOptions options;
    options.flushMarkers = markers_;
    options.bootId = "this boot";
    options.ioLimitBytes = 16 * kKiB;  // so that writes are split too
    return options;
  }
  void newUpper() {
    CreateUpperOptions create;
    create.virtualSize = stack_ != nullptr && random_() % 2 == 0 ? 0 : kDiskBytes;  // 0: inherits
    create.sparse = sparse_;
    files_ = UpperFiles::create(create);
    open();
  }
  void open() {
    upper_.reset();
    upper_ = files_.open(options());
    expectOk(upper_->attachLower(stack_.get()));
    ASSERT_EQ(upper_->virtualSize(), kDiskBytes);
  }

  std::pair<uint64_t, uint64_t> range() {
    uint64_t length = 1 + random_() % (random_() % 50 == 0 ? 400 : 24);
    uint64_t offset = random_() % kDiskSectors;
    if (random_() % 2 == 0) {  // what file systems do
      offset = offset / 8 * 8;
      length = (length + 7) / 8 * 8;
    }
    return {offset * kSectorSize, std::min(length, kDiskSectors - offset) * kSectorSize};
  }

  void write() {
    const auto [offset, length] = range();
    const std::span<std::byte> part = std::span(disk_).subspan(offset, length);
    for (uint64_t at = 0; at < length; at += kSectorSize) {
      std::memset(part.data() + at, static_cast<int>(random_()), kSectorSize);
      storeLe64(part.data() + at, ++stamp_);
    }
    expectOk(upper_->write(offset, part));
  }
  void discard() {
    const auto [offset, length] = range();
    std::memset(disk_.data() + offset, 0, length);
    expectOk(upper_->discard(offset, length));
  }
  void read() {
    const auto [offset, length] = range();
    compare(offset, length);
  }
  void compare(uint64_t offset, uint64_t length) {
    buffer_.resize(length);
    expectOk(upper_->read(offset, buffer_));
    if (std::memcmp(buffer_.data(), disk_.data() + offset, length) == 0) return;
    for (uint64_t at = 0; at < length; at += kSectorSize) {
      ASSERT_EQ(std::memcmp(buffer_.data() + at, disk_.data() + offset + at, kSectorSize), 0)
          << "sector " << (offset + at) / kSectorSize << " differs";
    }
  }
  void compareAll() { compare(0, kDiskBytes); }

  void reopen() {
    ++reopened;
    open();
    compareAll();
  }

  void stackFiles() {
    std::vector<std::unique_ptr<LayerReader>> readers;
    for (const auto& file : layerFiles_) {
      auto reader = LayerReader::open(share(file));
      ASSERT_TRUE(reader.isOk()) << reader.status().toString();
      readers.push_back(std::move(reader).value());
    }
    upper_.reset();
    stack_ = LayerStack::make(std::move(readers)).value();
    newUpper();
    compareAll();
  }
  // The live snapshot of §7.4.
  void sealAndStack() {
    if (layerFiles_.size() >= 6) return flatten();
    ++sealed;
    if (random_() % 3 == 0) {
      auto compact = std::make_shared<MemoryFile>("committed");
      FileSink sink(*compact);
      ASSERT_TRUE(commitUpper(*upper_, {}, sink).isOk());
      layerFiles_.push_back(compact);
    } else {
      expectOk(upper_->seal());
      expectOk(upper_->seal());
      compareAll();
      ASSERT_EQ(upper_->write(0, filled(kSectorSize, 1)).code(), Code::kFailedPrecondition);
      layerFiles_.push_back(files_.data);
    }
    stackFiles();
  }
  void flatten() {
    ++flattened;
    auto flat = std::make_shared<MemoryFile>("flat");
    FileSink sink(*flat);
    const auto empty = LayerStack::make({}).value();
    ASSERT_TRUE(commitStack(stack_ != nullptr ? *stack_ : *empty, upper_.get(), {}, sink).isOk());
    layerFiles_ = {flat};
    stackFiles();
  }

  std::mt19937_64 random_;
  const bool sparse_, markers_;
  std::vector<std::byte> disk_;
  std::vector<std::byte> buffer_;
  uint64_t stamp_ = 0;
  UpperFiles files_;
  std::vector<std::shared_ptr<MemoryFile>> layerFiles_;
  std::shared_ptr<const LayerStack> stack_;
  std::unique_ptr<Upper> upper_;
};

TEST(Model, AMillionRandomOperationsLeaveWhatAnArrayOfBytesHolds) {
  const uint64_t seed = testSeed();
  const uint64_t dose = kSanitized ? 15'000 : 350'000;  // of each kind
  std::cout << "dose: 3 x " << dose << " operations" << std::endl;
  for (int kind = 0; kind < 3; ++kind) {
    SCOPED_TRACE(kind == 0 ? "append" : kind == 1 ? "append with flush markers" : "sparse");
    Model model(seed + static_cast<uint64_t>(kind), kind == 2, kind == 1);
    model.run(dose);
    ASSERT_FALSE(HasFailure());
    std::cout << "reopened " << model.reopened << ", sealed " << model.sealed << ", flattened " << model.flattened
              << std::endl;
    EXPECT_GT(model.reopened, 0u);
    EXPECT_GT(model.sealed, 0u);
    EXPECT_GT(model.flattened, 0u);
  }
}

}  // namespace
}  // namespace obd
