// Assertions stay on in release builds: a broken invariant ends the process and recovery copes.
#pragma once

namespace obd {
[[noreturn]] void assertFailed(const char* condition, const char* message, const char* file, int line);
}  // namespace obd

#define OBD_ASSERT(condition, message) \
  ((condition) ? static_cast<void>(0) : ::obd::assertFailed(#condition, message, __FILE__, __LINE__))
