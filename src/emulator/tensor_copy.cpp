#include "tensor_copy.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "runtime.h"
#include "shared_memory.h"

namespace nvemu {

namespace {

constexpr int kNaN = 0xFF;
constexpr std::uint32_t kLine = 16;
constexpr std::uint32_t kAlignment = 128;       // of a destination
constexpr std::uint32_t kSwizzledRow = 128;     // bytes
constexpr std::uint32_t kSwizzledGroup = 1024;  // after which the pattern repeats

// The swizzle is one of addresses: bits 4 to 6 are those XOR bits 7 to 9.
std::uint64_t swizzled(std::uint64_t address) {
    return address ^ (address >> 7 & 7) << 4;
}

}  // namespace

template <typename Visit>
void TensorCopies::for_each_row(const Copy& copy, const Visit& visit) {
    const TensorMap& map = copy.map;
    const std::uint32_t rows = map.box_bytes() / map.row_bytes();
    for (std::uint32_t r = 0; r < rows; ++r) {
        std::array<std::int64_t, kMaxTensorRank> at = copy.at;
        std::uint32_t rest = r;
        for (std::uint32_t d = 1; d < kMaxTensorRank; ++d) {
            at[d] += rest % map.box(d);
            rest /= map.box(d);
        }
        visit(map.row(at), r * map.row_bytes());
    }
}

void TensorCopies::check(const Copy& copy) const {
    const std::uint64_t to = copy.destination;
    const std::uint32_t num_bytes = copy.map.box_bytes();
    const auto swizzle = copy.map.swizzle();
    if (swizzle != TensorMap::kNone && (swizzle != TensorMap::k128 || copy.map.row_bytes() != kSwizzledRow)) {
        block_.fail(FailureKind::kInvalidOperand, copy.line, to,
                    "cp.async.bulk.tensor: of swizzles, only that of rows of 128 bytes is emulated");
    }
    const std::uint32_t alignment = swizzle == TensorMap::kNone ? kAlignment : kSwizzledGroup;
    if (to % alignment != 0) {
        block_.fail(FailureKind::kMisalignedAddress, copy.line, to,
                    "cp.async.bulk.tensor: its destination must be aligned to %u", alignment);
    }
    if (!SharedMemory::contains(to, num_bytes)) {
        block_.fail(FailureKind::kIllegalAddress, copy.line, to,
                    "cp.async.bulk.tensor of %u bytes to what is not shared memory", num_bytes);
    }
    if (!SharedMemory::writable(to, num_bytes)) {
        nvemu_check_access(to, num_bytes, kLine, 1, copy.line);
    }
    if (SharedMemory::any(to, num_bytes, SharedMemory::kUnfenced)) {
        block_.fail(FailureKind::kAsyncRace, copy.line, to,
                    "cp.async.bulk.tensor writes what ordinary stores wrote, and who wrote it issued no "
                    "fence.proxy.async since");
    }
}

void TensorCopies::issue(std::uint32_t line, const Operands& operands) {
    Copy copy{.map = {},
              .at = {},
              .destination = operands.destination,
              .mbarrier = operands.mbarrier,
              .line = line};
    if (operands.to_others) {
        block_.fail(FailureKind::kInvalidOperand, line, 0,
                    "cp.async.bulk.tensor to other blocks of a cluster is not emulated");
    }
    const LaunchRequest& launch = block_.request();
    const bool is_param = std::any_of(launch.params, launch.params + launch.kernel->num_params,
                                      [&](const void* param) { return param == operands.map; });
    if (!is_param || !copy.map.decode(operands.map)) {
        block_.fail(FailureKind::kInvalidOperand, line, 0, "cp.async.bulk.tensor: %s",
                    is_param ? "its tensor map is not what cuTensorMapEncodeTiled made"
                             : "its tensor map is no parameter of the kernel");
    }
    if (operands.rank != copy.map.rank()) {
        block_.fail(FailureKind::kInvalidOperand, line, 0,
                    "cp.async.bulk.tensor of %u dimensions, its tensor map has %u", operands.rank,
                    copy.map.rank());
    }
    std::copy(operands.at, operands.at + operands.rank, copy.at.begin());
    block_.mbarriers().check_for_copy(line, copy.mbarrier);
    check(copy);
    const TensorMap::Inside inside = copy.map.inside(copy.at[0]);
    for_each_row(copy, [&](std::uint64_t source, std::uint32_t) {
        if (source != 0 && inside.begin < inside.end) {  // a fault now, and not when the copy lands
            const auto* row = reinterpret_cast<const volatile std::byte*>(source);
            static_cast<void>(row[inside.begin * copy.map.element_bytes()]);
            static_cast<void>(row[inside.end * copy.map.element_bytes() - 1]);
        }
    });
    std::memset(reinterpret_cast<void*>(copy.destination), kNaN, copy.map.box_bytes());
    SharedMemory::set(copy.destination, copy.map.box_bytes(), SharedMemory::kClosed);
    pending_.push_back(copy);
    block_.interleave();
}

void TensorCopies::land(std::size_t chosen) {
    const Copy copy = pending_[chosen];
    pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(chosen));
    const TensorMap& map = copy.map;
    SharedMemory::clear(copy.destination, map.box_bytes(), SharedMemory::kClosed);
    const TensorMap::Inside inside = map.inside(copy.at[0]);
    const auto num_bytes = static_cast<std::size_t>(inside.end - inside.begin) * map.element_bytes();
    const auto skipped = static_cast<std::size_t>(inside.begin - copy.at[0]) * map.element_bytes();
    for_each_row(copy, [&](std::uint64_t source, std::uint32_t offset) {
        std::array<std::byte, 256 * 8> row{};  // the largest; zeros where nothing is
        if (source != 0 && num_bytes != 0) {
            std::memcpy(row.data() + skipped,
                        reinterpret_cast<const std::byte*>(source) + inside.begin * map.element_bytes(),
                        num_bytes);
        }
        for (std::uint32_t at = 0; at < map.row_bytes(); at += kLine) {
            const std::uint64_t to = copy.destination + offset + at;
            std::memcpy(reinterpret_cast<void*>(map.swizzle() == TensorMap::kNone ? to : swizzled(to)),
                        row.data() + at, kLine);
        }
    });
    block_.mbarriers().complete(copy.line, copy.mbarrier, map.box_bytes());
}

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_tensor_copy(std::uint32_t line, std::uint64_t destination, std::uint64_t mbarrier,
                                    const void* map, std::uint32_t to_others, std::uint32_t rank,
                                    const std::int32_t* at) {
    Block::running->tensor_copies().issue(line, {destination, mbarrier, map, at, rank, to_others != 0});
}
