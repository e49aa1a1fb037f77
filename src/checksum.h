// A 64-bit checksum that keeps up with memory, against damage and not against forgers.
//
// Eight lanes of 8 bytes, each step a bijection of its lane and of the word it takes in, and so is the fold
// of the lanes: a change within one word always changes the result, any other goes unnoticed once in 2^64.
// Words are the machine's own: what is checked here never leaves it.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace nanoserve {

class Checksum {
  public:
    static constexpr std::size_t kStep = 64;  // bytes; updates come in multiples of it

    explicit Checksum(std::uint64_t seed) {
        for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
            lanes_[lane] = mixed(seed, lane + 1);
        }
    }

    void update(const std::byte* data, std::size_t num_bytes) {
        auto lanes = lanes_;  // in registers
        for (std::size_t at = 0; at < num_bytes; at += kStep) {
            std::array<std::uint64_t, 8> words;
            std::memcpy(words.data(), data + at, kStep);
            for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
                lanes[lane] = mixed(lanes[lane], words[lane]);
            }
        }
        lanes_ = lanes;
    }

    [[nodiscard]] std::uint64_t value() const {
        std::uint64_t folded = 0;
        for (const std::uint64_t lane : lanes_) {
            folded = mixed(folded, lane);
        }
        return folded;
    }

    [[nodiscard]] static std::uint64_t mixed(std::uint64_t state, std::uint64_t word) {
        return std::rotl((state ^ word) * 0x9e3779b97f4a7c15U, 29);  // odd, so that multiplying loses nothing
    }

  private:
    std::array<std::uint64_t, 8> lanes_{};
};

}  // namespace nanoserve
