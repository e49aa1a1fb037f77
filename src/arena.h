// One block of zeroed memory from the operating system.
//
// Invariant: the bytes are zero when first read and 64-byte aligned (a block of a huge page or more begins on
// one), and they cost nothing until touched. Decision: mmap instead of new[], because a pool of many GiB must
// not be cleared (and so committed) up front. Price: sizes round up to OS pages, so this is for few large
// blocks, not for small ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nanoserve {

class Arena {
  public:
    // `what` names the block in the error message when the system refuses it.
    Arena(const char* what, std::int64_t num_bytes);
    ~Arena();
    Arena(Arena&& other) noexcept;
    Arena& operator=(Arena&&) = delete;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Has the system give all of it now, so that nobody waits for a page later. False where it cannot.
    bool populate() const;

    [[nodiscard]] std::byte* data() const { return data_; }
    [[nodiscard]] std::int64_t num_bytes() const { return num_bytes_; }

  private:
    std::byte* mapped_ = nullptr;  // data_ lies in [mapped_, mapped_ + mapped_bytes_)
    std::int64_t mapped_bytes_ = 0;
    std::byte* data_ = nullptr;
    std::int64_t num_bytes_ = 0;
};

}  // namespace nanoserve
