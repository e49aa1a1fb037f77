// Device memory, page-locked host memory, copies and fills.
//
// Memory is as the emulator makes it: full of NaN, between pages that fault, never at the same address twice.
// What is allocated counts against the size of the device, so running out of memory can be tested.
//
// Copies follow "API synchronization behavior" of the driver's manual, at its latest: from pageable memory
// they take the bytes during the call and write them when the stream gets there, even if the call is not an
// Async one; from and to page-locked memory they read and write when the stream gets there; to pageable
// memory they are done on return.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "driver.h"

using namespace fake_cuda;

namespace {

constexpr std::uint64_t kGranularity = 512;  // of what an allocation is charged
constexpr int kUndefined = 0xFF;

template <typename Pointer>
std::uint64_t as_number(Pointer pointer) {
    return reinterpret_cast<std::uint64_t>(pointer);
}

template <typename Byte = void>
Byte* as_pointer(std::uint64_t address) {
    return reinterpret_cast<Byte*>(address);
}

Result check(Driver& driver, std::uint64_t address, std::size_t num_bytes, const char* what) {
    if (num_bytes != 0 && nvemu_is_allocated(as_pointer(address), num_bytes) == 0) {
        return driver.fail(kInvalidValue, std::string(what) + " of " + std::to_string(num_bytes) +
                                              " bytes is not within one device allocation");
    }
    return kSuccess;
}

Stream::Work copy(std::uint64_t to, std::uint64_t from, std::size_t num_bytes) {
    return [=] { std::memmove(as_pointer(to), as_pointer(from), num_bytes); };
}

// Work that does nothing in a broken context.
Stream::Work guarded(Driver& driver, Stream::Work work) {
    return [&driver, work = std::move(work)] {
        if (driver.sticky == kSuccess) {
            work();
        }
    };
}

// For calls without "Async": they are on the legacy stream and may not be captured.
Result on_legacy(Driver& driver, Stream::Work work, bool waits) {
    if (const Result refused = driver.refuse_in_capture()) {
        return refused;
    }
    if (const Result result = driver.submit_legacy(guarded(driver, std::move(work)))) {
        return result;
    }
    if (waits) {
        driver.legacy_stream()->end().reach();
    }
    return driver.sticky;
}

Result on_stream(Driver& driver, void* handle, Stream::Work work, bool waits) {
    const auto stream = driver.stream(handle);
    if (stream == nullptr) {
        return driver.fail(kInvalidHandle, "no such stream");
    }
    if (const Result result = driver.submit(stream, guarded(driver, std::move(work)))) {
        return result;
    }
    if (waits && stream->capture == nullptr) {
        stream->end().reach();
    }
    return driver.sticky;
}

// The bytes of pageable memory as they are now; page-locked memory is read later.
Stream::Work upload(Driver& driver, std::uint64_t to, const void* from, std::size_t num_bytes,
                    bool captured) {
    if (captured || driver.is_pinned(from, num_bytes)) {
        return copy(to, as_number(from), num_bytes);
    }
    const auto* bytes = static_cast<const std::byte*>(from);
    return [to, staged = std::vector<std::byte>(bytes, bytes + num_bytes)] {
        std::memcpy(as_pointer(to), staged.data(), staged.size());
    };
}

template <typename Element>
Stream::Work fill(std::uint64_t to, Element value, std::size_t count) {
    return [=] {
        for (std::size_t i = 0; i < count; ++i) {
            as_pointer<Element>(to)[i] = value;
        }
    };
}

}  // namespace

