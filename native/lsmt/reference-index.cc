#include "lsmt/reference-index.h"

#include <algorithm>

namespace obd {

void ReferenceIndex::erase(uint64_t begin, uint64_t end) {
  auto it = map_.upper_bound(begin);
  if (it != map_.begin() && std::prev(it)->second.end() > begin) --it;
  while (it != map_.end() && it->second.offset() < end) {
    const Segment old = it->second;
    it = map_.erase(it);
    if (old.offset() < begin) map_.emplace(old.offset(), old.cut(old.offset(), begin));
    if (old.end() > end) it = std::next(map_.emplace(end, old.cut(end, old.end())).first);
  }
}

void ReferenceIndex::insert(const Segment& segment) {
  if (segment.length() == 0) return;
  erase(segment.offset(), segment.end());
  map_.emplace(segment.offset(), segment);
}

std::vector<Segment> ReferenceIndex::segments() const {
  std::vector<Segment> out;
  out.reserve(map_.size());
  for (const auto& [offset, segment] : map_) out.push_back(segment);
  return out;
}

std::vector<Run> ReferenceIndex::lookup(uint64_t begin, uint64_t end) const {
  std::vector<Run> runs;
  const auto add = [&runs](const Run& run) {
    if (!runs.empty()) {
      Run& last = runs.back();
      if (last.kind == run.kind && last.layer == run.layer &&
          (run.kind != RunKind::kData || last.moffset + last.length == run.moffset)) {
        last.length += run.length;
        return;
      }
    }
    runs.push_back(run);
  };
  auto it = map_.upper_bound(begin);
  if (it != map_.begin() && std::prev(it)->second.end() > begin) --it;
  while (begin < end) {
    const uint64_t next = it == map_.end() ? end : std::min(end, it->second.offset());
    if (begin < next) {
      add({begin, next - begin, 0, 0, RunKind::kGap});
      begin = next;
      continue;
    }
    const Segment part = it->second.cut(begin, std::min(end, it->second.end()));
    if (part.zeroed()) {
      add({part.offset(), part.length(), 0, 0, RunKind::kZero});
    } else {
      add({part.offset(), part.length(), part.moffset(), part.tag(), RunKind::kData});
    }
    begin = part.end();
    ++it;
  }
  return runs;
}

}  // namespace obd
