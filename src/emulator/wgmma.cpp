// wgmma.mma_async: D += A * B by four warps, B (and mostly A) read from shared memory by the tensor core
// itself.
//
// D is m64 x n in registers, k is 16, and warp w of the group holds rows 16w to 16w + 15: with g = lane / 4
// and t = lane % 4, register 4j + r is element (g + 8 * (r / 2), 8j + 2t + r % 2). The order of summation is
// that of mma.cpp. Each warp computes its rows as soon as its own lanes arrive, which the hardware may do
// too: what another warp has yet to write to shared memory is then missing and shows.
//
// Asynchronous means: shared memory must not be written before wgmma.wait_group, and what ordinary stores
// wrote is seen only after fence.proxy.async. Both are checked, by the shadow of shared memory. (For cp.async
// the fence is not demanded: CUTLASS and Triton do without, so hardware evidently does too.) Not checked:
// that registers of D are not used before the wait, for the IR has them as values of the instruction already.
#include <cstring>

#include "collective.h"
#include "element.h"
#include "matrix_descriptor.h"
#include "runtime.h"
#include "shared_memory.h"

namespace nvemu {

namespace {

constexpr std::uint32_t kK = 16;
constexpr std::uint32_t kMaxN = 256;
constexpr std::uint32_t kWarpRows = 16;

enum Flag : std::uint32_t {
    kAccumulate = 1,
    kNegateA = 2,
    kNegateB = 4,
    kTransposedA = 8,
    kTransposedB = 16,
    kHalf = 32,
};

struct Operands {
    const std::uint32_t* a_registers;
    std::uint64_t a;
    std::uint64_t b;
};

class Reader {
  public:
    Reader(Block& block, std::uint32_t line, bool half) : block_(block), line_(line), half_(half) {}

    // rows x 16 elements from `first_row` on, as float, k slow: out[k * stride + row].
    void read(const MatrixDescriptor& matrix, bool mn_major, std::uint32_t first_row, std::uint32_t rows,
              bool negate, float* out, std::uint32_t stride) {
        const float sign = negate ? -1.0f : 1.0f;
        // Eight elements (16 bytes) lie together whatever the layout: along m if MN-major, along k if not.
        const std::uint32_t slow_end = mn_major ? kK : rows;
        const std::uint32_t fast_end = mn_major ? rows : kK;
        for (std::uint32_t slow = 0; slow < slow_end; ++slow) {
            for (std::uint32_t fast = 0; fast < fast_end; fast += 8) {
                const std::uint64_t address = mn_major ? matrix.address(first_row + fast, slow)
                                                       : matrix.address(first_row + slow, fast);
                std::uint16_t piece[8];
                load(address, piece);
                for (std::uint32_t e = 0; e < 8; ++e) {
                    const float value = sign * (half_ ? from_f16(piece[e]) : from_bf16(piece[e]));
                    const std::uint32_t k = mn_major ? slow : fast + e;
                    out[k * stride + (mn_major ? fast + e : slow)] = value;
                }
            }
        }
    }

  private:
    void load(std::uint64_t address, std::uint16_t* piece) {
        constexpr std::uint32_t kBytes = 16;
        if (!SharedMemory::readable(address, kBytes)) {
            nvemu_check_access(address, kBytes, kBytes, 0, line_);
        }
        if (SharedMemory::any(address, kBytes, SharedMemory::kUnfenced)) {
            block_.fail(FailureKind::kAsyncRace, line_, address,
                        "wgmma reads shared memory at offset %llu that ordinary stores wrote, and who wrote "
                        "it issued no fence.proxy.async since",
                        static_cast<unsigned long long>(address - kSharedBase));
        }
        if (!SharedMemory::add_reader(address, kBytes)) {
            block_.fail(FailureKind::kInvalidOperand, line_, address,
                        "more than 60 wgmma under way read one place");
        }
        block_.warp().wgmma_reads.push_back({address, kBytes});
        std::memcpy(piece, reinterpret_cast<const void*>(address), kBytes);
    }

