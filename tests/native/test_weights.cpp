// The weight arena: filled from a file in blocks, checksummed the same by any number of threads.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "checksum.h"
#include "weight_arena.h"

using namespace nanoserve;

namespace {

std::vector<std::byte> some_bytes(std::int64_t count) {
    std::vector<std::byte> bytes(static_cast<std::size_t>(count));
    std::uint32_t state = 1;
    for (std::byte& byte : bytes) {
        state = state * 1664525 + 1013904223;
        byte = static_cast<std::byte>(state >> 24);
    }
    return bytes;
}

}  // namespace

TEST(an_arena_is_filled_from_a_file) {
    constexpr std::int64_t kSize = (std::int64_t{5} << 20) + 4096;
    constexpr std::int64_t kBefore = 100;
    const std::vector<std::byte> bytes = some_bytes(kBefore + kSize);
    std::FILE* const file = std::tmpfile();
    CHECK(file != nullptr);
    CHECK_EQ(std::fwrite(bytes.data(), 1, bytes.size(), file), bytes.size());
    std::fflush(file);
    for (const int n : {1, 3}) {
        ThreadPool threads(n);
        WeightArena filled(kSize + 8192);
        const std::uint64_t sum = filled.read(::fileno(file), kBefore, 4096, kSize, threads);
        const std::span<std::byte> range = filled.range(4096, kSize);
        CHECK(std::equal(range.begin(), range.end(), bytes.begin() + kBefore));
        CHECK_EQ(sum, checksum(range, threads));
        CHECK_EQ(filled.range(0, 4096)[4095], std::byte{0});
        CHECK_EQ(filled.range(4096 + kSize, 4096)[0], std::byte{0});
        CHECK_THROWS(std::runtime_error, "4096 bytes early",
                     filled.read(::fileno(file), kBefore + 4096, 0, kSize, threads));
        CHECK_THROWS(std::invalid_argument, "num_bytes is",
                     filled.read(::fileno(file), 0, 0, kSize + 16384, threads));
        CHECK_THROWS(std::invalid_argument, "must be a multiple of 4096",
                     filled.read(::fileno(file), 0, 0, 100, threads));
        CHECK_THROWS(std::invalid_argument, "offset is -1",
                     filled.read(::fileno(file), -1, 0, 4096, threads));
    }
    std::fclose(file);
}

TEST(a_large_arena_begins_on_a_huge_page) {
    for (const std::int64_t size : {std::int64_t{4096}, std::int64_t{2} << 20, std::int64_t{7} << 20}) {
        const WeightArena arena(size);
        const auto address = reinterpret_cast<std::uintptr_t>(arena.range(0, size).data());
        CHECK_EQ(address % (size < (2 << 20) ? 4096U : 2U << 20), 0U);
        arena.range(0, size)[static_cast<std::size_t>(size - 1)] = std::byte{1};  // all of it is there
        CHECK_EQ(arena.num_bytes(), size);
    }
}

TEST(any_changed_bit_changes_the_checksum) {
    std::vector<std::byte> bytes = some_bytes(4096);
    ThreadPool threads(1);
    const std::uint64_t sum = checksum(bytes, threads);
    int unnoticed = 0;
    for (std::byte& byte : bytes) {
        for (int bit = 0; bit < 8; ++bit) {
            byte ^= static_cast<std::byte>(1 << bit);
            unnoticed += checksum(bytes, threads) == sum ? 1 : 0;
            byte ^= static_cast<std::byte>(1 << bit);
        }
    }
    CHECK_EQ(unnoticed, 0);
    CHECK_EQ(checksum(bytes, threads), sum);
    CHECK(Checksum(0).value() != Checksum(1).value());
}
