// The functions that rewritten kernels call, one per kind of instruction.
//
// `line` is where the instruction stands in the LLVM IR text: two calls of one instruction are the same
// collective only if they are on the same line, and messages say it. Addresses are 64-bit integers. Where an
// instruction has several registers, `in` and `out` point at arrays of 32-bit registers, in the order of the
// PTX operands.
#pragma once

#include <cstdint>

#include "abi.h"

namespace nvemu {

enum class ShuffleMode : std::uint32_t { kUp = 0, kDown = 1, kButterfly = 2, kIndex = 3 };
enum class VoteMode : std::uint32_t { kAll = 0, kAny = 1, kUniform = 2, kBallot = 3 };
enum class ReduceOp : std::uint32_t { kAdd, kMin, kMax, kUMin, kUMax, kAnd, kOr, kXor };
enum class BarrierReduce : std::uint32_t { kCount = 0, kAnd = 1, kOr = 2 };
enum class MmaShape : std::uint32_t {
    kBf16K16 = 0,  // m16n8k16: 4 + 2 + 4 registers
    kF16K16 = 1,
    kTf32K8 = 2,  // m16n8k8: 4 + 2 + 4
    kBf16K8 = 3,  // m16n8k8: 2 + 1 + 4
    kF16K8 = 4,
    kTf32K4 = 5,  // m16n8k4: 2 + 1 + 4
};

}  // namespace nvemu

// --- who am I (dim: 0 x, 1 y, 2 z)
// --------------------------------------------------------------------------
NVEMU_EXPORT std::uint32_t nvemu_thread_index(std::uint32_t dim);
NVEMU_EXPORT std::uint32_t nvemu_block_dim(std::uint32_t dim);
NVEMU_EXPORT std::uint32_t nvemu_block_index(std::uint32_t dim);
NVEMU_EXPORT std::uint32_t nvemu_grid_dim(std::uint32_t dim);
NVEMU_EXPORT std::uint32_t nvemu_lane();
NVEMU_EXPORT std::uint32_t nvemu_warp();
NVEMU_EXPORT std::uint32_t nvemu_dynamic_shared_bytes();

// --- memory
// ------------------------------------------------------------------------------------------------- The slow
// path of an access check: returns if the access is allowed after all. access: 0 load, 1 store.
NVEMU_EXPORT void nvemu_check_access(std::uint64_t address, std::uint32_t num_bytes, std::uint32_t alignment,
                                     std::uint32_t access, std::uint32_t line);
NVEMU_EXPORT void nvemu_shared_written(std::uint64_t address, std::uint32_t num_bytes);
NVEMU_EXPORT void nvemu_proxy_fence();
NVEMU_EXPORT void nvemu_interleave();
// Kernels run one after the other, so there is nothing to wait for; that every thread does is checked.
NVEMU_EXPORT void nvemu_await_previous();
NVEMU_EXPORT void nvemu_trap(std::uint32_t line);

// --- the block
// ---------------------------------------------------------------------------------------------- count:
// threads that take part, 0 for all. aligned: the lanes of a warp must be at the same line.
NVEMU_EXPORT void nvemu_barrier(std::uint32_t line, std::uint32_t id, std::uint32_t count,
                                std::uint32_t aligned);
NVEMU_EXPORT void nvemu_barrier_arrive(std::uint32_t line, std::uint32_t id, std::uint32_t count);
NVEMU_EXPORT std::uint32_t nvemu_barrier_reduce(std::uint32_t line, std::uint32_t id, std::uint32_t count,
                                                std::uint32_t op, std::uint32_t predicate);

// --- the warp
// -----------------------------------------------------------------------------------------------
NVEMU_EXPORT void nvemu_warp_sync(std::uint32_t line, std::uint32_t mask);
// out: the value, and whether it came from a lane in range.
NVEMU_EXPORT void nvemu_shuffle(std::uint32_t line, std::uint32_t mode, std::uint32_t mask,
                                std::uint32_t value, std::uint32_t b, std::uint32_t c, std::uint32_t* out);
NVEMU_EXPORT std::uint32_t nvemu_vote(std::uint32_t line, std::uint32_t mode, std::uint32_t mask,
                                      std::uint32_t predicate);
NVEMU_EXPORT std::uint32_t nvemu_match_any(std::uint32_t line, std::uint32_t mask, std::uint64_t value);
NVEMU_EXPORT std::uint32_t nvemu_warp_reduce(std::uint32_t line, std::uint32_t op, std::uint32_t mask,
                                             std::uint32_t value);
// out: a lane all agree on (the lowest), and whether it is this one.
NVEMU_EXPORT void nvemu_elect(std::uint32_t line, std::uint32_t mask, std::uint32_t* out);

// --- matrices
// -----------------------------------------------------------------------------------------------
NVEMU_EXPORT void nvemu_load_matrix(std::uint32_t line, std::uint32_t count, std::uint32_t transposed,
                                    std::uint64_t address, std::uint32_t* out);
NVEMU_EXPORT void nvemu_store_matrix(std::uint32_t line, std::uint32_t count, std::uint32_t transposed,
                                     std::uint64_t address, const std::uint32_t* in);
NVEMU_EXPORT void nvemu_mma(std::uint32_t line, std::uint32_t shape, const std::uint32_t* in,
                            std::uint32_t* out);
// d: n / 2 floats, read and written. a_registers: A's four registers, or null when a is a descriptor.
// flags: bit 0 accumulate, bits 1 and 2 negate A and B, bits 3 and 4 A and B are MN-major, bit 5 f16, not
// bf16.
NVEMU_EXPORT void nvemu_wgmma(std::uint32_t line, std::uint32_t n, std::uint32_t flags,
                              const std::uint32_t* a_registers, std::uint64_t a, std::uint64_t b, float* d);
NVEMU_EXPORT void nvemu_wgmma_fence(std::uint32_t line);
NVEMU_EXPORT void nvemu_wgmma_commit(std::uint32_t line);
NVEMU_EXPORT void nvemu_wgmma_wait(std::uint32_t line, std::uint32_t max_pending);

// --- asynchronous copies
// ------------------------------------------------------------------------------------
NVEMU_EXPORT void nvemu_copy_async(std::uint32_t line, std::uint64_t destination, std::uint64_t source,
                                   std::uint32_t num_bytes, std::uint32_t copied_bytes);
NVEMU_EXPORT void nvemu_copy_commit();
NVEMU_EXPORT void nvemu_copy_wait(std::uint32_t max_pending);
NVEMU_EXPORT void nvemu_copy_wait_all();

// --- mbarriers, and the copies that complete on them
// ------------------------------------------------------------------------------------
NVEMU_EXPORT void nvemu_mbarrier_init(std::uint32_t line, std::uint64_t address, std::uint32_t count);
NVEMU_EXPORT void nvemu_mbarrier_fence();
NVEMU_EXPORT void nvemu_mbarrier_arrive(std::uint32_t line, std::uint64_t address,
                                        std::uint32_t expected_bytes);
NVEMU_EXPORT std::uint32_t nvemu_mbarrier_try_wait(std::uint32_t line, std::uint64_t address,
                                                   std::uint32_t parity);
// map: 128 bytes, a parameter of the kernel. to_others: not 0 where it goes to other blocks as well. at:
// coordinates of the box, `rank` of them.
NVEMU_EXPORT void nvemu_tensor_copy(std::uint32_t line, std::uint64_t destination, std::uint64_t mbarrier,
                                    const void* map, std::uint32_t to_others, std::uint32_t rank,
                                    const std::int32_t* at);
