// overlaybd-create: makes an empty writable layer.
#include <sys/stat.h>
#include <unistd.h>

#include <iostream>

#include "lsmt/upper.h"
#include "tools/make-ext4.h"
#include "tools/tool.h"

namespace {

struct Arguments {
  std::string data;
  std::string index;
  std::string sizeGib;
  std::string parent;
  bool sparse = false;
  bool mkfs = false;
  bool verbose = false;
  bool unsupported = false;
};

obd::Status run(const CLI::App& app, const Arguments& arguments) {
  using namespace obd;
  OBD_RETURN_IF_ERROR(refuseUnsupported(app, {"--turboOCI", "--raw"}));
  CreateUpperOptions options;
  OBD_ASSIGN_OR_RETURN(options.virtualSize, parseSizeGib("vsize", arguments.sizeGib));
  OBD_ASSIGN_OR_RETURN(const std::optional<Uuid> parent, parseUuid("-u", arguments.parent));
  if (parent) options.parentUuid = *parent;
  options.sparse = arguments.sparse;
  if (arguments.mkfs && options.virtualSize == 0) return invalidArgument("--mkfs needs a size");
  OBD_RETURN_IF_ERROR(createUpper(arguments.data, arguments.index, options));
  if (arguments.mkfs) {
    const PartialPath data(arguments.data);
    const PartialPath index(arguments.index);
    Status made = makeExt4(arguments.data, arguments.index);
    if (!made.isOk()) {
      ::unlink(arguments.data.c_str());
      ::unlink(arguments.index.c_str());
      return std::move(made).withContext("mkfs");
    }
  }
  if (arguments.verbose) {
    std::cerr << (arguments.sparse ? "sparse" : "append-only") << " layer " << options.uuid.toString() << " of "
              << options.virtualSize << " bytes\n";
  }
  std::cout << "overlaybd-create has created files SUCCESSFULLY\n";
  return Status::ok();
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App* app = nullptr;
  return obd::runTool(
      argc, argv, {"overlaybd-create", "Makes an empty writable layer: a data file and an index file."},
      [&](CLI::App& cli) {
        app = &cli;
        cli.add_option("data", arguments.data, "data file to create; must not exist")->required();
        cli.add_option("index", arguments.index, "index file to create; must not exist")->required();
        cli.add_option("vsize", arguments.sizeGib, "size of the disk in whole GiB; 0: that of the layers below")
            ->required();
        cli.add_option("-u", arguments.parent, "UUID of the layer below");
        cli.add_flag("-s", arguments.sparse, "sparse layer instead of an append-only one");
        cli.add_flag("--turboOCI,--fastoci", arguments.unsupported, "turboOCI layer (not supported in this version)");
        cli.add_flag("--raw", arguments.unsupported, "raw disk instead of a layer (not supported in this version)");
        cli.add_flag("--mkfs", arguments.mkfs, "make an ext4 file system in it");
        cli.add_flag("--verbose", arguments.verbose, "say what was made");
      },
      [&] { return run(*app, arguments); });
}
