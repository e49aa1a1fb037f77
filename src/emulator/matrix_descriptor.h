// Where wgmma finds a matrix in shared memory: the 64-bit descriptor, decoded.
//
//     bits  0..13  start address / 16        bits 16..29  leading byte offset / 16
//     bits 32..45  stride byte offset / 16   bits 49..51  base offset (0 here)
//     bits 62..63  swizzle: 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
//
// A matrix is made of cores of 8 rows; a row is as long as the swizzle (16 bytes without one). In a K-major
// matrix a row runs along k and the 8 rows are neighbours in m (or n): the stride offset leads to the next 8
// m, the leading offset, used without a swizzle only, to the next 8 k. In an MN-major matrix a row runs along
// m and the 8 rows are neighbours in k: the stride offset leads to the next 8 k and the leading offset to the
// next row length of m (without a swizzle the two change places). The swizzle exchanges 16-byte pieces within
// a row by the number of the row, so that 8 rows read at one column fall into different banks: address
// bits 4..6 are xored with bits 7..9 (for 64 bytes bits 4..5 with 7..8, for 32 bytes bit 4 with 7).
#pragma once

#include <cstdint>

#include "abi.h"

namespace nvemu {

class MatrixDescriptor {
  public:
    MatrixDescriptor(std::uint64_t bits, bool mn_major)
        : mn_major_(mn_major),
          base_offset_(static_cast<std::uint32_t>(bits >> 49 & 7)),
          start_(field(bits, 0)),
          leading_(field(bits, 16)),
          stride_(field(bits, 32)) {
        switch (bits >> 62) {
            case 0:
                row_bytes_ = 16;
                break;
            case 1:
                row_bytes_ = 128;
                break;
            case 2:
                row_bytes_ = 64;
                break;
            default:
                row_bytes_ = 32;
        }
    }

    [[nodiscard]] bool is_supported() const { return base_offset_ == 0; }

    // Of element (m, k) with 16 bits each.
    [[nodiscard]] std::uint64_t address(std::uint64_t m, std::uint64_t k) const {
        constexpr std::uint64_t kElementBytes = 2;
        const std::uint64_t row_elements = row_bytes_ / kElementBytes;
        const bool plain = row_bytes_ == 16;
        std::uint64_t offset = 0;
        if (mn_major_) {
            offset = m % row_elements * kElementBytes + k % 8 * row_bytes_ +
                     m / row_elements * (plain ? stride_ : leading_) + k / 8 * (plain ? leading_ : stride_);
        } else {
            offset = m % 8 * row_bytes_ + m / 8 * stride_;
            offset += plain ? k % 8 * kElementBytes + k / 8 * leading_ : k * kElementBytes;
        }
        return kSharedBase + swizzled((start_ + offset) % kSharedBytes);
    }

  private:
    static std::uint64_t field(std::uint64_t bits, int first) { return (bits >> first & 0x3FFF) << 4; }
    [[nodiscard]] std::uint64_t swizzled(std::uint64_t address) const {
        const std::uint64_t pieces = row_bytes_ / 16;  // 1, 2, 4 or 8
        return address ^ ((address >> 7 & (pieces - 1)) << 4);
    }

    bool mn_major_;
    std::uint32_t base_offset_;
    std::uint64_t start_;
    std::uint64_t leading_;
    std::uint64_t stride_;
    std::uint64_t row_bytes_ = 16;
};

}  // namespace nvemu
