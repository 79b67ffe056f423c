#include "tools/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace obd {

Progress::Progress(std::string label, uint64_t totalBytes)
    : label_(std::move(label)),
      total_(totalBytes),
      enabled_(::isatty(STDERR_FILENO) == 1),
      begin_(Clock::now()),
      next_(begin_ + std::chrono::milliseconds(500)) {}

Progress::~Progress() {
  if (shown_) std::fputs("\r\033[K", stderr);
}

void Progress::add(uint64_t bytes) {
  done_ += bytes;
  if (!enabled_) return;
  const Clock::time_point now = Clock::now();
  if (now < next_) return;
  next_ = now + std::chrono::milliseconds(100);
  shown_ = true;
  const double mib = static_cast<double>(done_) / 1048576.0;
  const double seconds = std::chrono::duration<double>(now - begin_).count();
  if (total_ > 0) {
    const double percent = std::min(100.0, 100.0 * static_cast<double>(done_) / static_cast<double>(total_));
    std::fprintf(stderr, "\r\033[K%s  %3.0f %%  %.0f MiB  %.0f MiB/s", label_.c_str(), percent, mib, mib / seconds);
  } else {
    std::fprintf(stderr, "\r\033[K%s  %.0f MiB  %.0f MiB/s", label_.c_str(), mib, mib / seconds);
  }
  std::fflush(stderr);
}

}  // namespace obd
