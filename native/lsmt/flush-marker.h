// The two entries of an index log that only we write: padding to every other reader. Meaning: FORMAT.md.
#pragma once

#include "lsmt/format.h"

namespace obd {

inline constexpr uint8_t kFlushMarkerTag = 0xF1;
inline constexpr uint8_t kSessionMarkerTag = 0xF2;

// The data of the first `entries` entries of the log is durable.
constexpr Segment flushMarker(uint64_t entries) { return Segment::padding(kFlushMarkerTag, entries); }
// What follows was written under the kernel with this boot hash (48 bits).
constexpr Segment sessionMarker(uint64_t bootHash) { return Segment::padding(kSessionMarkerTag, bootHash); }

}  // namespace obd
