// The one-member tar around a layer (formats.md §10).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "io/file.h"
#include "io/sink.h"

namespace obd {

// Where the content of a wrapped layer lies.
struct TarMember {
  uint64_t offset = 0;
  uint64_t sizeBytes = 0;
};

// Looks at the first 512 bytes: "ustar", "00" and a right checksum make a tar; everything else (GNU-magic tars and
// unfinished files with the placeholder too) is nullopt, to be passed on as it is.
// dataLoss: a tar whose member cannot be where it says; unimplemented: a pax record area of more than one block.
Result<std::optional<TarMember>> findTarMember(const File& file);

// The member of a tar as a read-only File; a file that is no tar comes back unchanged, with *wasTar = false.
Result<std::unique_ptr<File>> unwrapTar(std::unique_ptr<File> file, bool* wasTar);

// Bytes from the start of the file to the content, in what TarWriter writes.
inline constexpr uint64_t kTarHeaderSize = 1536;

// Puts a tar around what is written. The file begins with a placeholder that nobody takes for a tar; finish() writes
// the end, finishes the stage below (all is durable then), and only then writes the real headers and syncs again.
// Confined to one thread. Borrows `below`, which must write to `file` from its byte 0; both must outlive this.
class TarWriter final : public Sink {
 public:
  TarWriter(Sink& below, File& file) : below_(below), file_(file) {}

  Status write(std::span<const std::byte> data) override;
  Status finish() override;

 private:
  Status start();
  Status fail(Status status);

  Sink& below_;
  File& file_;
  uint64_t sizeBytes_ = 0;
  bool started_ = false;
  bool finished_ = false;
  Status failure_;
};

}  // namespace obd
