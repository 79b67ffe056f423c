#include "zfile/tar.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>

#include "base/assert.h"

namespace obd {
namespace {

constexpr size_t kBlock = 512;
using TarBlock = std::array<std::byte, kBlock>;

// Fields of a ustar header: position, size.
struct Field {
  size_t at;
  size_t size;
};
constexpr Field kName{0, 100}, kMode{100, 8}, kUid{108, 8}, kGid{116, 8}, kSize{124, 12}, kMtime{136, 12},
    kChecksum{148, 8}, kTypeFlag{156, 1}, kMagic{257, 6}, kVersion{263, 2}, kUname{265, 32}, kGname{297, 32};

// The file's whole st_mode, as the original stores it; constant, so that the same layer gives the same bytes.
constexpr uint64_t kMemberMode = 0100644;

std::string_view text(std::span<const std::byte> block, Field field) {
  return {reinterpret_cast<const char*>(block.data()) + field.at, field.size};
}

// Sums of all bytes with the checksum field taken as spaces.
struct Sums {
  uint64_t asUnsigned = 0;
  int64_t asSigned = 0;
};

Sums sumsOf(std::span<const std::byte> block) {
  Sums sums;
  for (size_t i = 0; i < block.size(); i++) {
    const bool inChecksum = i >= kChecksum.at && i < kChecksum.at + kChecksum.size;
    const uint8_t value = inChecksum ? uint8_t{' '} : std::to_integer<uint8_t>(block[i]);
    sums.asUnsigned += value;
    sums.asSigned += static_cast<int8_t>(value);
  }
  return sums;
}

// Octal with leading spaces, ended by a space, a NUL or the end of the field; or, top bit set, big-endian binary.
std::optional<uint64_t> parseNumber(std::span<const std::byte> block, Field field) {
  const std::string_view digits = text(block, field);
  if ((static_cast<uint8_t>(digits[0]) & 0x80U) != 0) {
    uint64_t value = static_cast<uint8_t>(digits[0]) & 0x7fU;
    for (const char c : digits.substr(1)) {
      if (value >> 55 != 0) return std::nullopt;
      value = value << 8 | static_cast<uint8_t>(c);
    }
    return value;
  }
  size_t at = 0;
  while (at < digits.size() && digits[at] == ' ') at++;
  uint64_t value = 0;
  for (; at < digits.size() && digits[at] != ' ' && digits[at] != '\0'; at++) {
    if (digits[at] < '0' || digits[at] > '7') return std::nullopt;
    value = value << 3 | static_cast<uint64_t>(digits[at] - '0');
  }
  return value;
}

bool isUstarHeader(std::span<const std::byte> block) {
  if (text(block, {kMagic.at, 5}) != "ustar" || text(block, kVersion) != "00") return false;
  const std::optional<uint64_t> stored = parseNumber(block, kChecksum);
  if (!stored) return false;
  const Sums sums = sumsOf(block);
  return *stored == sums.asUnsigned || static_cast<int64_t>(*stored) == sums.asSigned;
}

// The value of `size` among the records "<length> <key>=<value>\n" of a pax area; 0 if it is not there.
Result<uint64_t> paxSize(std::string_view records) {
  uint64_t size = 0;
  while (!records.empty() && records.front() != '\0') {
    size_t length = 0;
    size_t at = 0;
    for (; at < records.size() && records[at] >= '0' && records[at] <= '9' && length < kBlock; at++) {
      length = length * 10 + static_cast<size_t>(records[at] - '0');
    }
    if (at == 0 || at >= records.size() || records[at] != ' ' || length <= at + 1 || length > records.size() ||
        records[length - 1] != '\n') {
      return dataLoss("tar: malformed pax record");
    }
    const std::string_view record = records.substr(at + 1, length - at - 2);
    constexpr std::string_view kKey = "size=";
    if (record.starts_with(kKey)) {
      size = 0;
      for (const char c : record.substr(kKey.size())) {
        if (c < '0' || c > '9' || size > (uint64_t{1} << 59)) return dataLoss("tar: malformed pax size");
        size = size * 10 + static_cast<uint64_t>(c - '0');
      }
    }
    records.remove_prefix(length);
  }
  return size;
}

// A window onto the file it owns.
class TarMemberFile final : public File {
 public:
  TarMemberFile(std::unique_ptr<File> file, TarMember member) : file_(std::move(file)), member_(member) {}

