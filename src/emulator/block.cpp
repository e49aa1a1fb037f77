#include "block.h"

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <string>

#include "context_switch.h"

namespace nvemu {

Block* Block::running = nullptr;

namespace {

const FiberStacks& stacks() {
    static const FiberStacks all;
    return all;
}

std::uint32_t nth_set_bit(std::uint32_t bits, std::uint32_t n) {
    for (; n > 0; --n) {
        bits &= bits - 1;
    }
    return static_cast<std::uint32_t>(std::countr_zero(bits));
}

}  // namespace

Block::Block(const LaunchRequest& request, Failure* failure)
    : request_(request),
      failure_(failure),
      num_threads_(request.block[0] * request.block[1] * request.block[2]),
      threads_(num_threads_),
      warps_(num_warps()) {
    stacks();
}

std::uint64_t Block::random() {  // xorshift64*
    random_state_ ^= random_state_ >> 12;
    random_state_ ^= random_state_ << 25;
    random_state_ ^= random_state_ >> 27;
    return (random_state_ * 0x2545F4914F6CDD1Dull) >> 33;
}

void Block::start_threads() {
    const auto& dim = request_.block;
    num_done_ = 0;
    ready_warps_ = 0;
    barriers_.fill(Barrier{});
    mbarriers_.clear();
    tensor_copies_.clear();
    for (std::uint32_t i = 0; i < num_threads_; ++i) {
        Thread& thread = threads_[i];
        thread.context = new_context(stacks().top(i), &Block::thread_main);
        thread.linear = i;
        thread.index[0] = i % dim[0];
        thread.index[1] = i / dim[0] % dim[1];
        thread.index[2] = i / dim[0] / dim[1];
        thread.done = false;
        thread.waiting = {};
        thread.copies.clear();
        thread.copy_groups.clear();
        thread.num_grouped = 0;
        thread.unfenced.clear();
        thread.mbarrier_refused = false;
        thread.awaited_previous = false;
    }
    for (std::uint32_t w = 0; w < num_warps(); ++w) {
        const std::uint32_t lanes = std::min(kWarpThreads, num_threads_ - w * kWarpThreads);
        Warp& warp = warps_[w];
        warp.exists = lanes == kWarpThreads ? ~0u : (1u << lanes) - 1;
        warp.done = 0;
        warp.ready = 0;
        warp.pending.clear();
        warp.wgmma_reads.clear();
        warp.wgmma_groups.clear();
        warp.wgmma_grouped = 0;
        warp.wgmma_fenced = false;
        wake(w, warp.exists);
    }
}

bool Block::run(const std::array<std::uint32_t, 3>& index) {
    index_ = index;
    std::uint64_t seed = request_.order;
    for (const std::uint32_t part : index) {
        seed = seed * 0x9E3779B97F4A7C15ull + part + 1;
    }
    random_state_ = seed | 1;
    start_threads();
    running = this;
    current_ = &threads_[request_.order == 1 ? num_threads_ - 1 : 0];  // whose warp goes first
    current_ = next();
    nvemu_switch_context(&scheduler_, current_->context);
    // Back here when everybody ended, somebody failed, or nobody can go on.
    running = nullptr;
    if (failure_->kind == FailureKind::kNone && num_done_ < num_threads_) {
        report_stuck();
    }
    return failure_->kind == FailureKind::kNone;
}

void Block::thread_main() {
    Block& block = *running;
    block.request_.kernel->call(block.request_.params);
    Thread& thread = block.current();
    Warp& warp = block.warp();
    if (!thread.copies.empty()) {
        block.fail(FailureKind::kAsyncAtExit, 0, thread.copies[0].destination,
                   "the thread ends with %zu cp.async under way", thread.copies.size());
    }
    if (block.request_.kernel->awaits_previous != 0 && !thread.awaited_previous) {
        block.fail(FailureKind::kInvalidOperand, 0, 0,
                   "the thread ends without griddepcontrol.wait: who waits for this kernel would not have "
                   "waited for those in front of it");
    }
    thread.done = true;
    warp.done |= thread.bit();
    warp.ready &= ~thread.bit();
    ++block.num_done_;
    if (warp.done == warp.exists && !warp.wgmma_reads.empty()) {
        block.fail(FailureKind::kAsyncAtExit, 0, warp.wgmma_reads[0].address,
                   "the warp ends with wgmma under way");
    }
    if (block.num_done_ == block.num_threads_ && block.tensor_copies_.num_pending() != 0) {
        block.fail(FailureKind::kAsyncAtExit, 0, block.tensor_copies_.destination(),
                   "the block ends with %zu cp.async.bulk.tensor under way",
                   block.tensor_copies_.num_pending());
    }
    block.switch_away();
    __builtin_unreachable();
}

void Block::land_copy() {
    const std::size_t count = tensor_copies_.num_pending();
    tensor_copies_.land(request_.order == 0 ? 0 : request_.order == 1 ? count - 1 : random() % count);
}

Thread* Block::next() {
    if (current_ != nullptr && warps_[current_->warp()].ready == 0) {
        ready_warps_ &= ~(1u << current_->warp());
    }
    while (ready_warps_ == 0 && tensor_copies_.num_pending() != 0) {
        land_copy();
    }
    if (ready_warps_ == 0) {
        return nullptr;
    }
    std::uint32_t w = current_->warp();
    const bool stays = (ready_warps_ >> w & 1) != 0;
    std::uint32_t lane = 0;
    if (request_.order == 0) {
        w = stays ? w : static_cast<std::uint32_t>(std::countr_zero(ready_warps_));
        lane = static_cast<std::uint32_t>(std::countr_zero(warps_[w].ready));
    } else if (request_.order == 1) {
        w = stays ? w : 31 - static_cast<std::uint32_t>(std::countl_zero(ready_warps_));
        lane = 31 - static_cast<std::uint32_t>(std::countl_zero(warps_[w].ready));
    } else {
        const auto one_of = [this](std::uint32_t bits) {
            return nth_set_bit(
                bits, static_cast<std::uint32_t>(random() % static_cast<std::uint64_t>(std::popcount(bits))));
        };
        w = stays && random() % 4 != 0 ? w : one_of(ready_warps_);
        lane = one_of(warps_[w].ready);
    }
    return &threads_[w * kWarpThreads + lane];
}

void Block::switch_away() {
    Thread* from = current_;
    Thread* to = next();
    if (to == from) {
        return;
    }
    if (to == nullptr) {
        nvemu_switch_context(&from->context, scheduler_);
    } else {
        current_ = to;
        nvemu_switch_context(&from->context, to->context);
    }
}

void Block::wait(const Waiting& waiting) {
    current_->waiting = waiting;
    warp().ready &= ~current_->bit();
    switch_away();
    current_->waiting = {};
}

void Block::wake(std::uint32_t warp, std::uint32_t lanes) {
    warps_[warp].ready |= lanes;
    if (lanes != 0) {
        ready_warps_ |= 1u << warp;
    }
}

void Block::interleave() {
    if (request_.order < 2) {
        return;
    }
    if (tensor_copies_.num_pending() != 0 && random() % 8 == 0) {
        land_copy();
    }
    if (random() % 4 == 0) {
        switch_away();
    }
}

bool Block::on_own_stack(std::uint64_t address, std::uint64_t num_bytes) const {
    return stacks().holds(current_->linear, address, num_bytes);
}

void Block::note(FailureKind kind, std::uint32_t line, std::uint64_t address) {
    failure_->kind = kind;
    failure_->line = line;
    failure_->address = address;
    std::copy(index_.begin(), index_.end(), failure_->block);
    std::copy(std::begin(current_->index), std::end(current_->index), failure_->thread);
}

void Block::fail(FailureKind kind, std::uint32_t line, std::uint64_t address, const char* format, ...) {
    note(kind, line, address);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(failure_->message, sizeof failure_->message, format, arguments);
    va_end(arguments);
    void* abandoned = nullptr;
    nvemu_switch_context(&abandoned, scheduler_);
    __builtin_unreachable();
}

void Block::note_fault(std::uint64_t address, const char* what) {
    note(FailureKind::kIllegalAddress, 0, address);
    std::size_t length = 0;
    for (; what[length] != '\0' && length + 1 < sizeof failure_->message; ++length) {
        failure_->message[length] = what[length];
    }
    failure_->message[length] = '\0';
}

// Nobody can go on: who waits for what, as counts per place, and the first thread that waits as the culprit.
void Block::report_stuck() {
    struct Place {
        Waiting waiting;
        std::uint32_t count;
    };
    std::vector<Place> places;
    Thread* first = nullptr;
    bool collective = false;
    for (Thread& thread : threads_) {
        if (thread.done) {
            continue;
        }
        first = first == nullptr ? &thread : first;
        collective = collective || thread.waiting.is_collective;
        const auto same = [&](const Place& place) {
            return place.waiting.operation == thread.waiting.operation &&
                   place.waiting.line == thread.waiting.line &&
                   place.waiting.mbarrier == thread.waiting.mbarrier;
        };
        const auto found = std::find_if(places.begin(), places.end(), same);
        if (found == places.end()) {
            places.push_back({thread.waiting, 1});
        } else {
            ++found->count;
        }
    }
    std::string text = collective ? "lanes of a warp wait for others that do not come: " : "deadlock: ";
    for (const Place& place : places) {
        text += std::to_string(place.count) + " at " + place.waiting.operation + " (line " +
                std::to_string(place.waiting.line) + "), ";
        if (place.waiting.mbarrier != 0) {
            text += mbarriers_.missing(place.waiting.mbarrier) + ", ";
        }
    }
    text += std::to_string(num_done_) + " ended, of " + std::to_string(num_threads_);
    current_ = first;
    note(collective ? FailureKind::kDivergence : FailureKind::kDeadlock, first->waiting.line, 0);
    std::snprintf(failure_->message, sizeof failure_->message, "%s", text.c_str());
}

}  // namespace nvemu
