#include "device/fuse-session.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <span>

#include "device/apart.h"
#include "device/fuse-protocol.h"

namespace obd {
namespace {

constexpr uint32_t kPageBytes = 4096;
constexpr uint32_t kMaxWriteBytes = 1U << 20;
constexpr uint16_t kMaxBackground = 256;
constexpr uint16_t kCongestionThreshold = 192;
constexpr int kInitTimeoutMs = 5000;
constexpr uint32_t kEndGraceMs = 20;
// Nothing but this process changes the file, so the kernel may keep what it was told for ever.
constexpr uint64_t kForeverSeconds = uint64_t{1} << 31;
constexpr uint64_t kFileHandle = 1;

template <typename T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

// One worker's memory: [pad][in-header and arguments][payload]. The payload starts on a page, so that a WRITE can go to
// a direct-I/O file, and a READ come from one, without a copy. Faulted in and locked: the kernel must be able to copy
// into it even while the process is being killed, or the request would end with EIO instead of being delivered again.
class RequestBuffer final {
 public:
  static Result<std::unique_ptr<RequestBuffer>> create() {
    void* memory = ::mmap(nullptr, kPageBytes + kMaxWriteBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) return fromErrno("allocate a request buffer", errno);
    (void)::mlock(memory, kPageBytes + kMaxWriteBytes);  // best effort: RLIMIT_MEMLOCK may forbid it
    return std::unique_ptr<RequestBuffer>(new RequestBuffer(static_cast<std::byte*>(memory)));
  }
  RequestBuffer(const RequestBuffer&) = delete;
  RequestBuffer& operator=(const RequestBuffer&) = delete;
  ~RequestBuffer() { ::munmap(memory_, kPageBytes + kMaxWriteBytes); }

  std::byte* payload() const { return memory_ + kPageBytes; }
  std::byte* request() const { return payload() - fuse::kWritePrefix; }
  static constexpr size_t kRequestCapacity = fuse::kWritePrefix + kMaxWriteBytes;
  // A reply of up to kMaxWriteBytes is sent from here, its body being payload().
  std::byte* reply() const { return payload() - sizeof(fuse_out_header); }

 private:
  explicit RequestBuffer(std::byte* memory) : memory_(memory) {}
  std::byte* memory_;
};

// Detached mounts of kernel file systems, through the mount API of Linux 5.2.
Result<OwnFd> newMount(const char* type, std::span<const std::pair<const char*, std::string>> parameters) {
  OwnFd context(::fsopen(type, FSOPEN_CLOEXEC));
  if (!context.isValid()) {
    const int error = errno;
    if (error == ENODEV || error == ENOSYS) {
      return unavailable(std::string("the kernel has no ") + type + " file system");
    }
    return fromErrno(std::string("fsopen ") + type, error);
  }
  for (const auto& [key, value] : parameters) {
    if (::fsconfig(context.get(), FSCONFIG_SET_STRING, key, value.c_str(), 0) != 0) {
      return fromErrno(std::string("mount ") + type + ": option " + key, errno);
    }
  }
  if (::fsconfig(context.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) != 0) {
    return fromErrno(std::string("mount ") + type, errno);
  }
  OwnFd mount(::fsmount(context.get(), FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC));
  if (!mount.isValid()) return fromErrno(std::string("fsmount ") + type, errno);
  return mount;
}

// The errno for the kernel. Some values would not be taken as failures: the loop driver reads EINVAL of an fsync as
// "no need to flush", FUSE reads ENOSYS as "never ask again, it is fine", and values past 511 break the connection.
int replyErrno(const Status& status) {
  const int error = status.toErrno();
  if (error <= 0 || error > 511 || error == EINVAL || error == ENOSYS || error == EINTR || error == EAGAIN) return EIO;
  return error;
}

struct Counters {
  std::atomic<uint64_t> readOps{0}, readBytes{0}, writeOps{0}, writeBytes{0};
  std::atomic<uint64_t> discardOps{0}, discardBytes{0}, flushOps{0}, errors{0};
};

// Each counter has one writer, its worker: no read-modify-write is needed.
void add(std::atomic<uint64_t>& counter, uint64_t amount) {
  counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
}

}  // namespace

struct alignas(64) FuseSession::Worker {
  explicit Worker(FuseSession& owner) : session(owner) {}

