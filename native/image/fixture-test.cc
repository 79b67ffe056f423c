// The golden files of the original, by manifest: every layer, stack and writable pair gives exactly the content it says;
// what is damaged is refused with a typed error; and what we write from the recorded operations equals the original's
// files byte for byte where the format leaves no freedom.
#include <gtest/gtest.h>

#include <functional>
#include <set>

#include "io/file-sink.h"
#include "lsmt/commit.h"
#include "lsmt/reference-index.h"
#include "lsmt/testing.h"
#include "zfile/fixtures.h"
#include "zfile/layer-file.h"

namespace obd {
namespace {

using nlohmann::json;
using namespace testing_lsmt;  // NOLINT(google-build-using-namespace)


std::shared_ptr<MemoryFile> load(const json& file) {
  const std::string path = file.at("path");
  const std::vector<std::byte> stored = fixtures::readWhole(fixtures::pathOf(path));
  auto memory = std::make_shared<MemoryFile>(path);
  if (file.value("storage", "plain") == "sparse-packed") {
    size_t at = 0;
    for (const json& extent : file.at("extents")) {
      const uint64_t length = extent.at(1);
      EXPECT_TRUE(memory->pwrite(std::span(stored).subspan(at, length), extent.at(0)).isOk());
      at += length;
    }
    EXPECT_TRUE(memory->truncate(file.at("logical_size").get<uint64_t>()).isOk());
  } else {
    EXPECT_TRUE(memory->pwrite(stored, 0).isOk());
  }
  return memory;
}

std::shared_ptr<MemoryFile> loadRole(const json& one, const std::string& role) {
  for (const json& file : one.at("files")) {
    if (file.at("role") == role) return load(file);
  }
  return nullptr;
}

Result<std::unique_ptr<LayerReader>> openLayer(std::shared_ptr<File> file) {
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> content, openLayerFile(share(std::move(file))));
  return LayerReader::open(std::move(content));
}

template <typename Readable>
std::string digest(const Readable& readable, uint64_t offset, uint64_t length) {
  fixtures::Sha256 hash;
  std::vector<std::byte> buffer(1 << 20);
  for (uint64_t at = offset; at < offset + length;) {
    const std::span<std::byte> part = std::span(buffer).first(std::min<uint64_t>(buffer.size(), offset + length - at));
    const Status status = readable.read(at, part);
    EXPECT_TRUE(status.isOk()) << status.toString();
    hash.add(part);
    at += part.size();
  }
  return hash.hex();
}

template <typename Readable>
void expectContent(const Readable& readable, const json& expected) {
  EXPECT_EQ(readable.virtualSize(), expected.at("virtual_size").get<uint64_t>());
  if (expected.contains("sha256")) {
    EXPECT_EQ(digest(readable, 0, readable.virtualSize()), expected.at("sha256"));
  }
  for (const json& probe : expected.value("probes", json::array())) {
    EXPECT_EQ(digest(readable, probe.at("offset"), probe.at("length")), probe.at("sha256"));
  }
}

std::shared_ptr<const LayerStack> stackOf(const json& one, size_t layers = kLowersMax) {
  std::vector<std::unique_ptr<LayerReader>> readers;
  for (const json& file : one.at("files")) {
    if (file.at("role") != "layer" || readers.size() == layers) continue;
    auto reader = openLayer(load(file));
    EXPECT_TRUE(reader.isOk()) << reader.status().toString();
    readers.push_back(std::move(reader).value());
  }
  return LayerStack::make(std::move(readers)).value();
}

std::vector<json> casesOf(const std::string& kind) {
  std::vector<json> found;
  const json manifest = fixtures::manifest();
  for (const json& one : manifest.at("cases")) {
    if (one.at("kind") == kind) found.push_back(one);
  }
  EXPECT_FALSE(found.empty());
  return found;
}

UpperFiles pairOf(const json& one, const std::string& prefix = "") {
  return {loadRole(one, prefix + "data"), loadRole(one, prefix + "index")};
}

// Replays ops.json on `upper`; `reopen` gives a new handle on the same files. Returns false at a crash.
bool apply(const json& ops, std::unique_ptr<Upper>& upper, const std::function<std::unique_ptr<Upper>()>& reopen) {
  const auto ok = [](const Status& status) { EXPECT_TRUE(status.isOk()) << status.toString(); };
  size_t group = 0;
  for (const json& op : ops) {
    const std::string name = op.at("op");
    if (name == "write") {
      const size_t length = op.at("length");
      ok(upper->write(op.at("offset"), fixturePayload(op.at("seed"), length, op.value("kind", "mix"))));
    } else if (name == "discard") {
      ok(upper->discard(op.at("offset"), op.at("length")));
    } else if (name == "fsync") {
      ok(upper->flush());
    } else if (name == "reopen") {
      upper.reset();
      upper = reopen();
    } else if (name == "group_commit") {
      group = op.at("bytes");
      ok(upper->setGroupCommit(group));
    } else if (name == "crash") {
      return false;
    } else {
      EXPECT_EQ(name, "close");
    }
  }
  return true;
}

CreateUpperOptions createOptions(const json& one, bool sparse) {
  CreateUpperOptions options;
  options.virtualSize = one.at("virtual_size");
  options.sparse = sparse;
  options.uuid = Uuid::parse(one.at("uuid").get<std::string>()).value();
  options.parentUuid = Uuid::parse(one.at("parent_uuid").get<std::string>()).value();
  return options;
}

json opsOf(const json& one) {
  for (const json& file : one.at("files")) {
    if (file.at("role") == "ops") return json::parse(std::ifstream(fixtures::pathOf(file.at("path"))));
  }
  return {};
}

// The log as the original replays it: a map of segments, neighbours not joined.
ReferenceIndex replayReference(const MemoryFile& index, uint64_t* records) {
  ReferenceIndex reference;
  const std::vector<std::byte> bytes = index.contents();
  *records = 0;
  for (size_t at = kHeaderSize; at + kSegmentBytes <= bytes.size(); at += kSegmentBytes) {
    const Segment segment = Segment::decode(std::span(bytes).subspan(at).first<kSegmentBytes>());
    if (segment.isPadding()) continue;
    ++*records;
    reference.insert(segment);
  }
  return reference;
}

void expectSameBytes(const MemoryFile& ours, const MemoryFile& golden) {
  const std::vector<std::byte> a = ours.contents();
  const std::vector<std::byte> b = golden.contents();
  ASSERT_EQ(a.size(), b.size()) << golden.name();
  for (size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i], b[i]) << golden.name() << " differs at byte " << i;
}

