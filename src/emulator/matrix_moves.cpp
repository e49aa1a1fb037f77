// ldmatrix and stmatrix: 8x8 tiles of 16-bit elements between shared memory and the registers of a warp.
//
// Lane 8*i + r gives the address of row r (16 bytes) of tile i. Lane l then holds, of each tile, the elements
// (l / 4, 2 * (l % 4)) and the one right of it, packed into one register: what mma takes as a fragment. The
// transposed forms hold the elements (2 * (l % 4), l / 4) and the one below it.
#include <cstring>

#include "collective.h"
#include "runtime.h"
#include "shared_memory.h"

namespace nvemu {

namespace {

constexpr std::uint32_t kRowBytes = 16;
constexpr std::uint32_t kTile = 8;

using Tile = std::uint16_t[kTile][kTile];

struct StoreOperands {
    std::uint64_t address;
    const std::uint32_t* registers;
};

void check_row(std::uint64_t address, bool is_write, std::uint32_t line) {
    if (address % kRowBytes != 0 || !(is_write ? SharedMemory::writable(address, kRowBytes)
                                               : SharedMemory::readable(address, kRowBytes))) {
        nvemu_check_access(address, kRowBytes, kRowBytes, is_write ? 1 : 0, line);
    }
    if (!SharedMemory::contains(address, kRowBytes)) {
        Block::running->fail(FailureKind::kIllegalAddress, line, address,
                             "a matrix row outside shared memory");
    }
}

// The two elements of a tile that a lane holds.
struct Held {
    std::uint32_t row0, column0, row1, column1;
};

Held held(std::uint32_t lane, bool transposed) {
    const std::uint32_t slow = lane / 4;
    const std::uint32_t fast = 2 * (lane % 4);
    return transposed ? Held{fast, slow, fast + 1, slow} : Held{slow, fast, slow, fast + 1};
}

}  // namespace

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_load_matrix(std::uint32_t line, std::uint32_t count, std::uint32_t transposed,
                                    std::uint64_t address, std::uint32_t* out) {
    if (Block::running->current().lane() < kTile * count) {  // the other lanes' addresses are not used
        check_row(address, false, line);
    }
    collect_warp("ldmatrix", line, &address, out, [&](const Collective& warp) {
        for (std::uint32_t t = 0; t < count; ++t) {
            Tile tile;
            for (std::uint32_t row = 0; row < kTile; ++row) {
                const std::uint64_t from = *static_cast<const std::uint64_t*>(warp.in[kTile * t + row]);
                std::memcpy(tile[row], reinterpret_cast<const void*>(from), kRowBytes);
            }
            for (std::uint32_t lane = 0; lane < kWarpThreads; ++lane) {
                const Held at = held(lane, transposed != 0);
                static_cast<std::uint32_t*>(warp.out[lane])[t] =
                    tile[at.row0][at.column0] | std::uint32_t{tile[at.row1][at.column1]} << 16;
            }
        }
    });
}

NVEMU_EXPORT void nvemu_store_matrix(std::uint32_t line, std::uint32_t count, std::uint32_t transposed,
                                     std::uint64_t address, const std::uint32_t* in) {
    if (Block::running->current().lane() < kTile * count) {
        check_row(address, true, line);
    }
    const StoreOperands operands{address, in};
    collect_warp("stmatrix", line, &operands, nullptr, [&](const Collective& warp) {
        const auto of = [&](std::uint32_t lane) { return static_cast<const StoreOperands*>(warp.in[lane]); };
        for (std::uint32_t t = 0; t < count; ++t) {
            Tile tile;
            for (std::uint32_t lane = 0; lane < kWarpThreads; ++lane) {
                const Held at = held(lane, transposed != 0);
                const std::uint32_t pair = of(lane)->registers[t];
                tile[at.row0][at.column0] = static_cast<std::uint16_t>(pair);
                tile[at.row1][at.column1] = static_cast<std::uint16_t>(pair >> 16);
            }
            for (std::uint32_t row = 0; row < kTile; ++row) {
                const std::uint64_t to = of(kTile * t + row)->address;
                std::memcpy(reinterpret_cast<void*>(to), tile[row], kRowBytes);
            }
        }
    });
    if (Block::running->request().module->checks_proxies != 0 &&
        Block::running->current().lane() < kTile * count) {
        nvemu_shared_written(address, kRowBytes);
    }
}
