// Conversions between float formats that the host compiler turns into calls of its run time library, which
// older systems lack. A 16-bit float is passed in the low bits of a vector register, as a float is.
#include <bit>
#include <cmath>
#include <cstdint>

#include "abi.h"

namespace {

// To the nearest, ties to even; NaN stays NaN.
std::uint32_t nearest_bf16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if (std::isnan(value)) {
        return bits >> 16 | 0x40;
    }
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

}  // namespace

NVEMU_EXPORT float __truncsfbf2(float value) {
    return std::bit_cast<float>(nearest_bf16(value));
}

NVEMU_EXPORT float __truncdfbf2(double value) {
    // Rounding twice would round wrong; rounding to odd in between does not.
    auto once = static_cast<float>(value);
    if (static_cast<double>(once) != value && !std::isnan(value)) {
        auto bits = std::bit_cast<std::uint32_t>(once);
        if (std::abs(static_cast<double>(once)) > std::abs(value)) {
            --bits;
        }
        once = std::bit_cast<float>(bits | 1);
    }
    return std::bit_cast<float>(nearest_bf16(once));
}
