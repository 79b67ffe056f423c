// Files from an attacker: any change of bytes in a layer, a log or a data file is refused with dataLoss or read as some
// disk; never a crash, a hang or an allocation out of proportion. Run under sanitizers this is where it shows.
#include "io/file-sink.h"
#include "lsmt/commit.h"
#include "lsmt/testing.h"

namespace obd {
namespace {

using namespace testing_lsmt;  // NOLINT(google-build-using-namespace)

constexpr uint64_t kSize = 256 << 10;

UpperFiles makeUpper(std::mt19937_64& random, bool sparse) {
  CreateUpperOptions create;
  create.virtualSize = kSize;
  create.sparse = sparse;
  const UpperFiles files = UpperFiles::create(create);
  OpenUpperOptions options;
  options.flushMarkers = true;
  const auto upper = files.open(options);
  for (int i = 0; i < 30; ++i) {
    const uint64_t offset = random() % (kSize / kSectorSize - 20) * kSectorSize;
    const uint64_t length = (1 + random() % 20) * kSectorSize;
    EXPECT_TRUE((i % 4 == 0 ? upper->discard(offset, length) : upper->write(offset, filled(length, i))).isOk());
    EXPECT_TRUE(i % 10 != 0 || upper->flush().isOk());
  }
  return files;
}

// Mostly where structure is: headers, trailers, index entries.
void damage(std::mt19937_64& random, MemoryFile& file) {
  const uint64_t size = file.size().value();
  if (size == 0) return;
  const uint64_t choice = random() % 10;
  if (choice == 0) {
    EXPECT_TRUE(file.truncate(random() % size).isOk());
    return;
  }
  for (uint64_t n = 1 + random() % 4; n > 0; --n) {
    uint64_t at = random() % size;
    if (choice < 4) at = random() % 136;
    if (choice >= 4 && choice < 7 && size > kHeaderSize) at = size - kHeaderSize + random() % 136;
    if (choice >= 7 && size > 2 * kHeaderSize) at = size - 2 * kHeaderSize + random() % kHeaderSize;
    std::array<std::byte, 8> bytes;
    storeLe64(bytes.data(), random() % 3 == 0 ? UINT64_MAX >> (random() % 64) : random());
    EXPECT_TRUE(file.pwrite(std::span(bytes).first(1 + random() % 8), std::min(at, size - 1)).isOk());
  }
}

template <typename Readable>
void readSome(std::mt19937_64& random, const Readable& readable) {
  std::vector<std::byte> out(64 << 10);
  const uint64_t size = readable.virtualSize() / kSectorSize * kSectorSize;
  for (int i = 0; i < 4; ++i) {
    const uint64_t length = std::min<uint64_t>(size, out.size());
    const uint64_t offset = i == 0 || size == length ? 0 : random() % ((size - length) / kSectorSize) * kSectorSize;
    EXPECT_TRUE(readable.read(offset, std::span(out).first(length)).isOk());
  }
}

TEST(Hostile, DamagedFilesAreRefusedOrReadButNeverBelieved) {
  std::mt19937_64 random(testSeed());
  const int dose = kSanitized ? 1500 : 20'000;
  int opened = 0;
  int refused = 0;
  const auto count = [&](const Status& status) {
    if (status.isOk()) {
      ++opened;
    } else {
      ++refused;
      EXPECT_EQ(status.code(), Code::kDataLoss) << status.toString();
    }
    return status.isOk();
  };
  for (const bool sparse : {false, true}) {
    const UpperFiles files = makeUpper(random, sparse);
    const UpperFiles sealed = files.copy();
    EXPECT_TRUE(sealed.open()->seal().isOk());
    MemoryFile committed;
    FileSink sink(committed);
    EXPECT_TRUE(commitUpper(*files.open({.write = false}), {}, sink).isOk());
    for (int i = 0; i < dose; ++i) {
      const auto layer = copyOf(i % 2 == 0 ? committed : *sealed.data);
      damage(random, *layer);
      auto reader = LayerReader::open(share(layer));
      if (count(reader.status())) {
        readSome(random, *reader.value());
        std::vector<std::unique_ptr<LayerReader>> layers;
        layers.push_back(std::move(reader).value());
        readSome(random, *LayerStack::make(std::move(layers)).value());
      }

      const UpperFiles pair = files.copy();
      damage(random, i % 3 == 0 ? *pair.data : *pair.index);
      OpenUpperOptions options;
      options.write = i % 2 == 0;
      const auto upper = pair.tryOpen(options);
      if (count(upper.status())) readSome(random, *upper.value());
    }
  }
  std::cout << "dose: " << 4 * dose << " files, opened " << opened << ", refused " << refused << std::endl;
  EXPECT_GT(opened, 0);
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace obd
