#include "tools/layer-output.h"

#include <iostream>
#include <memory>

#include "io/file-sink.h"
#include "tools/output-file.h"
#include "tools/progress.h"
#include "zfile/tar.h"
#include "zfile/writer.h"

namespace obd {
namespace {

Status writeOnce(const LayerTarget& target, const LayerFormat& format, const std::function<Status(Sink&)>& produce,
                 bool* blockTooLarge) {
  OBD_ASSIGN_OR_RETURN(const std::unique_ptr<OutputFile> output, OutputFile::create(target.path, target.replace));
  FileSink sink(output->file());
  Sink* top = &sink;
  TarWriter tar(sink, output->file());
  if (format.tar) top = &tar;
  std::unique_ptr<ZFileWriter> zfile;
  if (format.zfile) {
    ZFileOptions options;
    options.algorithm = format.algorithm;
    options.blockSize = format.blockSize;
    options.threads = format.threads;
    if (format.rewriteHeader) {
      options.rewriteHeaderIn = &output->file();
      options.headerOffset = format.tar ? kTarHeaderSize : 0;
    }
    zfile = std::make_unique<ZFileWriter>(*top, options);
    top = zfile.get();
  }
  Progress progress(target.path, target.expectedBytes);
  ProgressSink counted(*top, progress);
  const Status status = produce(counted);
  *blockTooLarge = zfile && zfile->blockTooLarge();
  OBD_RETURN_IF_ERROR(status);
  return output->publish();
}

}  // namespace

Status writeLayerFile(const LayerTarget& target, const LayerFormat& format,
                      const std::function<Status(Sink&)>& produce) {
  bool blockTooLarge = false;
  Status status = writeOnce(target, format, produce, &blockTooLarge);
  if (status.isOk() || !blockTooLarge) return status;
  std::cerr << "note: some data does not compress, and 64 KiB blocks of it could not be read by every reader; "
               "writing blocks of 32 KiB instead\n";
  LayerFormat smaller = format;
  smaller.blockSize = 32768;
  return writeOnce(target, smaller, produce, &blockTooLarge);
}

}  // namespace obd
