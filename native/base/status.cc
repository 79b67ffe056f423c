#include "base/status.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <system_error>

#include "base/assert.h"

namespace obd {

void assertFailed(const char* condition, const char* message, const char* file, int line) {
  std::fprintf(stderr, "assertion failed: %s (%s) at %s:%d\n", condition, message, file, line);
  std::abort();
}

std::string_view codeName(Code code) {
  switch (code) {
    case Code::kOk: return "ok";
    case Code::kInvalidArgument: return "invalid-argument";
    case Code::kNotFound: return "not-found";
    case Code::kAlreadyExists: return "already-exists";
    case Code::kFailedPrecondition: return "failed-precondition";
    case Code::kDataLoss: return "data-loss";
    case Code::kNoSpace: return "no-space";
    case Code::kResourceExhausted: return "resource-exhausted";
    case Code::kPermissionDenied: return "permission-denied";
    case Code::kUnavailable: return "unavailable";
    case Code::kCancelled: return "cancelled";
    case Code::kIo: return "io";
    case Code::kUnimplemented: return "unimplemented";
  }
  return "unknown";
}

int Status::toErrno() const {
  if (errno_ != 0) return errno_;
  switch (code_) {
    case Code::kOk: return 0;
    case Code::kInvalidArgument: return EINVAL;
    case Code::kNotFound: return ENOENT;
    case Code::kAlreadyExists: return EEXIST;
    case Code::kFailedPrecondition: return EBUSY;
    case Code::kNoSpace: return ENOSPC;
    case Code::kResourceExhausted: return ENOMEM;
    case Code::kPermissionDenied: return EACCES;
    case Code::kUnavailable: return ENODEV;
    case Code::kCancelled: return EINTR;
    case Code::kUnimplemented: return EOPNOTSUPP;
    case Code::kDataLoss:
    case Code::kIo: return EIO;
  }
  return EIO;
}

Status Status::withContext(std::string_view context) && {
  if (!isOk()) message_ = std::string(context) + ": " + message_;
  return std::move(*this);
}

Status Status::withContext(std::string_view context) const& { return Status(*this).withContext(context); }

std::string Status::toString() const {
  if (isOk()) return "ok";
  return std::string(codeName(code_)) + ": " + message_;
}

Status fromErrno(std::string_view context, int errnoValue) {
  Code code = Code::kIo;
  switch (errnoValue) {
    case ENOENT:
    case ENXIO: code = Code::kNotFound; break;
    case EEXIST: code = Code::kAlreadyExists; break;
    case EINVAL:
    case ENAMETOOLONG:
    case ENOTDIR:
    case EISDIR:
    case ELOOP: code = Code::kInvalidArgument; break;
    case ENOSPC:
    case EDQUOT: code = Code::kNoSpace; break;
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case EAGAIN: code = Code::kResourceExhausted; break;
    case EPERM:
    case EACCES:
    case EROFS: code = Code::kPermissionDenied; break;
    case EBUSY: code = Code::kFailedPrecondition; break;
    case ENODEV: code = Code::kUnavailable; break;
    case EINTR: code = Code::kCancelled; break;
    case EOPNOTSUPP: code = Code::kUnimplemented; break;
    default: break;
  }
  std::string text(context);
  text += ": ";
  text += std::generic_category().message(errnoValue);
  return {code, std::move(text), errnoValue};
}

Status invalidArgument(std::string message) { return {Code::kInvalidArgument, std::move(message)}; }
Status notFound(std::string message) { return {Code::kNotFound, std::move(message)}; }
Status alreadyExists(std::string message) { return {Code::kAlreadyExists, std::move(message)}; }
Status failedPrecondition(std::string message) { return {Code::kFailedPrecondition, std::move(message)}; }
Status dataLoss(std::string message) { return {Code::kDataLoss, std::move(message)}; }
Status unavailable(std::string message) { return {Code::kUnavailable, std::move(message)}; }
Status unimplemented(std::string message) { return {Code::kUnimplemented, std::move(message)}; }
Status ioError(std::string message) { return {Code::kIo, std::move(message)}; }

}  // namespace obd
