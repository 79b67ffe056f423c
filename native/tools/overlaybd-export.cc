// overlaybd-export: flattens an image, lowers and upper, to a sparse raw disk.
#include <cstring>
#include <iostream>

#include "image/stack.h"
#include "tools/output-file.h"
#include "tools/progress.h"
#include "tools/tool.h"

namespace {

using namespace obd;

constexpr size_t kPiece = 1024 * 1024;
constexpr size_t kHoleUnit = 4096;  // stretches of zeros of this size and alignment become holes

bool isZero(std::span<const std::byte> bytes) {
  return bytes[0] == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

// Writes what is not zero of `piece`, which belongs at `offset`.
Status writeSparse(File& out, std::span<const std::byte> piece, uint64_t offset) {
  size_t at = 0;
  const auto unitEnd = [&](size_t from) {
    return static_cast<size_t>(std::min<uint64_t>(piece.size(), (offset + from) / kHoleUnit * kHoleUnit + kHoleUnit - offset));
  };
  while (at < piece.size()) {
    if (isZero(piece.subspan(at, unitEnd(at) - at))) {
      at = unitEnd(at);
      continue;
    }
    size_t end = unitEnd(at);
    while (end < piece.size() && !isZero(piece.subspan(end, unitEnd(end) - end))) end = unitEnd(end);
    OBD_RETURN_IF_ERROR(out.pwrite(piece.subspan(at, end - at), offset + at));
    at = end;
  }
  return Status::ok();
}

Status run(const std::string& configPath, const std::string& outputPath, bool replace) {
  OBD_ASSIGN_OR_RETURN(const ImageConfig config, ImageConfig::load(configPath));
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<Stack> stack, Stack::open(config, {}));
  const uint64_t sectors = Sectors::fromBytes(stack->virtualSize()).value;
  uint64_t total = 0;
  stack->forEachRun(0, sectors, [&](const Run& run) {
    if (run.kind == RunKind::kData) total += Sectors(run.length).bytes();
    return true;
  });
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> output, OutputFile::create(outputPath, replace));
  OBD_RETURN_IF_ERROR(output->file().truncate(stack->virtualSize()));
  {
    Progress progress(outputPath, total);
    std::vector<std::byte> buffer(kPiece);
    const auto copy = [&](uint64_t at, uint64_t to) -> Status {
      while (at < to) {
        const std::span<std::byte> piece(buffer.data(), static_cast<size_t>(std::min<uint64_t>(kPiece, to - at)));
        OBD_RETURN_IF_ERROR(stack->read(at, piece).withContext("read at byte " + std::to_string(at)));
        OBD_RETURN_IF_ERROR(writeSparse(output->file(), piece, at));
        at += piece.size();
        progress.add(piece.size());
      }
      return Status::ok();
    };
    // Neighbouring runs of different layers are read in one go.
    uint64_t from = 0;
    uint64_t to = 0;
    Status status;
    stack->forEachRun(0, sectors, [&](const Run& run) {
      if (run.kind != RunKind::kData) return true;
      if (run.offset != to) {
        status = copy(Sectors(from).bytes(), Sectors(to).bytes());
        from = run.offset;
      }
      to = run.end();
      return status.isOk();
    });
    OBD_RETURN_IF_ERROR(status);
    OBD_RETURN_IF_ERROR(copy(Sectors(from).bytes(), Sectors(to).bytes()));
  }
  return output->publish();
}

}  // namespace

int main(int argc, char** argv) {
  std::string config;
  std::string output;
  bool replace = false;
  return runTool(
      argc, argv, {"overlaybd-export", "Flattens an image, lowers and upper, to a sparse raw disk."},
      [&](CLI::App& cli) {
        cli.add_option("config", config, "config.v1.json of the image")->required();
        cli.add_option("output", output, "raw file to write")->required();
        cli.add_flag("-f", replace, "replace an existing output");
      },
      [&] { return run(config, output, replace); });
}
