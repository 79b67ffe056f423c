// Result<T>: a value or a bad Status.
#pragma once

#include <optional>
#include <utility>

#include "base/assert.h"
#include "base/status.h"

namespace obd {

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}                    // NOLINT(google-explicit-constructor)
  Result(Status status) : status_(std::move(status)) {             // NOLINT(google-explicit-constructor)
    OBD_ASSERT(!status_.isOk(), "a Result without a value needs a bad status");
  }

  bool isOk() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  Code code() const { return status_.code(); }

  // REQUIRES: isOk().
  T& value() & { OBD_ASSERT(isOk(), "value() of a failed Result"); return *value_; }
  const T& value() const& { OBD_ASSERT(isOk(), "value() of a failed Result"); return *value_; }
  T&& value() && { OBD_ASSERT(isOk(), "value() of a failed Result"); return *std::move(value_); }

  Result withContext(std::string_view context) && {
    if (isOk()) return std::move(*this);
    return Result(std::move(status_).withContext(context));
  }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace obd

#define OBD_CONCAT_INNER(a, b) a##b
#define OBD_CONCAT(a, b) OBD_CONCAT_INNER(a, b)

// OBD_ASSIGN_OR_RETURN(auto file, File::open(path));
#define OBD_ASSIGN_OR_RETURN(declaration, expression) \
  OBD_ASSIGN_OR_RETURN_INNER(OBD_CONCAT(obdResult_, __LINE__), declaration, expression)
#define OBD_ASSIGN_OR_RETURN_INNER(result, declaration, expression) \
  auto result = (expression);                                       \
  if (!result.isOk()) return result.status();                       \
  declaration = std::move(result).value()
