// Runs work that may wait for a device this very process serves.
//
// Such a wait cannot be interrupted. If the process is killed meanwhile, the serving threads die at once but the waiting
// one stays, and with an ordinary thread's shared descriptor table it keeps /dev/fuse open: the kernel would see a live
// server, never answer, and the process could never be reaped. A thread with a descriptor table of its own, which holds
// no /dev/fuse, lets the connection end with the process, and so gets its EIO.
#pragma once

#include <fcntl.h>
#include <linux/close_range.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <future>
#include <memory>
#include <system_error>
#include <thread>

#include "base/result.h"

namespace obd {

// Calls `work` on a thread of its own whose descriptor table has only 0 to 2 and `keepFd` (-1 = none) of the process's.
// `work` must close what it opens. The future is ready when it returned; the caller must keep what `work` uses.
template <typename Work>
std::future<Status> runApart(int keepFd, Work work) {
  auto task = std::make_shared<std::packaged_task<Status()>>([keepFd, work = std::move(work)]() mutable -> Status {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);
    pthread_setname_np(pthread_self(), "obd-apart");
    if (::unshare(CLONE_FILES) != 0) return fromErrno("give a thread its own descriptors", errno);
    const auto keep = static_cast<unsigned int>(keepFd);
    const bool keeps = keepFd > 2;
    if (keeps && keep > 3 && ::close_range(3, keep - 1, 0) != 0) return fromErrno("close_range", errno);
    if (::close_range(keeps ? keep + 1 : 3, ~0U, 0) != 0) return fromErrno("close_range", errno);
    return work();
  });
  std::future<Status> outcome = task->get_future();
  try {
    std::thread([task] { (*task)(); }).detach();
  } catch (const std::system_error& error) {
    std::promise<Status> failed;
    failed.set_value(fromErrno("start a thread", error.code().value()));
    return failed.get_future();
  }
  return outcome;
}

}  // namespace obd
