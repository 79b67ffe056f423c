// From a config file to a disk: what is looked up where, what is refused and how it is told, and that images of the
// same layers share them.
#include "image/image.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "image/layer-cache.h"
#include "image/stack.h"
#include "io/file-sink.h"
#include "io/posix-file.h"
#include "lsmt/commit.h"
#include "lsmt/testing.h"

namespace obd {
namespace {

using nlohmann::json;
using namespace testing_lsmt;  // NOLINT(google-build-using-namespace)

constexpr uint64_t kSize = 1 << 20;

void expectOk(const Status& status) { ASSERT_TRUE(status.isOk()) << status.toString(); }

class ImageTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/obd-image-XXXXXX";
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }

  // A layer whose sectors [from, to) hold `value`.
  std::string makeLayer(const std::string& name, uint64_t from, uint64_t to, int value, uint64_t size = kSize) {
    CreateUpperOptions options;
    options.virtualSize = size;
    const UpperFiles files = UpperFiles::create(options);
    const auto upper = files.open();
    expectOk(upper->write(from * kSectorSize, filled((to - from) * kSectorSize, value)));
    std::filesystem::create_directories(std::filesystem::path(path(name)).parent_path());
    auto file = openPosixFile(path(name), {.write = true, .create = true});
    EXPECT_TRUE(file.isOk());
    FileSink sink(*file.value());
    EXPECT_TRUE(commitUpper(*upper, {}, sink).isOk());
    return path(name);
  }
  json upperConfig(bool sparse = false, uint64_t size = kSize) {
    CreateUpperOptions options;
    options.virtualSize = size;
    options.sparse = sparse;
    expectOk(createUpper(path("upper.data"), path("upper.index"), options));
    return {{"data", path("upper.data")}, {"index", path("upper.index")}};
  }
  Result<std::unique_ptr<Image>> open(const json& config, const ImageOpenOptions& options = {}) {
    const auto parsed = ImageConfig::parse(config.dump());
    if (!parsed.isOk()) return parsed.status();
    return Image::open(parsed.value(), options);
  }
  static int byteAt(BlockBackend& image, uint64_t sector) {
    std::array<std::byte, kSectorSize> out;
    expectOk(image.read(sector * kSectorSize, out));
    return static_cast<int>(out[0]);
  }
  std::string result() const {
    std::ifstream in(path("result"));
    return std::string(std::istreambuf_iterator<char>(in), {});
  }

  std::string folder_;
};

TEST_F(ImageTest, LowersAndUpperMakeOneDiskThatSurvivesReopening) {
  for (const bool sparse : {false, true}) {
    const json config = {{"lowers", {{{"file", makeLayer("a", 0, 16, 1)}}, {{"file", makeLayer("b", 8, 24, 2)}}}},
                         {"upper", upperConfig(sparse)},
                         {"resultFile", path("result")}};
    auto image = std::move(open(config)).value();
    EXPECT_EQ(result(), "success");
    EXPECT_FALSE(image->readOnly());
    EXPECT_EQ(image->sizeBytes(), kSize);
    EXPECT_EQ(byteAt(*image, 0), 1);
    EXPECT_EQ(byteAt(*image, 8), 2);
    EXPECT_EQ(byteAt(*image, 24), 0);
    expectOk(image->write(3 * kSectorSize, filled(kSectorSize, 3)));
    expectOk(image->discard(8 * kSectorSize, 8 * kSectorSize));
    expectOk(image->writeZeroes(17 * kSectorSize, kSectorSize));
    for (int again = 0; again < 2; ++again) {
      EXPECT_EQ(byteAt(*image, 2), 1);
      EXPECT_EQ(byteAt(*image, 3), 3);
      EXPECT_EQ(byteAt(*image, 8), 0);
      EXPECT_EQ(byteAt(*image, 16), 2);
      EXPECT_EQ(byteAt(*image, 17), 0);
      expectOk(image->close());
      expectOk(image->close());
      EXPECT_EQ(image->flush().code(), Code::kFailedPrecondition);
      image = std::move(open(config)).value();
    }
    ::unlink(path("upper.data").c_str());
    ::unlink(path("upper.index").c_str());
  }
}

