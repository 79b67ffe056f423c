// Invariants: what the original wrote reads back to the byte; what we write does, too, in every combination of
// parameters, and is the same for any number of threads; damage of any field is either harmless or a typed error,
// never wrong bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "io/file-sink.h"
#include "zfile/crc32c.h"
#include "zfile/fixtures.h"
#include "zfile/format.h"
#include "zfile/layer-file.h"
#include "zfile/reader.h"
#include "zfile/tar.h"
#include "zfile/writer.h"

namespace obd {
namespace {

using Bytes = std::vector<std::byte>;
using zfile::Algorithm;

// A content with text-like, zero and incompressible stretches.
Bytes mixedContent(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  Bytes content(size);
  size_t at = 0;
  while (at < size) {
    const size_t run = std::min<size_t>(size - at, 1 + random() % 40000);
    const uint32_t kind = static_cast<uint32_t>(random() % 3);
    for (size_t i = 0; i < run; i++) {
      content[at + i] = kind == 0   ? std::byte{0}
                        : kind == 1 ? static_cast<std::byte>(random())
                                    : static_cast<std::byte>("layered block"[(i + i / 97) % 13]);
    }
    at += run;
  }
  return content;
}

Bytes randomContent(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  Bytes content(size);
  for (std::byte& byte : content) byte = static_cast<std::byte>(random());
  return content;
}

struct Shape {
  ZFileOptions options;
  bool rewriteHeader = true;
  bool tar = false;
};

// Compresses `content` in pieces of uneven size.
Result<Bytes> compress(const Bytes& content, const Shape& shape) {
  MemoryFile file("out");
  FileSink sink(file);
  TarWriter tar(sink, file);
  ZFileOptions options = shape.options;
  if (shape.rewriteHeader) {
    options.rewriteHeaderIn = &file;
    options.headerOffset = shape.tar ? kTarHeaderSize : 0;
  }
  ZFileWriter writer(shape.tar ? static_cast<Sink&>(tar) : sink, options);
  size_t at = 0;
  size_t piece = 1;
  while (at < content.size()) {
    const size_t part = std::min(piece, content.size() - at);
    OBD_RETURN_IF_ERROR(writer.write(std::span(content).subspan(at, part)));
    at += part;
    piece = piece * 7 % 300007 + 1;
  }
  OBD_RETURN_IF_ERROR(writer.finish());
  return file.contents();
}

Result<Bytes> readAll(const File& file) {
  OBD_ASSIGN_OR_RETURN(const uint64_t size, file.size());
  Bytes all(static_cast<size_t>(size));
  OBD_RETURN_IF_ERROR(file.preadExact(all, 0));
  return all;
}

Result<std::unique_ptr<File>> open(const Bytes& bytes, LayerFileKind* kind = nullptr) {
  return openLayerFile(fixtures::memoryFile(bytes), kind);
}

TEST(ZFileFixtures, EveryPlainZFileHasTheExpectedContent) {
  size_t seen = 0;
  const nlohmann::json manifest = fixtures::manifest();
  for (const nlohmann::json& one : manifest.at("cases")) {
    if (one.at("kind") != "zfile") continue;
    SCOPED_TRACE(one.at("id").get<std::string>());
    seen++;
    const std::string path = fixtures::pathOf(one.at("files").at(0).at("path"));
    LayerFileKind kind;
    Result<std::unique_ptr<File>> file = openLayerFile(path, false, &kind);
    ASSERT_TRUE(file.isOk()) << file.status().toString();
    EXPECT_TRUE(kind.zfile);
    EXPECT_FALSE(kind.tar);
    EXPECT_EQ(file.value()->size().value(), one.at("expected").at("size").get<uint64_t>());
    Result<Bytes> content = readAll(*file.value());
    ASSERT_TRUE(content.isOk()) << content.status().toString();
    EXPECT_EQ(fixtures::sha256(content.value()), one.at("expected").at("sha256").get<std::string>());
  }
  EXPECT_EQ(seen, 4U);
}

// Every file of the manifest says which wrappers it has; all of them come off, and a layer's header is inside.
TEST(ZFileFixtures, EveryWrappedLayerUnwrapsToALayer) {
  size_t seen = 0;
  const nlohmann::json manifest = fixtures::manifest();
  for (const nlohmann::json& one : manifest.at("cases")) {
    for (const nlohmann::json& entry : one.at("files")) {
      if (!entry.contains("wrap") || entry.at("storage") != "plain") continue;
      SCOPED_TRACE(entry.at("path").get<std::string>());
      seen++;
      bool tar = false;
      bool zfile = false;
      for (const nlohmann::json& wrap : entry.at("wrap")) {
        tar = tar || wrap == "tar";
        zfile = zfile || wrap.get<std::string>().starts_with("zfile");
      }
      LayerFileKind kind;
      Result<std::unique_ptr<File>> file = openLayerFile(fixtures::pathOf(entry.at("path")), false, &kind);
      ASSERT_TRUE(file.isOk()) << file.status().toString();
      EXPECT_EQ(kind.tar, tar);
      EXPECT_EQ(kind.zfile, zfile);
      Result<Bytes> content = readAll(*file.value());
      ASSERT_TRUE(content.isOk()) << content.status().toString();
      ASSERT_GE(content.value().size(), 8192U);
      const std::array<uint8_t, 6> magic = {'L', 'S', 'M', 'T', 0, 1};
      EXPECT_EQ(std::memcmp(content.value().data(), magic.data(), magic.size()), 0);
    }
  }
  EXPECT_GE(seen, 20U);
}

TEST(ZFileFixtures, TheCompressedCommitsHoldTheRawCommitsBytes) {
  const auto contentOf = [](const std::string& id) {
    Result<std::unique_ptr<File>> file = openLayerFile(fixtures::pathOf(id + "/layer"), false);
    EXPECT_TRUE(file.isOk()) << file.status().toString();
    Result<Bytes> content = readAll(*file.value());
    EXPECT_TRUE(content.isOk()) << content.status().toString();
    return std::move(content).value();
  };
  const Bytes raw = contentOf("commit-raw");
  EXPECT_EQ(contentOf("zfile-trailer-zstd-64k"), raw);
  EXPECT_EQ(contentOf("zfile-trailer-lz4-32k-tar"), raw);
}

TEST(ZFileFixtures, ADamagedFileIsRefusedAsDataLoss) {
  for (const char* id : {"neg-zfile-header-digest", "neg-zfile-index-checksum", "neg-zfile-truncated"}) {
    Result<std::unique_ptr<File>> file = openLayerFile(fixtures::pathOf(std::string(id) + "/layer"), false);
    ASSERT_FALSE(file.isOk()) << id;
    EXPECT_EQ(file.code(), Code::kDataLoss) << id << ": " << file.status().toString();
  }
}

TEST(ZFileFixtures, ATarWithAWrongChecksumIsPassedOnAsItIs) {
  LayerFileKind kind{true, true};
  Result<std::unique_ptr<File>> file = openLayerFile(fixtures::pathOf("neg-tar-checksum/layer"), false, &kind);
  ASSERT_TRUE(file.isOk());
  EXPECT_FALSE(kind.tar);
  EXPECT_FALSE(kind.zfile);
  EXPECT_EQ(file.value()->size().value(), 9216U);
}

TEST(ZFileFixtures, OnlyReadsThatTouchTheDamagedBlockFail) {
  const nlohmann::json one = fixtures::caseOf("neg-block-checksum");
  Result<std::unique_ptr<File>> file = openLayerFile(fixtures::pathOf("neg-block-checksum/layer"), false);
  ASSERT_TRUE(file.isOk()) << file.status().toString();
  for (int round = 0; round < 2; round++) {  // the second time with warm caches
    for (const nlohmann::json& probe : one.at("expected").at("probes")) {
      Bytes bytes(probe.at("length").get<size_t>());
      const Status status = file.value()->preadExact(bytes, probe.at("offset").get<uint64_t>());
      SCOPED_TRACE(probe.dump());
      if (probe.contains("error")) {
        EXPECT_EQ(status.code(), Code::kDataLoss);
        EXPECT_NE(status.message().find("block 7"), std::string::npos) << status.message();
      } else {
        ASSERT_TRUE(status.isOk()) << status.toString();
        EXPECT_EQ(fixtures::sha256(bytes), probe.at("sha256").get<std::string>());
      }
    }
  }
}

// The same content, compressed by us with the parameters the manifest gives, where the libraries are the same.
TEST(ZFileFixtures, OurWriterGivesTheOriginalsBytes) {
  struct Golden {
    const char* path;
    Shape shape;
  };
  const auto shape = [](Algorithm algorithm, uint32_t blockSize, bool checksums, bool rewrite, bool tar) {
    Shape made;
    made.options.algorithm = algorithm;
    made.options.blockSize = blockSize;
    made.options.checksums = checksums;
    made.options.allowLargeBlocks = true;
    made.rewriteHeader = rewrite;
    made.tar = tar;
    return made;
  };
  const std::array goldens = {
      Golden{"commit-lz4-4k/layer", shape(Algorithm::kLz4, 4096, true, true, false)},
      Golden{"commit-lz4-4k-tar/layer", shape(Algorithm::kLz4, 4096, true, true, true)},
      Golden{"commit-sealed-lz4/layer", shape(Algorithm::kLz4, 4096, true, true, false)},
      Golden{"commit-zstd-16k/layer", shape(Algorithm::kZstd, 16384, true, true, false)},
      Golden{"zfile-trailer-zstd-64k/layer", shape(Algorithm::kZstd, 65536, true, false, false)},
      Golden{"zfile-trailer-lz4-32k-tar/layer", shape(Algorithm::kLz4, 32768, true, false, true)},
      Golden{"zfile-plain-tiny/file.zfile", shape(Algorithm::kLz4, 4096, true, true, false)},
      Golden{"zfile-plain-odd-lz4/file.zfile", shape(Algorithm::kLz4, 4096, true, false, false)},
      Golden{"zfile-plain-nocrc-lz4-8k/file.zfile", shape(Algorithm::kLz4, 8192, false, true, false)},
      Golden{"zfile-64k-incompressible/file.zfile", shape(Algorithm::kLz4, 65536, true, true, false)},
      Golden{"long-segments/layer", shape(Algorithm::kLz4, 4096, true, true, false)},
      Golden{"stack-3-mixed/layer02", shape(Algorithm::kZstd, 8192, true, true, true)},
      Golden{"merge-3/layer", shape(Algorithm::kLz4, 4096, true, false, false)},
  };
  for (const Golden& golden : goldens) {
    SCOPED_TRACE(golden.path);
    const Bytes stored = fixtures::readWhole(fixtures::pathOf(golden.path));
    Result<std::unique_ptr<File>> file = open(stored);
    ASSERT_TRUE(file.isOk()) << file.status().toString();
    Result<Bytes> content = readAll(*file.value());
    ASSERT_TRUE(content.isOk()) << content.status().toString();
    Result<Bytes> ours = compress(content.value(), golden.shape);
    ASSERT_TRUE(ours.isOk()) << ours.status().toString();
    EXPECT_EQ(ours.value().size(), stored.size());
    EXPECT_TRUE(ours.value() == stored) << "same parameters, other bytes";
  }
}

class RoundTrip : public testing::TestWithParam<std::tuple<Algorithm, uint32_t>> {};

TEST_P(RoundTrip, EveryShapeReadsBackAndDoesNotDependOnThreads) {
  const auto [algorithm, blockSize] = GetParam();
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  const std::array<size_t, 9> sizes = {0,         1,          511,        4096,       size_t{blockSize} - 1,
                                       blockSize, 3 * size_t{blockSize} + 1, 256 * 1024, 700003};
  for (const size_t size : sizes) {
    const Bytes content = mixedContent(size, seed);
    for (const bool checksums : {true, false}) {
      for (const bool rewrite : {true, false}) {
        for (const bool tar : {true, false}) {
          if (size > 100000 && rewrite != checksums) continue;  // half of the shapes for the long ones
          SCOPED_TRACE(std::to_string(size) + (checksums ? " crc" : "") + (rewrite ? " hdr" : "") + (tar ? " tar" : ""));
          Shape shape;
          shape.options = {.algorithm = algorithm, .blockSize = blockSize, .checksums = checksums,
                           .threads = 1, .allowLargeBlocks = true};
          shape.rewriteHeader = rewrite;
          shape.tar = tar;
          Result<Bytes> stored = compress(content, shape);
          ASSERT_TRUE(stored.isOk()) << stored.status().toString();
          LayerFileKind kind;
          Result<std::unique_ptr<File>> file = open(stored.value(), &kind);
          ASSERT_TRUE(file.isOk()) << file.status().toString();
          EXPECT_TRUE(kind.zfile);
          EXPECT_EQ(kind.tar, tar);
          Result<Bytes> back = readAll(*file.value());
          ASSERT_TRUE(back.isOk()) << back.status().toString();
          ASSERT_TRUE(back.value() == content);
          if (size > 600000 && rewrite && checksums) {
            for (const uint32_t threads : {2U, 5U}) {
              shape.options.threads = threads;
              Result<Bytes> again = compress(content, shape);
              ASSERT_TRUE(again.isOk());
              EXPECT_TRUE(again.value() == stored.value()) << threads << " threads";
            }
          }
        }
      }
    }
  }
}

TEST_P(RoundTrip, RandomRangesAreSlicesOfTheContent) {
  const auto [algorithm, blockSize] = GetParam();
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const Bytes content = mixedContent(1500001, seed);
  Shape shape;
  shape.options = {.algorithm = algorithm, .blockSize = blockSize, .allowLargeBlocks = true};
  Result<Bytes> stored = compress(content, shape);
  ASSERT_TRUE(stored.isOk());
  Result<std::unique_ptr<File>> file = open(stored.value());
  ASSERT_TRUE(file.isOk());
  Bytes out(700000);
  for (int i = 0; i < 400; i++) {
    const size_t offset = random() % (content.size() + 1000);
    const size_t length = i % 8 == 0 ? random() % out.size() : random() % 20000;
    Result<size_t> got = file.value()->pread(std::span(out).first(length), offset);
    ASSERT_TRUE(got.isOk()) << got.status().toString();
    const size_t expected = offset >= content.size() ? 0 : std::min(length, content.size() - offset);
    ASSERT_EQ(got.value(), expected);
    ASSERT_EQ(std::memcmp(out.data(), content.data() + std::min(offset, content.size()), expected), 0)
        << offset << "+" << length;
  }
}

INSTANTIATE_TEST_SUITE_P(All, RoundTrip,
                         testing::Combine(testing::Values(Algorithm::kLz4, Algorithm::kZstd),
                                          testing::Values(4096U, 8192U, 16384U, 32768U, 65536U)),
                         [](const auto& combination) {
                           return std::string(std::get<0>(combination.param) == Algorithm::kLz4 ? "Lz4" : "Zstd") +
                                  std::to_string(std::get<1>(combination.param) / 1024) + "K";
                         });

// Counts what is read below.
class CountingFile final : public File {
 public:
  CountingFile(std::unique_ptr<File> file, std::atomic<size_t>* reads) : file_(std::move(file)), reads_(reads) {}
  Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const override {
    reads_->fetch_add(1);
    return file_->pread(out, offset);
  }
  Status pwrite(std::span<const std::byte> data, uint64_t offset) override { return file_->pwrite(data, offset); }
  Status sync() override { return file_->sync(); }
  Result<uint64_t> size() const override { return file_->size(); }
  Status truncate(uint64_t size) override { return file_->truncate(size); }
  Status punchHole(uint64_t offset, uint64_t length) override { return file_->punchHole(offset, length); }
  Result<uint64_t> seekData(uint64_t offset) const override { return file_->seekData(offset); }
  Result<uint64_t> seekHole(uint64_t offset) const override { return file_->seekHole(offset); }
  const std::string& name() const override { return file_->name(); }