TEST(Fixture, EveryReadOnlyLayerGivesTheContentOfTheManifest) {
  for (const json& one : casesOf("ro-layer")) {
    SCOPED_TRACE(one.at("id"));
    auto layer = openLayer(loadRole(one, "layer"));
    ASSERT_TRUE(layer.isOk()) << layer.status().toString();
    expectContent(*layer.value(), one.at("expected"));
    if (!one.contains("layer")) continue;
    const json& facts = one.at("layer");
    const LayerHeader& info = layer.value()->info();
    EXPECT_EQ(info.uuid.toString(), facts.at("uuid"));
    EXPECT_EQ(info.parentUuid.toString(), facts.at("parent_uuid"));
    EXPECT_EQ(info.userTag, facts.at("user_tag"));
    EXPECT_EQ(info.indexSize, facts.at("index_entries_on_disk").get<uint64_t>());
    EXPECT_EQ(layer.value()->segments().size(), facts.at("segments").get<size_t>());
    size_t zeroed = 0;
    for (const Segment& segment : layer.value()->segments()) zeroed += segment.zeroed();
    EXPECT_EQ(zeroed, facts.at("zeroed_segments").get<size_t>());
  }
}

TEST(Fixture, EveryStackAndItsPrefixesGiveTheContentOfTheManifest) {
  for (const json& one : casesOf("stack")) {
    SCOPED_TRACE(one.at("id"));
    expectContent(*stackOf(one), one.at("expected"));
    for (const json& prefix : one.at("expected").at("prefixes")) expectContent(*stackOf(one, prefix.at("layers")), prefix);
  }
}

