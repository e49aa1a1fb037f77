// Integer arithmetic that names what overflowed instead of wrapping.
//
// Every size in this project comes from somebody's configuration; a wrapped product would become a short
// allocation and a long write. So sizes are int64, non-negative, and multiplied here only.
#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

namespace nanoserve {

struct Factor {
    const char* name;
    std::int64_t value;
};

// Throws invalid_argument naming the field, its value and the limit it breaks.
inline void require_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", must be in [" +
                                    std::to_string(low) + ", " + std::to_string(high) + "]");
    }
}

inline void require_at_least(const char* name, std::int64_t value, std::int64_t low) {
    if (value < low) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                    ", must be at least " + std::to_string(low));
    }
}

// The product of non-negative factors; on overflow an error that lists every factor.
[[nodiscard]] inline std::int64_t checked_product(const char* what, std::initializer_list<Factor> factors) {
    std::int64_t product = 1;
    for (const Factor& factor : factors) {
        if (__builtin_mul_overflow(product, factor.value, &product)) {
            std::string message = std::string(what) + " does not fit in 63 bits:";
            const char* separator = " ";
            for (const Factor& f : factors) {
                message += separator + std::string(f.name) + "=" + std::to_string(f.value);
                separator = " * ";
            }
            throw std::invalid_argument(message);
        }
    }
    return product;
}

// For non-negative a; written so that a near the maximum does not overflow.
[[nodiscard]] constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return a / b + (a % b != 0 ? 1 : 0);
}

[[nodiscard]] constexpr std::int64_t round_up(std::int64_t a, std::int64_t multiple) {
    return ceil_div(a, multiple) * multiple;
}

// A narrowing conversion that was already shown to be in range; throws if that proof was wrong.
template <std::integral To, std::integral From>
[[nodiscard]] inline To narrow(From value) {
    if (!std::in_range<To>(value)) {
        throw std::out_of_range("integer " + std::to_string(value) + " does not fit its type");
    }
    return static_cast<To>(value);
}

// Container index from a checked non-negative integer: the one place where the sign is dropped.
[[nodiscard]] constexpr std::size_t at(std::int64_t index) {
    return static_cast<std::size_t>(index);
}

}  // namespace nanoserve
