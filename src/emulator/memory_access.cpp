// The slow path of every load and store: what compiled code does not see at a glance to be right.
//
// At a glance right are aligned accesses to the range of device memory (whose guard pages do the rest) and to
// shared memory whose shadow is clear. What remains is generic pointers into shared memory, the thread's own
// stack (local memory), the module's constants, and errors.
#include "block.h"
#include "runtime.h"
#include "shared_memory.h"

namespace nvemu {

namespace {

bool in_module_data(const ModuleTable& module, std::uint64_t address, std::uint64_t num_bytes) {
    for (std::uint32_t i = 0; i < module.num_data; ++i) {
        const std::uint64_t offset = address - module.data[i].place;
        if (offset < module.data[i].num_bytes && num_bytes <= module.data[i].num_bytes - offset) {
            return true;
        }
    }
    return false;
}

}  // namespace

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_check_access(std::uint64_t address, std::uint32_t num_bytes, std::uint32_t alignment,
                                     std::uint32_t access, std::uint32_t line) {
    Block& block = *Block::running;
    const bool is_write = access != 0;
    const char* verb = is_write ? "store" : "load";
    if (address % alignment != 0) {
        block.fail(FailureKind::kMisalignedAddress, line, address, "%s of %u bytes must be aligned to %u",
                   verb, num_bytes, alignment);
    }
    if (address - kDeviceBase < kDeviceBytes) {
        return;
    }
    if (address - kSharedBase < kSharedBytes) {
        if (block.mbarriers().touches(address, num_bytes)) {
            block.fail(FailureKind::kInvalidOperand, line, address,
                       "%s of %u bytes of shared memory at offset %llu, where an mbarrier is", verb,
                       num_bytes, static_cast<unsigned long long>(address - kSharedBase));
        }
        const char* reason = SharedMemory::instance()->reason(address, num_bytes, is_write);
        if (reason == nullptr) {
            if (is_write && block.request().module->checks_proxies != 0) {
                nvemu_shared_written(address, num_bytes);
            }
            return;
        }
        const bool race = SharedMemory::contains(address, num_bytes) && reason[0] != 'o';
        block.fail(race ? FailureKind::kAsyncRace : FailureKind::kIllegalAddress, line, address,
                   "%s of %u bytes of shared memory at offset %llu: %s", verb, num_bytes,
                   static_cast<unsigned long long>(address - kSharedBase), reason);
    }
    if (block.on_own_stack(address, num_bytes) ||
        in_module_data(*block.request().module, address, num_bytes)) {
        return;
    }
    block.fail(FailureKind::kIllegalAddress, line, address,
               "%s of %u bytes, which is neither device nor shared memory of this block", verb, num_bytes);
}

NVEMU_EXPORT void nvemu_shared_written(std::uint64_t address, std::uint32_t num_bytes) {
    SharedMemory::set(address, num_bytes, SharedMemory::kUnfenced);
    Block::running->current().unfenced.push_back({address, num_bytes});
}

NVEMU_EXPORT void nvemu_proxy_fence() {
    std::vector<Span>& mine = Block::running->current().unfenced;
    for (const Span& span : mine) {
        SharedMemory::clear(span.address, span.num_bytes, SharedMemory::kUnfenced);
    }
    mine.clear();
    Block::running->mbarriers().fence();
}

NVEMU_EXPORT void nvemu_await_previous() {
    Block::running->current().awaited_previous = true;
}

NVEMU_EXPORT void nvemu_interleave() {
    Block::running->interleave();
}

NVEMU_EXPORT void nvemu_trap(std::uint32_t line) {
    Block::running->fail(FailureKind::kInvalidOperand, line, 0,
                         "the kernel trapped (an assertion of its own)");
}
