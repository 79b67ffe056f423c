// overlaybd-commit: turns a writable layer into a read-only one, by compaction into a new file or by sealing in place.
#include <iostream>

#include "io/posix-file.h"
#include "lsmt/commit.h"
#include "tools/file-digest.h"
#include "tools/layer-output.h"
#include "tools/tool.h"
#include "zfile/layer-file.h"

namespace {

using namespace obd;

struct Arguments {
  std::string data;
  std::string index;
  std::string output;
  std::string message;
  std::string uuid;
  std::string parent;
  std::string algorithm = "lz4";
  int64_t blockSizeKib = 4;
  int64_t threads = 0;
  bool compress = false;
  bool tar = false;
  bool replace = false;
  bool seal = false;
  bool sealed = false;
  bool digest = false;
  bool verbose = false;
  bool unsupported = false;
  std::string unsupportedText;
};

// A sealed layer's file, raw or wrapped.
Result<std::unique_ptr<LayerReader>> openSealed(const std::string& path) {
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> file, openLayerFile(path, false));
  return LayerReader::open(std::move(file));
}

Status seal(const Arguments& arguments) {
  if (!arguments.output.empty()) return invalidArgument("--seal takes data and index only");
  const std::string& data = arguments.data;
  // Sealed by an earlier run, perhaps one whose success nobody heard of; its index may be gone.
  if (openSealed(data).isOk()) {
    std::cout << "overlaybd-commit: " << data << " was sealed before SUCCESSFULLY\n";
    return Status::ok();
  }
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<Upper> upper, openUpper(data, arguments.index, {}));
  OBD_RETURN_IF_ERROR(upper->seal());
  std::cout << "overlaybd-commit has sealed " << data << " SUCCESSFULLY\n";
  return Status::ok();
}

Status commit(const Arguments& arguments) {
  if (arguments.sealed != arguments.output.empty()) {
    return invalidArgument(arguments.sealed ? "--commit_sealed takes the sealed layer and the output only"
                                            : "expects data, index and output");
  }
  CommitOptions options;
  OBD_ASSIGN_OR_RETURN(options.uuid, parseUuid("--uuid", arguments.uuid));
  OBD_ASSIGN_OR_RETURN(options.parentUuid, parseUuid("--parent-uuid", arguments.parent));
  options.userTag = arguments.message;
  LayerFormat format;
  format.zfile = arguments.compress;
  format.tar = arguments.compress && arguments.tar;
  OBD_ASSIGN_OR_RETURN(format.algorithm, parseAlgorithm(arguments.algorithm));
  OBD_ASSIGN_OR_RETURN(format.blockSize, parseBlockSize(arguments.blockSizeKib));
  format.threads = threadCount(arguments.threads);
  if (arguments.tar && !arguments.compress) std::cerr << "note: -t has an effect only together with -z\n";

  LayerTarget target;
  target.path = arguments.sealed ? arguments.index : arguments.output;
  target.replace = arguments.replace;
  CommitStats stats;
  if (arguments.sealed) {
    OBD_ASSIGN_OR_RETURN(const std::unique_ptr<LayerReader> layer, openSealed(arguments.data));
    for (const Segment& segment : layer->segments()) {
      if (!segment.zeroed()) target.expectedBytes += Sectors(segment.length()).bytes();
    }
    OBD_RETURN_IF_ERROR(writeLayerFile(target, format, [&](Sink& out) -> Status {
      OBD_ASSIGN_OR_RETURN(stats, commitLayer(*layer, options, out));
      return Status::ok();
    }));
  } else {
    OpenUpperOptions looking;
    looking.write = false;
    OBD_ASSIGN_OR_RETURN(const std::unique_ptr<Upper> upper, openUpper(arguments.data, arguments.index, looking));
    target.expectedBytes = upper->stats().liveBytes;
    OBD_RETURN_IF_ERROR(writeLayerFile(target, format, [&](Sink& out) -> Status {
      OBD_ASSIGN_OR_RETURN(stats, commitUpper(*upper, options, out));
      return Status::ok();
    }));
  }
  if (arguments.verbose) {
    std::cerr << stats.dataBytes << " bytes of data, " << stats.entries << " index entries, layer of "
              << stats.layerBytes << " bytes\n";
  }
  // The line is expected; its value only where somebody asked, because it costs another pass over the output.
  std::string digest;
  if (arguments.digest) {
    OBD_ASSIGN_OR_RETURN(digest, fileDigest(target.path));
  }
  std::cerr << "digest: " << digest << '\n';
  std::cout << "overlaybd-commit has committed " << target.path << " SUCCESSFULLY\n";
  return Status::ok();
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App* app = nullptr;
  return runTool(
      argc, argv, {"overlaybd-commit", "Turns a writable layer into a read-only one."},
      [&](CLI::App& cli) {
        app = &cli;
        cli.add_option("data", arguments.data, "data file of the layer; with --commit_sealed: the sealed layer")
            ->required();
        cli.add_option("index", arguments.index, "index file of the layer; with --commit_sealed: the output")->required();
        cli.add_option("commit", arguments.output, "the output; not with --seal and --commit_sealed");
        cli.add_option("-m", arguments.message, "message to store, at most 256 bytes");
        cli.add_option("--uuid", arguments.uuid, "UUID of the new layer; all zero if not given");
        cli.add_option("-p,--parent-uuid", arguments.parent, "UUID of the layer below; that of the source if not given");
        cli.add_flag("-z", arguments.compress, "compress (ZFile)");
        cli.add_flag("-t", arguments.tar, "wrap into a tar; only with -z");
        cli.add_flag("-f", arguments.replace, "replace an existing output");
        cli.add_option("--algorithm", arguments.algorithm, "lz4 or zstd")->capture_default_str();
        cli.add_option("--bs", arguments.blockSizeKib, "block size in KiB: 4, 8, 16, 32 or 64")->capture_default_str();
        cli.add_option("--compress_threads", arguments.threads, "threads that compress; 0: one for each core")
            ->capture_default_str();
        CLI::Option* seal = cli.add_flag("--seal", arguments.seal, "seal DATA in place and write nothing else");
        cli.add_flag("--commit_sealed", arguments.sealed, "the source is a sealed layer")->excludes(seal);
        cli.add_flag("--digest", arguments.digest, "compute the SHA-256 of the output for the digest line");
        cli.add_flag("--turboOCI,--fastoci", arguments.unsupported, "turboOCI layer (not supported in this version)");
        for (const char* option : {"--upload", "--upload_bs", "--cred_file_path", "--tls_key_path", "--tls_cert_path"}) {
          cli.add_option(option, arguments.unsupportedText, "(not supported in this version)");
        }
        cli.add_flag("--verbose", arguments.verbose, "say what was written");
      },
      [&]() -> Status {
        OBD_RETURN_IF_ERROR(refuseUnsupported(*app, {"--turboOCI", "--upload", "--upload_bs", "--cred_file_path",
                                                     "--tls_key_path", "--tls_cert_path"}));
        return arguments.seal ? seal(arguments) : commit(arguments);
      });
}
