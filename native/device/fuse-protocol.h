// What we use of the FUSE wire protocol beyond <linux/fuse.h> of Debian 12 (protocol 7.38); the kernel speaks 7.45.
#pragma once

#include <linux/fuse.h>

#include <cstddef>
#include <cstdint>

namespace obd::fuse {

inline constexpr uint32_t kMajor = 7;
inline constexpr uint32_t kMinor = 45;     // the newest minor whose replies we know; features are switched by flags
inline constexpr uint32_t kMinorMin = 31;  // FALLOCATE, ASYNC_DIO and MAX_PAGES exist

// INIT flags above bit 31 travel in `flags2`.
inline constexpr uint64_t kHasResend = uint64_t{1} << 39;
// open_out.open_flags: the kernel need not hold the inode lock around direct writes.
inline constexpr uint32_t kFopenParallelDirectWrites = 1U << 6;
// Bit of `unique` that marks a request delivered again. It is echoed unchanged.
inline constexpr uint64_t kUniqueResend = uint64_t{1} << 63;

// fallocate(2) modes that the loop driver sends.
inline constexpr uint32_t kFallocPunchHole = 0x3;   // PUNCH_HOLE | KEEP_SIZE: discard
inline constexpr uint32_t kFallocZeroRange = 0x11;  // ZERO_RANGE | KEEP_SIZE: write zeroes

// A WRITE request is header, arguments, payload; a READ reply is header, payload.
inline constexpr size_t kWritePrefix = sizeof(fuse_in_header) + sizeof(fuse_write_in);
static_assert(sizeof(fuse_in_header) == 40 && sizeof(fuse_write_in) == 40 && sizeof(fuse_out_header) == 16);
static_assert(sizeof(fuse_read_in) == 40 && sizeof(fuse_fallocate_in) == 32 && sizeof(fuse_init_out) == 64);
static_assert(sizeof(fuse_attr_out) == 104 && sizeof(fuse_entry_out) == 128 && sizeof(fuse_open_out) == 16);

}  // namespace obd::fuse