FAKE_CUDA_EXPORT Result cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total) {
    return call(Needs::kContext, [&](Driver& driver) {
        *free_bytes = driver.device.memory_bytes - driver.used_bytes;
        *total = driver.device.memory_bytes;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuMemAlloc_v2(std::uint64_t* address, std::size_t num_bytes) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (const Result refused = driver.refuse_in_capture()) {
            return refused;
        }
        const std::uint64_t available = driver.device.memory_bytes - driver.used_bytes;
        if (num_bytes == 0) {
            return driver.fail(kInvalidValue, "cuMemAlloc of 0 bytes");
        }
        const std::uint64_t charged =
            num_bytes > available ? num_bytes : (num_bytes + kGranularity - 1) / kGranularity * kGranularity;
        void* memory = charged > available ? nullptr : nvemu_allocate(num_bytes);
        if (memory == nullptr) {
            return driver.fail(kOutOfMemory, "cuMemAlloc of " + std::to_string(num_bytes) +
                                                 " bytes: " + std::to_string(available) + " of " +
                                                 std::to_string(driver.device.memory_bytes) + " are free");
        }
        driver.allocations[as_number(memory)] = charged;
        driver.used_bytes += charged;
        *address = as_number(memory);
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuMemFree_v2(std::uint64_t address) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (address == 0) {
            return kSuccess;
        }
        const auto found = driver.allocations.find(address);
        if (found == driver.allocations.end()) {
            return driver.fail(kInvalidValue, "cuMemFree of what cuMemAlloc did not give, or freed before");
        }
        if (const Result refused = driver.refuse_in_capture()) {
            return refused;
        }
        driver.synchronize();  // as the driver does, so work that uses the memory is done
        driver.used_bytes -= found->second;
        driver.allocations.erase(found);
        if (nvemu_free(as_pointer(address)) != 0) {
            driver.sticky = driver.fail(kIllegalAddress, "the bytes behind a device allocation were written");
        }
        return driver.sticky;
    });
}

FAKE_CUDA_EXPORT Result cuMemHostAlloc(void** address, std::size_t num_bytes, unsigned) {
    return call(Needs::kContext, [&](Driver& driver) {
        void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            return driver.fail(kOutOfMemory, "no page-locked host memory");
        }
        std::memset(memory, kUndefined, num_bytes);
        driver.pinned[as_number(memory)] = num_bytes;
        *address = memory;
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuMemAllocHost_v2(void** address, std::size_t num_bytes) {
    return cuMemHostAlloc(address, num_bytes, 0);
}

FAKE_CUDA_EXPORT Result cuMemFreeHost(void* address) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto found = driver.pinned.find(as_number(address));
        if (found == driver.pinned.end()) {
            return driver.fail(kInvalidValue, "cuMemFreeHost of what cuMemHostAlloc did not give");
        }
        driver.synchronize();
        munmap(address, found->second);
        driver.pinned.erase(found);
        return driver.sticky;
    });
}

FAKE_CUDA_EXPORT Result cuMemHostRegister_v2(void* address, std::size_t num_bytes, unsigned) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (num_bytes == 0 || !driver.pinned.emplace(as_number(address), num_bytes).second) {
            return driver.fail(num_bytes == 0 ? kInvalidValue : kHostMemoryAlreadyRegistered,
                               "cuMemHostRegister");
        }
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuMemHostUnregister(void* address) {
    return call(Needs::kContext, [&](Driver& driver) {
        driver.synchronize();
        if (driver.pinned.erase(as_number(address)) == 0) {
            return driver.fail(kHostMemoryNotRegistered, "cuMemHostUnregister of what was not registered");
        }
        return driver.sticky;
    });
}

FAKE_CUDA_EXPORT Result cuMemcpyHtoD_v2(std::uint64_t to, const void* from, std::size_t num_bytes) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (const Result bad = check(driver, to, num_bytes, "the destination")) {
            return bad;
        }
        const bool pinned = driver.is_pinned(from, num_bytes);
        return on_legacy(driver, upload(driver, to, from, num_bytes, false), pinned);
    });
}

FAKE_CUDA_EXPORT Result cuMemcpyHtoDAsync_v2(std::uint64_t to, const void* from, std::size_t num_bytes,
                                             void* stream) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (const Result bad = check(driver, to, num_bytes, "the destination")) {
            return bad;
        }
        const auto queue = driver.stream(stream);
        const bool captured = queue != nullptr && queue->capture != nullptr;
        return on_stream(driver, stream, upload(driver, to, from, num_bytes, captured), false);
    });
}

FAKE_CUDA_EXPORT Result cuMemcpyDtoH_v2(void* to, std::uint64_t from, std::size_t num_bytes) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (const Result bad = check(driver, from, num_bytes, "the source")) {
            return bad;
        }
        return on_legacy(driver, copy(as_number(to), from, num_bytes), true);
    });
}

FAKE_CUDA_EXPORT Result cuMemcpyDtoHAsync_v2(void* to, std::uint64_t from, std::size_t num_bytes,
                                             void* stream) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (const Result bad = check(driver, from, num_bytes, "the source")) {
            return bad;
        }
        const bool pinned = driver.is_pinned(to, num_bytes);
        const auto queue = driver.stream(stream);
        if (pinned && queue != nullptr && queue->capture == nullptr) {
            std::memset(to, kUndefined, num_bytes);  // who reads it before the copy is done reads this
        }
        return on_stream(driver, stream, copy(as_number(to), from, num_bytes), !pinned);
    });
}

