#include "zfile/layer-file.h"

#include <utility>

#include "io/posix-file.h"
#include "zfile/reader.h"
#include "zfile/tar.h"

namespace obd {

Result<std::unique_ptr<File>> openLayerFile(std::unique_ptr<File> file, LayerFileKind* kind) {
  LayerFileKind found;
  OBD_ASSIGN_OR_RETURN(file, unwrapTar(std::move(file), &found.tar));
  OBD_ASSIGN_OR_RETURN(found.zfile, ZFileReader::detect(*file));
  if (found.zfile) {
    OBD_ASSIGN_OR_RETURN(file, ZFileReader::open(std::move(file)));
  }
  if (kind != nullptr) *kind = found;
  return file;
}

Result<std::unique_ptr<File>> openLayerFile(const std::string& path, bool direct, LayerFileKind* kind) {
  PosixOpen options;
  options.randomAccess = true;
  LayerFileKind found;
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> buffered, openPosixFile(path, options));
  OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> content, openLayerFile(std::move(buffered), &found));
  if (direct && !found.zfile) {
    options.direct = true;
    OBD_ASSIGN_OR_RETURN(std::unique_ptr<File> unbuffered, openPosixFile(path, options));
    OBD_ASSIGN_OR_RETURN(content, openLayerFile(std::move(unbuffered), &found));
  }
  if (kind != nullptr) *kind = found;
  return content;
}

}  // namespace obd
