// overlaybd-attacher: attaches an image as a block device, or detaches it, through overlaybd-blockd.
// stdout carries the device path and nothing else; everything else goes to stderr.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <thread>

#include "image/image.h"
#include "tools/control-client.h"
#include "tools/tool.h"

namespace {

using namespace obd;

constexpr const char* kOwner = "attacher";
constexpr const char* kDefaultSocket = "/run/overlaybd-blockd/control.sock";
constexpr int kAttempts = 5;
constexpr std::chrono::seconds kPause{1};
constexpr std::chrono::seconds kTimeout{120};

struct Arguments {
  std::string socket;
  std::string id;
  std::string config;
  bool withDeviceId = false;
  bool verbose = false;
};

Status attachOnce(const ControlClient& client, const Arguments& arguments, const std::string& configPath) {
  OBD_ASSIGN_OR_RETURN(
      const nlohmann::json answer,
      client.call("Attach", {{"owner", kOwner}, {"id", arguments.id}, {"configPath", configPath}}, kTimeout));
  const std::string path = answer.value(nlohmann::json::json_pointer("/device/path"), "");
  if (path.empty()) return ioError("overlaybd-blockd named no device");
  std::cout << path << std::endl;
  return Status::ok();
}

// Where the daemon does not write it: it knows absolute paths only.
void recordResult(const ImageConfig& config, const std::string& configPath, const Status& status) {
  const std::filesystem::path named(config.resultFile);
  if (named.is_absolute()) return;
  const std::filesystem::path path =
      std::filesystem::path(configPath).parent_path() / (named.empty() ? "init-debug.log" : named);
  std::ofstream out(path, std::ios::trunc);
  out << (status.isOk() ? "success" : "failed:" + status.message());
  if (!out.flush()) std::cerr << "note: the result could not be written to " << path << '\n';
}

Status attach(const ControlClient& client, const Arguments& arguments) {
  std::error_code failure;
  const std::string path = std::filesystem::absolute(arguments.config, failure).lexically_normal().string();
  if (failure) return fromErrno(arguments.config, failure.value());
  OBD_ASSIGN_OR_RETURN(const ImageConfig config, ImageConfig::load(path));
  if (config.lowers.empty() && !config.hasUpper()) return invalidArgument(path + ": names no layer");
  Status status;
  for (int attempt = 1; attempt <= kAttempts; attempt++) {
    if (attempt > 1) std::this_thread::sleep_for(kPause);
    status = attachOnce(client, arguments, path);
    if (arguments.verbose) std::cerr << "attach " << arguments.id << ", attempt " << attempt << ": " << status.toString() << '\n';
    // Only what may be otherwise in a second is tried again.
    if (status.code() != Code::kUnavailable && status.code() != Code::kResourceExhausted) break;
  }
  recordResult(config, path, status);
  return status;
}

Status detach(const ControlClient& client, const Arguments& arguments) {
  Status status =
      client.call("Detach", {{"owner", kOwner}, {"id", arguments.id}}, kTimeout).status();
  if (arguments.verbose) std::cerr << "detach " << arguments.id << ": " << status.toString() << '\n';
  return status;
}

Status run(const CLI::App& app, const Arguments& arguments) {
  if (arguments.id.empty()) return invalidArgument("--id is empty");
  const ControlClient client(arguments.socket);
  return app.got_subcommand("attach") ? attach(client, arguments) : detach(client, arguments);
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  const char* fromEnvironment = std::getenv("OVERLAYBD_BLOCKD_SOCKET");
  arguments.socket = fromEnvironment != nullptr && *fromEnvironment != '\0' ? fromEnvironment : kDefaultSocket;
  CLI::App* app = nullptr;
  return runTool(
      argc, argv, {"overlaybd-attacher", "Attaches an image as a block device, or detaches it, through overlaybd-blockd."},
      [&](CLI::App& cli) {
        app = &cli;
        cli.add_option("--socket", arguments.socket,
                       "control socket of overlaybd-blockd; also OVERLAYBD_BLOCKD_SOCKET in the environment")
            ->capture_default_str();
        cli.require_subcommand(1);
        cli.fallthrough();
        CLI::App* attachCommand = cli.add_subcommand("attach", "attach an image and print the device's path");
        attachCommand->add_option("--id", arguments.id, "name of the device, chosen by the caller")->required();
        attachCommand->add_option("--config", arguments.config, "config.v1.json of the image")->required();
        attachCommand->add_flag("--with-devid", arguments.withDeviceId, "accepted: a device always knows its id");
        attachCommand->add_flag("-v,--verbose", arguments.verbose, "say what happens");
        CLI::App* detachCommand = cli.add_subcommand("detach", "detach it again; unknown ids are detached already");
        detachCommand->add_option("--id", arguments.id, "name given to attach")->required();
        detachCommand->add_flag("-v,--verbose", arguments.verbose, "say what happens");
      },
      [&] { return run(*app, arguments); });
}
