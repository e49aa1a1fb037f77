#include "shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

namespace nvemu {

namespace {

constexpr int kNaN = 0xFF;

bool map_at(std::uint64_t address, std::uint64_t num_bytes) {
    void* wanted = reinterpret_cast<void*>(address);
    return mmap(wanted, num_bytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) == wanted;
}

// Mapped when the library is loaded: the longer a process runs, the more of its low addresses are taken. (The
// heap of a program that is not position-independent begins there.)
[[maybe_unused]] const SharedMemory* const early = SharedMemory::instance();

}  // namespace

SharedMemory* SharedMemory::instance() {
    static SharedMemory memory;
    static const bool mapped = [] {
        if (!map_at(kSharedBase, kSharedBytes) || !map_at(kShadowBase, kSharedBytes / kGranule)) {
            return false;
        }
        std::memset(shadow(kSharedBase), kClosed, kSharedBytes / kGranule);
        return true;
    }();
    return mapped ? &memory : nullptr;
}

void SharedMemory::open(const ModuleTable& module, std::uint32_t dynamic_bytes) {
    module_ = &module;
    dynamic_bytes_ = dynamic_bytes;
    used_bytes_ = dynamic_bytes == 0 ? 0 : std::uint64_t{module.dynamic_offset} + dynamic_bytes;
    for (std::uint32_t i = 0; i < module.num_shared; ++i) {
        used_bytes_ = std::max(used_bytes_, module.shared[i].place + module.shared[i].num_bytes);
    }
}

void SharedMemory::close() {
    std::memset(shadow(kSharedBase), kClosed, granules(kSharedBase, used_bytes_));
    module_ = nullptr;
    used_bytes_ = 0;
}

void SharedMemory::reset() {
    std::memset(reinterpret_cast<void*>(kSharedBase), kNaN, used_bytes_);
    std::memset(shadow(kSharedBase), kClosed, granules(kSharedBase, used_bytes_));
    const auto open_range = [](std::uint64_t offset, std::uint64_t num_bytes) {
        std::memset(shadow(kSharedBase + offset), 0, granules(kSharedBase + offset, num_bytes));
    };
    for (std::uint32_t i = 0; i < module_->num_shared; ++i) {
        open_range(module_->shared[i].place, module_->shared[i].num_bytes);
    }
    open_range(module_->dynamic_offset, dynamic_bytes_);
}

bool SharedMemory::any(std::uint64_t address, std::uint64_t num_bytes, std::uint8_t bits) {
    if (!contains(address, num_bytes)) {
        return true;
    }
    const std::uint8_t* first = shadow(address);
    return std::any_of(first, first + granules(address, num_bytes),
                       [bits](std::uint8_t state) { return (state & bits) != 0; });
}

void SharedMemory::set(std::uint64_t address, std::uint64_t num_bytes, std::uint8_t bits) {
    std::uint8_t* first = shadow(address);
    std::for_each(first, first + granules(address, num_bytes),
                  [bits](std::uint8_t& state) { state = static_cast<std::uint8_t>(state | bits); });
}

void SharedMemory::clear(std::uint64_t address, std::uint64_t num_bytes, std::uint8_t bits) {
    std::uint8_t* first = shadow(address);
    std::for_each(first, first + granules(address, num_bytes),
                  [bits](std::uint8_t& state) { state = static_cast<std::uint8_t>(state & ~bits); });
}

bool SharedMemory::add_reader(std::uint64_t address, std::uint64_t num_bytes) {
    std::uint8_t* first = shadow(address);
    std::uint8_t* last = first + granules(address, num_bytes);
    if (std::any_of(first, last, [](std::uint8_t state) { return state > 0xFF - kReader; })) {
        return false;
    }
    std::for_each(first, last,
                  [](std::uint8_t& state) { state = static_cast<std::uint8_t>(state + kReader); });
    return true;
}

void SharedMemory::remove_reader(std::uint64_t address, std::uint64_t num_bytes) {
    std::uint8_t* first = shadow(address);
    std::for_each(first, first + granules(address, num_bytes),
                  [](std::uint8_t& state) { state = static_cast<std::uint8_t>(state - kReader); });
}

bool SharedMemory::in_variable(std::uint64_t address, std::uint64_t num_bytes) const {
    const auto within = [&](std::uint64_t offset, std::uint64_t size) {
        const std::uint64_t from = address - kSharedBase - offset;
        return from < size && num_bytes <= size - from;
    };
    return within(module_->dynamic_offset, dynamic_bytes_) ||
           std::any_of(module_->shared, module_->shared + module_->num_shared,
                       [&](const Variable& variable) { return within(variable.place, variable.num_bytes); });
}

const char* SharedMemory::reason(std::uint64_t address, std::uint64_t num_bytes, bool is_write) const {
    if (!contains(address, num_bytes) || !in_variable(address, num_bytes)) {
        return "outside the block's shared memory variables";
    }
    if (any(address, num_bytes, kClosed)) {
        return is_write ? "where an asynchronous copy nobody waited for is going to write"
                        : "the destination of an asynchronous copy nobody waited for";
    }
    return is_write && any(address, num_bytes, kNoWrite) ? "what a wgmma nobody waited for may still read"
                                                         : nullptr;
}

}  // namespace nvemu
