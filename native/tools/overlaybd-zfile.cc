// overlaybd-zfile: compresses any file into a ZFile, takes one apart, or checks one.
#include <cstring>
#include <iostream>

#include "io/file-sink.h"
#include "io/posix-file.h"
#include "tools/layer-output.h"
#include "tools/output-file.h"
#include "tools/progress.h"
#include "tools/tool.h"
#include "zfile/layer-file.h"

namespace {

using namespace obd;

constexpr size_t kPiece = 1024 * 1024;

struct Arguments {
  std::string source;
  std::string target;
  std::string algorithm = "lz4";
  int64_t blockSizeKib = 4;
  int64_t threads = 0;
  bool extract = false;
  bool tar = false;
  bool replace = false;
  bool verify = false;
};

// All of `file` in order. `visit` returns a Status.
template <typename Visit>
Status forEachPiece(const File& file, const std::string& label, Visit&& visit) {
  OBD_ASSIGN_OR_RETURN(const uint64_t size, file.size());
  Progress progress(label, size);
  std::vector<std::byte> buffer(kPiece);
  uint64_t at = 0;
  while (at < size) {
    const std::span<std::byte> piece(buffer.data(), static_cast<size_t>(std::min<uint64_t>(kPiece, size - at)));
    OBD_RETURN_IF_ERROR(file.preadExact(piece, at));
    OBD_RETURN_IF_ERROR(visit(at, std::span<const std::byte>(piece)));
    at += piece.size();
    progress.add(piece.size());
  }
  return Status::ok();
}

Result<std::unique_ptr<File>> openZFile(const std::string& path) {
  LayerFileKind kind;
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> file, openLayerFile(path, false, &kind));
  if (!kind.zfile) return invalidArgument(path + ": not a ZFile");
  return file;
}

Status check(const std::string& path) {
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> file, openZFile(path));
  return forEachPiece(*file, path, [](uint64_t, std::span<const std::byte>) { return Status::ok(); });
}

// The content of ZFile `path` is that of `original`.
Status compare(const std::string& path, const File& original) {
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> file, openZFile(path));
  OBD_ASSIGN_OR_RETURN(const uint64_t size, file->size());
  OBD_ASSIGN_OR_RETURN(const uint64_t originalSize, original.size());
  if (size != originalSize) return dataLoss(path + ": holds " + std::to_string(size) + " bytes");
  std::vector<std::byte> other(kPiece);
  return forEachPiece(*file, path, [&](uint64_t at, std::span<const std::byte> piece) -> Status {
    const std::span<std::byte> expected(other.data(), piece.size());
    OBD_RETURN_IF_ERROR(original.preadExact(expected, at));
    if (std::memcmp(expected.data(), piece.data(), piece.size()) != 0) {
      return dataLoss(path + ": differs from its source near byte " + std::to_string(at));
    }
    return Status::ok();
  });
}

Status extract(const Arguments& arguments) {
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> file, openZFile(arguments.source));
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> output,
                       OutputFile::create(arguments.target, arguments.replace));
  FileSink sink(output->file());
  OBD_RETURN_IF_ERROR(forEachPiece(*file, arguments.target,
                                   [&](uint64_t, std::span<const std::byte> piece) { return sink.write(piece); }));
  OBD_RETURN_IF_ERROR(sink.finish());
  return output->publish();
}

Status compress(const Arguments& arguments) {
  LayerFormat format;
  format.zfile = true;
  format.tar = arguments.tar;
  format.rewriteHeader = false;
  OBD_ASSIGN_OR_RETURN(format.algorithm, parseAlgorithm(arguments.algorithm));
  OBD_ASSIGN_OR_RETURN(format.blockSize, parseBlockSize(arguments.blockSizeKib));
  format.threads = threadCount(arguments.threads);
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<File> source, openPosixFile(arguments.source, {}));
  LayerTarget target;
  target.path = arguments.target;
  target.replace = arguments.replace;
  const Status written = writeLayerFile(target, format, [&](Sink& out) {
    Status status = forEachPiece(*source, arguments.target,
                                 [&](uint64_t, std::span<const std::byte> piece) { return out.write(piece); });
    return status.isOk() ? out.finish() : status;
  });
  OBD_RETURN_IF_ERROR(written);
  return arguments.verify ? compare(arguments.target, *source) : Status::ok();
}

Status run(const Arguments& arguments) {
  if (arguments.target.empty()) {
    if (!arguments.verify) return invalidArgument("expects a target file");
    OBD_RETURN_IF_ERROR(check(arguments.source));
    std::cout << "overlaybd-zfile has verified " << arguments.source << " SUCCESSFULLY\n";
    return Status::ok();
  }
  OBD_RETURN_IF_ERROR(arguments.extract ? extract(arguments) : compress(arguments));
  std::cout << "overlaybd-zfile has written " << arguments.target << " SUCCESSFULLY\n";
  return Status::ok();
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  return runTool(
      argc, argv, {"overlaybd-zfile", "Compresses a file into a ZFile, or extracts one."},
      [&](CLI::App& cli) {
        cli.add_option("source", arguments.source, "file to read")->required();
        cli.add_option("target", arguments.target, "file to write; none with --verify: only check the source");
        cli.add_flag("-x", arguments.extract, "extract; a tar around the source is taken off");
        cli.add_flag("-t", arguments.tar, "wrap the ZFile into a tar");
        cli.add_flag("-f", arguments.replace, "replace an existing target");
        cli.add_flag("--verify", arguments.verify, "read everything back (after compressing, or of the source alone)");
        cli.add_option("--algorithm", arguments.algorithm, "lz4 or zstd")->capture_default_str();
        cli.add_option("--bs", arguments.blockSizeKib, "block size in KiB: 4, 8, 16, 32 or 64")->capture_default_str();
        cli.add_option("--compress_threads", arguments.threads, "threads that compress; 0: one for each core")
            ->capture_default_str();
      },
      [&] { return run(arguments); });
}