    Block& block_;
    std::uint32_t line_;
    bool half_;
};

void read_a_registers(const Collective& warp, bool half, bool negate, float (&a)[kK][kWarpRows]) {
    for (std::uint32_t lane = 0; lane < kWarpThreads; ++lane) {
        const std::uint32_t* registers = static_cast<const Operands*>(warp.in[lane])->a_registers;
        for (std::uint32_t r = 0; r < 4; ++r) {
            for (std::uint32_t e = 0; e < 2; ++e) {
                const auto bits = static_cast<std::uint16_t>(registers[r] >> (16 * e));
                const float value = half ? from_f16(bits) : from_bf16(bits);
                a[2 * (lane % 4) + e + 8 * (r / 2)][lane / 4 + 8 * (r % 2)] = negate ? -value : value;
            }
        }
    }
}

void run(const Collective& warp, std::uint32_t line, std::uint32_t n, std::uint32_t flags) {
    Block& block = *Block::running;
    const auto& operands = *static_cast<const Operands*>(warp.in[0]);
    for (std::uint32_t lane = 1; lane < kWarpThreads; ++lane) {
        const auto& other = *static_cast<const Operands*>(warp.in[lane]);
        if (other.b != operands.b || (operands.a_registers == nullptr && other.a != operands.a)) {
            block.fail(FailureKind::kDivergence, line, 0,
                       "wgmma: the lanes of a warp have different descriptors");
        }
    }
    const bool half = (flags & kHalf) != 0;
    Reader reader(block, line, half);
    static float a[kK][kWarpRows];  // one launch at a time
    static float b[kK][kMaxN];
    if (operands.a_registers != nullptr) {
        read_a_registers(warp, half, (flags & kNegateA) != 0, a);
    } else {
        const bool mn_major = (flags & kTransposedA) != 0;
        const std::uint32_t first_row = block.current().warp() % 4 * kWarpRows;
        reader.read(MatrixDescriptor(operands.a, mn_major), mn_major, first_row, kWarpRows,
                    (flags & kNegateA) != 0, &a[0][0], kWarpRows);
    }
    const bool b_mn_major = (flags & kTransposedB) != 0;
    reader.read(MatrixDescriptor(operands.b, b_mn_major), b_mn_major, 0, n, (flags & kNegateB) != 0, &b[0][0],
                kMaxN);

    const bool accumulate = (flags & kAccumulate) != 0;
    static float d[kWarpRows][kMaxN];
    const auto for_each_register = [&](const auto& visit) {
        for (std::uint32_t lane = 0; lane < kWarpThreads; ++lane) {
            auto* registers = static_cast<float*>(warp.out[lane]);
            for (std::uint32_t i = 0; i < n / 2; ++i) {
                const std::uint32_t r = i % 4;
                visit(registers[i], d[lane / 4 + 8 * (r / 2)][8 * (i / 4) + 2 * (lane % 4) + r % 2]);
            }
        }
    };
    for_each_register([&](float held, float& element) { element = accumulate ? held : 0.0f; });
    for (std::uint32_t m = 0; m < kWarpRows; ++m) {
        for (std::uint32_t k = 0; k < kK; ++k) {
            for (std::uint32_t column = 0; column < n; ++column) {
                d[m][column] += a[k][m] * b[k][column];
            }
        }
    }
    for_each_register([](float& held, float element) { held = element; });
}

void retire(Warp& warp, std::uint32_t max_pending) {
    const std::size_t groups = warp.wgmma_groups.size();
    if (groups <= max_pending) {
        return;
    }
    const std::size_t done = groups - max_pending;
    std::uint32_t count = 0;
    for (std::size_t g = 0; g < done; ++g) {
        count += warp.wgmma_groups[g];
    }
    for (std::uint32_t i = 0; i < count; ++i) {
        SharedMemory::remove_reader(warp.wgmma_reads[i].address, warp.wgmma_reads[i].num_bytes);
    }
    warp.wgmma_reads.erase(warp.wgmma_reads.begin(), warp.wgmma_reads.begin() + count);
    warp.wgmma_groups.erase(warp.wgmma_groups.begin(),
                            warp.wgmma_groups.begin() + static_cast<std::ptrdiff_t>(done));
    warp.wgmma_grouped -= count;
}

}  // namespace

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_wgmma(std::uint32_t line, std::uint32_t n, std::uint32_t flags,
                              const std::uint32_t* a_registers, std::uint64_t a, std::uint64_t b, float* d) {
    Block& block = *Block::running;
    if (n < 8 || n > kMaxN || n % 8 != 0) {
        block.fail(FailureKind::kInvalidOperand, line, 0, "wgmma with n = %u: 8 to 256, a multiple of 8", n);
    }
    if (!MatrixDescriptor(b, false).is_supported() ||
        (a_registers == nullptr && !MatrixDescriptor(a, false).is_supported())) {
        block.fail(FailureKind::kInvalidOperand, line, 0,
                   "wgmma: descriptors with a base offset are not emulated");
    }
    if (block.current().warp() / 4 * 4 + 4 > block.num_threads() / kWarpThreads) {
        block.fail(FailureKind::kInvalidOperand, line, 0, "wgmma needs warps in groups of four");
    }
    if (!block.warp().wgmma_fenced) {
        block.fail(FailureKind::kInvalidOperand, line, 0,
                   "the warp's first wgmma is not preceded by wgmma.fence");
    }
    const Operands operands{a_registers, a, b};
    collect_warp("wgmma", line, &operands, d, [=](const Collective& warp) { run(warp, line, n, flags); });
}

NVEMU_EXPORT void nvemu_wgmma_fence(std::uint32_t line) {
    collect_warp("wgmma.fence", line, nullptr, nullptr,
                 [](const Collective&) { Block::running->warp().wgmma_fenced = true; });
}

NVEMU_EXPORT void nvemu_wgmma_commit(std::uint32_t line) {
    collect_warp("wgmma.commit_group", line, nullptr, nullptr, [](const Collective&) {
        Warp& warp = Block::running->warp();
        const auto issued = static_cast<std::uint32_t>(warp.wgmma_reads.size());
        warp.wgmma_groups.push_back(issued - warp.wgmma_grouped);
        warp.wgmma_grouped = issued;
    });
}

NVEMU_EXPORT void nvemu_wgmma_wait(std::uint32_t line, std::uint32_t max_pending) {
    collect_warp("wgmma.wait_group", line, nullptr, nullptr,
                 [max_pending](const Collective&) { retire(Block::running->warp(), max_pending); });
    Block::running->interleave();
}