TEST(Fixture, EveryWritablePairReplaysToTheContentOfTheManifest) {
  for (const char* kind : {"rw-append", "rw-sparse"}) {
    for (const json& one : casesOf(kind)) {
      SCOPED_TRACE(one.at("id"));
      const UpperFiles files = pairOf(one);
      const auto upper = files.open({.write = false});
      expectContent(*upper, one.at("expected"));
      EXPECT_EQ(upper->uuid().toString(), one.value("uuid", upper->uuid().toString()));
      EXPECT_EQ(upper->parentUuid().toString(), one.value("parent_uuid", upper->parentUuid().toString()));
      if (upper->isSparse()) {
        EXPECT_EQ(upper->segments().size(), one.at("expected").at("segments_after_replay").get<size_t>());
        continue;
      }
      uint64_t records = 0;
      const ReferenceIndex reference = replayReference(*files.index, &records);
      if (one.at("expected").contains("log_records")) {
        EXPECT_EQ(records, one.at("expected").at("log_records").get<uint64_t>());
        EXPECT_EQ(upper->stats().logRecords, records);
        EXPECT_EQ(reference.size(), one.at("expected").at("segments_after_replay").get<size_t>());
      }
      std::vector<obd::Run> runs;
      upper->index().lookup(0, upper->virtualSize() / kSectorSize, [&](const obd::Run& run) {
        runs.push_back(run);
        return true;
      });
      std::vector<obd::Run> expected = reference.lookup(0, upper->virtualSize() / kSectorSize);
      for (obd::Run& run : expected) run.layer = 0;  // the tag upstream leaves in records
      EXPECT_EQ(runs, expected);
    }
  }
}

TEST(Fixture, TheSameOperationsGiveTheSameAppendFilesByteForByte) {
  size_t replayed = 0;
  for (const json& one : casesOf("rw-append")) {
    SCOPED_TRACE(one.at("id"));
    const json ops = opsOf(one);
    if (ops.is_null()) continue;  // an edited copy of another case
    ++replayed;
    const UpperFiles golden = pairOf(one);
    const UpperFiles files = UpperFiles::create(createOptions(one, false));
    auto upper = files.open();
    const bool closed = apply(ops, upper, [&] { return files.open(); });
    const UpperFiles left = files.copy();  // what a dying process leaves
    if (closed) upper.reset();
    expectSameBytes(closed ? *files.data : *left.data, *golden.data);
    expectSameBytes(closed ? *files.index : *left.index, *golden.index);
  }
  EXPECT_EQ(replayed, 4u);
}

TEST(Fixture, TheSameOperationsGiveTheSameSparseFileAndHoles) {
  for (const json& one : casesOf("rw-sparse")) {
    SCOPED_TRACE(one.at("id"));
    const UpperFiles golden = pairOf(one);
    const UpperFiles files = UpperFiles::create(createOptions(one, true));
    auto upper = files.open();
    EXPECT_TRUE(apply(opsOf(one), upper, [&] { return files.open(); }));
    upper.reset();
    expectSameBytes(*files.data, *golden.data);
    EXPECT_EQ(files.index->size().value(), 0u) << "nothing is below, so no discard needs a record";
    EXPECT_EQ(files.open()->segments(), golden.open()->segments());
  }
}

TEST(Fixture, EveryStackWithAnUpperGivesTheContentOfTheManifest) {
  for (const json& one : casesOf("stack-rw")) {
    SCOPED_TRACE(one.at("id"));
    const auto lowers = stackOf(one);
    const UpperFiles files = pairOf(one, "upper-");
    const auto upper = files.open({.write = false});
    ASSERT_TRUE(upper->attachLower(lowers.get()).isOk());
    expectContent(*upper, one.at("expected"));
  }
}

