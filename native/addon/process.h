// What the daemons need of their own process: a lock, a peer's identity, the service manager, the clock.
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"

namespace obd {

// Takes an exclusive lock that lasts as long as the process; creates the file (0600). False: another holds it.
Result<bool> lockForLife(const std::string& path);

struct PeerCredentials {
  uint32_t uid = 0;
  uint32_t gid = 0;
  int32_t pid = 0;
};
// Of the peer of a connected unix socket.
Result<PeerCredentials> peerCredentials(int fd);

// Sends one datagram to the service manager's socket: a path, or '@' and an abstract name.
Status notifyServiceManager(const std::string& socket, const std::string& state);

// Nanoseconds since the epoch.
uint64_t clockRealtimeNs();

}  // namespace obd