  void run(const std::string& threadName);
  void answer(size_t requestBytes);
  void serve(const fuse_in_header& header, size_t argumentBytes);
  void read(uint64_t unique, const fuse_read_in& in);
  void write(uint64_t unique, const fuse_write_in& in, size_t argumentBytes);
  void fallocate(uint64_t unique, const fuse_fallocate_in& in);
  void lookup(const fuse_in_header& header, size_t argumentBytes);
  void getattr(const fuse_in_header& header);
  fuse_attr attributesOf(uint64_t node) const;
  bool isWithinFile(uint64_t offset, uint64_t length) const;

  void replyError(uint64_t unique, int error);
  // Sends `payloadBytes` that lie at buffer->payload().
  void replyPayload(uint64_t unique, size_t payloadBytes);
  template <typename T>
  void replyStruct(uint64_t unique, const T& body) {
    std::memcpy(buffer->payload(), &body, sizeof(body));
    replyPayload(unique, sizeof(body));
  }
  void fail(uint64_t unique, const Status& status) {
    add(counters.errors, 1);
    replyError(unique, replyErrno(status));
  }

  FuseSession& session;
  std::unique_ptr<RequestBuffer> buffer;
  Counters counters;
  std::thread thread;
};

FuseSession::FuseSession(BlockBackend& backend, std::string name)
    : backend_(backend), name_(std::move(name)), sizeBytes_(backend.sizeBytes()), readOnly_(backend.readOnly()) {}

Result<std::unique_ptr<FuseSession>> FuseSession::start(BlockBackend& backend, const std::string& name,
                                                        uint32_t blockSizeBytes, uint32_t threads) {
  std::unique_ptr<FuseSession> session(new FuseSession(backend, name));
  OBD_RETURN_IF_ERROR(session->mountDetached());
  OBD_RETURN_IF_ERROR(session->negotiate(blockSizeBytes));
  OBD_RETURN_IF_ERROR(session->startWorkers(threads));
  return session;
}

FuseSession::~FuseSession() {
  mount_.reset();
  // The connection outlives us only if somebody else holds the file: its I/O must fail, not hang.
  if (!join(kEndGraceMs)) (void)abort();
  join(kForever);
}

Status FuseSession::mountDetached() {
  fuse_ = OwnFd(::open("/dev/fuse", O_RDWR | O_CLOEXEC));
  if (!fuse_.isValid()) {
    const int error = errno;
    if (error == ENOENT || error == ENODEV || error == ENXIO) return unavailable("/dev/fuse: the kernel has no FUSE");
    return fromErrno("open /dev/fuse", error);
  }
  const std::pair<const char*, std::string> parameters[] = {
      {"source", name_},       {"fd", std::to_string(fuse_.get())},          {"rootmode", "40000"}, {"user_id", "0"},
      {"group_id", "0"},       {"max_read", std::to_string(kMaxWriteBytes)},
  };
  OBD_ASSIGN_OR_RETURN(mount_, newMount("fuse", parameters));

  struct statx attributes = {};
  // DONT_SYNC: nobody answers a GETATTR yet.
  if (::statx(mount_.get(), "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &attributes) != 0) {
    return fromErrno("statx of the FUSE root", errno);
  }
  parameters_.connectionId = attributes.stx_dev_minor;
  return Status::ok();
}

Status FuseSession::negotiate(uint32_t blockSizeBytes) {
  OBD_ASSIGN_OR_RETURN(auto buffer, RequestBuffer::create());
  pollfd ready = {fuse_.get(), POLLIN, 0};
  int count = 0;
  do {
    count = ::poll(&ready, 1, kInitTimeoutMs);
  } while (count < 0 && errno == EINTR);
  if (count == 0) return unavailable("FUSE: no INIT from the kernel");
  ssize_t length = 0;
  do {
    length = ::read(fuse_.get(), buffer->request(), RequestBuffer::kRequestCapacity);
  } while (length < 0 && errno == EINTR);
  if (length < 0) return fromErrno("FUSE: read INIT", errno);

  // Older kernels send a shorter INIT; what they leave out is zero.
  fuse_in_header header = {};
  fuse_init_in in = {};
  const auto bytes = static_cast<size_t>(length);
  if (bytes < sizeof(header) + 16) return unavailable("FUSE: short INIT");
  std::memcpy(&header, buffer->request(), sizeof(header));
  std::memcpy(&in, buffer->request() + sizeof(header), std::min(sizeof(in), bytes - sizeof(header)));
  if (header.opcode != FUSE_INIT || in.major != fuse::kMajor || in.minor < fuse::kMinorMin) {
    return unavailable("FUSE: the kernel speaks protocol " + std::to_string(in.major) + "." + std::to_string(in.minor) +
                       ", 7." + std::to_string(fuse::kMinorMin) + " is needed");
  }
  uint64_t offered = in.flags;
  if ((in.flags & FUSE_INIT_EXT) != 0) offered |= uint64_t{in.flags2} << 32;
  const uint64_t needed = FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_BIG_WRITES;
  if ((offered & needed) != needed) return unavailable("FUSE: the kernel lacks asynchronous direct I/O");
  const uint64_t accepted = offered & (needed | FUSE_ASYNC_READ | FUSE_INIT_EXT | fuse::kHasResend);

  fuse_init_out out = {};
  out.major = fuse::kMajor;
  out.minor = std::min(in.minor, fuse::kMinor);
  out.max_readahead = in.max_readahead;
  out.flags = static_cast<uint32_t>(accepted);
  out.flags2 = static_cast<uint32_t>(accepted >> 32);
  out.max_background = kMaxBackground;
  out.congestion_threshold = kCongestionThreshold;
  out.max_write = kMaxWriteBytes;
  out.time_gran = 1;
  out.max_pages = kMaxWriteBytes / kPageBytes;
  fuse_out_header reply = {};
  reply.len = sizeof(reply) + sizeof(out);
  reply.unique = header.unique;
  std::memcpy(buffer->payload(), &out, sizeof(out));
  std::memcpy(buffer->reply(), &reply, sizeof(reply));
  if (::write(fuse_.get(), buffer->reply(), reply.len) < 0) return fromErrno("FUSE: answer INIT", errno);

  parameters_.minor = out.minor;
  parameters_.maxWriteBytes = kMaxWriteBytes;
  parameters_.canResend = (accepted & fuse::kHasResend) != 0;
  parameters_.blockSizeBytes = blockSizeBytes;
  return Status::ok();
}

Status FuseSession::startWorkers(uint32_t threads) {
  for (uint32_t i = 0; i < threads; i++) {
    auto worker = std::make_unique<Worker>(*this);
    OBD_ASSIGN_OR_RETURN(worker->buffer, RequestBuffer::create());
    workers_.push_back(std::move(worker));
  }
  // No signal handler of the process may run on a serving thread.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  Status started;
  for (size_t i = 0; i < workers_.size() && started.isOk(); i++) {
    Worker& worker = *workers_[i];
    std::string suffix = "." + std::to_string(i);
    const size_t room = 15 - suffix.size();
    // The end of a name tells devices apart, its beginning does not.
    std::string threadName = (name_.size() > room ? name_.substr(name_.size() - room) : name_) + suffix;
    aliveWorkers_.fetch_add(1, std::memory_order_release);
    try {
      worker.thread = std::thread([&worker, threadName] { worker.run(threadName); });
    } catch (const std::system_error& error) {
      aliveWorkers_.fetch_sub(1, std::memory_order_release);
      started = fromErrno("start a request thread", error.code().value());
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return started;
}

Status FuseSession::withFile(const std::function<Status(int fd)>& use) {
  const int flags = (readOnly_ ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOFOLLOW;
  const int mount = mount_.get();
  Status used = runApart(mount, [&, mount]() -> Status {
                  const OwnFd ownMount(mount);  // this thread's own duplicate
                  const OwnFd file(::openat(mount, name_.c_str(), flags));
                  if (!file.isValid()) return fromErrno("open the FUSE file", errno);
                  return use(file.get());
                }).get();
  mount_.reset();
  return used;
}

Status FuseSession::abort() {
  OBD_ASSIGN_OR_RETURN(OwnFd control, newMount("fusectl", {}));
  const std::string path = std::to_string(parameters_.connectionId) + "/abort";
  OwnFd button(::openat(control.get(), path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!button.isValid()) {
    if (errno == ENOENT) return Status::ok();  // the connection has ended
    return fromErrno("open the abort file of FUSE connection " + path, errno);
  }
  // The number is used again once a connection has ended. Ours being connected after the open means that what was
  // opened is ours; should it end before the write, the write does nothing.
  pollfd state = {fuse_.get(), POLLIN, 0};
  if (::poll(&state, 1, 0) < 0 || (state.revents & POLLERR) != 0) return Status::ok();
  if (::write(button.get(), "1", 1) != 1) return fromErrno("abort FUSE connection " + path, errno);
  return Status::ok();
}

bool FuseSession::join(uint32_t timeoutMs) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeoutMs);
  uint32_t alive = 0;
  while ((alive = aliveWorkers_.load(std::memory_order_acquire)) != 0) {
    if (timeoutMs != kForever && std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  for (auto& worker : workers_) {
    if (worker->thread.joinable()) worker->thread.join();
  }
  return true;
}

BlockTargetStats FuseSession::stats() const {
  BlockTargetStats sum;
  for (const auto& worker : workers_) {
    const Counters& c = worker->counters;
    sum.readOps += c.readOps.load(std::memory_order_relaxed);
    sum.readBytes += c.readBytes.load(std::memory_order_relaxed);
    sum.writeOps += c.writeOps.load(std::memory_order_relaxed);
    sum.writeBytes += c.writeBytes.load(std::memory_order_relaxed);
    sum.discardOps += c.discardOps.load(std::memory_order_relaxed);
    sum.discardBytes += c.discardBytes.load(std::memory_order_relaxed);
    sum.flushOps += c.flushOps.load(std::memory_order_relaxed);
    sum.errors += c.errors.load(std::memory_order_relaxed);
  }
  return sum;
}

uint64_t FuseSession::changes() const {
  const BlockTargetStats sum = stats();
  return sum.writeOps + sum.discardOps;
}

void FuseSession::Worker::run(const std::string& threadName) {
  pthread_setname_np(pthread_self(), threadName.c_str());
#ifdef PR_SET_IO_FLUSHER
  // Memory this thread allocates must not wait for write-back to our own device. Needs CAP_SYS_RESOURCE: best effort.
  (void)::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
#endif
  for (;;) {
    const ssize_t length = ::read(session.fuse_.get(), buffer->request(), RequestBuffer::kRequestCapacity);
    if (length >= 0) {
      answer(static_cast<size_t>(length));
      continue;
    }
    // ENOENT: the request was withdrawn before we got it.
    if (errno == EINTR || errno == EAGAIN || errno == ENOENT) continue;
    break;  // ENODEV: the file system is gone; anything else would repeat for ever
  }
  session.aliveWorkers_.fetch_sub(1, std::memory_order_release);
}

void FuseSession::Worker::answer(size_t requestBytes) {
  if (requestBytes < sizeof(fuse_in_header)) return;
  const auto header = load<fuse_in_header>(buffer->request());
  if (header.len != requestBytes) return replyError(header.unique, EIO);
  try {
    serve(header, requestBytes - sizeof(header));
  } catch (const std::bad_alloc&) {
    add(counters.errors, 1);
    replyError(header.unique, ENOMEM);
  }
}

void FuseSession::Worker::serve(const fuse_in_header& header, size_t argumentBytes) {
  const std::byte* arguments = buffer->request() + sizeof(fuse_in_header);
  const uint64_t unique = header.unique;
  switch (header.opcode) {
    case FUSE_READ:
      if (argumentBytes < sizeof(fuse_read_in)) return replyError(unique, EINVAL);
      return read(unique, load<fuse_read_in>(arguments));
    case FUSE_WRITE:
      if (argumentBytes < sizeof(fuse_write_in)) return replyError(unique, EINVAL);
      return write(unique, load<fuse_write_in>(arguments), argumentBytes);
    case FUSE_FSYNC: {
      add(counters.flushOps, 1);
      const Status status = session.readOnly_ ? Status::ok() : session.backend_.flush();
      return status.isOk() ? replyError(unique, 0) : fail(unique, status);
    }
    case FUSE_FALLOCATE:
      if (argumentBytes < sizeof(fuse_fallocate_in)) return replyError(unique, EINVAL);
      return fallocate(unique, load<fuse_fallocate_in>(arguments));
    case FUSE_LOOKUP:
      return lookup(header, argumentBytes);
    case FUSE_GETATTR:
      return getattr(header);
    case FUSE_OPEN: {
      if (argumentBytes < sizeof(fuse_open_in)) return replyError(unique, EINVAL);
      if (header.nodeid != kFileInode) return replyError(unique, EISDIR);
      const auto in = load<fuse_open_in>(arguments);
      if (session.readOnly_ && (in.flags & O_ACCMODE) != O_RDONLY) return replyError(unique, EROFS);
      fuse_open_out out = {};
      out.fh = kFileHandle;
      out.open_flags = FOPEN_DIRECT_IO | fuse::kFopenParallelDirectWrites;
      return replyStruct(unique, out);
    }
    case FUSE_STATFS: {
      fuse_statfs_out out = {};
      // bsize becomes the loop queue's discard granularity.
      out.st.bsize = kPageBytes;
      out.st.frsize = kPageBytes;
      out.st.blocks = session.sizeBytes_ / kPageBytes;
      out.st.files = 1;
      out.st.namelen = 255;
      return replyStruct(unique, out);
    }
    case FUSE_FLUSH:  // close(2) of one descriptor: durability is FSYNC's business
    case FUSE_RELEASE:
    case FUSE_ACCESS:
    case FUSE_DESTROY:
      return replyError(unique, 0);
    case FUSE_SETATTR:  // the size of the file is that of the image
      return replyError(unique, session.readOnly_ ? EROFS : EPERM);
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
      return;  // these have no reply
    case FUSE_INTERRUPT:  // ENOSYS: do not send these; every request ends by itself
    default:
      return replyError(unique, ENOSYS);
  }
}

bool FuseSession::Worker::isWithinFile(uint64_t offset, uint64_t length) const {
  const uint64_t mask = session.parameters_.blockSizeBytes - 1;
  return ((offset | length) & mask) == 0 && offset <= session.sizeBytes_ && length <= session.sizeBytes_ - offset;
}

void FuseSession::Worker::read(uint64_t unique, const fuse_read_in& in) {
  if (in.size > kMaxWriteBytes || !isWithinFile(in.offset, in.size)) return replyError(unique, EINVAL);
  const Status status = session.backend_.read(in.offset, {buffer->payload(), in.size});
  if (!status.isOk()) return fail(unique, status);
  add(counters.readOps, 1);
  add(counters.readBytes, in.size);
  replyPayload(unique, in.size);
}

void FuseSession::Worker::write(uint64_t unique, const fuse_write_in& in, size_t argumentBytes) {
  if (session.readOnly_) return replyError(unique, EROFS);
  if (in.size > kMaxWriteBytes || argumentBytes != sizeof(in) + in.size || !isWithinFile(in.offset, in.size)) {
    return replyError(unique, EINVAL);
  }
  add(counters.writeOps, 1);
  const Status status = session.backend_.write(in.offset, {buffer->payload(), in.size});
  if (!status.isOk()) return fail(unique, status);
  add(counters.writeBytes, in.size);
  fuse_write_out out = {};
  out.size = in.size;
  replyStruct(unique, out);
}

void FuseSession::Worker::fallocate(uint64_t unique, const fuse_fallocate_in& in) {
  if (session.readOnly_) return replyError(unique, EROFS);
  if (in.mode != fuse::kFallocPunchHole && in.mode != fuse::kFallocZeroRange) return replyError(unique, EOPNOTSUPP);
  if (!isWithinFile(in.offset, in.length)) return replyError(unique, EINVAL);
  add(counters.discardOps, 1);
  const Status status = in.mode == fuse::kFallocPunchHole ? session.backend_.discard(in.offset, in.length)
                                                          : session.backend_.writeZeroes(in.offset, in.length);
  if (!status.isOk()) return fail(unique, status);
  add(counters.discardBytes, in.length);
  replyError(unique, 0);
}

fuse_attr FuseSession::Worker::attributesOf(uint64_t node) const {
  fuse_attr attr = {};
  attr.ino = node;
  attr.nlink = 1;
  attr.blksize = kPageBytes;
  if (node == kFileInode) {
    attr.mode = S_IFREG | (session.readOnly_ ? 0400U : 0600U);
    attr.size = session.sizeBytes_;
    attr.blocks = session.sizeBytes_ / 512;
  } else {
    attr.mode = S_IFDIR | 0500U;
  }
  return attr;
}

void FuseSession::Worker::lookup(const fuse_in_header& header, size_t argumentBytes) {
  const std::string& name = session.name_;
  const std::byte* argument = buffer->request() + sizeof(fuse_in_header);
  if (header.nodeid != FUSE_ROOT_ID || argumentBytes != name.size() + 1 ||
      std::memcmp(argument, name.c_str(), name.size() + 1) != 0) {
    return replyError(header.unique, ENOENT);
  }
  fuse_entry_out out = {};
  out.nodeid = kFileInode;
  out.entry_valid = kForeverSeconds;
  out.attr_valid = kForeverSeconds;
  out.attr = attributesOf(kFileInode);
  replyStruct(header.unique, out);
}

void FuseSession::Worker::getattr(const fuse_in_header& header) {
  if (header.nodeid != FUSE_ROOT_ID && header.nodeid != kFileInode) return replyError(header.unique, ENOENT);
  fuse_attr_out out = {};
  out.attr_valid = kForeverSeconds;
  out.attr = attributesOf(header.nodeid);
  replyStruct(header.unique, out);
}

// A reply that the kernel no longer wants (ENOENT, the request was aborted) needs no care; ENODEV is seen by read().
void FuseSession::Worker::replyError(uint64_t unique, int error) {
  fuse_out_header out = {};
  out.len = sizeof(out);
  out.error = -error;
  out.unique = unique;
  ssize_t written = 0;
  do {
    written = ::write(session.fuse_.get(), &out, sizeof(out));
  } while (written < 0 && errno == EINTR);
}

void FuseSession::Worker::replyPayload(uint64_t unique, size_t payloadBytes) {
  fuse_out_header out = {};
  out.len = static_cast<uint32_t>(sizeof(out) + payloadBytes);
  out.unique = unique;
  std::memcpy(buffer->reply(), &out, sizeof(out));
  ssize_t written = 0;
  do {
    written = ::write(session.fuse_.get(), buffer->reply(), out.len);
  } while (written < 0 && errno == EINTR);
}

}  // namespace obd
