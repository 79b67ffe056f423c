// Compaction: the live content of a writable layer, a sealed layer or a whole stack as one read-only layer, in one pass
// over a stream.
#pragma once

#include <optional>
#include <string>

#include "io/sink.h"
#include "lsmt/layer-stack.h"
#include "lsmt/upper.h"

namespace obd {

struct CommitOptions {
  std::optional<Uuid> uuid;        // absent: all zero, it is not inherited
  std::optional<Uuid> parentUuid;  // absent: that of the source (of the bottom layer of a stack)
  std::string userTag;             // at most kUserTagMax bytes, else invalidArgument
};

struct CommitStats {
  uint64_t dataBytes = 0;
  uint64_t entries = 0;         // without padding
  uint64_t layerBytes = 0;      // of the whole output
};

// Each writes a complete layer to `out` and finishes it. resourceExhausted when the index would exceed
// kLayerEntriesMax entries, before anything is written past the data. Reading from the layer's own content only:
// lowers attached to the upper do not take part.
Result<CommitStats> commitUpper(const Upper& upper, const CommitOptions& options, Sink& out);
Result<CommitStats> commitLayer(const LayerReader& layer, const CommitOptions& options, Sink& out);
// Flattens: lowers and, unless null, `upper` on top of them. Zeroed segments are kept.
Result<CommitStats> commitStack(const LayerStack& lowers, const Upper* upper, const CommitOptions& options, Sink& out);

}  // namespace obd
