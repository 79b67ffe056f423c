#include "base/own-fd.h"

#include <unistd.h>

namespace obd {

void OwnFd::reset() {
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

}  // namespace obd