TEST_F(ImageTest, WithoutAnUpperWritesAreRefusedAsOnAReadOnlyDisk) {
  json config = {{"lowers", {{{"file", makeLayer("a", 0, 16, 1)}}}}};
  auto image = std::move(open(config)).value();
  EXPECT_TRUE(image->readOnly());
  EXPECT_EQ(image->write(0, filled(512, 1)).toErrno(), EROFS);
  EXPECT_EQ(image->discard(0, 512).toErrno(), EROFS);
  expectOk(image->flush());

  config["upper"] = {{"data", "only one of the two"}, {"index", ""}};
  EXPECT_TRUE(open(config).value()->readOnly());
  config["upper"] = upperConfig();
  image = std::move(open(config, {.readOnly = true})).value();
  EXPECT_TRUE(image->readOnly());
}

TEST_F(ImageTest, ADirectoryIsSearchedInTheOrderOfTheFormat) {
  const auto valueFrom = [&] {
    return byteAt(*open({{"lowers", {{{"dir", path("layer")}, {"digest", "sha256:00"}}}}}).value(), 0);
  };
  makeLayer("layer/overlaybd.sealed", 0, 8, 3);
  EXPECT_EQ(valueFrom(), 3);
  makeLayer("layer/.commit", 0, 8, 2);
  EXPECT_EQ(valueFrom(), 2);
  makeLayer("layer/overlaybd.commit", 0, 8, 1);
  EXPECT_EQ(valueFrom(), 1);
  const json both = {{"lowers", {{{"dir", path("layer")}, {"file", makeLayer("elsewhere", 0, 8, 9)}}}}};
  EXPECT_EQ(byteAt(*open(both).value(), 0), 9);
}

TEST_F(ImageTest, AFailureNamesTheLayerAndIsWrittenToTheResultFile) {
  const std::string good = makeLayer("good", 0, 8, 1);
  std::ofstream(path("bad")) << std::string(9000, 'x');
  const auto fails = [&](const json& lower, Code code, const std::string& reason) {
    ::unlink(path("result").c_str());
    const json config = {{"lowers", {{{"file", good}}, lower}}, {"resultFile", path("result")}};
    const auto opened = open(config);
    ASSERT_FALSE(opened.isOk());
    EXPECT_EQ(opened.code(), code) << opened.status().toString();
    EXPECT_NE(opened.status().message().find("open layer 1"), std::string::npos) << opened.status().toString();
    EXPECT_TRUE(result().starts_with("failed:")) << result();
    EXPECT_NE(result().find(reason), std::string::npos) << result();
  };
  fails({{"file", path("bad")}}, Code::kDataLoss, "failed to open layer 1 (" + path("bad"));
  fails({{"file", path("missing")}}, Code::kNotFound, "No such file or directory");
  fails({{"dir", path("empty")}}, Code::kNotFound, "no local copy");
  fails({{"dir", path("empty")}, {"digest", "sha256:00"}}, Code::kInvalidArgument, "empty repoBlobUrl");
}

TEST_F(ImageTest, ALayerOnlyInARegistryIsNamedAsUnsupported) {
  const json config = {{"repoBlobUrl", "http://127.0.0.1:1/v2/x/blobs"}, {"lowers", {{{"digest", "sha256:00"}}}}};
  EXPECT_EQ(open(config).code(), Code::kUnimplemented);
}

TEST_F(ImageTest, ADamagedUpperFailsTheOpenWithItsPath) {
  const json config = {{"lowers", {{{"file", makeLayer("a", 0, 8, 1)}}}}, {"upper", upperConfig()}};
  ASSERT_EQ(::truncate(path("upper.index").c_str(), 100), 0);
  const auto opened = open(config);
  EXPECT_EQ(opened.code(), Code::kDataLoss);
  EXPECT_NE(opened.status().message().find("upper.data"), std::string::npos);
}

