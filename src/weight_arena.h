// The packed weights of one model: one block of memory, filled by packing or from a file that holds it as it
// is.
//
// One block because it is streamed once per step: huge pages spare most of the address translation, and they
// need memory that is contiguous. It begins on a huge page. Who lies where is Python's business; nothing here
// knows a tensor. Reading takes whatever threads there are, in blocks that are checksummed while they are in
// the cache.
#pragma once

#include <cstdint>
#include <span>

#include "arena.h"
#include "thread_pool.h"

namespace nanoserve {

class WeightArena {
  public:
    static constexpr std::int64_t kUnit = 4096;  // sizes and offsets are multiples of it

    explicit WeightArena(std::int64_t num_bytes);

    [[nodiscard]] std::int64_t num_bytes() const { return memory_.num_bytes(); }
    [[nodiscard]] std::span<std::byte> range(std::int64_t begin, std::int64_t num_bytes) const;

    // Bytes [begin, begin + num_bytes) from a file's [offset, ...); their checksum. Throws when the file ends
    // early or cannot be read, with part of the range written.
    std::uint64_t read(int file, std::int64_t offset, std::int64_t begin, std::int64_t num_bytes,
                       ThreadPool& threads);

  private:
    Arena memory_;
};

// What `read` gives for the same bytes, a multiple of WeightArena::kUnit of them.
[[nodiscard]] std::uint64_t checksum(std::span<const std::byte> bytes, ThreadPool& threads);

}  // namespace nanoserve
