// CRC-32C (Castagnoli) as the ZFile format uses it: the caller's start value, no inversions, no final XOR (FORMAT.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace obd {

// The fastest form this processor has; chosen once, at the first call. Chains: f(f(s, a), b) == f(s, a + b).
uint32_t crc32cRaw(uint32_t start, std::span<const std::byte> data);

// Byte by byte, by the definition. What the others are tested against.
uint32_t crc32cReference(uint32_t start, std::span<const std::byte> data);

// Eight tables, eight bytes a step: for processors without the instruction.
uint32_t crc32cTables(uint32_t start, std::span<const std::byte> data);

// REQUIRES: crc32cHasHardware().
uint32_t crc32cHardware(uint32_t start, std::span<const std::byte> data);
bool crc32cHasHardware();

}  // namespace obd
