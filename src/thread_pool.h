// A fixed team of threads that runs one function at a time, and the barrier such a function uses between its
// parts.
//
// A forward pass is hundreds of short operations. Threads that sleep between them would cost more than the
// work, so waiting is: spin for some tens of microseconds, then sleep in the kernel. The spin is bounded (and
// skipped when there are more threads than cores), so a machine that is short of CPUs gets slower and never
// stuck. A team that has a thread for every core keeps each of its own threads on one: there is nowhere
// better to go. The caller's thread is not ours to pin, and a smaller team goes where the machine has room.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace nanoserve {

// What makes work worth another thread, in multiply-adds: some microseconds, well above the cost of a
// barrier.
inline constexpr std::int64_t kMinCostPerThread = 100'000;

// Waits until `word` differs from `old`: spins up to spin_us microseconds, then sleeps until notified.
void wait_while_equal(const std::atomic<std::uint32_t>& word, std::uint32_t old, int spin_us);

// All `num_threads` threads arrive before any leaves; what was written before is visible after.
class Barrier {
  public:
    Barrier(int num_threads, int spin_us)
        : num_threads_(static_cast<std::uint32_t>(num_threads)), spin_us_(spin_us) {}
    void arrive_and_wait();

  private:
    const std::uint32_t num_threads_;
    const int spin_us_;
    // On lines of their own: the counter is written by everyone while the phase is being polled.
    alignas(64) std::atomic<std::uint32_t> num_arrived_{0};
    alignas(64) std::atomic<std::uint32_t> phase_{0};
};

class ThreadPool {
  public:
    static constexpr int kMaxThreads = 1024;

    // num_threads counts the caller of run(): num_threads - 1 threads are started.
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    [[nodiscard]] int num_threads() const { return num_threads_; }
    [[nodiscard]] int spin_us() const { return spin_us_; }

    // Calls fn(thread_id) once on every thread, thread 0 being the caller, and returns when all are done. The
    // first exception is rethrown here; a function that uses a Barrier must not throw between its phases.
    // Calls from several threads take turns; a call from inside fn is an error, and so is one in a forked
    // child, which has no workers.
    template <typename Fn>
    void run(Fn&& fn) {
        using Target = std::remove_reference_t<Fn>;
        run_job({[](void* target, int thread_id) { (*static_cast<Target*>(target))(thread_id); },
                 const_cast<void*>(static_cast<const void*>(&fn))});
    }

  private:
    struct Job {
        void (*call)(void*, int) = nullptr;
        void* target = nullptr;
    };

    void run_job(Job job);
    void call_guarded(int thread_id) noexcept;
    void work(int thread_id);
    void stop_workers();

    const int num_threads_;
    const int spin_us_;
    const pid_t owner_pid_;
    std::mutex turn_;
    Job job_;                   // written before generation_ changes, read after
    std::mutex failure_mutex_;  // guards failure_
    std::exception_ptr failure_;
    alignas(64) std::atomic<std::uint32_t> generation_{0};
    alignas(64) std::atomic<std::uint32_t> num_running_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> workers_;
};

}  // namespace nanoserve