TEST_F(ImageTest, AnUpperOfSizeZeroTakesTheSizeFromBelow) {
  const json config = {{"lowers", {{{"file", makeLayer("a", 0, 8, 1, 3 * kSize)}}}}, {"upper", upperConfig(false, 0)}};
  EXPECT_EQ(open(config).value()->sizeBytes(), 3 * kSize);
  EXPECT_EQ(open(config).value()->sizeBytes(), 3 * kSize);
}

TEST_F(ImageTest, AnUpperAloneIsAStandAloneDisk) {
  auto image = std::move(open({{"upper", upperConfig()}})).value();
  expectOk(image->write(0, filled(512, 7)));
  EXPECT_EQ(byteAt(*image, 0), 7);
  EXPECT_EQ(byteAt(*image, 1), 0);
}

TEST_F(ImageTest, ImagesOfTheSameLayersShareThem) {
  const json config = {{"lowers", {{{"file", makeLayer("a", 0, 16, 1)}}, {{"file", makeLayer("b", 8, 24, 2)}}}}};
  const size_t before = sharedLayerCache().liveStacks();
  {
    const auto parsed = ImageConfig::parse(config.dump()).value();
    const auto one = std::move(Stack::open(parsed, {})).value();
    const auto two = std::move(Stack::open(parsed, {})).value();
    EXPECT_EQ(one->lowers(), two->lowers());
    EXPECT_EQ(sharedLayerCache().liveStacks(), before + 1);
    // Another file under the same name is another layer.
    ::unlink(path("b").c_str());
    makeLayer("b", 8, 24, 5);
    const auto three = std::move(Stack::open(parsed, {})).value();
    EXPECT_NE(three->lowers(), one->lowers());
    std::array<std::byte, kSectorSize> sector;
    expectOk(three->read(8 * kSectorSize, sector));
    EXPECT_EQ(sector[0], std::byte{5});
    expectOk(one->read(8 * kSectorSize, sector));
    EXPECT_EQ(sector[0], std::byte{2});
  }
  EXPECT_EQ(sharedLayerCache().liveStacks(), before);
}

TEST_F(ImageTest, RunsOfAStackCoverTheDiskAndSayWhereDataIs) {
  const json config = {{"lowers", {{{"file", makeLayer("a", 16, 32, 1)}}}}, {"upper", upperConfig()}};
  {
    auto image = std::move(open(config)).value();
    expectOk(image->write(0, filled(8 * kSectorSize, 2)));
    expectOk(image->discard(24 * kSectorSize, 16 * kSectorSize));
  }
  const auto stack = std::move(Stack::open(ImageConfig::parse(config.dump()).value(), {})).value();
  std::vector<std::tuple<uint64_t, uint64_t, RunKind>> runs;
  stack->forEachRun(0, stack->virtualSize() / kSectorSize, [&](const obd::Run& run) {
    runs.emplace_back(run.offset, run.length, run.kind);
    return true;
  });
  EXPECT_EQ(runs, (std::vector<std::tuple<uint64_t, uint64_t, RunKind>>{{0, 8, RunKind::kData},
                                                                        {8, 8, RunKind::kGap},
                                                                        {16, 8, RunKind::kData},
                                                                        {24, 16, RunKind::kZero},
                                                                        {40, 2048 - 40, RunKind::kGap}}));
  EXPECT_EQ(stack->upper()->write(0, filled(512, 1)).code(), Code::kFailedPrecondition) << "opened for reading";
}

TEST_F(ImageTest, RequestsPastTheEndAreRefused) {
  auto image = std::move(open({{"upper", upperConfig()}})).value();
  std::array<std::byte, kSectorSize> sector{};
  EXPECT_EQ(image->read(kSize, sector).code(), Code::kInvalidArgument);
  EXPECT_EQ(image->read(UINT64_MAX - 511, sector).code(), Code::kInvalidArgument);
  EXPECT_EQ(image->read(1, sector).code(), Code::kInvalidArgument);
  EXPECT_EQ(image->write(kSize, sector).code(), Code::kInvalidArgument);
  EXPECT_EQ(image->discard(0, kSize + 512).code(), Code::kInvalidArgument);
}