  Result<size_t> pread(std::span<std::byte> out, uint64_t offset) const override {
    if (offset >= member_.sizeBytes) return size_t{0};
    const uint64_t left = member_.sizeBytes - offset;
    return file_->pread(out.first(static_cast<size_t>(std::min<uint64_t>(out.size(), left))), member_.offset + offset);
  }
  Result<uint64_t> size() const override { return member_.sizeBytes; }
  Result<uint64_t> seekData(uint64_t offset) const override { return seek(offset, &File::seekData); }
  Result<uint64_t> seekHole(uint64_t offset) const override { return seek(offset, &File::seekHole); }
  Status sync() override { return Status::ok(); }
  Status pwrite(std::span<const std::byte>, uint64_t) override { return readOnly(); }
  Status truncate(uint64_t) override { return readOnly(); }
  Status punchHole(uint64_t, uint64_t) override { return readOnly(); }
  const std::string& name() const override { return file_->name(); }

 private:
  Status readOnly() const { return failedPrecondition(name() + ": the member of a tar is read-only"); }

  Result<uint64_t> seek(uint64_t offset, Result<uint64_t> (File::*how)(uint64_t) const) const {
    if (offset >= member_.sizeBytes) return member_.sizeBytes;
    OBD_ASSIGN_OR_RETURN(const uint64_t found, ((*file_).*how)(member_.offset + offset));
    return std::min(found - member_.offset, member_.sizeBytes);
  }

