#include "addon/process.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <ctime>

#include "base/own-fd.h"

namespace obd {

Result<bool> lockForLife(const std::string& path) {
  OwnFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!file.isValid()) return fromErrno("open " + path, errno);
  int result = 0;
  do {
    result = ::flock(file.get(), LOCK_EX | LOCK_NB);
  } while (result != 0 && errno == EINTR);
  if (result != 0) {
    if (errno == EWOULDBLOCK) return false;
    return fromErrno("lock " + path, errno);
  }
  (void)file.release();  // the process's end closes it
  return true;
}

Result<PeerCredentials> peerCredentials(int fd) {
  ucred peer = {};
  socklen_t length = sizeof(peer);
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) return fromErrno("SO_PEERCRED", errno);
  return PeerCredentials{peer.uid, peer.gid, peer.pid};
}

Status notifyServiceManager(const std::string& socket, const std::string& state) {
  sockaddr_un address = {};
  if (socket.size() < 2 || socket.size() >= sizeof(address.sun_path) || (socket[0] != '/' && socket[0] != '@')) {
    return invalidArgument("\"" + socket + "\" is not a notification socket");
  }
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, socket.data(), socket.size());
  if (socket[0] == '@') address.sun_path[0] = '\0';
  const OwnFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!fd.isValid()) return fromErrno("create a socket", errno);
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + socket.size());
  const ssize_t sent = ::sendto(fd.get(), state.data(), state.size(), MSG_NOSIGNAL,
                                reinterpret_cast<const sockaddr*>(&address), length);
  if (sent < 0) return fromErrno("notify " + socket, errno);
  return Status::ok();
}

uint64_t clockRealtimeNs() {
  timespec now = {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace obd