TEST(ImageConfig, ValuesOfAWrongTypeAreRefusedByKey) {
  const auto refuses = [](const char* text, const char* key, Code code = Code::kInvalidArgument) {
    const auto parsed = ImageConfig::parse(text);
    ASSERT_FALSE(parsed.isOk()) << text;
    EXPECT_EQ(parsed.code(), code);
    EXPECT_NE(parsed.status().message().find(key), std::string::npos) << parsed.status().toString();
  };
  refuses("", "not valid JSON");
  refuses("{\"lowers\": [", "not valid JSON");
  refuses("[]", "the document");
  refuses(R"({"repoBlobUrl": 1})", "repoBlobUrl");
  refuses(R"({"resultFile": null})", "resultFile");
  refuses(R"({"lowers": {}})", "lowers");
  refuses(R"({"lowers": [{}, 3]})", "lowers[1]");
  refuses(R"({"lowers": [{"file": []}]})", "lowers[0].file");
  refuses(R"({"lowers": [{"dir": 1}]})", "lowers[0].dir");
  refuses(R"({"lowers": [{"digest": true}]})", "lowers[0].digest");
  refuses(R"({"lowers": [{"size": -1}]})", "lowers[0].size");
  refuses(R"({"lowers": [{"size": "7"}]})", "lowers[0].size");
  refuses(R"({"lowers": [{"file": "a\u0000b"}]})", "lowers[0].file");
  refuses(R"({"upper": []})", "upper");
  refuses(R"({"upper": {"data": 1}})", "upper.data");
  refuses(R"({"accelerationLayer": "yes"})", "accelerationLayer");
  refuses(R"({"accelerationLayer": true, "recordTracePath": "/x"})", "recordTracePath");
  refuses(R"({"lowers": [{"targetFile": "/x"}]})", "lowers[0].targetFile", Code::kUnimplemented);
  refuses(R"({"upper": {"target": "/x"}})", "upper.target", Code::kUnimplemented);
}

TEST(ImageConfig, UnknownKeysAreIgnoredAndAnAccelerationLayerIsNoDisk) {
  const auto config = ImageConfig::parse(R"({"repoBlobUrl": "u", "new": {"x": 1}, "download": {"enable": true},
      "lowers": [{"file": "a", "what": 1, "size": 7}, {"dir": "trace"}], "accelerationLayer": true,
      "upper": {"data": "d", "index": "i", "vsize": 64}, "resultFile": "r"})");
  ASSERT_TRUE(config.isOk()) << config.status().toString();
  ASSERT_EQ(config.value().lowers.size(), 1u);
  EXPECT_EQ(config.value().lowers[0].file, "a");
  EXPECT_EQ(config.value().lowers[0].sizeBytes, 7u);
  EXPECT_TRUE(config.value().hasUpper());
  EXPECT_EQ(config.value().resultFile, "r");
}

TEST(ImageConfig, AStackHoldsAtMost255Layers) {
  json config = {{"lowers", json::array()}};
  for (size_t i = 0; i < kLowersMax; ++i) config["lowers"].push_back({{"file", "a"}});
  EXPECT_TRUE(ImageConfig::parse(config.dump()).isOk());
  config["lowers"].push_back({{"file", "a"}});
  EXPECT_EQ(ImageConfig::parse(config.dump()).code(), Code::kInvalidArgument);
  config["accelerationLayer"] = true;
  EXPECT_TRUE(ImageConfig::parse(config.dump()).isOk());
}

TEST(ImageConfig, LoadingAMissingFileIsNotFound) {
  EXPECT_EQ(ImageConfig::load("/nonexistent/config.v1.json").code(), Code::kNotFound);
}

}  // namespace
}  // namespace obd