TEST(Fixture, OurUpperOverTheSameLowersKeepsTheLiveViewAcrossReopening) {
  for (const json& one : casesOf("stack-rw")) {
    SCOPED_TRACE(one.at("id"));
    const auto lowers = stackOf(one);
    CreateUpperOptions options;
    options.virtualSize = one.at("virtual_size");
    options.sparse = one.at("upper_kind") == "sparse";
    const UpperFiles files = UpperFiles::create(options);
    const auto reopen = [&] {
      auto upper = files.open();
      EXPECT_TRUE(upper->attachLower(lowers.get()).isOk());
      return upper;
    };
    auto upper = reopen();
    EXPECT_TRUE(apply(opsOf(one), upper, reopen));
    const json& expected = one.at("expected").at("sha256_before_reopen");
    EXPECT_EQ(digest(*upper, 0, upper->virtualSize()), expected);
    upper.reset();
    // The original forgets discards of a sparse layer here.
    EXPECT_EQ(digest(*reopen(), 0, one.at("virtual_size")), expected);
  }
}

TEST(Fixture, DamagedLayersAndPairsAreRefusedAsDataLoss) {
  std::set<std::string> refused;
  for (const json& one : casesOf("negative")) {
    const std::string id = one.at("id");
    SCOPED_TRACE(id);
    if (one.at("expected").at("open") != "error") continue;
    if (const auto data = loadRole(one, "data")) {
      const auto opened = pairOf(one).tryOpen({.write = false});
      ASSERT_FALSE(opened.isOk());
      EXPECT_EQ(opened.code(), Code::kDataLoss) << opened.status().toString();
    } else {
      const auto opened = openLayer(loadRole(one, "layer"));
      ASSERT_FALSE(opened.isOk());
      EXPECT_EQ(opened.code(), Code::kDataLoss) << opened.status().toString();
    }
    refused.insert(id);
  }
  EXPECT_EQ(refused.size(), 13u);
}

TEST(Fixture, ATornPairRefusedForReadingIsNotChangedByTryingToWrite) {
  const UpperFiles files = pairOf(fixtures::caseOf("neg-rw-data-short"));
  const std::vector<std::byte> data = files.data->contents();
  const std::vector<std::byte> index = files.index->contents();
  EXPECT_EQ(files.tryOpen({.flushMarkers = true}).code(), Code::kDataLoss);
  EXPECT_EQ(files.data->contents(), data);
  EXPECT_EQ(files.index->contents(), index);
}

template <typename Commit>
std::shared_ptr<MemoryFile> committed(Commit&& commit) {
  auto file = std::make_shared<MemoryFile>("committed");
  FileSink sink(*file);
  const Result<CommitStats> stats = commit(sink);
  EXPECT_TRUE(stats.isOk()) << stats.status().toString();
  EXPECT_EQ(stats.value().layerBytes, file->size().value());
  return file;
}

TEST(Fixture, CommittingWritesTheOriginalsBytes) {
  const UpperFiles append = pairOf(fixtures::caseOf("rw-append-basic"));
  const UpperFiles sparse = pairOf(fixtures::caseOf("rw-sparse-basic"));
  CommitOptions options;
  options.uuid = Uuid::parse("C0FFEE65-1111-4222-8333-000000000065");
  options.parentUuid = Uuid::parse("C0FFEE64-1111-4222-8333-000000000064");
  options.userTag = "golden commit message";
  expectSameBytes(*committed([&](Sink& out) { return commitUpper(*append.open(), options, out); }),
                  *loadRole(fixtures::caseOf("commit-raw"), "layer"));
  CommitOptions sparseOptions;
  sparseOptions.uuid = Uuid::parse("C0FFEE68-1111-4222-8333-000000000068");
  expectSameBytes(*committed([&](Sink& out) { return commitUpper(*sparse.open(), sparseOptions, out); }),
                  *loadRole(fixtures::caseOf("commit-sparse-raw"), "layer"));

  // The sealed layer committed afterwards, seen through its ZFile.
  const auto sealed = openLayer(loadRole(fixtures::caseOf("sealed-append"), "layer"));
  const auto ours = committed([&](Sink& out) { return commitLayer(*sealed.value(), {}, out); });
  const auto golden = openLayerFile(share(loadRole(fixtures::caseOf("commit-sealed-lz4"), "layer")));
  std::vector<std::byte> bytes(golden.value()->size().value());
  ASSERT_TRUE(golden.value()->preadExact(bytes, 0).isOk());
  EXPECT_EQ(ours->contents(), bytes);
}

