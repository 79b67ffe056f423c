// Runs the built executables, as other programs do. Invariants: exit code 0 or 1; stdout and the files are what the
// contract says; the same input gives the same bytes; a run that fails, or is ended, leaves nothing behind.
#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>
#include <set>
#include <thread>

#include "base/own-fd.h"
#include "io/posix-file.h"
#include "lsmt/commit.h"
#include "lsmt/upper.h"
#include "zfile/fixtures.h"
#include "zfile/layer-file.h"
#include "zfile/reader.h"

extern char** environ;

namespace obd {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Bytes = std::vector<std::byte>;

struct Outcome {
  int exitCode = -1;  // -1: ended by a signal
  int signalNumber = 0;
  std::string out;
  std::string err;
};

std::string readText(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void writeText(const fs::path& path, std::string_view text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  ASSERT_TRUE(out.flush().good()) << path;
}

void writeBytes(const fs::path& path, std::span<const std::byte> bytes) {
  writeText(path, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

class ToolsTest : public testing::Test {
 protected:
  // On a disk: its holes have the granularity that sparse layers need.
  void SetUp() override {
    std::string pattern = "/var/tmp/overlaybd-tools-XXXXXX";
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    dir_ = root_ / "work";
    fs::create_directory(dir_);
  }
  void TearDown() override { fs::remove_all(root_); }

  pid_t start(const std::string& tool, std::vector<std::string> words) {
    const std::string path = std::string(OBD_BIN) + "/" + tool;
    words.insert(words.begin(), path);
    std::vector<char*> pointers;
    for (std::string& word : words) pointers.push_back(word.data());
    pointers.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, (root_ / "out").c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
    posix_spawn_file_actions_addopen(&actions, 2, (root_ / "err").c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
    pid_t pid = -1;
    EXPECT_EQ(::posix_spawn(&pid, path.c_str(), &actions, nullptr, pointers.data(), environ), 0) << path;
    posix_spawn_file_actions_destroy(&actions);
    return pid;
  }

  Outcome finish(pid_t pid) {
    int state = 0;
    EXPECT_EQ(::waitpid(pid, &state, 0), pid);
    Outcome outcome;
    if (WIFEXITED(state)) outcome.exitCode = WEXITSTATUS(state);
    if (WIFSIGNALED(state)) outcome.signalNumber = WTERMSIG(state);
    outcome.out = readText(root_ / "out");
    outcome.err = readText(root_ / "err");
    return outcome;
  }

  Outcome run(const std::string& tool, std::vector<std::string> words) { return finish(start(tool, std::move(words))); }

  void expectSuccess(const std::string& tool, std::vector<std::string> words) {
    const Outcome outcome = run(tool, std::move(words));
    EXPECT_EQ(outcome.exitCode, 0) << tool << ": " << outcome.err;
  }

  // Exit code 1, the reason on stderr, and no other file in dir_ than before.
  void expectFailure(const std::string& tool, std::vector<std::string> words, const std::string& reason) {
    const std::set<std::string> before = filesIn(dir_);
    const Outcome outcome = run(tool, std::move(words));
    EXPECT_EQ(outcome.exitCode, 1) << tool << ": " << outcome.out << outcome.err;
    EXPECT_NE(outcome.err.find(reason), std::string::npos) << reason << " is not in: " << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_EQ(filesIn(dir_), before);
  }

  static std::set<std::string> filesIn(const fs::path& path) {
    std::set<std::string> names;
    for (const fs::directory_entry& entry : fs::directory_iterator(path)) names.insert(entry.path().filename());
    return names;
  }

  std::string in(const std::string& name) const { return (dir_ / name).string(); }
  static std::string fixture(const std::string& path) { return fixtures::pathOf(path); }
  Bytes bytesOf(const std::string& name) const { return fixtures::readWhole(in(name)); }

  // A file of the manifest, ready for use: packed sparse ones are unpacked into dir_.
  std::string fileOf(const json& entry) const {
    const std::string packed = fixture(entry.at("path"));
    if (entry.at("storage") != "sparse-packed") return packed;
    std::string name = entry.at("path").get<std::string>() + ".unpacked";
    std::ranges::replace(name, '/', '_');
    PosixOpen options;
    options.write = true;
    options.create = true;
    Result<std::unique_ptr<File>> file = openPosixFile(in(name), options);
    EXPECT_TRUE(file.isOk()) << file.status().toString();
    EXPECT_TRUE(file.value()->truncate(entry.at("logical_size")).isOk());
    const Bytes bytes = fixtures::readWhole(packed);
    size_t at = 0;
    for (const json& extent : entry.at("extents")) {
      const auto length = extent.at(1).get<size_t>();
      EXPECT_TRUE(file.value()->pwrite(std::span(bytes).subspan(at, length), extent.at(0)).isOk());
      at += length;
    }
    return in(name);
  }

  // The config of a case of the manifest; its layers are named by path.
  std::string configOf(const json& one) {
    json config = json::object();
    json lowers = json::array();
    for (const json& entry : one.at("files")) {
      const std::string role = entry.at("role");
      if (role == "layer" || role == "zfile") lowers.push_back({{"file", fileOf(entry)}});
      if (role == "data" || role == "upper-data") config["upper"]["data"] = fileOf(entry);
      if (role == "index" || role == "upper-index") config["upper"]["index"] = fileOf(entry);
    }
    if (!lowers.empty()) config["lowers"] = lowers;
    const std::string path = in(one.at("id").get<std::string>() + ".json");
    writeText(path, config.dump());
    return path;
  }

  std::string writeConfig(const std::string& name, const json& config) {
    writeText(dir_ / name, config.dump());
    return in(name);
  }

  static std::string sha256Of(const std::string& path) {
    fixtures::Sha256 hash;
    std::ifstream file(path, std::ios::binary);
    std::vector<char> buffer(1024 * 1024);
    while (file.read(buffer.data(), static_cast<std::streamsize>(buffer.size())), file.gcount() > 0) {
      hash.add(std::as_bytes(std::span(buffer)).first(static_cast<size_t>(file.gcount())));
    }
    return hash.hex();
  }

  fs::path root_;  // of this test
  fs::path dir_;   // where tools write
};

CreateUpperOptions layerOf(uint64_t virtualSize, bool sparse = false) {
  CreateUpperOptions options;
  options.virtualSize = virtualSize;
  options.sparse = sparse;
  return options;
}

const std::vector<std::string> kTools = {"overlaybd-create", "overlaybd-commit",   "overlaybd-merge", "overlaybd-resize",
                                         "overlaybd-zfile",  "overlaybd-attacher", "overlaybd-export"};

TEST_F(ToolsTest, EveryToolExplainsItselfAndRefusesWhatItDoesNotKnow) {
  for (const std::string& tool : kTools) {
    SCOPED_TRACE(tool);
    const Outcome help = run(tool, {"--help"});
    EXPECT_EQ(help.exitCode, 0);
    EXPECT_NE(help.out.find("Usage: " + tool), std::string::npos) << help.out;
    const Outcome version = run(tool, {"--version"});
    EXPECT_EQ(version.exitCode, 0);
    EXPECT_EQ(version.out.find(tool + " "), 0U) << version.out;
    expectFailure(tool, {}, tool + ": ");
    expectFailure(tool, {"--no-such-option", "a", "b", "c"}, tool + ": ");
  }
}

// create

TEST_F(ToolsTest, CreateMakesAnEmptyLayerOfEitherKind) {
  for (const bool sparse : {false, true}) {
    const std::string data = in(sparse ? "s.data" : "a.data");
    const std::string index = in(sparse ? "s.index" : "a.index");
    std::vector<std::string> words = {data, index, "3", "-u", "C0FFEE01-1111-4222-8333-000000000001", "--verbose"};
    if (sparse) words.push_back("-s");
    const Outcome outcome = run("overlaybd-create", words);
    ASSERT_EQ(outcome.exitCode, 0) << outcome.err;
    EXPECT_TRUE(outcome.out.ends_with("SUCCESSFULLY\n")) << outcome.out;
    Result<std::unique_ptr<Upper>> upper = openUpper(data, index, {});
    ASSERT_TRUE(upper.isOk()) << upper.status().toString();
    EXPECT_EQ(upper.value()->virtualSize(), 3 * kGiB);
    EXPECT_EQ(upper.value()->isSparse(), sparse);
    EXPECT_EQ(upper.value()->parentUuid().toString(), "C0FFEE01-1111-4222-8333-000000000001");
    EXPECT_FALSE(upper.value()->uuid().isNull());
  }
}

TEST_F(ToolsTest, CreateNeverTouchesWhatExists) {
  writeText(in("data"), "mine");
  expectFailure("overlaybd-create", {in("data"), in("index"), "1"}, "already-exists");
  EXPECT_EQ(readText(in("data")), "mine");
  fs::rename(in("data"), in("index"));
  expectFailure("overlaybd-create", {in("data"), in("index"), "1"}, "already-exists");
  EXPECT_EQ(readText(in("index")), "mine");
}

TEST_F(ToolsTest, CreateRefusesImpossibleArguments) {
  for (const char* size : {"x", "1.5", "-1", "18446744073709551615", "9999999999999999999999", "", "0x10", "1 "}) {
    expectFailure("overlaybd-create", {in("data"), in("index"), size}, "overlaybd-create: ");
  }
  expectFailure("overlaybd-create", {in("data"), in("index"), "1", "-u", "no-uuid"}, "invalid-argument: -u");
  expectFailure("overlaybd-create", {in("no/data"), in("no/index"), "1"}, "not-found");
  expectFailure("overlaybd-create", {in("same"), in("same"), "1"}, "overlaybd-create: ");
  expectFailure("overlaybd-create", {in("data"), in("index"), "1", "--turboOCI"}, "not supported in this version");
  expectFailure("overlaybd-create", {in("data"), in("index"), "1", "--fastoci"}, "not supported in this version");
  expectFailure("overlaybd-create", {in("data"), in("index"), "0", "--mkfs"}, "--mkfs needs a size");
}

TEST_F(ToolsTest, CreateMakesACleanExt4) {
  for (const char* kind : {"append", "sparse"}) {
    std::vector<std::string> words = {"--mkfs", in(std::string(kind) + ".d"), in(std::string(kind) + ".i"), "1"};
    if (std::string_view(kind) == "sparse") words.push_back("-s");
    expectSuccess("overlaybd-create", words);
    const json upper = {{"data", in(std::string(kind) + ".d")}, {"index", in(std::string(kind) + ".i")}};
    const std::string config = writeConfig(std::string(kind) + ".json", {{"upper", upper}});
    expectSuccess("overlaybd-export", {config, in(std::string(kind) + ".raw")});
    EXPECT_EQ(std::system(("e2fsck -fn " + in(std::string(kind) + ".raw") + " > /dev/null 2>&1").c_str()), 0);
  }
}

// commit

TEST_F(ToolsTest, CommitGivesTheReferencesBytes) {
  struct Golden {
    const char* path;
    std::vector<std::string> words;
    bool sealed = false;
  };
  const std::vector<Golden> goldens = {
      {"commit-raw/layer",
       {"--uuid", "C0FFEE65-1111-4222-8333-000000000065", "-p", "C0FFEE64-1111-4222-8333-000000000064", "-m",
        "golden commit message"}},
      {"commit-lz4-4k/layer", {"-z", "--uuid", "C0FFEE66-1111-4222-8333-000000000066"}},
      {"commit-zstd-16k/layer", {"-z", "--algorithm", "zstd", "--bs", "16"}},
      {"commit-lz4-4k-tar/layer", {"-z", "-t", "--uuid", "C0FFEE67-1111-4222-8333-000000000067"}},
      {"commit-sealed-lz4/layer", {"-z"}, true},
  };
  int number = 0;
  for (const Golden& golden : goldens) {
    SCOPED_TRACE(golden.path);
    const Bytes expected = fixtures::readWhole(fixture(golden.path));
    for (const char* threads : {"1", "2", "5", "0"}) {
      // Options may stand on either side of the files.
      for (const bool optionsFirst : {true, false}) {
        const std::string output = "out" + std::to_string(number++);
        std::vector<std::string> words;
        if (golden.sealed) {
          words = {"--commit_sealed", fixture("sealed-append/overlaybd.sealed"), in(output)};
        } else {
          words = {fixture("rw-append-basic/data"), fixture("rw-append-basic/index"), in(output)};
        }
        std::vector<std::string> options = golden.words;
        options.insert(options.end(), {"--compress_threads", threads});
        words.insert(optionsFirst ? words.begin() : words.end(), options.begin(), options.end());
        const Outcome outcome = run("overlaybd-commit", words);
        ASSERT_EQ(outcome.exitCode, 0) << outcome.err;
        EXPECT_NE(outcome.err.find("digest:"), std::string::npos);
        EXPECT_TRUE(outcome.out.ends_with("SUCCESSFULLY\n"));
        EXPECT_TRUE(bytesOf(output) == expected);
        EXPECT_EQ(fs::status(in(output)).permissions() & fs::perms::mask, fs::perms(0644));
      }
    }
  }
}

TEST_F(ToolsTest, CommitOfASparseLayerGivesTheReferencesBytes) {
  const json one = fixtures::caseOf("rw-sparse-basic");
  const std::string data = fileOf(one.at("files").at(0));
  expectSuccess("overlaybd-commit", {data, fileOf(one.at("files").at(1)), in("out"), "--uuid",
                                     "C0FFEE68-1111-4222-8333-000000000068"});
  EXPECT_TRUE(bytesOf("out") == fixtures::readWhole(fixture("commit-sparse-raw/layer")));
}

// The two calls that BuildKit and nerdctl make.
TEST_F(ToolsTest, CommitSealedAsTheClientsCallIt) {
  const std::string sealed = fixture("sealed-append/overlaybd.sealed");
  const std::string out = in("overlaybd.commit.temp");
  expectSuccess("overlaybd-commit", {"--commit_sealed", sealed, out, "-t", "-z", "-f"});
  const Bytes first = bytesOf("overlaybd.commit.temp");
  expectFailure("overlaybd-commit", {"--commit_sealed", sealed, out, "-z", "-t"}, "already-exists");
  EXPECT_TRUE(bytesOf("overlaybd.commit.temp") == first);
  writeText(out, "an older output");
  expectSuccess("overlaybd-commit", {"--commit_sealed", sealed, out, "-t", "-z", "-f"});
  EXPECT_TRUE(bytesOf("overlaybd.commit.temp") == first) << "the same layer gives the same bytes";
  expectSuccess("overlaybd-export", {writeConfig("c.json", {{"lowers", {{{"file", out}}}}}), in("raw")});
  EXPECT_EQ(sha256Of(in("raw")), fixtures::caseOf("sealed-append").at("expected").at("sha256").get<std::string>());
  const Outcome digest = run("overlaybd-commit", {"--commit_sealed", sealed, out, "-tzf", "--digest"});
  EXPECT_NE(digest.err.find("digest: sha256:" + fixtures::sha256(first) + "\n"), std::string::npos) << digest.err;
}

TEST_F(ToolsTest, CommitRefusesImpossibleArguments) {
  const std::string data = fixture("rw-append-basic/data");
  const std::string index = fixture("rw-append-basic/index");
  const std::string out = in("out");
  const auto refused = [&](std::vector<std::string> more, const std::string& reason) {
    more.insert(more.begin(), {data, index, out});
    expectFailure("overlaybd-commit", more, reason);
  };
  refused({"-z", "--bs", "5"}, "invalid-argument: --bs");
  refused({"-z", "--bs", "128"}, "invalid-argument: --bs");
  refused({"-z", "--bs", "-4"}, "overlaybd-commit: ");
  refused({"-z", "--bs", "99999999999999999999"}, "overlaybd-commit: ");
  refused({"-z", "--algorithm", "lzma"}, "invalid-argument: --algorithm");
  refused({"--uuid", "zzz"}, "invalid-argument: --uuid");
  refused({"-p", "zzz"}, "invalid-argument: --parent-uuid");
  refused({"-m", std::string(257, 'm')}, "invalid-argument");
  refused({"--seal"}, "invalid-argument: --seal");
  refused({"--commit_sealed"}, "invalid-argument: --commit_sealed");
  refused({"--seal", "--commit_sealed"}, "overlaybd-commit: ");
  refused({"extra"}, "overlaybd-commit: ");
  for (const char* option : {"--upload", "--upload_bs", "--cred_file_path", "--tls_key_path", "--tls_cert_path"}) {
    refused({option, "something"}, "unimplemented: " + std::string(option));
  }
  refused({"--turboOCI"}, "unimplemented");
  refused({"--fastoci"}, "unimplemented");
  expectFailure("overlaybd-commit", {data, index}, "invalid-argument: expects data, index and output");
  expectFailure("overlaybd-commit", {in("none"), index, out}, "not-found");
  expectFailure("overlaybd-commit", {data, index, in("no/such/dir")}, "not-found");
  expectFailure("overlaybd-commit", {data, index, dir_.string(), "-f"}, "not a regular file");
  expectFailure("overlaybd-commit", {"--commit_sealed", data, out}, "data-loss");
  expectFailure("overlaybd-commit", {fixture("neg-rw-index-sealed/data"), fixture("neg-rw-index-sealed/index"), out},
                "data-loss");
}

TEST_F(ToolsTest, CommitFallsBackToSmallerBlocksWhereLargeOnesCannotBeRead) {
  ASSERT_TRUE(createUpper(in("d"), in("i"), layerOf(8 * kMiB)).isOk());
  Bytes noise(4 * kMiB);
  std::mt19937_64 random(7);
  for (std::byte& byte : noise) byte = static_cast<std::byte>(random());
  {
    Result<std::unique_ptr<Upper>> upper = openUpper(in("d"), in("i"), {});
    ASSERT_TRUE(upper.isOk());
    ASSERT_TRUE(upper.value()->write(0, noise).isOk());
    ASSERT_TRUE(upper.value()->flush().isOk());
  }
  const Outcome outcome = run("overlaybd-commit", {in("d"), in("i"), in("out"), "-z", "--bs", "64"});
  ASSERT_EQ(outcome.exitCode, 0) << outcome.err;
  EXPECT_NE(outcome.err.find("32 KiB"), std::string::npos);
  Result<std::unique_ptr<ZFileReader>> reader = ZFileReader::open(openPosixFile(in("out"), {}).value());
  ASSERT_TRUE(reader.isOk());
  EXPECT_EQ(reader.value()->record().blockSize, 32768U);
}

TEST_F(ToolsTest, SealMakesTheDataFileALayerAndCanBeRepeated) {
  fs::copy(fixture("rw-append-basic/data"), in("data"));
  fs::copy(fixture("rw-append-basic/index"), in("index"));
  expectSuccess("overlaybd-commit", {"--seal", in("data"), in("index")});
  // As the reference seals it, but for two things it leaves open: the padding (zeros here, memory of the process there)
  // and where a zeroed entry would lie.
  const Bytes golden = fixtures::readWhole(fixture("sealed-append/overlaybd.sealed"));
  const Bytes ours = bytesOf("data");
  ASSERT_EQ(ours.size(), golden.size());
  constexpr size_t kIndexAt = 390144;
  constexpr size_t kIndexEnd = kIndexAt + 39 * 16;
  EXPECT_TRUE(std::equal(ours.begin(), ours.begin() + kIndexAt, golden.begin()));
  EXPECT_TRUE(std::equal(ours.end() - 4096, ours.end(), golden.end() - 4096)) << "trailer";
  for (size_t at = kIndexAt; at < kIndexEnd; at += 16) {
    const Segment mine = Segment::decode(std::span(ours).subspan(at).first<16>());
    const Segment theirs = Segment::decode(std::span(golden).subspan(at).first<16>());
    EXPECT_EQ(mine.offset(), theirs.offset());
    EXPECT_EQ(mine.length(), theirs.length());
    EXPECT_EQ(mine.zeroed(), theirs.zeroed());
    if (!mine.zeroed()) {
      EXPECT_EQ(mine.moffset(), theirs.moffset());
    }
  }
  EXPECT_TRUE(std::all_of(ours.begin() + kIndexEnd, ours.end() - 4096, [](std::byte b) { return b == std::byte{0}; }));
  fs::remove(in("index"));
  expectSuccess("overlaybd-commit", {"--seal", in("data"), in("index")});
  EXPECT_TRUE(bytesOf("data") == ours);
  expectFailure("overlaybd-commit", {"--seal", in("missing"), in("index")}, "not-found");
}

// merge

TEST_F(ToolsTest, MergeFlattensAStack) {
  for (const char* id : {"stack-3-mixed", "stack-vsize-grow", "stack-empty-middle", "stack-upper-append"}) {
    SCOPED_TRACE(id);
    const json one = fixtures::caseOf(id);
    const std::string config = configOf(one);
    const std::string expected = one.at("expected").at("sha256");
    for (const bool compress : {true, false}) {
      const std::string layer = in(std::string(id) + (compress ? ".z" : ".raw"));
      std::vector<std::string> words = {config, layer};
      if (!compress) words.push_back("--compress=false");
      expectSuccess("overlaybd-merge", words);
      LayerFileKind kind;
      ASSERT_TRUE(openLayerFile(layer, false, &kind).isOk());
      EXPECT_EQ(kind.zfile, compress);
      EXPECT_FALSE(kind.tar);
      expectSuccess("overlaybd-export", {writeConfig("m.json", {{"lowers", {{{"file", layer}}}}}), in("flat"), "-f"});
      EXPECT_EQ(sha256Of(in("flat")), expected);
    }
    expectFailure("overlaybd-merge", {config, in(std::string(id) + ".z")}, "already-exists");
  }
  expectFailure("overlaybd-merge", {in("stack-3-mixed.json")}, "invalid-argument");
  expectFailure("overlaybd-merge", {in("stack-3-mixed.json"), in("x"), "--upload", "u"}, "unimplemented");
}

// zfile

TEST_F(ToolsTest, ZFileGivesTheReferencesBytes) {
  expectSuccess("overlaybd-zfile", {fixture("commit-raw/layer"), in("a"), "--algorithm", "zstd", "--bs", "64", "--verify"});
  EXPECT_TRUE(bytesOf("a") == fixtures::readWhole(fixture("zfile-trailer-zstd-64k/layer")));
  expectSuccess("overlaybd-zfile", {"-t", "--algorithm", "lz4", "--bs", "32", fixture("commit-raw/layer"), in("b")});
  EXPECT_TRUE(bytesOf("b") == fixtures::readWhole(fixture("zfile-trailer-lz4-32k-tar/layer")));
}

TEST_F(ToolsTest, ZFileExtractsEveryFixture) {
  const json manifest = fixtures::manifest();
  size_t seen = 0;
  for (const json& one : manifest.at("cases")) {
    if (one.at("kind") != "zfile") continue;
    seen++;
    const std::string source = fixture(one.at("files").at(0).at("path"));
    expectSuccess("overlaybd-zfile", {"-x", source, in("out"), "-f"});
    EXPECT_EQ(sha256Of(in("out")), one.at("expected").at("sha256").get<std::string>()) << one.at("id");
    expectSuccess("overlaybd-zfile", {source, "--verify"});
  }
  EXPECT_EQ(seen, 4U);
  expectFailure("overlaybd-zfile", {"-x", fixture("zfile-plain-tiny/file.zfile"), in("out")}, "already-exists");
  for (const char* path : {"zfile-trailer-lz4-32k-tar/layer", "zfile-trailer-zstd-64k/layer"}) {
    expectSuccess("overlaybd-zfile", {"-x", "-t", fixture(path), in("out"), "-f"});
    EXPECT_TRUE(bytesOf("out") == fixtures::readWhole(fixture("commit-raw/layer")));
  }
}

TEST_F(ToolsTest, ZFileReportsDamageAndLeavesNoTarget) {
  expectFailure("overlaybd-zfile", {"-x", fixture("neg-block-checksum/layer"), in("out")}, "block 7");
  expectFailure("overlaybd-zfile", {"--verify", fixture("neg-block-checksum/layer")}, "data-loss");
  expectFailure("overlaybd-zfile", {"-x", fixture("neg-zfile-truncated/layer"), in("out")}, "data-loss");
  expectFailure("overlaybd-zfile", {"-x", fixture("commit-raw/layer"), in("out")}, "not a ZFile");
  expectFailure("overlaybd-zfile", {fixture("commit-raw/layer")}, "expects a target");
  expectFailure("overlaybd-zfile", {in("missing"), in("out")}, "not-found");
  expectFailure("overlaybd-zfile", {"/dev/null", in("out")}, "invalid-argument");
}

// export

TEST_F(ToolsTest, ExportGivesTheExpectedDiskOfEveryFixture) {
  const json manifest = fixtures::manifest();
  const std::set<std::string> kinds = {"rw-append", "rw-sparse", "ro-layer", "stack", "stack-rw", "ext4-apply"};
  size_t disks = 0;
  for (const json& one : manifest.at("cases")) {
    if (!kinds.contains(one.at("kind").get<std::string>())) continue;
    const std::string id = one.at("id");
    SCOPED_TRACE(id);
    const json& expected = one.at("expected");
    const Outcome outcome = run("overlaybd-export", {configOf(one), in(id)});
    ASSERT_EQ(outcome.exitCode, 0) << outcome.err;
    disks++;
    EXPECT_EQ(fs::file_size(in(id)), expected.at("virtual_size").get<uint64_t>());
    if (expected.contains("sha256")) {
      EXPECT_EQ(sha256Of(in(id)), expected.at("sha256").get<std::string>());
    }
    if (expected.contains("probes")) {
      Result<std::unique_ptr<File>> disk = openPosixFile(in(id), {});
      for (const json& probe : expected.at("probes")) {
        Bytes bytes(probe.at("length").get<size_t>());
        ASSERT_TRUE(disk.value()->preadExact(bytes, probe.at("offset")).isOk());
        EXPECT_EQ(fixtures::sha256(bytes), probe.at("sha256").get<std::string>());
      }
    }
    fs::remove(in(id));
  }
  EXPECT_GE(disks, 25U);
}

TEST_F(ToolsTest, ExportOfTheLowestLayersGivesTheirDisks) {
  const json manifest = fixtures::manifest();
  size_t seen = 0;
  for (const json& one : manifest.at("cases")) {
    if (!one.at("expected").contains("prefixes")) continue;
    const json& prefixes = one.at("expected").at("prefixes");
    for (size_t count = 1; count <= prefixes.size(); count++) {
      json lowers = json::array();
      for (const json& entry : one.at("files")) {
        if (entry.at("role") == "layer" && lowers.size() < count) lowers.push_back({{"file", fileOf(entry)}});
      }
      if (lowers.size() != count) continue;
      expectSuccess("overlaybd-export", {writeConfig("p.json", {{"lowers", lowers}}), in("p"), "-f"});
      EXPECT_EQ(sha256Of(in("p")), prefixes.at(count - 1).at("sha256").get<std::string>())
          << one.at("id") << ", lowest " << count;
      seen++;
    }
  }
  EXPECT_GE(seen, 5U);
}

TEST_F(ToolsTest, ExportKeepsHoles) {
  expectSuccess("overlaybd-export", {configOf(fixtures::caseOf("offset-4tib")), in("out")});
  struct stat info {};
  ASSERT_EQ(::stat(in("out").c_str(), &info), 0);
  EXPECT_EQ(info.st_size, 4398046511104);
  EXPECT_LE(info.st_blocks * 512, 1024 * 1024);
}

TEST_F(ToolsTest, ExportFindsALayerInItsDirectory) {
  fs::create_directory(in("layer"));
  const std::string config = writeConfig("c.json", {{"lowers", {{{"dir", in("layer")}}}}});
  expectFailure("overlaybd-export", {config, in("out")}, "not-found");
  const std::string expected = fixtures::caseOf("commit-raw").at("expected").at("sha256");
  for (const char* name : {"overlaybd.sealed", ".commit", "overlaybd.commit"}) {
    fs::copy(fixture("commit-lz4-4k-tar/layer"), in("layer/" + std::string(name)));
    expectSuccess("overlaybd-export", {config, in("out"), "-f"});
    EXPECT_EQ(sha256Of(in("out")), expected);
    // The next one is preferred.
    writeText(in("layer/" + std::string(name)), "no layer");
  }
}

TEST_F(ToolsTest, ExportRefusesEveryBadFixtureWithATypedReason) {
  const json manifest = fixtures::manifest();
  size_t seen = 0;
  for (const json& one : manifest.at("cases")) {
    // One is a fine ZFile that holds no layer.
    if (one.at("kind") != "negative" && one.at("kind") != "zfile") continue;
    SCOPED_TRACE(one.at("id").get<std::string>());
    const std::string config = configOf(one);
    expectFailure("overlaybd-export", {config, in("out")}, "overlaybd-export: data-loss: open ");
    seen++;
  }
  EXPECT_GE(seen, 14U);
}

TEST_F(ToolsTest, ExportRefusesABadConfig) {
  expectFailure("overlaybd-export", {in("none.json"), in("out")}, "not-found");
  for (const char* text : {"", "{", "[]", "null", "{\"lowers\": 3}", "{\"lowers\": [{\"file\": 7}]}", "{}",
                           "{\"lowers\": []}", "{\"upper\": {\"data\": \"/x\", \"index\": 5}}", "\xff\xfe"}) {
    writeText(in("bad.json"), text);
    expectFailure("overlaybd-export", {in("bad.json"), in("out")}, "invalid-argument");
  }
  expectFailure("overlaybd-export", {writeConfig("c.json", {{"lowers", {{{"file", in("gone")}}}}}), in("out")},
                "not-found: open layer 0");
  expectFailure("overlaybd-export",
                {writeConfig("r.json", {{"repoBlobUrl", "http://127.0.0.1:1/v2/x/blobs"},
                                        {"lowers", {{{"digest", "sha256:00"}, {"size", 5}}}}}),
                 in("out")},
                "unimplemented");
}

TEST_F(ToolsTest, AReadErrorOnTheWayFailsTheRunAndLeavesNoOutput) {
  Bytes damaged = fixtures::readWhole(fixture("commit-lz4-4k/layer"));
  damaged[30000] ^= std::byte{0x10};
  writeBytes(in("layer"), damaged);
  const std::string config = writeConfig("c.json", {{"lowers", {{{"file", in("layer")}}}}});
  expectFailure("overlaybd-export", {config, in("out")}, "data-loss");
  expectFailure("overlaybd-merge", {config, in("out")}, "data-loss");
  expectFailure("overlaybd-commit", {"--commit_sealed", in("layer"), in("out"), "-z"}, "data-loss");
  expectFailure("overlaybd-zfile", {"-x", in("layer"), in("out")}, "data-loss");
  writeText(in("out"), "an older output");
  expectFailure("overlaybd-export", {config, in("out"), "-f"}, "data-loss");
  EXPECT_EQ(readText(in("out")), "an older output") << "what is replaced stays until there is something better";
}

// A tmpfs of one megabyte at `path`, unmounted at the end.
class SmallDisk final {
 public:
  explicit SmallDisk(fs::path path) : path_(std::move(path)) {
    fs::create_directory(path_);
    mounted_ = ::mount("tmpfs", path_.c_str(), "tmpfs", 0, "size=1m") == 0;
  }
  ~SmallDisk() {
    if (mounted_) {
      EXPECT_EQ(::umount2(path_.c_str(), 0), 0) << path_;
    }
  }
  bool isMounted() const { return mounted_; }
  void fill() {
    std::ofstream out(path_ / "ballast", std::ios::binary);
    const std::string block(4096, 'b');
    while (out.write(block.data(), 4096).flush()) {
    }
  }
  void makeRoom() { fs::remove(path_ / "ballast"); }
  std::string in(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
  bool mounted_ = false;
};

TEST_F(ToolsTest, AFullDiskFailsEveryToolAndTheSameCallWorksOnceThereIsRoom) {
  if (::geteuid() != 0) GTEST_SKIP() << "mounting a small tmpfs needs root";
  SmallDisk disk(root_ / "small");
  ASSERT_TRUE(disk.isMounted()) << std::strerror(errno);
  const std::string layer = fixture("commit-raw/layer");
  const std::string config = writeConfig("c.json", {{"lowers", {{{"file", layer}}}}});
  const std::vector<std::pair<std::string, std::vector<std::string>>> calls = {
      {"overlaybd-create", {disk.in("data"), disk.in("index"), "1"}},
      {"overlaybd-commit", {"--commit_sealed", layer, disk.in("commit"), "-z", "-t"}},
      {"overlaybd-commit", {"--commit_sealed", layer, disk.in("raw")}},
      {"overlaybd-merge", {config, disk.in("merged")}},
      {"overlaybd-zfile", {layer, disk.in("zfile")}},
      {"overlaybd-zfile", {"-x", fixture("commit-lz4-4k/layer"), disk.in("extracted")}},
      {"overlaybd-export", {config, disk.in("disk")}},
  };
  for (const auto& [tool, words] : calls) {
    SCOPED_TRACE(tool);
    disk.fill();
    const Outcome full = run(tool, words);
    EXPECT_EQ(full.exitCode, 1);
    EXPECT_NE(full.err.find("no-space"), std::string::npos) << full.err;
    EXPECT_EQ(filesIn(root_ / "small"), std::set<std::string>{"ballast"});
    disk.makeRoom();
    expectSuccess(tool, words);
    for (const std::string& name : filesIn(root_ / "small")) fs::remove(root_ / "small" / name);
  }
}

TEST_F(ToolsTest, ASignalEndsARunAndLeavesNothing) {
  // Long enough to be met on its way: 16 GiB of mapped hole.
  constexpr uint64_t kSize = 16 * kGiB;
  {
    PosixOpen options;
    options.write = true;
    options.create = true;
    std::unique_ptr<File> file = openPosixFile(in("huge"), options).value();
    ASSERT_TRUE(file->truncate(kSize).isOk());
  }
  for (const int signalNumber : {SIGTERM, SIGINT}) {
    const pid_t pid = start("overlaybd-zfile", {in("huge"), in("out"), "--algorithm", "zstd"});
    // Its output is open once one of its descriptors leads into dir_ and is not the source.
    const fs::path descriptors = "/proc/" + std::to_string(pid) + "/fd";
    bool open = false;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!open && std::chrono::steady_clock::now() < deadline) {
      std::error_code ignored;
      for (const fs::directory_entry& entry : fs::directory_iterator(descriptors, ignored)) {
        const std::string target = fs::read_symlink(entry.path(), ignored).string();
        open = open || (target.starts_with(dir_.string() + "/") && target != in("huge"));
      }
      std::this_thread::yield();
    }
    EXPECT_TRUE(open);
    ASSERT_EQ(::kill(pid, signalNumber), 0);
    const Outcome outcome = finish(pid);
    EXPECT_EQ(outcome.signalNumber, signalNumber);
    EXPECT_EQ(filesIn(dir_), std::set<std::string>{"huge"});
  }
}

// resize

TEST_F(ToolsTest, ResizeGrowsAndShrinksADiskWithoutAFileSystem) {
  for (const bool sparse : {false, true}) {
    const std::string data = in(sparse ? "s.d" : "a.d");
    const std::string index = in(sparse ? "s.i" : "a.i");
    ASSERT_TRUE(createUpper(data, index, layerOf(kGiB, sparse)).isOk());
    const std::string config = writeConfig("c.json", {{"upper", {{"data", data}, {"index", index}}}});
    for (const uint64_t gib : {3, 3, 2}) {
      expectSuccess("overlaybd-resize", {"--config", config, "--size", std::to_string(gib)});
      EXPECT_EQ(openUpper(data, index, {}).value()->virtualSize(), gib * kGiB);
    }
  }
}

TEST_F(ToolsTest, ResizeRefusesWhatWouldLoseData) {
  ASSERT_TRUE(createUpper(in("d"), in("i"), layerOf(2 * kGiB)).isOk());
  const std::string config = writeConfig("c.json", {{"upper", {{"data", in("d")}, {"index", in("i")}}}});
  const auto startWith = [&](std::string_view text) {
    Bytes block(512);
    for (size_t i = 0; i < text.size(); i++) block[i] = static_cast<std::byte>(text[i]);
    Result<std::unique_ptr<Upper>> upper = openUpper(in("d"), in("i"), {});
    ASSERT_TRUE(upper.isOk());
    ASSERT_TRUE(upper.value()->write(0, block).isOk() && upper.value()->flush().isOk());
  };
  startWith("XFSB");
  expectFailure("overlaybd-resize", {"--config", config, "--size", "1"}, "xfs cannot be made smaller");
  startWith("something else");
  expectFailure("overlaybd-resize", {"--config", config, "--size", "1"}, "unknown content");
  EXPECT_EQ(openUpper(in("d"), in("i"), {}).value()->virtualSize(), 2 * kGiB);
  expectFailure("overlaybd-resize", {"--config", config, "--size", "0"}, "invalid-argument");
  expectFailure("overlaybd-resize", {"--config", config, "--size", "many"}, "invalid-argument");
  expectFailure("overlaybd-resize", {"--config", config}, "--size");
  expectFailure("overlaybd-resize", {"--size", "1"}, "--config");
  const std::string readOnly =
      writeConfig("r.json", {{"lowers", {{{"file", fixture("commit-raw/layer")}}}}});
  expectFailure("overlaybd-resize", {"--config", readOnly, "--size", "1"}, "failed-precondition");
}

TEST_F(ToolsTest, ResizeTakesTheExt4WithIt) {
  if (::geteuid() != 0 || ::access("/dev/fuse", R_OK | W_OK) != 0 || ::access("/dev/loop-control", R_OK | W_OK) != 0) {
    GTEST_SKIP() << "a device needs root, /dev/fuse and /dev/loop-control";
  }
  expectSuccess("overlaybd-create", {"--mkfs", in("d"), in("i"), "1"});
  const std::string config = writeConfig("c.json", {{"upper", {{"data", in("d")}, {"index", in("i")}}}});
  for (const uint64_t gib : {2, 1}) {
    expectSuccess("overlaybd-resize", {"--config", config, "--size", std::to_string(gib)});
    expectSuccess("overlaybd-export", {config, in("raw"), "-f"});
    EXPECT_EQ(fs::file_size(in("raw")), gib * kGiB);
    EXPECT_EQ(std::system(("e2fsck -fn " + in("raw") + " > /dev/null 2>&1").c_str()), 0);
    Bytes superblock(1024);
    ASSERT_TRUE(openPosixFile(in("raw"), {}).value()->preadExact(superblock, 1024).isOk());
    EXPECT_EQ(loadLe32(superblock.data() + 4) * uint64_t{4096}, gib * kGiB) << "blocks in the superblock";
  }
}

// attacher: the daemon's side of the wire, one canned answer a connection. Keeps what was asked.
class WireDaemon final {
 public:
  struct Answer {
    int httpStatus;
    std::string body;
  };

  WireDaemon(const std::string& path, std::vector<Answer> answers) : answers_(std::move(answers)) {
    socket_ = OwnFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    EXPECT_EQ(::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(::listen(socket_.get(), 4), 0);
    thread_ = std::thread([this] { serve(); });
  }
  ~WireDaemon() {
    ::shutdown(socket_.get(), SHUT_RDWR);  // ends a pending accept
    thread_.join();
  }

  // REQUIRES: the tool has ended.
  const std::vector<std::string>& requests() const { return requests_; }
  static std::string lineOf(const std::string& request) { return request.substr(0, request.find("\r\n")); }
  static json bodyOf(const std::string& request) { return json::parse(request.substr(request.find("\r\n\r\n") + 4)); }

 private:
  void serve() {
    for (const Answer& answer : answers_) {
      const OwnFd peer(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!peer.isValid()) return;
      std::string request;
      std::vector<char> buffer(4096);
      while (!isComplete(request)) {
        const ssize_t got = ::read(peer.get(), buffer.data(), buffer.size());
        if (got <= 0) break;
        request.append(buffer.data(), static_cast<size_t>(got));
      }
      requests_.push_back(request);
      const std::string reply = "HTTP/1.1 " + std::to_string(answer.httpStatus) +
                                " X\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: " +
                                std::to_string(answer.body.size()) + "\r\n\r\n" + answer.body;
      EXPECT_EQ(::write(peer.get(), reply.data(), reply.size()), static_cast<ssize_t>(reply.size()));
    }
  }
  static bool isComplete(const std::string& request) {
    const size_t end = request.find("\r\n\r\n");
    const size_t length = request.find("Content-Length: ");
    return end != std::string::npos && length != std::string::npos &&
           request.size() >= end + 4 + std::stoul(request.substr(length + 16));
  }

  OwnFd socket_;
  std::vector<Answer> answers_;
  std::vector<std::string> requests_;
  std::thread thread_;
};

TEST_F(ToolsTest, AttacherPrintsTheDeviceAndNothingElse) {
  const std::string socket = root_ / "socket";
  WireDaemon daemon(socket, {{200, R"({"device":{"id":"x","path":"/dev/loop7"}})"}, {200, "{}"}});
  const std::string config = writeConfig("config.v1.json", {{"lowers", {{{"file", "/layer"}}}}});
  const Outcome attach =
      run("overlaybd-attacher", {"attach", "--id", "x", "--config", config, "--with-devid", "-v", "--socket", socket});
  EXPECT_EQ(attach.exitCode, 0) << attach.err;
  EXPECT_EQ(attach.out, "/dev/loop7\n");
  EXPECT_EQ(readText(in("init-debug.log")), "success");
  const Outcome detach = run("overlaybd-attacher", {"--socket", socket, "detach", "--id", "x"});
  EXPECT_EQ(detach.exitCode, 0) << detach.err;
  EXPECT_EQ(detach.out, "");
  ASSERT_EQ(daemon.requests().size(), 2U);
  EXPECT_EQ(WireDaemon::lineOf(daemon.requests()[0]), "POST /overlaybd.control.v1.BlockDaemon/Attach HTTP/1.1");
  EXPECT_EQ(WireDaemon::bodyOf(daemon.requests()[0]), json({{"owner", "attacher"}, {"id", "x"}, {"configPath", config}}));
  EXPECT_EQ(WireDaemon::lineOf(daemon.requests()[1]), "POST /overlaybd.control.v1.BlockDaemon/Detach HTTP/1.1");
  EXPECT_EQ(WireDaemon::bodyOf(daemon.requests()[1]), json({{"owner", "attacher"}, {"id", "x"}}));
}

TEST_F(ToolsTest, AttacherTellsTheDaemonsReasonAndRetriesOnlyWhatMayPass) {
  const std::string socket = root_ / "socket";
  const std::string config = writeConfig("config.v1.json", {{"lowers", {{{"file", "/layer"}}}}, {"resultFile", "result"}});
  {
    WireDaemon daemon(socket, {{500, R"({"code":"data_loss","message":"open layer 0 (/layer): bad"})"}});
    const Outcome outcome = run("overlaybd-attacher", {"attach", "--id", "x", "--config", config, "--socket", socket});
    EXPECT_EQ(outcome.exitCode, 1);
    EXPECT_EQ(outcome.out, "");
    EXPECT_NE(outcome.err.find("data-loss: open layer 0 (/layer): bad"), std::string::npos) << outcome.err;
    EXPECT_EQ(readText(in("result")), "failed:open layer 0 (/layer): bad");
  }
  fs::remove(socket);
  {
    WireDaemon daemon(socket, {{503, R"({"code":"unavailable","message":"starting"})"},
                               {200, R"({"device":{"path":"/dev/loop9"}})"}});
    const Outcome outcome = run("overlaybd-attacher", {"attach", "--id", "x", "--config", config, "--socket", socket});
    EXPECT_EQ(outcome.exitCode, 0) << outcome.err;
    EXPECT_EQ(outcome.out, "/dev/loop9\n");
    EXPECT_EQ(readText(in("result")), "success");
  }
  fs::remove(socket);
  for (const char* body : {"", "[]", "{}", "{\"device\":3}", "<html>", "{\"device\":{\"path\":7}}"}) {
    WireDaemon daemon(socket, {{200, body}});
    const Outcome outcome = run("overlaybd-attacher", {"attach", "--id", "x", "--config", config, "--socket", socket});
    EXPECT_EQ(outcome.exitCode, 1) << body;
    EXPECT_EQ(outcome.out, "");
    fs::remove(socket);
  }
}

TEST_F(ToolsTest, AttacherChecksTheConfigBeforeItAsks) {
  const std::string socket = root_ / "nobody";
  for (const char* text : {"{", "{}", "{\"lowers\":5}"}) {
    writeText(in("bad.json"), text);
    expectFailure("overlaybd-attacher", {"attach", "--id", "x", "--config", in("bad.json"), "--socket", socket},
                  "invalid-argument");
  }
  expectFailure("overlaybd-attacher", {"attach", "--id", "x", "--config", in("none"), "--socket", socket}, "not-found");
  expectFailure("overlaybd-attacher", {"attach", "--id", "x"}, "--config");
  expectFailure("overlaybd-attacher", {"attach", "--config", in("none")}, "--id");
  expectFailure("overlaybd-attacher", {"detach", "--id", "", "--socket", socket}, "invalid-argument");
  expectFailure("overlaybd-attacher", {"detach", "--id", "x", "--socket", socket}, "unavailable");
}

}  // namespace
}  // namespace obd
