// One thread block being run: its threads, who waits for what, and who goes on next.
//
// A block is up to 1024 CUDA threads in warps of 32. Here each is a fiber, and exactly one runs at a time:
// until it waits, ends or fails. The one that stops picks the next one itself and switches to it; only when
// nobody can go on does control return to run(). Which one is next is where broken synchronisation shows, so
// there are several orders: 0 runs each warp as far as it gets before the next one, 1 does the same from the
// other end, and any other number is a seed. On a GPU all of these can happen.
#pragma once

#include <pthread.h>

#include <array>
#include <cstdint>
#include <vector>

#include "abi.h"
#include "fiber_stacks.h"
#include "mbarrier.h"
#include "tensor_copy.h"

namespace nvemu {

inline constexpr std::uint32_t kWarpThreads = 32;
inline constexpr std::uint32_t kMaxWarps = FiberStacks::kMaxThreads / kWarpThreads;
inline constexpr std::uint32_t kNumBarriers = 16;

struct AsyncCopy {
    std::uint64_t destination;
    std::uint64_t source;
    std::uint32_t num_bytes;
    std::uint32_t copied_bytes;  // the rest becomes zero
};

struct Span {
    std::uint64_t address;
    std::uint64_t num_bytes;
};

// What a waiting thread waits for, for messages.
struct Waiting {
    const char* operation = nullptr;  // null: it does not wait
    std::uint32_t line = 0;
    bool is_collective = false;
    std::uint64_t mbarrier = 0;  // where it waits at one
};

struct Thread {
    void* context = nullptr;
    std::uint32_t index[3] = {};
    std::uint32_t linear = 0;
    bool done = false;
    Waiting waiting;
    std::uint32_t barrier_result = 0;
    std::vector<AsyncCopy> copies;           // in order of issue
    std::vector<std::uint32_t> copy_groups;  // copies in each committed group, oldest first
    std::uint32_t num_grouped = 0;           // the sum of copy_groups; the rest is not committed yet
    std::vector<Span> unfenced;              // written to shared memory since the last proxy fence
    bool mbarrier_refused = false;           // its last try_wait came too early
    bool awaited_previous = false;           // it has waited for the kernels in front

    [[nodiscard]] std::uint32_t lane() const { return linear % kWarpThreads; }
    [[nodiscard]] std::uint32_t warp() const { return linear / kWarpThreads; }
    [[nodiscard]] std::uint32_t bit() const { return 1u << lane(); }
};

// A collective some lanes of a warp arrived at and others are expected at.
struct Collective {
    const char* operation = nullptr;
    std::uint32_t line = 0;
    std::uint32_t mask = 0;  // lanes that take part; 0: this slot is free
    std::uint32_t arrived = 0;
    std::array<const void*, kWarpThreads> in{};  // on the stacks of the lanes, which wait meanwhile
    std::array<void*, kWarpThreads> out{};
};

struct Warp {
    std::uint32_t exists = 0;  // lanes
    std::uint32_t ready = 0;   // lanes that can go on
    std::uint32_t done = 0;    // lanes
    // Lanes in different branches may be in collectives of their own, if their masks are disjoint.
    std::vector<Collective> pending;
    std::vector<Span> wgmma_reads;            // of wgmmas under way, in order of issue
    std::vector<std::uint32_t> wgmma_groups;  // spans in each committed group, oldest first
    std::uint32_t wgmma_grouped = 0;
    bool wgmma_fenced = false;
};

struct Barrier {
    std::uint32_t expected = 0;
    std::uint32_t arrived = 0;
    std::uint32_t reduced = 0;                       // of the values the threads brought along
    std::array<std::uint32_t, kMaxWarps> waiting{};  // lanes
    std::array<std::uint32_t, kMaxWarps> lines{};    // where each warp waits
};

class Block {
  public:
    Block(const LaunchRequest& request, Failure* failure);

    // Runs block `index` to its end; false when it failed.
    bool run(const std::array<std::uint32_t, 3>& index);

    // The block being run, for the functions that kernels call.
    static Block* running;
    [[nodiscard]] Thread& current() { return *current_; }
    [[nodiscard]] Warp& warp() { return warps_[current_->warp()]; }
    [[nodiscard]] Warp& warp(std::uint32_t number) { return warps_[number]; }
    [[nodiscard]] Thread& thread(std::uint32_t linear) { return threads_[linear]; }
    [[nodiscard]] Barrier& barrier(std::uint32_t id) { return barriers_[id]; }
    [[nodiscard]] MBarriers& mbarriers() { return mbarriers_; }
    [[nodiscard]] TensorCopies& tensor_copies() { return tensor_copies_; }
    [[nodiscard]] std::uint32_t num_threads() const { return num_threads_; }
    [[nodiscard]] std::uint32_t num_warps() const { return (num_threads_ + kWarpThreads - 1) / kWarpThreads; }
    [[nodiscard]] const LaunchRequest& request() const { return request_; }
    [[nodiscard]] const std::array<std::uint32_t, 3>& index() const { return index_; }
    [[nodiscard]] bool on_own_stack(std::uint64_t address, std::uint64_t num_bytes) const;

    // The current thread waits until somebody calls wake.
    void wait(const Waiting& waiting);
    void wake(std::uint32_t warp, std::uint32_t lanes);
    // In the random orders, now and then: somebody else goes first.
    void interleave();

    // Ends the launch; the message is formatted as by printf. Does not return.
    [[noreturn]] __attribute__((format(printf, 5, 6))) void fail(FailureKind kind, std::uint32_t line,
                                                                 std::uint64_t address, const char* format,
                                                                 ...);
    // The same from a signal handler: only notes the failure; what to continue with is in
    // scheduler_context().
    void note_fault(std::uint64_t address, const char* what);
    [[nodiscard]] void* scheduler_context() const { return scheduler_; }
    // Whether the calling OS thread is not the one that runs this block.
    [[nodiscard]] bool faults_elsewhere() const { return pthread_equal(runner_, pthread_self()) == 0; }

  private:
    static void thread_main();
    [[nodiscard]] Thread* next();
    void land_copy();
    void switch_away();
    void start_threads();
    void note(FailureKind kind, std::uint32_t line, std::uint64_t address);
    void report_stuck();
    [[nodiscard]] std::uint64_t random();

    const LaunchRequest& request_;
    Failure* failure_;
    std::array<std::uint32_t, 3> index_{};
    std::uint32_t num_threads_;
    std::uint32_t num_done_ = 0;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::uint32_t ready_warps_ = 0;
    std::array<Barrier, kNumBarriers> barriers_{};
    MBarriers mbarriers_{*this};
    TensorCopies tensor_copies_{*this};
    Thread* current_ = nullptr;
    void* scheduler_ = nullptr;
    std::uint64_t random_state_ = 0;
    pthread_t runner_ = pthread_self();
};

}  // namespace nvemu
