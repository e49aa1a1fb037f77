#include "mbarrier.h"

#include <iterator>
#include <utility>

#include "block.h"
#include "runtime.h"
#include "shared_memory.h"

namespace nvemu {

namespace {

constexpr std::uint32_t kBytes = 8;
constexpr std::uint32_t kMaxCount = (1u << 20) - 1;  // of arrivals, and of bytes

std::uint64_t offset(std::uint64_t address) {
    return address - kSharedBase;
}

}  // namespace

void MBarriers::init(std::uint32_t line, std::uint64_t address, std::uint32_t count) {
    if (touches(address, kBytes)) {
        block_.fail(FailureKind::kInvalidOperand, line, address, "mbarrier.init where there is one");
    }
    nvemu_check_access(address, kBytes, kBytes, 1, line);
    if (address - kSharedBase >= kSharedBytes) {
        block_.fail(FailureKind::kIllegalAddress, line, address,
                    "mbarrier.init in what is not shared memory");
    }
    if (count == 0 || count > kMaxCount) {
        block_.fail(FailureKind::kInvalidOperand, line, address, "mbarrier.init for %u arrivals: 1 to %u",
                    count, kMaxCount);
    }
    SharedMemory::set(address, kBytes, SharedMemory::kClosed);
    MBarrier& made = barriers_[address];
    made.expected = made.pending = count;
    made.maker = block_.current().linear;
}

void MBarriers::fence() {
    for (auto& [address, barrier] : barriers_) {
        barrier.is_fenced = barrier.is_fenced || barrier.maker == block_.current().linear;
    }
}

MBarrier& MBarriers::at(const char* operation, std::uint32_t line, std::uint64_t address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) {
        block_.fail(FailureKind::kInvalidOperand, line, address,
                    "%s: there is no mbarrier at this address, or not yet", operation);
    }
    return found->second;
}

void MBarriers::arrive(std::uint32_t line, std::uint64_t address, std::uint32_t expected_bytes) {
    MBarrier& barrier = at("mbarrier.arrive", line, address);
    if (barrier.pending == 0) {
        block_.fail(FailureKind::kInvalidOperand, line, address,
                    "mbarrier.arrive: all %u of this phase have arrived, %lld bytes are still to come",
                    barrier.expected, static_cast<long long>(barrier.bytes));
    }
    barrier.bytes += expected_bytes;
    if (barrier.bytes > std::int64_t{kMaxCount}) {
        block_.fail(FailureKind::kInvalidOperand, line, address, "an mbarrier can expect %u bytes, not %lld",
                    kMaxCount, static_cast<long long>(barrier.bytes));
    }
    --barrier.pending;
    end_phase_if_complete(line, address, barrier);
    block_.interleave();
}

bool MBarriers::try_wait(std::uint32_t line, std::uint64_t address, std::uint32_t parity) {
    MBarrier& barrier = at("mbarrier.try_wait", line, address);
    Thread& thread = block_.current();
    if (parity > 1) {
        block_.fail(FailureKind::kInvalidOperand, line, address, "mbarrier.try_wait for parity %u: 0 or 1",
                    parity);
    }
    const bool was_refused = std::exchange(thread.mbarrier_refused, false);
    if (barrier.phase % 2 == parity) {
        if (!was_refused) {
            thread.mbarrier_refused = true;
            return false;
        }
        barrier.waiting[thread.warp()] |= thread.bit();
        block_.wait({"mbarrier.try_wait", line, false, address});
    }
    block_.interleave();
    return true;
}

void MBarriers::check_for_copy(std::uint32_t line, std::uint64_t address) {
    if (!at("cp.async.bulk.tensor", line, address).is_fenced) {
        block_.fail(FailureKind::kAsyncRace, line, address,
                    "cp.async.bulk.tensor: who made its mbarrier has not issued fence.mbarrier_init since");
    }
}

void MBarriers::complete(std::uint32_t line, std::uint64_t address, std::uint32_t num_bytes) {
    MBarrier& barrier = at("cp.async.bulk.tensor", line, address);
    barrier.bytes -= num_bytes;
    end_phase_if_complete(line, address, barrier);
}

void MBarriers::end_phase_if_complete(std::uint32_t line, std::uint64_t address, MBarrier& barrier) {
    if (barrier.pending != 0) {
        return;
    }
    if (barrier.bytes < 0) {
        block_.fail(FailureKind::kInvalidOperand, line, address,
                    "mbarrier: all have arrived, and %lld bytes more have come than they expected",
                    static_cast<long long>(-barrier.bytes));
    }
    if (barrier.bytes == 0) {
        ++barrier.phase;
        barrier.pending = barrier.expected;
        for (std::uint32_t w = 0; w < block_.num_warps(); ++w) {
            block_.wake(w, std::exchange(barrier.waiting[w], 0));
        }
    }
}

bool MBarriers::touches(std::uint64_t address, std::uint64_t num_bytes) const {
    const auto after = barriers_.lower_bound(address + num_bytes);
    return after != barriers_.begin() && std::prev(after)->first + kBytes > address;
}

std::string MBarriers::missing(std::uint64_t address) const {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) {
        return "";
    }
    return "the mbarrier at offset " + std::to_string(offset(address)) + " of shared memory, which lacks " +
           std::to_string(found->second.pending) + " arrivals and " + std::to_string(found->second.bytes) +
           " bytes";
}

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_mbarrier_init(std::uint32_t line, std::uint64_t address, std::uint32_t count) {
    Block::running->mbarriers().init(line, address, count);
}

NVEMU_EXPORT void nvemu_mbarrier_fence() {
    Block::running->mbarriers().fence();
}

NVEMU_EXPORT void nvemu_mbarrier_arrive(std::uint32_t line, std::uint64_t address,
                                        std::uint32_t expected_bytes) {
    Block::running->mbarriers().arrive(line, address, expected_bytes);
}

NVEMU_EXPORT std::uint32_t nvemu_mbarrier_try_wait(std::uint32_t line, std::uint64_t address,
                                                   std::uint32_t parity) {
    return Block::running->mbarriers().try_wait(line, address, parity) ? 1 : 0;
}
