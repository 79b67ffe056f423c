#include "addon/mount-table.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <optional>

#include "base/own-fd.h"

namespace obd {
namespace {

constexpr size_t kReadBytes = 64 * 1024;
// The kernel copies one page of option text.
constexpr size_t kMountDataMax = 4095;
constexpr unsigned long kBindFlags = MS_BIND | MS_REC;

// The kernel writes space, tab, newline and backslash as three octal digits.
std::string decodeEscapes(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  const auto isOctal = [](char c) { return c >= '0' && c <= '7'; };
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] == '\\' && i + 3 < text.size() && isOctal(text[i + 1]) && isOctal(text[i + 2]) &&
        isOctal(text[i + 3])) {
      out.push_back(static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0')));
      i += 3;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const size_t at = text.find(separator);
    parts.push_back(text.substr(0, at));
    if (at == std::string_view::npos) return parts;
    text.remove_prefix(at + 1);
  }
}

// Commas within an option are written as \054, so the raw text is split first.
void addOptions(std::string_view text, std::vector<std::string>& options) {
  for (const std::string_view raw : split(text, ',')) {
    std::string option = decodeEscapes(raw);
    if (!option.empty() && std::find(options.begin(), options.end(), option) == options.end()) {
      options.push_back(std::move(option));
    }
  }
}

std::optional<uint32_t> number(std::string_view text) {
  uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// "36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
std::optional<MountTableEntry> parseLine(std::string_view line) {
  const std::vector<std::string_view> fields = split(line, ' ');
  const auto dash = std::find(fields.begin() + std::min<ptrdiff_t>(6, std::ssize(fields)), fields.end(), "-");
  if (fields.size() < 9 || fields.end() - dash < 3) return std::nullopt;
  const std::vector<std::string_view> device = split(fields[2], ':');
  if (device.size() != 2) return std::nullopt;
  const auto deviceMajor = number(device[0]);
  const auto deviceMinor = number(device[1]);
  if (!deviceMajor || !deviceMinor) return std::nullopt;
  MountTableEntry entry;
  entry.mountPoint = decodeEscapes(fields[4]);
  entry.fsType = decodeEscapes(dash[1]);
  entry.source = decodeEscapes(dash[2]);
  entry.deviceMajor = *deviceMajor;
  entry.deviceMinor = *deviceMinor;
  addOptions(fields[5], entry.options);
  if (fields.end() - dash > 3) addOptions(dash[3], entry.options);
  return entry;
}

struct FlagWord {
  std::string_view word;
  unsigned long flag;
  bool isSet;
};

constexpr FlagWord kFlagWords[] = {
    {"defaults", 0, true},
    {"ro", MS_RDONLY, true},
    {"rw", MS_RDONLY, false},
    {"nosuid", MS_NOSUID, true},
    {"suid", MS_NOSUID, false},
    {"nodev", MS_NODEV, true},
    {"dev", MS_NODEV, false},
    {"noexec", MS_NOEXEC, true},
    {"exec", MS_NOEXEC, false},
    {"sync", MS_SYNCHRONOUS, true},
    {"async", MS_SYNCHRONOUS, false},
    {"dirsync", MS_DIRSYNC, true},
    {"mand", MS_MANDLOCK, true},
    {"nomand", MS_MANDLOCK, false},
    {"noatime", MS_NOATIME, true},
    {"atime", MS_NOATIME, false},
    {"nodiratime", MS_NODIRATIME, true},
    {"diratime", MS_NODIRATIME, false},
    {"relatime", MS_RELATIME, true},
    {"norelatime", MS_RELATIME, false},
    {"strictatime", MS_STRICTATIME, true},
    {"nostrictatime", MS_STRICTATIME, false},
    {"lazytime", MS_LAZYTIME, true},
    {"nolazytime", MS_LAZYTIME, false},
    {"silent", MS_SILENT, true},
    {"loud", MS_SILENT, false},
    {"bind", MS_BIND, true},
    {"rbind", MS_BIND | MS_REC, true},
    {"remount", MS_REMOUNT, true},
};

}  // namespace

Result<std::vector<MountTableEntry>> parseMountTable(std::string_view text) {
  std::vector<MountTableEntry> entries;
  size_t number = 0;
  for (const std::string_view line : split(text, '\n')) {
    number++;
    if (line.empty()) continue;
    std::optional<MountTableEntry> entry = parseLine(line);
    if (!entry) return dataLoss("mount table: line " + std::to_string(number) + " is not understood");
    entries.push_back(std::move(*entry));
  }
  return entries;
}

Result<std::vector<MountTableEntry>> readMountTable(const std::string& pid) {
  const bool isNumber = !pid.empty() && pid.size() <= 10 && pid.find_first_not_of("0123456789") == std::string::npos;
  if (pid != "self" && !isNumber) return invalidArgument("\"" + pid + "\" is not a process");
  const std::string path = "/proc/" + pid + "/mountinfo";
  const OwnFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.isValid()) return fromErrno("open " + path, errno);
  std::string text;
  for (;;) {
    const size_t before = text.size();
    text.resize(before + kReadBytes);
    const ssize_t got = ::read(file.get(), text.data() + before, kReadBytes);
    const int error = errno;
    text.resize(before + (got > 0 ? static_cast<size_t>(got) : 0));
    if (got == 0) break;
    if (got < 0 && error != EINTR) return fromErrno("read " + path, error);
  }
  return parseMountTable(text).withContext(path);
}

Status mountFileSystem(const std::string& type, const std::string& source, const std::string& target,
                       const std::vector<std::string>& options) {
  unsigned long flags = 0;
  std::string data;
  for (const std::string& option : options) {
    const auto* word = std::find_if(std::begin(kFlagWords), std::end(kFlagWords),
                                    [&](const FlagWord& candidate) { return candidate.word == option; });
    if (word == std::end(kFlagWords)) {
      data += (data.empty() ? "" : ",") + option;
    } else if (word->isSet) {
      flags |= word->flag;
    } else {
      flags &= ~word->flag;
    }
  }
  const std::string context = "mount " + type + " " + source + " at " + target;
  if (data.size() > kMountDataMax) {
    return invalidArgument(context + ": " + std::to_string(data.size()) + " bytes of options, at most " +
                           std::to_string(kMountDataMax) + " are possible");
  }
  const bool isBind = (flags & MS_BIND) != 0 && (flags & MS_REMOUNT) == 0;
  const unsigned long first = isBind ? flags & kBindFlags : flags;
  if (::mount(source.c_str(), target.c_str(), type.c_str(), first, isBind ? nullptr : data.c_str()) != 0) {
    return fromErrno(context, errno);
  }
  // The kernel ignores every other flag of a bind.
  if (isBind && (flags & ~kBindFlags) != 0) {
    if (::mount(nullptr, target.c_str(), nullptr, (flags & ~static_cast<unsigned long>(MS_REC)) | MS_REMOUNT, nullptr) != 0) {
      Status failed = fromErrno(context + ": flags", errno);
      (void)::umount2(target.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW);
      return failed;
    }
  }
  return Status::ok();
}

Status unmountFileSystem(const std::string& target, bool detach) {
  if (::umount2(target.c_str(), UMOUNT_NOFOLLOW | (detach ? MNT_DETACH : 0)) != 0) {
    return fromErrno("unmount " + target, errno);
  }
  return Status::ok();
}

}  // namespace obd
