// Calls overlaybd-blockd over its control socket: Connect, JSON over HTTP/1.1 on a unix socket.
#pragma once

#include <chrono>
#include <string>

#include <nlohmann/json.hpp>

#include "base/result.h"

namespace obd {

class ControlClient final {
 public:
  explicit ControlClient(std::string socketPath) : socketPath_(std::move(socketPath)) {}

  // Method of overlaybd.control.v1.BlockDaemon. The daemon's error comes back with its code and text; unavailable when
  // it cannot be reached or does not answer in time.
  Result<nlohmann::json> call(const std::string& method, const nlohmann::json& request,
                              std::chrono::seconds timeout) const;

 private:
  std::string socketPath_;
};

}  // namespace obd
