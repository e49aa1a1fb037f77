#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "abi.h"

namespace nvemu {

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr int kNaN = 0xFF;  // a NaN in every float format, -1 in every integer
constexpr unsigned char kPastTheEnd = 0xFE;

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
    std::memset(bytes + num_bytes, kPastTheEnd, used - num_bytes);
    live_[address] = {num_bytes, begin, begin + pages};
    return bytes;
}

bool DeviceMemory::intact(std::uint64_t address, const Allocation& allocation) {
    const auto* past = reinterpret_cast<const unsigned char*>(address + allocation.num_bytes);
    const auto* end = reinterpret_cast<const unsigned char*>(allocation.pages_end);
    return std::all_of(past, end, [](unsigned char byte) { return byte == kPastTheEnd; });
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
            const std::uint64_t end = address + allocation.num_bytes;
            std::memset(reinterpret_cast<void*>(end), kPastTheEnd, allocation.pages_end - end);
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