 private:
  std::unique_ptr<File> file_;
  std::atomic<size_t>* reads_;
};

TEST(ZFileReader, ReadsAdjacentBlocksTogetherAndAPartlyReadBlockOnce) {
  const Bytes content = mixedContent(1024 * 1024, 5);
  Shape shape;
  shape.options.blockSize = 65536;
  shape.options.allowLargeBlocks = true;
  Result<Bytes> stored = compress(content, shape);
  ASSERT_TRUE(stored.isOk());
  std::atomic<size_t> reads{0};
  Result<std::unique_ptr<File>> file =
      openLayerFile(std::make_unique<CountingFile>(fixtures::memoryFile(stored.value()), &reads));
  ASSERT_TRUE(file.isOk());
  reads = 0;
  Bytes out(4096);
  for (size_t at = 0; at < content.size(); at += out.size()) {
    ASSERT_TRUE(file.value()->preadExact(out, at).isOk());
    ASSERT_EQ(std::memcmp(out.data(), content.data() + at, out.size()), 0);
  }
  EXPECT_EQ(reads, 16U) << "one per 64 KiB block";
  reads = 0;
  Bytes all(content.size());
  ASSERT_TRUE(file.value()->preadExact(all, 0).isOk());
  EXPECT_LE(reads, 6U);
}

TEST(ZFileReader, TwoReadersOfOneThreadDoNotMixTheirBlocks) {
  Shape shape;
  shape.options.blockSize = 65536;
  shape.options.allowLargeBlocks = true;
  for (uint32_t round = 0; round < 20; round++) {  // a new reader may get the address of an old one
    const Bytes content = mixedContent(70000, round);
    Result<Bytes> stored = compress(content, shape);
    ASSERT_TRUE(stored.isOk());
    Result<std::unique_ptr<File>> file = open(stored.value());
    ASSERT_TRUE(file.isOk());
    Bytes out(100);
    ASSERT_TRUE(file.value()->preadExact(out, 50).isOk());
    EXPECT_EQ(std::memcmp(out.data(), content.data() + 50, out.size()), 0);
  }
}

TEST(ZFileReader, ManyThreadsReadAtOnce) {
  const Bytes content = mixedContent(2000000, 9);
  Shape shape;
  shape.options.algorithm = Algorithm::kZstd;
  shape.options.blockSize = 16384;
  Result<Bytes> stored = compress(content, shape);
  ASSERT_TRUE(stored.isOk());
  Result<std::unique_ptr<File>> file = open(stored.value());
  ASSERT_TRUE(file.isOk());
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 4; t++) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      Bytes out(50000);
      for (int i = 0; i < 100; i++) {
        const size_t length = random() % out.size();
        const size_t offset = random() % (content.size() - length);
        const Status status = file.value()->preadExact(std::span(out).first(length), offset);
        if (!status.isOk() || std::memcmp(out.data(), content.data() + offset, length) != 0) wrong++;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ZFileReader, TheJumpTableTakesLittleMoreThanTwoBytesABlock) {
  Shape shape;
  Result<Bytes> stored = compress(Bytes(40 * 1024 * 1024), shape);
  ASSERT_TRUE(stored.isOk());
  Result<std::unique_ptr<ZFileReader>> reader = ZFileReader::open(fixtures::memoryFile(stored.value()));
  ASSERT_TRUE(reader.isOk()) << reader.status().toString();
  EXPECT_EQ(reader.value()->blockCount(), 10240U);
  EXPECT_LE(reader.value()->indexMemoryBytes(), 10240U * 5 / 2);
}

TEST(ZFileReader, RefusesEveryWayOfWriting) {
  Result<Bytes> stored = compress(Bytes(5000), {});
  Result<std::unique_ptr<File>> file = open(stored.value());
  ASSERT_TRUE(file.isOk());
  const Bytes one(1);
  EXPECT_EQ(file.value()->pwrite(one, 0).code(), Code::kFailedPrecondition);
  EXPECT_EQ(file.value()->truncate(0).code(), Code::kFailedPrecondition);
  EXPECT_EQ(file.value()->punchHole(0, 1).code(), Code::kFailedPrecondition);
  EXPECT_EQ(file.value()->seekData(17).value(), 17U);
  EXPECT_EQ(file.value()->seekHole(17).value(), 5000U);
}

// Damage. `edit` changes a record; the digest is made right again afterwards, so that the field itself is judged.
Bytes withRecord(Bytes stored, size_t at, const std::function<void(std::byte*)>& edit) {
  edit(stored.data() + at);
  zfile::storeLittle32(stored.data() + at + 28, 0);
  const uint32_t digest = crc32cReference(0, std::span(stored).subspan(at, zfile::kRecordSize));
  zfile::storeLittle32(stored.data() + at + 28, digest);
  return stored;
}

TEST(ZFileDamage, EveryImpossibleFieldIsATypedError) {
  const Bytes content = mixedContent(100000, 3);
  for (const bool rewrite : {true, false}) {
    Shape shape;
    shape.rewriteHeader = rewrite;
    Result<Bytes> made = compress(content, shape);
    ASSERT_TRUE(made.isOk());
    const Bytes& stored = made.value();
    const size_t at = rewrite ? 0 : stored.size() - zfile::kRecordSize;
    const auto codeAfter = [&](const std::function<void(std::byte*)>& edit) {
      return open(withRecord(stored, at, edit)).code();
    };
    const auto put64 = [](std::byte* to, uint64_t value) {
      zfile::storeLittle32(to, static_cast<uint32_t>(value));
      zfile::storeLittle32(to + 4, static_cast<uint32_t>(value >> 32));
    };
    SCOPED_TRACE(rewrite ? "header" : "trailer");
    EXPECT_EQ(codeAfter([](std::byte*) {}), Code::kOk);
    for (const uint64_t offset : {uint64_t{0}, uint64_t{511}, uint64_t{stored.size()}, ~uint64_t{0}, uint64_t{1} << 63}) {
      EXPECT_EQ(codeAfter([&](std::byte* r) { put64(r + 40, offset); }), Code::kDataLoss) << offset;
    }
    for (const uint64_t blocks : {uint64_t{0}, uint64_t{24}, uint64_t{26}, uint64_t{1000000001}, ~uint64_t{0},
                                  uint64_t{1} << 62}) {
      EXPECT_EQ(codeAfter([&](std::byte* r) { put64(r + 48, blocks); }), Code::kDataLoss) << blocks;
    }
    for (const uint64_t size : {uint64_t{0}, uint64_t{98304}, uint64_t{1} << 40, ~uint64_t{0}}) {
      EXPECT_EQ(codeAfter([&](std::byte* r) { put64(r + 56, size); }), Code::kDataLoss) << size;
    }
    // Blocks and size that agree with each other, but not with the file.
    EXPECT_EQ(codeAfter([&](std::byte* r) {
                put64(r + 48, 1000000000);
                put64(r + 56, 4096000000000);
              }),
              Code::kDataLoss);
    EXPECT_EQ(codeAfter([](std::byte* r) { zfile::storeLittle32(r + 64, 1); }), Code::kDataLoss);
    for (const uint32_t blockSize : {0U, 1U, 2048U, 4095U, 5000U, 131072U, 0x80000000U}) {
      EXPECT_EQ(codeAfter([&](std::byte* r) { zfile::storeLittle32(r + 72, blockSize); }), Code::kDataLoss) << blockSize;
    }
    for (const uint8_t algorithm : {uint8_t{0}, uint8_t{3}, uint8_t{255}}) {
      EXPECT_EQ(codeAfter([&](std::byte* r) { r[76] = std::byte{algorithm}; }), Code::kUnimplemented);
    }
    EXPECT_EQ(codeAfter([](std::byte* r) { r[78] = std::byte{1}; }), Code::kUnimplemented) << "dictionary";
    EXPECT_EQ(codeAfter([](std::byte* r) { r[32] |= std::byte{0x20}; }), Code::kUnimplemented) << "compressed index";
    EXPECT_EQ(codeAfter([](std::byte* r) { zfile::storeLittle32(r + 84, 0xffffffff); }), Code::kDataLoss);
    // Reserved fields, the level and unknown flags mean nothing.
    EXPECT_EQ(codeAfter([](std::byte* r) {
                r[77] = std::byte{9};
                r[37] = std::byte{0x7f};
                for (size_t i : {68, 79, 83, 89, 300, 511}) r[i] = std::byte{0xee};
              }),
              Code::kOk);
    if (!rewrite) {
      for (const uint8_t flag : {0x01, 0x02, 0x04}) {
        EXPECT_EQ(codeAfter([&](std::byte* r) { r[32] ^= std::byte{flag}; }), Code::kDataLoss) << int{flag};
      }
    }
  }
}

TEST(ZFileDamage, AnyFlippedBitIsAnErrorOrHarmless) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const Bytes content = mixedContent(20000, 4);
  size_t refused = 0;
  size_t harmless = 0;
  for (const Algorithm algorithm : {Algorithm::kLz4, Algorithm::kZstd}) {
    for (const bool rewrite : {true, false}) {
      Shape shape;
      shape.options.algorithm = algorithm;
      shape.rewriteHeader = rewrite;
      Result<Bytes> made = compress(content, shape);
      ASSERT_TRUE(made.isOk());
      Bytes stored = made.value();
      // All of both records' fields and the jump table, and a sample of the rest.
      std::vector<size_t> bits;
      for (size_t bit = 0; bit < 100 * 8; bit++) bits.push_back(bit);
      for (size_t byte = stored.size() - 512 - 20; byte < stored.size() - 412; byte++) {
        for (size_t bit = 0; bit < 8; bit++) bits.push_back(byte * 8 + bit);
      }
      for (int i = 0; i < 300; i++) bits.push_back(random() % (stored.size() * 8));
      for (const size_t bit : bits) {
        stored[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
        LayerFileKind kind;
        Result<std::unique_ptr<File>> file = open(stored, &kind);
        if (file.isOk() && kind.zfile) {
          Result<Bytes> back = readAll(*file.value());
          if (back.isOk()) {
            harmless++;
            ASSERT_TRUE(back.value() == content) << "wrong bytes after flipping bit " << bit;
          } else {
            refused++;
            ASSERT_EQ(back.code(), Code::kDataLoss) << back.status().toString();
          }
        } else if (!file.isOk()) {
          refused++;
          ASSERT_TRUE(file.code() == Code::kDataLoss || file.code() == Code::kUnimplemented)
              << file.status().toString();
        } else {
          refused++;  // no longer a ZFile: whoever wants a layer in it refuses it
        }
        stored[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
      }
    }
  }
  EXPECT_GT(refused, 1000U);
  EXPECT_GT(harmless, 100U);
}

TEST(ZFileDamage, EveryTruncationIsRefusedOrReportedByTheRead) {
  const Bytes content = mixedContent(30000, 8);
  for (const bool rewrite : {true, false}) {
    Shape shape;
    shape.rewriteHeader = rewrite;
    Result<Bytes> made = compress(content, shape);
    ASSERT_TRUE(made.isOk());
    const Bytes& stored = made.value();
    const size_t needed = rewrite ? stored.size() - zfile::kRecordSize : stored.size();
    for (size_t length = 0; length < needed; length += 1 + length / 50) {
      const Bytes cut(stored.begin(), stored.begin() + static_cast<ptrdiff_t>(length));
      LayerFileKind kind;
      Result<std::unique_ptr<File>> file = open(cut, &kind);
      EXPECT_TRUE(!file.isOk() || !kind.zfile) << length;
    }
  }
}

TEST(ZFileDamage, AHugeSparseFileOfNoBlocksCostsNoMemory) {
  // A header that claims 10^9 blocks, with a jump table of holes behind it.
  auto file = std::make_unique<MemoryFile>("huge");
  zfile::Record record;
  record.flags = zfile::kFlagsFinalHeader;
  record.indexOffset = 4096;
  record.blockCount = zfile::kMaxBlocks;
  record.originalSize = zfile::kMaxBlocks * 4096;
  record.blockSize = 4096;
  record.algorithm = 1;
  record.hasChecksums = true;
  ASSERT_TRUE(file->pwrite(zfile::encodeRecord(record), 0).isOk());
  ASSERT_TRUE(file->truncate(4096 + 4 * zfile::kMaxBlocks).isOk());
  Result<std::unique_ptr<File>> opened = openLayerFile(std::move(file));
  EXPECT_EQ(opened.code(), Code::kDataLoss);
}

TEST(ZFileDamage, AJumpTableItCannotAddressIsRefused) {
  zfile::JumpTable table(4096, 512);
  Bytes entries(4 * 16);
  for (size_t i = 0; i < 16; i++) zfile::storeLittle32(entries.data() + 4 * i, 4400);
  EXPECT_EQ(table.append(entries, true).code(), Code::kDataLoss) << "15 * 4400 > 65534";
  for (const uint32_t length : {0U, 4U, 8193U, 0xffffffffU}) {
    zfile::JumpTable other(4096, 512);
    zfile::storeLittle32(entries.data(), length);
    EXPECT_EQ(other.append(std::span(entries).first(4), true).code(), Code::kDataLoss) << length;
  }
}

TEST(ZFileWriter, ABlockThatOthersCannotReadIsRefusedUnlessAllowed) {
  const Bytes content = randomContent(65536 * 3, 1);
  Shape shape;
  shape.options.blockSize = 65536;
  for (const Algorithm algorithm : {Algorithm::kLz4, Algorithm::kZstd}) {
    shape.options.algorithm = algorithm;
    for (const uint32_t threads : {1U, 3U}) {
      shape.options.threads = threads;
      shape.options.allowLargeBlocks = false;
      Result<Bytes> refused = compress(content, shape);
      EXPECT_EQ(refused.code(), Code::kFailedPrecondition) << refused.status().toString();
      shape.options.allowLargeBlocks = true;
      Result<Bytes> allowed = compress(content, shape);
      ASSERT_TRUE(allowed.isOk());
      Result<Bytes> back = readAll(*open(allowed.value()).value());
      ASSERT_TRUE(back.isOk());
      EXPECT_TRUE(back.value() == content);
    }
  }
}

// Takes so many bytes, then fails for ever.
class FullSink final : public Sink {
 public:
  explicit FullSink(size_t room) : room_(room) {}
  Status write(std::span<const std::byte> data) override {
    if (data.size() > room_) return Status(Code::kNoSpace, "full");
    room_ -= data.size();
    return Status::ok();
  }
  Status finish() override { return room_ == 0 ? Status(Code::kNoSpace, "full") : Status::ok(); }

 private:
  size_t room_;
};

TEST(ZFileWriter, AFailureBelowIsReportedAndKept) {
  const Bytes content = randomContent(3000000, 2);
  for (const uint32_t threads : {1U, 2U, 4U}) {
    for (const size_t room : {size_t{0}, size_t{100}, size_t{600}, size_t{2000000}, size_t{3000000}}) {
      FullSink below(room);
      ZFileOptions options;
      options.threads = threads;
      ZFileWriter writer(below, options);
      const Status written = writer.write(content);
      if (!written.isOk()) {
        EXPECT_EQ(written.code(), Code::kNoSpace);
        EXPECT_EQ(writer.write(content).code(), Code::kNoSpace);
      }
      EXPECT_EQ(writer.finish().code(), Code::kNoSpace);
    }
  }
}

// The tar wrapper.

TEST(Tar, HeadersAreTheOriginalsToTheByte) {
  const Bytes golden = fixtures::readWhole(fixtures::pathOf("commit-lz4-4k-tar/layer"));
  const Bytes content(golden.begin() + 1536, golden.begin() + 1536 + 57948);
  MemoryFile file;
  FileSink sink(file);
  TarWriter tar(sink, file);
  ASSERT_TRUE(tar.write(content).isOk());
  ASSERT_TRUE(tar.finish().isOk());
  EXPECT_TRUE(file.contents() == golden);
}

TEST(Tar, AnUnfinishedOneIsNotTakenForATar) {
  MemoryFile file;
  FileSink sink(file);
  TarWriter tar(sink, file);
  ASSERT_TRUE(tar.write(Bytes(5000)).isOk());
  ASSERT_TRUE(sink.finish().isOk());  // as after a crash: what is collected reached the file
  Result<std::optional<TarMember>> member = findTarMember(file);
  ASSERT_TRUE(member.isOk());
  EXPECT_FALSE(member.value().has_value());
  std::array<char, 5> magic{};
  ASSERT_TRUE(file.preadExact(std::as_writable_bytes(std::span(magic)), 257).isOk());
  EXPECT_EQ(std::string_view(magic.data(), 5), "xxtar");
}

TEST(Tar, SizesOfEveryLengthComeBack) {
  for (const size_t size : {0, 1, 511, 512, 513, 98, 99, 100, 9999, 100000}) {
    MemoryFile file;
    FileSink sink(file);
    TarWriter tar(sink, file);
    const Bytes content = randomContent(size, 3);
    ASSERT_TRUE(tar.write(content).isOk());
    ASSERT_TRUE(tar.finish().isOk());
    const Bytes all = file.contents();
    EXPECT_EQ(all.size() % 512, 0U);
    EXPECT_EQ(all.size(), 1536 + (size + 511) / 512 * 512 + 1024);
    Result<std::optional<TarMember>> member = findTarMember(file);
    ASSERT_TRUE(member.isOk()) << member.status().toString();
    ASSERT_TRUE(member.value().has_value());
    EXPECT_EQ(member.value()->offset, 1536U);
    EXPECT_EQ(member.value()->sizeBytes, size);
  }
}

Bytes tarWithChecksum(Bytes bytes, size_t header, bool asSigned) {
  int64_t sum = 0;
  for (size_t i = 0; i < 512; i++) {
    const uint8_t value = i >= 148 && i < 156 ? uint8_t{' '} : std::to_integer<uint8_t>(bytes[header + i]);
    sum += asSigned ? int64_t{static_cast<int8_t>(value)} : int64_t{value};
  }
  std::array<char, 9> text{};
  std::snprintf(text.data(), text.size(), "%06llo", static_cast<unsigned long long>(sum));
  text[7] = ' ';
  for (size_t i = 0; i < 8; i++) bytes.at(header + 148 + i) = static_cast<std::byte>(text[i]);
  return bytes;
}

void putText(Bytes& bytes, size_t at, std::string_view text) {
  for (size_t i = 0; i < text.size(); i++) bytes.at(at + i) = static_cast<std::byte>(text[i]);
}

TEST(Tar, ASumOfSignedBytesIsAccepted) {
  Bytes bytes = fixtures::readWhole(fixtures::pathOf("tar-plain-ustar/layer"));
  bytes[0] = std::byte{0xC3};  // a name that is not ASCII makes the two sums differ
  const auto isTar = [](const Bytes& b) { return findTarMember(*fixtures::memoryFile(b)).value().has_value(); };
  EXPECT_FALSE(isTar(bytes));
  EXPECT_TRUE(isTar(tarWithChecksum(bytes, 0, false)));
  EXPECT_TRUE(isTar(tarWithChecksum(bytes, 0, true)));
}

TEST(Tar, AGnuTarIsNotATar) {
  Bytes bytes = fixtures::readWhole(fixtures::pathOf("tar-plain-ustar/layer"));
  putText(bytes, 257, std::string_view("ustar  \0", 8));
  bytes = tarWithChecksum(bytes, 0, false);
  EXPECT_FALSE(findTarMember(*fixtures::memoryFile(bytes)).value().has_value());
}

TEST(Tar, AMemberThatCannotBeThereIsDataLoss) {
  const Bytes golden = fixtures::readWhole(fixtures::pathOf("commit-lz4-4k-tar/layer"));
  const auto codeOf = [](const Bytes& bytes) { return findTarMember(*fixtures::memoryFile(bytes)).code(); };
  EXPECT_EQ(codeOf(golden), Code::kOk);
  for (const size_t length : {size_t{512}, size_t{1000}, size_t{1024}, size_t{1535}, size_t{1536}, size_t{50000}}) {
    EXPECT_EQ(codeOf(Bytes(golden.begin(), golden.begin() + static_cast<ptrdiff_t>(length))), Code::kDataLoss) << length;
  }
  for (const std::string record : {"14 size=99999\n", "99 size=57948\n", "14 size=5794x\n", "xx size=57948\n",
                                   "30 size=99999999999999999999\n", "14 size=57948 ", "0 \n"}) {
    Bytes bytes = golden;
    putText(bytes, 512, std::string(512, '\0'));
    putText(bytes, 512, record);
    std::array<char, 13> size{};
    std::snprintf(size.data(), size.size(), "%011zo", record.size());
    putText(bytes, 124, size.data());
    EXPECT_EQ(codeOf(tarWithChecksum(bytes, 0, false)), Code::kDataLoss) << record;
  }
  Bytes longArea = golden;
  putText(longArea, 124, "00000001001 ");
  EXPECT_EQ(codeOf(tarWithChecksum(longArea, 0, false)), Code::kUnimplemented);
  Bytes noMember = golden;
  noMember[1024] ^= std::byte{1};
  EXPECT_EQ(codeOf(noMember), Code::kDataLoss);
}

TEST(Tar, ASizeInTheOctalFieldCountsWhereThePaxRecordHasNone) {
  Bytes bytes = fixtures::readWhole(fixtures::pathOf("commit-lz4-4k-tar/layer"));
  const std::string record = "14 comm=57948\n";
  putText(bytes, 512, record);
  putText(bytes, 1024 + 124, "00000001750 ");
  bytes = tarWithChecksum(bytes, 1024, false);
  Result<std::optional<TarMember>> member = findTarMember(*fixtures::memoryFile(bytes));
  ASSERT_TRUE(member.isOk()) << member.status().toString();
  EXPECT_EQ(member.value()->sizeBytes, 1000U);
}

TEST(LayerFile, AMissingFileIsNotFoundAndADirectoryIsRefused) {
  EXPECT_EQ(openLayerFile("/nonexistent/layer", false).code(), Code::kNotFound);
  EXPECT_EQ(openLayerFile("/", false).code(), Code::kInvalidArgument);
}

TEST(LayerFile, DirectReadsGiveTheSameBytes) {
  for (const char* path : {"commit-raw/layer", "commit-lz4-4k-tar/layer"}) {
    Result<std::unique_ptr<File>> direct = openLayerFile(fixtures::pathOf(path), true);
    Result<std::unique_ptr<File>> buffered = openLayerFile(fixtures::pathOf(path), false);
    ASSERT_TRUE(direct.isOk() && buffered.isOk());
    EXPECT_TRUE(readAll(*direct.value()).value() == readAll(*buffered.value()).value());
  }
}

}  // namespace
}  // namespace obd
