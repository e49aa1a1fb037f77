// Barriers of the block: sixteen, numbered, each for a number of threads that is a multiple of 32.
//
// __syncthreads() is barrier 0 for all threads. A thread that ended does not count as arrived: some GPUs let
// the others through, the programming guide does not promise it, so here they wait forever and are told.
#include "block.h"
#include "runtime.h"

namespace nvemu {

namespace {

void release(Block& block, Barrier& barrier) {
    for (std::uint32_t w = 0; w < block.num_warps(); ++w) {
        for (std::uint32_t lane = 0; lane < kWarpThreads; ++lane) {
            if ((barrier.waiting[w] >> lane & 1) != 0) {
                block.thread(w * kWarpThreads + lane).barrier_result = barrier.reduced;
            }
        }
        block.wake(w, barrier.waiting[w]);
        barrier.waiting[w] = 0;
    }
    barrier.arrived = 0;
}

std::uint32_t combined(BarrierReduce op, std::uint32_t a, std::uint32_t b) {
    switch (op) {
        case BarrierReduce::kCount:
            return a + b;
        case BarrierReduce::kAnd:
            return a & b;
        case BarrierReduce::kOr:
            break;
    }
    return a | b;
}

struct Arrival {
    std::uint32_t line;
    std::uint32_t id;
    std::uint32_t count;
    bool aligned;
    bool waits;
    BarrierReduce op = BarrierReduce::kCount;
    std::uint32_t value = 0;
};

std::uint32_t arrive(const Arrival& arrival) {
    Block& block = *Block::running;
    Thread& thread = block.current();
    const std::uint32_t line = arrival.line;
    if (arrival.id >= kNumBarriers) {
        block.fail(FailureKind::kInvalidOperand, line, 0, "barrier %u, there are 16", arrival.id);
    }
    const std::uint32_t count = arrival.count == 0 ? block.num_threads() : arrival.count;
    if (arrival.count % kWarpThreads != 0 || count > block.num_threads()) {
        block.fail(FailureKind::kInvalidOperand, line, 0,
                   "barrier %u for %u threads: must be a multiple of 32, at most the block's %u", arrival.id,
                   count, block.num_threads());
    }
    Barrier& barrier = block.barrier(arrival.id);
    if (barrier.arrived == 0) {
        barrier.expected = count;
        barrier.reduced = arrival.value;
    } else {
        if (barrier.expected != count) {
            block.fail(FailureKind::kInvalidOperand, line, 0, "barrier %u for %u threads, others came for %u",
                       arrival.id, count, barrier.expected);
        }
        barrier.reduced = combined(arrival.op, barrier.reduced, arrival.value);
    }
    std::uint32_t& waiting = barrier.waiting[thread.warp()];
    if (arrival.aligned && waiting != 0 && barrier.lines[thread.warp()] != line) {
        block.fail(
            FailureKind::kDivergence, line, 0,
            "the lanes of a warp diverge: lane %u is at bar.sync (line %u), lanes %08x at bar.sync (line %u)",
            thread.lane(), line, waiting, barrier.lines[thread.warp()]);
    }
    barrier.lines[thread.warp()] = line;
    if (++barrier.arrived == barrier.expected) {
        const std::uint32_t result = barrier.reduced;
        release(block, barrier);
        return result;
    }
    if (arrival.waits) {
        waiting |= thread.bit();
        block.wait({"bar.sync", line, false});
        return thread.barrier_result;
    }
    return 0;
}

}  // namespace

}  // namespace nvemu

using namespace nvemu;

NVEMU_EXPORT void nvemu_barrier(std::uint32_t line, std::uint32_t id, std::uint32_t count,
                                std::uint32_t aligned) {
    arrive({.line = line, .id = id, .count = count, .aligned = aligned != 0, .waits = true});
}

NVEMU_EXPORT void nvemu_barrier_arrive(std::uint32_t line, std::uint32_t id, std::uint32_t count) {
    arrive({.line = line, .id = id, .count = count, .aligned = false, .waits = false});
}

NVEMU_EXPORT std::uint32_t nvemu_barrier_reduce(std::uint32_t line, std::uint32_t id, std::uint32_t count,
                                                std::uint32_t op, std::uint32_t predicate) {
    return arrive({.line = line,
                   .id = id,
                   .count = count,
                   .aligned = true,
                   .waits = true,
                   .op = static_cast<BarrierReduce>(op),
                   .value = predicate != 0 ? 1u : 0u});
}
