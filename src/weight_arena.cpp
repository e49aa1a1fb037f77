#include "weight_arena.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "checked.h"
#include "checksum.h"

namespace nanoserve {

namespace {

// What a thread takes at once: a huge page, so that no two of them wait for the same one to be cleared.
constexpr std::int64_t kBlock = std::int64_t{2} << 20;
// And of that: what is still in the core's own cache when its checksum is taken.
constexpr std::int64_t kPiece = std::int64_t{256} << 10;

void require_unit(const char* name, std::int64_t value) {
    if (value % WeightArena::kUnit != 0) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                    ", must be a multiple of " + std::to_string(WeightArena::kUnit));
    }
}

void read_all(int file, std::byte* to, std::int64_t num_bytes, std::int64_t offset) {
    while (num_bytes > 0) {
        const ssize_t got = ::pread(file, to, at(num_bytes), offset);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            throw std::system_error(errno, std::generic_category(), "reading weights");
        }
        if (got == 0) {
            throw std::runtime_error("reading weights: the file ends at byte " + std::to_string(offset) +
                                     ", " + std::to_string(num_bytes) + " bytes early");
        }
        to += got;
        num_bytes -= got;
        offset += got;
    }
}

// The checksum over the checksums of blocks; prepare(begin, num_bytes) runs before a piece is looked at.
template <typename Prepare>
std::uint64_t by_blocks(const std::byte* data, std::int64_t num_bytes, ThreadPool& threads,
                        Prepare&& prepare) {
    std::vector<std::uint64_t> sums(at(ceil_div(num_bytes, kBlock)));
    std::atomic<std::int64_t> next{0};
    threads.run([&](int) {
        for (std::int64_t block = next++; block < std::ssize(sums); block = next++) {
            Checksum sum(static_cast<std::uint64_t>(block));
            const std::int64_t end = std::min((block + 1) * kBlock, num_bytes);
            for (std::int64_t begin = block * kBlock; begin < end; begin += kPiece) {
                const std::int64_t size = std::min(kPiece, end - begin);
                prepare(begin, size);
                sum.update(data + begin, at(size));
            }
            sums[at(block)] = sum.value();
        }
    });
    std::uint64_t total = 0;
    for (const std::uint64_t sum : sums) {
        total = Checksum::mixed(total, sum);
    }
    return total;
}

}  // namespace

WeightArena::WeightArena(std::int64_t num_bytes) : memory_("the weights", num_bytes) {
    require_unit("num_bytes", num_bytes);
}

std::span<std::byte> WeightArena::range(std::int64_t begin, std::int64_t num_bytes) const {
    require_range("begin", begin, 0, memory_.num_bytes());
    require_range("num_bytes", num_bytes, 0, memory_.num_bytes() - begin);
    return {memory_.data() + begin, at(num_bytes)};
}

std::uint64_t WeightArena::read(int file, std::int64_t offset, std::int64_t begin, std::int64_t num_bytes,
                                ThreadPool& threads) {
    require_at_least("offset", offset, 0);
    require_unit("num_bytes", num_bytes);
    std::byte* const to = range(begin, num_bytes).data();
    return by_blocks(to, num_bytes, threads, [&](std::int64_t done, std::int64_t size) {
        read_all(file, to + done, size, offset + done);
    });
}

std::uint64_t checksum(std::span<const std::byte> bytes, ThreadPool& threads) {
    require_unit("num_bytes", std::ssize(bytes));
    return by_blocks(bytes.data(), std::ssize(bytes), threads, [](std::int64_t, std::int64_t) {});
}

}  // namespace nanoserve