  std::unique_ptr<File> file_;
  TarMember member_;
};

// Writing.

void put(TarBlock& block, Field field, std::string_view value) {
  OBD_ASSERT(value.size() <= field.size, "tar field");
  std::memcpy(block.data() + field.at, value.data(), value.size());
}

// Right-aligned octal after spaces, then a space; 8-byte fields end in a NUL, too.
void putNumber(TarBlock& block, Field field, uint64_t value) {
  const size_t width = field.size == 8 ? 6 : field.size - 1;
  std::string digits(width, ' ');
  size_t at = width;
  do {
    OBD_ASSERT(at > 0, "tar number");
    digits[--at] = static_cast<char>('0' + (value & 7));
    value >>= 3;
  } while (value != 0);
  put(block, field, digits + ' ');
}

enum class Form { kPlaceholder, kFinal };

void putMagicAndChecksum(TarBlock& block, Form form) {
  put(block, kMagic, form == Form::kFinal ? "ustar" : "xxtar");
  put(block, kVersion, form == Form::kFinal ? "00" : "xx");
  putNumber(block, kChecksum, sumsOf(block).asUnsigned);
}

// "<length> size=<n>\n", where the length counts its own digits.
std::string paxRecord(uint64_t sizeBytes) {
  const std::string rest = " size=" + std::to_string(sizeBytes) + "\n";
  size_t length = rest.size() + 1;
  while (std::to_string(length).size() + rest.size() != length) length++;
  return std::to_string(length) + rest;
}

std::array<std::byte, kTarHeaderSize> headers(uint64_t sizeBytes, Form form) {
  const std::string record = paxRecord(sizeBytes);
  TarBlock pax{};
  put(pax, kName, "overlaybd.pax");
  putNumber(pax, kSize, record.size());
  put(pax, kTypeFlag, "x");
  putMagicAndChecksum(pax, form);

  TarBlock records{};
  put(records, {0, kBlock}, record);

  TarBlock member{};
  put(member, kName, form == Form::kFinal ? "overlaybd.commit" : "overlaybd.new");
  putNumber(member, kMode, kMemberMode);
  putNumber(member, kUid, 0);
  putNumber(member, kGid, 0);
  putNumber(member, kSize, 0);  // the true size is in the pax record only
  putNumber(member, kMtime, 0);
  put(member, kTypeFlag, "0");
  put(member, kUname, "root");
  put(member, kGname, "root");
  putMagicAndChecksum(member, form);

  std::array<std::byte, kTarHeaderSize> all{};
  std::memcpy(all.data(), pax.data(), kBlock);
  std::memcpy(all.data() + kBlock, records.data(), kBlock);
  std::memcpy(all.data() + 2 * kBlock, member.data(), kBlock);
  return all;
}

}  // namespace

Result<std::optional<TarMember>> findTarMember(const File& file) {
  TarBlock first{};
  OBD_ASSIGN_OR_RETURN(const size_t got, file.pread(first, 0));
  if (got < kBlock || !isUstarHeader(first)) return std::optional<TarMember>();

  const auto locate = [&]() -> Result<TarMember> {
    OBD_ASSIGN_OR_RETURN(const uint64_t fileSize, file.size());
    TarBlock header = first;
    TarMember member;
    uint64_t size = 0;
    if (text(first, kTypeFlag) == "x") {
      const std::optional<uint64_t> areaSize = parseNumber(first, kSize);
      if (!areaSize) return dataLoss("tar: malformed size of the pax area");
      if (*areaSize > kBlock) return unimplemented("tar: pax area of " + std::to_string(*areaSize) + " bytes");
      TarBlock records{};
      OBD_RETURN_IF_ERROR(file.preadExact(records, kBlock));
      OBD_ASSIGN_OR_RETURN(size, paxSize(text(records, {0, static_cast<size_t>(*areaSize)})));
      OBD_RETURN_IF_ERROR(file.preadExact(header, 2 * kBlock));
      if (!isUstarHeader(header)) return dataLoss("tar: no member header after the pax header");
      member.offset = kTarHeaderSize;
    } else {
      member.offset = kBlock;
    }
    if (size == 0) {
      const std::optional<uint64_t> plain = parseNumber(header, kSize);
      if (!plain) return dataLoss("tar: malformed size");
      size = *plain;
    }
    if (member.offset > fileSize || size > fileSize - member.offset) {
      return dataLoss("tar: the member's " + std::to_string(size) + " bytes reach past the end of the file");
    }
    member.sizeBytes = size;
    return member;
  };
  Result<TarMember> member = locate().withContext(file.name());
  if (!member.isOk()) return member.status();
  return std::optional<TarMember>(member.value());
}

Result<std::unique_ptr<File>> unwrapTar(std::unique_ptr<File> file, bool* wasTar) {
  OBD_ASSIGN_OR_RETURN(const std::optional<TarMember> member, findTarMember(*file));
  if (wasTar != nullptr) *wasTar = member.has_value();
  if (!member) return file;
  return std::unique_ptr<File>(std::make_unique<TarMemberFile>(std::move(file), *member));
}

Status TarWriter::fail(Status status) {
  if (!status.isOk()) failure_ = status;
  return status;
}

Status TarWriter::start() {
  started_ = true;
  return fail(below_.write(headers(0, Form::kPlaceholder)));
}

Status TarWriter::write(std::span<const std::byte> data) {
  OBD_ASSERT(!finished_, "write after finish");
  if (!failure_.isOk()) return failure_;
  if (!started_) OBD_RETURN_IF_ERROR(start());
  if (data.empty()) return Status::ok();
  OBD_RETURN_IF_ERROR(fail(below_.write(data)));
  sizeBytes_ += data.size();
  return Status::ok();
}

Status TarWriter::finish() {
  OBD_ASSERT(!finished_, "finish twice");
  finished_ = true;
  if (!failure_.isOk()) return failure_;
  if (!started_) OBD_RETURN_IF_ERROR(start());
  const std::array<std::byte, 3 * kBlock> zeros{};
  const auto padding = static_cast<size_t>((kBlock - sizeBytes_ % kBlock) % kBlock);
  OBD_RETURN_IF_ERROR(fail(below_.write(std::span(zeros).first(padding + 2 * kBlock))));
  OBD_RETURN_IF_ERROR(fail(below_.finish()));
  OBD_RETURN_IF_ERROR(fail(file_.pwrite(headers(sizeBytes_, Form::kFinal), 0)));
  return fail(file_.sync());
}

}  // namespace obd
