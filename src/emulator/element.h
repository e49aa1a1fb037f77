// The 16- and 32-bit float formats that matrix instructions multiply, as float.
#pragma once

#include <bit>
#include <cstdint>

namespace nvemu {

inline float from_bf16(std::uint16_t bits) {
    return std::bit_cast<float>(std::uint32_t{bits} << 16);
}

// Exact, without a branch on normal numbers: the exponent moves from bias 15 to bias 127 by a multiplication,
// which also makes subnormals right; what was the largest exponent is infinity or NaN.
inline float from_f16(std::uint16_t bits) {
    const std::uint32_t sign = std::uint32_t{bits & 0x8000u} << 16;
    const std::uint32_t magnitude = std::uint32_t{bits & 0x7FFFu} << 13;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    const std::uint32_t special =
        (bits & 0x7C00u) == 0x7C00u ? magnitude | 0x7F80'0000u : std::bit_cast<std::uint32_t>(scaled);
    return std::bit_cast<float>(special | sign);
}

// tf32 is a float whose last 13 bits the tensor core does not read.
inline float from_tf32(std::uint32_t bits) {
    return std::bit_cast<float>(bits & 0xFFFF'E000u);
}

}  // namespace nvemu