TEST(Fixture, LongSegmentsCommitToTheOriginalsEntries) {
  const json one = fixtures::caseOf("long-segments");
  CreateUpperOptions create;
  create.virtualSize = one.at("virtual_size");
  const UpperFiles files = UpperFiles::create(create);
  auto upper = files.open();
  EXPECT_TRUE(apply(opsOf(one), upper, [&] { return files.open(); }));
  const auto ours = openLayer(committed([&](Sink& out) { return commitUpper(*upper, {}, out); }));
  const auto golden = openLayer(loadRole(one, "layer"));
  ASSERT_TRUE(ours.isOk() && golden.isOk());
  // Data entries leave no freedom. Zeroed ones do: the original remembers how a discard was cut, we do not.
  const auto dataOf = [](const LayerReader& layer) {
    std::vector<Segment> data;
    std::ranges::copy_if(layer.segments(), std::back_inserter(data), [](const Segment& s) { return !s.zeroed(); });
    return data;
  };
  EXPECT_EQ(dataOf(*ours.value()), dataOf(*golden.value()));
  EXPECT_LE(ours.value()->segments().size(), golden.value()->segments().size());
  expectContent(*ours.value(), one.at("expected"));
}

TEST(Fixture, SealingGivesTheContentOfTheOriginalsSealedLayer) {
  for (const char* id : {"rw-append-basic", "rw-sparse-basic"}) {
    SCOPED_TRACE(id);
    const json one = fixtures::caseOf(id);
    const UpperFiles files = pairOf(one);
    const auto upper = files.open();
    ASSERT_TRUE(upper->seal().isOk());
    const auto layer = openLayer(files.data);
    ASSERT_TRUE(layer.isOk()) << layer.status().toString();
    expectContent(*layer.value(), one.at("expected"));
    EXPECT_EQ(layer.value()->info().isSparse(), upper->isSparse());
    EXPECT_EQ(layer.value()->info().uuid, upper->uuid());
    if (!upper->isSparse()) continue;
    // Segments of a sparse layer leave no freedom: equal but for the bytes the original left undefined.
    std::vector<std::byte> golden = loadRole(fixtures::caseOf("sealed-sparse"), "layer")->contents();
    const size_t index = kHeaderSize + upper->virtualSize();
    const size_t used = index + upper->segments().size() * kSegmentBytes;
    std::fill(golden.begin() + used, golden.end() - kHeaderSize, std::byte{0});
    EXPECT_EQ(files.data->contents(), golden);
  }
}

TEST(Fixture, FlatteningAStackGivesItsContent) {
  const json merged = fixtures::caseOf("merge-3");
  const auto stack = stackOf(fixtures::caseOf("stack-3-mixed"));
  const auto layer = openLayer(committed([&](Sink& out) { return commitStack(*stack, nullptr, {}, out); }));
  ASSERT_TRUE(layer.isOk());
  expectContent(*layer.value(), merged.at("expected"));
  EXPECT_LE(layer.value()->segments().size(), merged.at("layer").at("segments").get<size_t>());
  EXPECT_EQ(layer.value()->info().parentUuid, stack->layer(0).info().parentUuid);

  for (const json& one : casesOf("stack-rw")) {
    SCOPED_TRACE(one.at("id"));
    const auto lowers = stackOf(one);
    const auto upper = pairOf(one, "upper-").open({.write = false});
    ASSERT_TRUE(upper->attachLower(lowers.get()).isOk());
    const auto whole = openLayer(committed([&](Sink& out) { return commitStack(*lowers, upper.get(), {}, out); }));
    ASSERT_TRUE(whole.isOk());
    expectContent(*whole.value(), one.at("expected"));
  }
}

}  // namespace
}  // namespace obd
