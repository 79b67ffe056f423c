// A file that appears under its name when it is complete and durable, or not at all.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "io/file.h"
#include "tools/tool.h"

namespace obd {

// Confined to one thread. Until publish() the bytes have no name where the file system allows that (O_TMPFILE: nothing
// is left even by SIGKILL), else one of their own beside the target, which the destructor and signals remove.
class OutputFile final {
 public:
  // alreadyExists unless `replace`; invalidArgument if the path is there and not a regular file.
  static Result<std::unique_ptr<OutputFile>> create(const std::string& path, bool replace);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  File& file() { return *file_; }

  // Syncs, gives the file its name in one step and makes that durable. alreadyExists if somebody was faster and not
  // `replace`. Call once.
  Status publish();

 private:
  OutputFile(std::string path, bool replace) : path_(std::move(path)), replace_(replace) {}

  Status openPartial();
  std::string partialPath() const;

  std::string path_;
  bool replace_;
  std::unique_ptr<File> file_;
  int fd_ = -1;  // of file_, borrowed
  std::optional<PartialPath> named_;  // partialPath() exists
};

}  // namespace obd
