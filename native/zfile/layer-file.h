// Opens a read-only layer's file through its wrappers: tar( ZFile( content ) ), each optional, each found by its first
// bytes (formats.md §1). What comes out is the content as a plain random-access File; writing to it fails.
#pragma once

#include <memory>
#include <string>

#include "base/result.h"
#include "io/file.h"

namespace obd {

// Which wrappers were found on the way to the content.
struct LayerFileKind {
  bool tar = false;
  bool zfile = false;
};

// `direct` asks for O_DIRECT where it pays: on content that is stored raw. Compressed layers are read through the page
// cache, because their blocks start at any byte.
// notFound, permissionDenied, io: of opening; dataLoss: a wrapper is damaged; unimplemented: a valid form we don't read.
// The result is immutable; any thread may read it. `kind`, if given, is filled on success.
Result<std::unique_ptr<File>> openLayerFile(const std::string& path, bool direct, LayerFileKind* kind = nullptr);

// The same for an already opened file, which the result owns.
Result<std::unique_ptr<File>> openLayerFile(std::unique_ptr<File> file, LayerFileKind* kind = nullptr);

}  // namespace obd
