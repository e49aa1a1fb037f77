#include "collective.h"

namespace nvemu {

Collective& arrive(const char* operation, std::uint32_t line, std::uint32_t mask, const void* in, void* out) {
    Block& block = *Block::running;
    Thread& thread = block.current();
    Warp& warp = block.warp();
    if ((mask & thread.bit()) == 0) {
        block.fail(FailureKind::kDivergence, line, 0, "%s by lane %u, which is not in its mask %08x",
                   operation, thread.lane(), mask);
    }
    mask &= warp.exists;
    if ((mask & warp.done) != 0) {
        block.fail(FailureKind::kDivergence, line, 0, "%s with lanes %08x that ended before", operation,
                   mask & warp.done);
    }
    Collective* slot = nullptr;
    Collective* free_slot = nullptr;
    for (Collective& pending : warp.pending) {
        if (pending.mask == 0) {
            free_slot = &pending;
        } else if ((pending.mask & mask) != 0) {
            if (pending.operation != operation || pending.line != line || pending.mask != mask) {
                block.fail(
                    FailureKind::kDivergence, line, 0,
                    "the lanes of a warp diverge: lane %u is at %s (line %u, mask %08x), lanes %08x at %s "
                    "(line %u, mask %08x)",
                    thread.lane(), operation, line, mask, pending.arrived, pending.operation, pending.line,
                    pending.mask);
            }
            slot = &pending;
        }
    }
    if (slot == nullptr) {
        slot = free_slot != nullptr ? free_slot : &warp.pending.emplace_back();
        slot->operation = operation;
        slot->line = line;
        slot->mask = mask;
        slot->arrived = 0;
    }
    slot->arrived |= thread.bit();
    slot->in[thread.lane()] = in;
    slot->out[thread.lane()] = out;
    return *slot;
}

}  // namespace nvemu
