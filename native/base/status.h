// Operating errors as values. Programmer errors assert; exceptions are bugs.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace obd {

// Closed set; the names cross the native border unchanged (engine/native-errors.ts holds the same table).
enum class Code : uint8_t {
  kOk = 0,
  kInvalidArgument,     // the caller's argument or configuration is wrong
  kNotFound,            // a file, layer or device does not exist
  kAlreadyExists,       // exclusive creation met an existing file
  kFailedPrecondition,  // right call, wrong state (sealed, closed, read-only, busy)
  kDataLoss,            // bytes on disk contradict the format or their checksum
  kNoSpace,             // ENOSPC, EDQUOT
  kResourceExhausted,   // EMFILE, ENFILE, ENOMEM, EAGAIN
  kPermissionDenied,    // EPERM, EACCES, EROFS
  kUnavailable,         // a kernel facility or peer is not there (now)
  kCancelled,
  kIo,                  // EIO and every errno without a better place
  kUnimplemented,       // valid by the format, not supported by us
};

// Lower-case kebab name, e.g. "data-loss". Part of the border contract.
std::string_view codeName(Code code);

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message, int errnoValue = 0)
      : code_(code), errno_(errnoValue), message_(std::move(message)) {}

  static Status ok() { return {}; }
  bool isOk() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

  // The errno to answer the kernel with: the original one where there was one, else the nearest to `code`. 0 if ok.
  int toErrno() const;
  // The errno of the system call that failed; 0 if there was none.
  int systemErrno() const { return errno_; }

  // Prepends "context: ". Context grows going up, once per layer of meaning. No effect on ok.
  Status withContext(std::string_view context) &&;
  Status withContext(std::string_view context) const&;

  // "data-loss: layer 3: index entry 7 …"; "ok".
  std::string toString() const;

 private:
  Code code_ = Code::kOk;
  int errno_ = 0;
  std::string message_;
};

// The one place that maps errno to Code. Message: "context: strerror".
Status fromErrno(std::string_view context, int errnoValue);

Status invalidArgument(std::string message);
Status notFound(std::string message);
Status alreadyExists(std::string message);
Status failedPrecondition(std::string message);
Status dataLoss(std::string message);
Status unavailable(std::string message);
Status unimplemented(std::string message);
Status ioError(std::string message);

}  // namespace obd

// Returns from the enclosing function when `expression` yields a bad Status.
#define OBD_RETURN_IF_ERROR(expression)                   \
  do {                                                    \
    if (::obd::Status obdStatus_ = (expression); !obdStatus_.isOk()) return obdStatus_; \
  } while (false)
