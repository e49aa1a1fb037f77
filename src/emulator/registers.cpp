// The special registers: which thread this is, of how many.
#include "block.h"
#include "runtime.h"

using nvemu::Block;

NVEMU_EXPORT std::uint32_t nvemu_thread_index(std::uint32_t dim) {
    return Block::running->current().index[dim];
}

NVEMU_EXPORT std::uint32_t nvemu_block_dim(std::uint32_t dim) {
    return Block::running->request().block[dim];
}

NVEMU_EXPORT std::uint32_t nvemu_block_index(std::uint32_t dim) {
    return Block::running->index()[dim];
}

NVEMU_EXPORT std::uint32_t nvemu_grid_dim(std::uint32_t dim) {
    return Block::running->request().grid[dim];
}

NVEMU_EXPORT std::uint32_t nvemu_lane() {
    return Block::running->current().lane();
}

NVEMU_EXPORT std::uint32_t nvemu_warp() {
    return Block::running->current().warp();
}

NVEMU_EXPORT std::uint32_t nvemu_dynamic_shared_bytes() {
    return Block::running->request().dynamic_shared_bytes;
}
