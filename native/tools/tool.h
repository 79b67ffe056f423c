// What all executables have in common: parsing the command line, reporting errors, leaving no half-made files.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>

#include "base/result.h"
#include "lsmt/format.h"
#include "zfile/format.h"

namespace obd {

struct ToolDescription {
  const char* name;         // of the executable
  const char* description;  // one line for --help
};

// Parses (--help and --version included), runs `run` and reports: 0, or 1 with "name: reason" on stderr, also for a
// command line that does not parse. `declare` adds the tool's own options, bound to variables that `run` reads.
// On SIGINT, SIGTERM and SIGHUP the files of PartialPath are removed and the process ends by that signal.
int runTool(int argc, char** argv, const ToolDescription& tool, const std::function<void(CLI::App&)>& declare,
            const std::function<Status()>& run);

// A path that is removed when the process is ended by a signal while this exists. Not more than eight at a time.
class PartialPath final {
 public:
  explicit PartialPath(const std::string& path);
  ~PartialPath();
  PartialPath(const PartialPath&) = delete;
  PartialPath& operator=(const PartialPath&) = delete;

 private:
  size_t slot_;
};

// invalidArgument naming `option`. An empty text is absent.
Result<std::optional<Uuid>> parseUuid(const std::string& option, const std::string& text);
Result<zfile::Algorithm> parseAlgorithm(const std::string& text);
// From KiB. invalidArgument unless it is a block size of the format.
Result<uint32_t> parseBlockSize(int64_t kib);
// From whole GiB. invalidArgument if it is no number or more than the format can address.
Result<uint64_t> parseSizeGib(const std::string& option, const std::string& text);
// 0 or less means one for each core.
uint32_t threadCount(int64_t wanted);

// unimplemented, naming every one of `options` that stands on the command line.
Status refuseUnsupported(const CLI::App& app, std::initializer_list<const char*> options);

}  // namespace obd
