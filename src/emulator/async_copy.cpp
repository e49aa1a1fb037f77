// cp.async: copies from global to shared memory that go on while the thread does something else.
//
// They land as late as the program allows: only when the thread's own wait_group demands it. Until then the
// destination holds NaN and is closed, so reading it early is an error in every thread order and not a matter
// of luck. That a wait makes only the thread's own copies visible, and a barrier is needed for the others',
// shows as well: the others' have not landed yet.
#include <cstring>

#include "block.h"
#include "runtime.h"
#include "shared_memory.h"

namespace nvemu {

namespace {

constexpr int kNaN = 0xFF;

void land(const AsyncCopy& copy) {
    SharedMemory::clear(copy.destination, copy.num_bytes, SharedMemory::kClosed);
    auto* destination = reinterpret_cast<std::byte*>(copy.destination);
    std::memcpy(destination, reinterpret_cast<const void*>(copy.source), copy.copied_bytes);
    std::memset(destination + copy.copied_bytes, 0, copy.num_bytes - copy.copied_bytes);
}

// A fault now, in the instruction that has the wrong address, and not when the copy lands.
void touch(std::uint64_t source, std::uint32_t num_bytes) {
    if (num_bytes != 0) {
        static_cast<void>(*reinterpret_cast<const volatile std::byte*>(source));
        static_cast<void>(*reinterpret_cast<const volatile std::byte*>(source + num_bytes - 1));
    }
}

}  // namespace

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_copy_async(std::uint32_t line, std::uint64_t destination, std::uint64_t source,
                                   std::uint32_t num_bytes, std::uint32_t copied_bytes) {
    Block& block = *Block::running;
    if ((num_bytes != 4 && num_bytes != 8 && num_bytes != 16) || copied_bytes > num_bytes) {
        block.fail(FailureKind::kInvalidOperand, line, 0, "cp.async of %u of %u bytes: takes 4, 8 or 16",
                   copied_bytes, num_bytes);
    }
    if (destination % num_bytes != 0 || (copied_bytes != 0 && source % num_bytes != 0)) {
        const bool wrong_destination = destination % num_bytes != 0;
        block.fail(FailureKind::kMisalignedAddress, line, wrong_destination ? destination : source,
                   "cp.async of %u bytes, whose %s must be aligned to as many", num_bytes,
                   wrong_destination ? "destination" : "source");
    }
    if (destination - kSharedBase >= kSharedBytes) {
        block.fail(FailureKind::kIllegalAddress, line, destination, "cp.async to what is not shared memory");
    }
    if (!SharedMemory::writable(destination, num_bytes)) {
        nvemu_check_access(destination, num_bytes, num_bytes, 1, line);
    }
    if (copied_bytes != 0 && source - kDeviceBase >= kDeviceBytes) {
        block.fail(FailureKind::kIllegalAddress, line, source, "cp.async from what is not device memory");
    }
    touch(source, copied_bytes);
    std::memset(reinterpret_cast<void*>(destination), kNaN, num_bytes);
    SharedMemory::set(destination, num_bytes, SharedMemory::kClosed);
    block.current().copies.push_back({destination, source, num_bytes, copied_bytes});
}

NVEMU_EXPORT void nvemu_copy_commit() {
    Thread& thread = Block::running->current();
    const auto issued = static_cast<std::uint32_t>(thread.copies.size());
    thread.copy_groups.push_back(issued - thread.num_grouped);
    thread.num_grouped = issued;
}

NVEMU_EXPORT void nvemu_copy_wait(std::uint32_t max_pending) {
    Block& block = *Block::running;
    Thread& thread = block.current();
    const std::size_t groups = thread.copy_groups.size();
    if (groups > max_pending) {
        const std::size_t landing = groups - max_pending;
        std::uint32_t count = 0;
        for (std::size_t g = 0; g < landing; ++g) {
            count += thread.copy_groups[g];
        }
        for (std::uint32_t i = 0; i < count; ++i) {
            land(thread.copies[i]);
        }
        thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
        thread.copy_groups.erase(thread.copy_groups.begin(),
                                 thread.copy_groups.begin() + static_cast<std::ptrdiff_t>(landing));
        thread.num_grouped -= count;
    }
    block.interleave();
}

NVEMU_EXPORT void nvemu_copy_wait_all() {
    nvemu_copy_commit();
    nvemu_copy_wait(0);
}
