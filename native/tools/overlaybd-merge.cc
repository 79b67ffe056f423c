// overlaybd-merge: flattens all layers of an image into one.
#include <iostream>

#include "image/stack.h"
#include "lsmt/commit.h"
#include "tools/layer-output.h"
#include "tools/tool.h"

namespace {

using namespace obd;

struct Arguments {
  std::string config;
  std::string output;
  bool compress = true;
  bool tar = false;
  bool replace = false;
  int64_t threads = 0;
  bool verbose = false;
  std::string unsupportedText;
};

Status run(const CLI::App& app, const Arguments& arguments) {
  OBD_RETURN_IF_ERROR(refuseUnsupported(
      app, {"--upload", "--upload_bs", "--cred_file_path", "--tls_key_path", "--tls_cert_path"}));
  if (arguments.output.empty()) return invalidArgument("expects an output file");
  if (arguments.tar) std::cerr << "note: -t has no effect here; overlaybd-commit and overlaybd-zfile make tars\n";
  OBD_ASSIGN_OR_RETURN(const ImageConfig config, ImageConfig::load(arguments.config));
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<Stack> stack, Stack::open(config, {}));
  LayerFormat format;
  format.zfile = arguments.compress;
  format.rewriteHeader = false;
  format.threads = threadCount(arguments.threads);
  LayerTarget target;
  target.path = arguments.output;
  target.replace = arguments.replace;
  stack->forEachRun(0, Sectors::fromBytes(stack->virtualSize()).value, [&](const Run& run) {
    if (run.kind == RunKind::kData) target.expectedBytes += Sectors(run.length).bytes();
    return true;
  });
  CommitOptions options;
  options.uuid = Uuid();
  CommitStats stats;
  OBD_RETURN_IF_ERROR(writeLayerFile(target, format, [&](Sink& out) -> Status {
    OBD_ASSIGN_OR_RETURN(stats, commitStack(*stack->lowers(), stack->upper(), options, out));
    return Status::ok();
  }));
  if (arguments.verbose) {
    std::cerr << config.lowers.size() << " lower layers, " << stats.dataBytes << " bytes of data, " << stats.entries
              << " index entries\n";
  }
  std::cout << "overlaybd-merge has merged into " << arguments.output << " SUCCESSFULLY\n";
  return Status::ok();
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App* app = nullptr;
  return runTool(
      argc, argv, {"overlaybd-merge", "Flattens all layers of an image into one read-only layer."},
      [&](CLI::App& cli) {
        app = &cli;
        cli.add_option("config", arguments.config, "config.v1.json of the image")->required();
        cli.add_option("output", arguments.output, "layer to write");
        cli.add_flag("--compress,!--no-compress", arguments.compress, "write a ZFile; --compress=false: a raw layer");
        cli.add_flag("-t", arguments.tar, "accepted, without effect");
        cli.add_flag("-f", arguments.replace, "replace an existing output");
        cli.add_option("--compress_threads", arguments.threads, "threads that compress; 0: one for each core")
            ->capture_default_str();
        for (const char* option : {"--upload", "--upload_bs", "--cred_file_path", "--tls_key_path", "--tls_cert_path"}) {
          cli.add_option(option, arguments.unsupportedText, "(not supported in this version)");
        }
        cli.add_flag("--verbose", arguments.verbose, "say what was written");
      },
      [&] { return run(*app, arguments); });
}