FAKE_CUDA_EXPORT Result cuMemcpyDtoD_v2(std::uint64_t to, std::uint64_t from, std::size_t num_bytes) {
    return call(Needs::kContext, [&](Driver& driver) {
        const Result bad = check(driver, to, num_bytes, "the destination");
        if (bad != kSuccess || check(driver, from, num_bytes, "the source") != kSuccess) {
            return kInvalidValue;
        }
        return on_legacy(driver, copy(to, from, num_bytes), false);
    });
}

FAKE_CUDA_EXPORT Result cuMemcpyDtoDAsync_v2(std::uint64_t to, std::uint64_t from, std::size_t num_bytes,
                                             void* stream) {
    return call(Needs::kContext, [&](Driver& driver) {
        const Result bad = check(driver, to, num_bytes, "the destination");
        if (bad != kSuccess || check(driver, from, num_bytes, "the source") != kSuccess) {
            return kInvalidValue;
        }
        return on_stream(driver, stream, copy(to, from, num_bytes), false);
    });
}

namespace {

// Where a row of a box begins.
std::uint64_t row_of(const Memcpy3D::Side& side, std::size_t y, std::size_t z) {
    return side.device + ((side.z + z) * side.height + side.y + y) * side.pitch + side.x_bytes;
}

Result check_side(Driver& driver, const Memcpy3D& box, const Memcpy3D::Side& side, const std::string& what) {
    if (side.memory_type != kDeviceMemory) {
        return driver.fail(kInvalidValue, what + ": only boxes of device memory are emulated");
    }
    if (side.pitch > kMaxPitch || side.pitch < side.x_bytes + box.width_bytes ||
        side.height < side.y + box.height) {
        return driver.fail(kInvalidValue, what + ": a pitch of " + std::to_string(side.pitch) +
                                              " bytes, or a height of " + std::to_string(side.height) +
                                              " rows, is too short for the box, or over the limit");
    }
    const std::uint64_t first = row_of(side, 0, 0);
    const std::uint64_t last = row_of(side, box.height - 1, box.depth - 1);
    return check(driver, first, last - first + box.width_bytes, what.c_str());
}

}  // namespace

FAKE_CUDA_EXPORT Result cuMemcpy3DAsync_v2(const Memcpy3D* wanted, void* stream) {
    return call(Needs::kContext, [&](Driver& driver) {
        const Memcpy3D box = *wanted;
        if (box.width_bytes == 0 || box.height == 0 || box.depth == 0) {
            return kSuccess;
        }
        Result bad = check_side(driver, box, box.destination, "the destination");
        if (bad == kSuccess) {
            bad = check_side(driver, box, box.source, "the source");
        }
        if (bad != kSuccess) {
            return bad;
        }
        return on_stream(
            driver, stream,
            [box] {
                for (std::size_t z = 0; z < box.depth; ++z) {
                    for (std::size_t y = 0; y < box.height; ++y) {
                        std::memmove(as_pointer(row_of(box.destination, y, z)),
                                     as_pointer(row_of(box.source, y, z)), box.width_bytes);
                    }
                }
            },
            false);
    });
}

namespace {

template <typename Element>
Result set_memory(std::uint64_t to, Element value, std::size_t count, void* const* stream) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (to % sizeof(Element) != 0) {
            return driver.fail(kInvalidValue, "the destination is not aligned to its elements");
        }
        if (const Result bad = check(driver, to, count * sizeof(Element), "the destination")) {
            return bad;
        }
        Stream::Work work = fill(to, value, count);
        return stream == nullptr ? on_legacy(driver, std::move(work), false)
                                 : on_stream(driver, *stream, std::move(work), false);
    });
}

}  // namespace

FAKE_CUDA_EXPORT Result cuMemsetD8_v2(std::uint64_t to, unsigned char value, std::size_t count) {
    return set_memory(to, value, count, nullptr);
}

FAKE_CUDA_EXPORT Result cuMemsetD8Async(std::uint64_t to, unsigned char value, std::size_t count,
                                        void* stream) {
    return set_memory(to, value, count, &stream);
}

FAKE_CUDA_EXPORT Result cuMemsetD32_v2(std::uint64_t to, unsigned value, std::size_t count) {
    return set_memory(to, value, count, nullptr);
}

FAKE_CUDA_EXPORT Result cuMemsetD32Async(std::uint64_t to, unsigned value, std::size_t count, void* stream) {
    return set_memory(to, value, count, &stream);
}
