#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "abi.h"

namespace nvemu {

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr int kNaN = 0xFF;  // a NaN in every float format, -1 in every integer

// What lies between the end of an allocation and its last page's: NaN as well, but not what memory starts
// with.
unsigned char past_the_end(std::uint64_t address) {
    return address % 2 == 0 ? 0xFF : 0x7F;
}

void fill_past_the_end(std::uint64_t begin, std::uint64_t end) {
    for (; begin < end; ++begin) {
        *reinterpret_cast<unsigned char*>(begin) = past_the_end(begin);
    }
}

std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

DeviceMemory& DeviceMemory::instance() {
    static DeviceMemory memory;
    return memory;
}

DeviceMemory::DeviceMemory() {
    void* wanted = reinterpret_cast<void*>(kDeviceBase);
    if (mmap(wanted, kDeviceBytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) == wanted) {
        next_ = kDeviceBase + kPage;
    }
}

void* DeviceMemory::allocate(std::uint64_t num_bytes) {
    const std::lock_guard lock(mutex_);
    if (next_ == 0 || num_bytes > kDeviceBytes) {
        return nullptr;
    }
    const std::uint64_t used = round_up(std::max<std::uint64_t>(num_bytes, 1), 16);
    const std::uint64_t pages = round_up(used, kPage);
    if (pages + kPage > kDeviceBase + kDeviceBytes - next_) {
        return nullptr;
    }
    const std::uint64_t begin = next_;
    if (mprotect(reinterpret_cast<void*>(begin), pages, PROT_READ | PROT_WRITE) != 0) {
        return nullptr;
    }
    next_ = begin + pages + kPage;
    const std::uint64_t address = begin + pages - used;
    auto* bytes = reinterpret_cast<unsigned char*>(address);
    std::memset(bytes, kNaN, num_bytes);
    fill_past_the_end(address + num_bytes, address + used);
    live_[address] = {num_bytes, begin, begin + pages};
    return bytes;
}

bool DeviceMemory::intact(std::uint64_t address, const Allocation& allocation) {
    for (std::uint64_t at = address + allocation.num_bytes; at < allocation.pages_end; ++at) {
        if (*reinterpret_cast<const unsigned char*>(at) != past_the_end(at)) {
            return false;
        }
    }
    return true;
}

DeviceMemory::Freed DeviceMemory::free(void* address) {
    const std::lock_guard lock(mutex_);
    const auto found = live_.find(reinterpret_cast<std::uint64_t>(address));
    if (found == live_.end()) {
        return Freed::kNoSuchAllocation;
    }
    const Allocation gone = found->second;
    const bool was_intact = intact(found->first, gone);
    live_.erase(found);
    void* pages = reinterpret_cast<void*>(gone.pages_begin);
    // Mapping anew gives the memory back and makes the range fault.
    mmap(pages, gone.pages_end - gone.pages_begin, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return was_intact ? Freed::kYes : Freed::kWrittenPastItsEnd;
}

bool DeviceMemory::is_allocated(const void* address, std::uint64_t num_bytes) {
    const std::lock_guard lock(mutex_);
    const auto begin = reinterpret_cast<std::uint64_t>(address);
    auto found = live_.upper_bound(begin);
    if (found == live_.begin()) {
        return false;
    }
    --found;
    const std::uint64_t offset = begin - found->first;
    return offset <= found->second.num_bytes && num_bytes <= found->second.num_bytes - offset;
}

std::string DeviceMemory::overrun() {
    const std::lock_guard lock(mutex_);
    for (const auto& [address, allocation] : live_) {
        if (!intact(address, allocation)) {
            fill_past_the_end(address + allocation.num_bytes, allocation.pages_end);
            return "the bytes behind the end of an allocation of " + std::to_string(allocation.num_bytes) +
                   " bytes were written";
        }
    }
    return {};
}

}  // namespace nvemu

NVEMU_EXPORT void* nvemu_allocate(std::uint64_t num_bytes) {
    return nvemu::DeviceMemory::instance().allocate(num_bytes);
}

NVEMU_EXPORT std::int32_t nvemu_free(void* address) {
    return static_cast<std::int32_t>(nvemu::DeviceMemory::instance().free(address));
}

NVEMU_EXPORT std::int32_t nvemu_is_allocated(const void* address, std::uint64_t num_bytes) {
    return nvemu::DeviceMemory::instance().is_allocated(address, num_bytes) ? 1 : 0;
}
