// Where the pages of a KV pool lie: in the machine's memory, or on a device. The pool knows who holds a page,
// this knows its bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nanoserve {

class PageMemory {
  public:
    PageMemory() = default;
    virtual ~PageMemory() = default;
    PageMemory(const PageMemory&) = delete;
    PageMemory& operator=(const PageMemory&) = delete;

    [[nodiscard]] virtual std::int64_t num_bytes() const = 0;
    // One page's keys and values in all layers. Both before any later step reads them.
    virtual void copy_page(std::int64_t from, std::int64_t to) = 0;
    virtual void scrub_page(std::int64_t page) = 0;
    // All of it from the system now, not as it is used; false where that cannot be had.
    virtual bool populate() = 0;
    // The first byte for the host to read and write, laid out as kv_pool.h says; null on a device.
    [[nodiscard]] virtual std::byte* host() const { return nullptr; }
};

}  // namespace nanoserve
