// A line on the terminal that says how far a long run is.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "io/sink.h"

namespace obd {

// Silent when stderr is no terminal, and for the first half second. Confined to one thread.
class Progress final {
 public:
  // `totalBytes` 0: unknown.
  Progress(std::string label, uint64_t totalBytes);
  ~Progress();  // clears the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void add(uint64_t bytes);

 private:
  using Clock = std::chrono::steady_clock;

  std::string label_;
  uint64_t total_;
  uint64_t done_ = 0;
  bool enabled_;
  bool shown_ = false;
  Clock::time_point begin_;
  Clock::time_point next_;
};

// Counts what passes. Borrows both.
class ProgressSink final : public Sink {
 public:
  ProgressSink(Sink& below, Progress& progress) : below_(below), progress_(progress) {}
  Status write(std::span<const std::byte> data) override {
    progress_.add(data.size());
    return below_.write(data);
  }
  Status finish() override { return below_.finish(); }

 private:
  Sink& below_;
  Progress& progress_;
};

}  // namespace obd
