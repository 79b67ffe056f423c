// A FUSE connection that exposes one regular file, served by threads of its own. The file system is never visible in
// any mount namespace: it exists as a detached mount until the file is open, then only as that open file.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/own-fd.h"
#include "base/result.h"
#include "device/block-target.h"
#include "io/block-backend.h"

namespace obd {

// What INIT settled. Together with the descriptor this is all a successor needs to go on serving the connection
// without a new INIT.
struct FuseParameters {
  uint32_t minor = 0;           // protocol minor in force
  uint32_t maxWriteBytes = 0;   // longest READ and WRITE
  uint32_t connectionId = 0;    // /sys/fs/fuse/connections/<id>
  bool canResend = false;       // the kernel re-delivers in-flight requests on demand
  uint32_t blockSizeBytes = 0;  // requests are multiples of this
};

// start() and stop are called by one thread; the serving threads call only the backend. The starting thread must not be
// one that serves another device's backend: it waits for replies of this session.
class FuseSession final {
 public:
  static constexpr uint64_t kFileInode = 2;

  // Mounts, settles INIT and starts `threads` workers. Borrows `backend`, which must outlive the session.
  // unavailable without /dev/fuse or the mount API; permissionDenied without CAP_SYS_ADMIN.
  // REQUIRES: `name` is a valid file name.
  static Result<std::unique_ptr<FuseSession>> start(BlockBackend& backend, const std::string& name,
                                                    uint32_t blockSizeBytes, uint32_t threads);
  // Aborts the connection if anything still keeps it alive, joins the workers.
  ~FuseSession();
  FuseSession(const FuseSession&) = delete;
  FuseSession& operator=(const FuseSession&) = delete;

  // Calls `use` with the open file, then forgets the mount: from now on the connection lives as long as something that
  // `use` gave the file to (a loop device) keeps it open. `use` runs on a thread apart (apart.h), so it must not count
  // on other descriptors of the process.
  Status withFile(const std::function<Status(int fd)>& use);

  // Makes every request, also those in flight, fail. The workers end.
  Status abort();
  // Waits until all workers ended, which they do when the last open file of the connection is gone, or after abort().
  // False after `timeoutMs`; kForever waits for a backend however long it takes.
  static constexpr uint32_t kForever = UINT32_MAX;
  bool join(uint32_t timeoutMs);

  bool isAlive() const { return aliveWorkers_.load(std::memory_order_acquire) != 0; }
  const FuseParameters& parameters() const { return parameters_; }
  BlockTargetStats stats() const;
  // Writes, discards and zeroings answered or begun so far: unchanged = nothing new to flush.
  uint64_t changes() const;

 private:
  struct Worker;

  FuseSession(BlockBackend& backend, std::string name);
  Status mountDetached();
  Status negotiate(uint32_t blockSizeBytes);
  Status startWorkers(uint32_t threads);

  BlockBackend& backend_;
  const std::string name_;
  const uint64_t sizeBytes_;
  const bool readOnly_;
  OwnFd fuse_;
  OwnFd mount_;
  FuseParameters parameters_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<uint32_t> aliveWorkers_{0};
};

}  // namespace obd
