#include "tools/tool.h"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <charconv>
#include <cstring>
#include <iostream>
#include <thread>

namespace obd {
namespace {

// Read by a signal handler: lock-free pointers to strings that live until they are taken out.
std::array<std::atomic<const char*>, 8> partialPaths{};
static_assert(std::atomic<const char*>::is_always_lock_free);

void removePartialsAndDie(int signalNumber) {
  for (std::atomic<const char*>& slot : partialPaths) {
    if (const char* path = slot.load()) ::unlink(path);
  }
  // SA_RESETHAND: this time the default action ends the process, and the parent sees the signal.
  ::raise(signalNumber);
}

void catchSignals() {
  struct sigaction action {};
  action.sa_handler = removePartialsAndDie;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_NODEFER);
  sigemptyset(&action.sa_mask);
  for (const int signalNumber : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(signalNumber, &action, nullptr);
}

}  // namespace

PartialPath::PartialPath(const std::string& path) : slot_(partialPaths.size()) {
  char* copy = ::strdup(path.c_str());
  OBD_ASSERT(copy != nullptr, "memory for a path");
  for (size_t i = 0; i < partialPaths.size(); i++) {
    const char* expected = nullptr;
    if (partialPaths[i].compare_exchange_strong(expected, copy)) {
      slot_ = i;
      return;
    }
  }
  OBD_ASSERT(false, "too many partial files");
}

PartialPath::~PartialPath() {
  const char* path = partialPaths[slot_].exchange(nullptr);
  ::free(const_cast<char*>(path));
}

int runTool(int argc, char** argv, const ToolDescription& tool, const std::function<void(CLI::App&)>& declare,
            const std::function<Status()>& run) {
  catchSignals();
  try {
    CLI::App app(tool.description, tool.name);
    app.set_version_flag("--version", std::string(tool.name) + " " + OBD_VERSION, "print the version and exit");
    app.get_formatter()->column_width(34);
    declare(app);
    try {
      app.parse(argc, argv);
    } catch (const CLI::Success& wanted) {
      return app.exit(wanted);
    } catch (const CLI::ParseError& error) {
      std::cerr << tool.name << ": " << error.what() << "\nRun '" << tool.name << " --help' for what it takes.\n";
      return 1;
    }
    const Status status = run();
    if (status.isOk()) return 0;
    std::cerr << tool.name << ": " << status.toString() << '\n';
  } catch (const std::exception& error) {
    std::cerr << tool.name << ": internal error: " << error.what() << '\n';
  }
  return 1;
}

Result<std::optional<Uuid>> parseUuid(const std::string& option, const std::string& text) {
  if (text.empty()) return std::optional<Uuid>();
  const std::optional<Uuid> uuid = Uuid::parse(text);
  if (!uuid) return invalidArgument(option + ": not a UUID: " + text);
  return uuid;
}

Result<zfile::Algorithm> parseAlgorithm(const std::string& text) {
  if (text == "lz4") return zfile::Algorithm::kLz4;
  if (text == "zstd") return zfile::Algorithm::kZstd;
  return invalidArgument("--algorithm: lz4 or zstd, not '" + text + "'");
}

Result<uint32_t> parseBlockSize(int64_t kib) {
  if (kib >= 0 && kib <= 1024) {
    const auto blockSize = static_cast<uint32_t>(kib * 1024);
    if (zfile::isLegalBlockSize(blockSize)) return blockSize;
  }
  return invalidArgument("--bs: 4, 8, 16, 32 or 64 (KiB), not " + std::to_string(kib));
}

Result<uint64_t> parseSizeGib(const std::string& option, const std::string& text) {
  uint64_t gib = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), gib);
  if (error != std::errc() || end != text.data() + text.size()) {
    return invalidArgument(option + ": a whole number of GiB, not '" + text + "'");
  }
  if (gib > kVirtualSizeMax / kGiB) return invalidArgument(option + ": " + text + " GiB are more than a disk can have");
  return gib * kGiB;
}

uint32_t threadCount(int64_t wanted) {
  constexpr int64_t kMost = 256;
  if (wanted > 0) return static_cast<uint32_t>(std::min(wanted, kMost));
  return std::max(1U, std::thread::hardware_concurrency());
}

Status refuseUnsupported(const CLI::App& app, std::initializer_list<const char*> options) {
  for (const char* option : options) {
    if (app.count(option) > 0) return unimplemented(std::string(option) + " is not supported in this version");
  }
  return Status::ok();
}

}  // namespace obd
