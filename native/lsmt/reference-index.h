// The plain form of an index: a map of segments, as the original keeps them. Slow, small and obviously right; the flat
// indexes are compared with it, and it gives the original's segment counts.
#pragma once

#include <map>
#include <vector>

#include "lsmt/format.h"
#include "lsmt/run.h"

namespace obd {

// Confined to one thread.
class ReferenceIndex final {
 public:
  // Replaces whatever it overlaps, keeping the uncovered parts of older segments. Neighbours are not joined.
  void insert(const Segment& segment);
  void erase(uint64_t begin, uint64_t end);

  std::vector<Segment> segments() const;
  size_t size() const { return map_.size(); }
  // Consecutive runs that cover [begin, end), joined like those of the flat indexes.
  std::vector<Run> lookup(uint64_t begin, uint64_t end) const;

 private:
  std::map<uint64_t, Segment> map_;  // by offset
};

}  // namespace obd
