// Microbenchmark of the two indexes against what they replace, in one binary and one run:
//   merged index   against std::lower_bound over the same sorted segments;
//   upper index    against std::set of segments, as a writable layer uses it (random 4 KiB writes, then look-ups).
// Prints medians of several rounds, in nanoseconds per operation, and their ratio. Seeded: OBD_SEED.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "lsmt/merged-index.h"
#include "lsmt/upper-index.h"

namespace obd {
namespace {

constexpr int kRounds = 5;
constexpr size_t kQueries = 1 << 20;

volatile uint64_t sink;  // keeps results alive

template <typename Work>
double medianNs(size_t operations, Work&& work) {
  std::vector<double> times;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    sink = work();
    const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
    times.push_back(elapsed.count() / static_cast<double>(operations));
  }
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2];
}

void printRow(const char* what, size_t records, double plainNs, double oursNs) {
  std::printf("%-34s %9zu %12.1f %12.1f %8.1f x\n", what, records, plainNs, oursNs, plainNs / oursNs);
  std::fflush(stdout);
}

// What a file system leaves in a layer: extents of a few blocks, gaps of any width.
std::vector<Segment> makeSegments(std::mt19937_64& random, size_t count) {
  std::vector<Segment> segments;
  uint64_t at = 0;
  for (size_t i = 0; i < count; ++i) {
    at += 8 * (random() % 64);
    const uint64_t length = 8 * (1 + random() % 32);
    segments.emplace_back(at, length, 8 + 8 * (random() % (1 << 26)), false, static_cast<uint8_t>(random() % 30));
    at += length;
  }
  return segments;
}

void benchMerged(std::mt19937_64& random, size_t count) {
  const std::vector<Segment> segments = makeSegments(random, count);
  const MergedIndex index(segments);
  std::vector<uint64_t> queries(kQueries);
  for (uint64_t& query : queries) query = random() % segments.back().end() / 8 * 8;

  const double plain = medianNs(kQueries, [&] {
    uint64_t sum = 0;
    for (const uint64_t query : queries) {
      const auto it = std::lower_bound(segments.begin(), segments.end(), query,
                                       [](const Segment& segment, uint64_t sector) { return segment.end() <= sector; });
      sum += static_cast<uint64_t>(it - segments.begin());
    }
    return sum;
  });
  const double found = medianNs(kQueries, [&] {
    uint64_t sum = 0;
    for (const uint64_t query : queries) sum += index.find(query);
    return sum;
  });
  const double runs = medianNs(kQueries, [&] {
    uint64_t sum = 0;
    for (const uint64_t query : queries) {
      static_cast<void>(index.lookup(query, query + 8, [&](const Run& run) {
        sum += run.moffset;
        return true;
      }));
    }
    return sum;
  });
  printRow("merged: find a sector", count, plain, found);
  printRow("merged: all runs of 4 KiB", count, plain, runs);
}

struct ByOffset {
  using is_transparent = void;
  bool operator()(const Segment& a, const Segment& b) const { return a.offset() < b.offset(); }
  bool operator()(const Segment& a, uint64_t b) const { return a.offset() < b; }
  bool operator()(uint64_t a, const Segment& b) const { return a < b.offset(); }
};
using SegmentSet = std::set<Segment, ByOffset>;

// What a tree of segments has to do for every write: cut what it overlaps, then insert.
void insertInto(SegmentSet& set, const Segment& segment) {
  auto it = set.upper_bound(segment.offset());
  if (it != set.begin() && std::prev(it)->end() > segment.offset()) --it;
  while (it != set.end() && it->offset() < segment.end()) {
    const Segment old = *it;
    it = set.erase(it);
    if (old.offset() < segment.offset()) set.insert(old.cut(old.offset(), segment.offset()));
    if (old.end() > segment.end()) it = set.insert(old.cut(segment.end(), old.end())).first;
  }
  set.insert(segment);
}

void benchUpper(std::mt19937_64& random, size_t count) {
  const uint64_t blocks = uint64_t{16} << 18;  // 16 GiB in 4 KiB blocks
  std::vector<uint64_t> writes(count);
  for (uint64_t& block : writes) block = random() % blocks * 8;
  std::vector<uint64_t> queries(kQueries);
  for (uint64_t& block : queries) block = random() % blocks * 8;

  SegmentSet set;
  const double plainInsert = medianNs(count, [&] {
    set.clear();
    uint64_t moffset = 8;
    for (const uint64_t offset : writes) {
      insertInto(set, Segment(offset, 8, moffset));
      moffset += 8;
    }
    return set.size();
  });
  std::unique_ptr<UpperIndex> index;
  const double insert = medianNs(count, [&] {
    index = std::make_unique<UpperIndex>(blocks * 8);
    uint64_t moffset = 8;
    for (const uint64_t offset : writes) {
      index->map(offset, 8, moffset);
      moffset += 8;
    }
    return index->memoryBytes();
  });
  const double overwrite = medianNs(count, [&] {
    uint64_t moffset = 8;
    for (const uint64_t offset : writes) {
      index->map(offset, 8, moffset);
      moffset += 8;
    }
    return moffset;
  });
  const double plainOverwrite = medianNs(count, [&] {
    uint64_t moffset = 8;
    for (const uint64_t offset : writes) {
      insertInto(set, Segment(offset, 8, moffset));
      moffset += 8;
    }
    return moffset;
  });
  const double plainLookup = medianNs(kQueries, [&] {
    uint64_t sum = 0;
    for (const uint64_t offset : queries) {
      auto it = set.upper_bound(offset);
      if (it != set.begin() && std::prev(it)->end() > offset) --it;
      if (it != set.end() && it->offset() < offset + 8) sum += it->moffset();
    }
    return sum;
  });
  const double lookup = medianNs(kQueries, [&] {
    uint64_t sum = 0;
    for (const uint64_t offset : queries) {
      static_cast<void>(index->lookup(offset, offset + 8, [&](const Run& run) {
        sum += run.moffset;
        return true;
      }));
    }
    return sum;
  });
  printRow("upper: insert into an empty index", count, plainInsert, insert);
  printRow("upper: overwrite", count, plainOverwrite, overwrite);
  printRow("upper: look up 4 KiB", count, plainLookup, lookup);
  std::printf("%-34s %9zu %11.1fM (64-byte nodes) %.1fM\n", "upper: memory", count,
              static_cast<double>(set.size() * 64) / 1e6, static_cast<double>(index->memoryBytes()) / 1e6);
}

int run() {
  const char* given = std::getenv("OBD_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : 42;
  std::printf("OBD_SEED=%llu, medians of %d rounds, ns per operation\n", static_cast<unsigned long long>(seed), kRounds);
  std::printf("%-34s %9s %12s %12s %10s\n", "what", "records", "std", "ours", "ratio");
  std::mt19937_64 random(seed);
  for (const size_t count : {size_t{1000}, size_t{30'000}, size_t{1'000'000}}) benchMerged(random, count);
  benchUpper(random, 1'000'000);
  return 0;
}

}  // namespace
}  // namespace obd

int main() { return obd::run(); }
