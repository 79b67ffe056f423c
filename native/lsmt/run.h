// What a look-up answers: one stretch of the virtual disk that one source decides. All units are sectors.
#pragma once

#include <cstdint>

namespace obd {

enum class RunKind : uint8_t {
  kGap,   // not mentioned: ask the next lower layer, or zeros
  kZero,  // reads as zeros and hides lower layers
  kData,  // at moffset of the source's file
};

struct Run {
  uint64_t offset = 0;
  uint64_t length = 0;
  uint64_t moffset = 0;  // only of kData
  uint32_t layer = 0;    // only of kData in a stack: 0 = bottom
  RunKind kind = RunKind::kGap;

  uint64_t end() const { return offset + length; }
  friend bool operator==(const Run&, const Run&) = default;
};

}  // namespace obd
