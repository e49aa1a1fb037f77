#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>

#include "checked.h"
#include "cpus.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nanoserve {

namespace {

constexpr int kSpinMicroseconds = 40;
constexpr std::chrono::microseconds kPoliteAfter{3};

// The pool whose function this thread is inside of, to refuse a nested run (it would wait for itself).
thread_local const ThreadPool* t_inside = nullptr;

void cpu_relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#else
    std::this_thread::yield();
#endif
}

int checked_num_threads(int num_threads) {
    require_range("num_threads", num_threads, 1, ThreadPool::kMaxThreads);
    return num_threads;
}

}  // namespace

void wait_while_equal(const std::atomic<std::uint32_t>& word, std::uint32_t old, int spin_us) {
    using Clock = std::chrono::steady_clock;
    if (spin_us > 0) {
        const Clock::time_point start = Clock::now();
        Clock::duration spent{};
        do {
            for (int i = 0; i < 32; ++i) {
                if (word.load(std::memory_order_acquire) != old) {
                    return;
                }
                cpu_relax();
            }
            spent = Clock::now() - start;
            if (spent > kPoliteAfter) {
                std::this_thread::yield();  // perhaps the thread we wait for is queued behind us on this very
                                            // CPU
            }
        } while (spent < std::chrono::microseconds(spin_us));
    }
    word.wait(old, std::memory_order_acquire);
}

void Barrier::arrive_and_wait() {
    // The phase is read before arriving: after the last arrival it may change at any moment.
    const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
        num_arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_while_equal(phase_, phase, spin_us_);
    }
}

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(checked_num_threads(num_threads)),
      spin_us_(num_threads <= default_num_threads() ? kSpinMicroseconds : 0),
      owner_pid_(::getpid()) {
    std::vector<Core> cores = usable_cores();
    if (std::ssize(cores) != num_threads_) {
        cores.clear();
    }
    workers_.reserve(at(num_threads_ - 1));
    try {
        for (int thread_id = 1; thread_id < num_threads_; ++thread_id) {
            workers_.emplace_back([this, thread_id, core = cores.empty() ? Core{} : cores[at(thread_id)]] {
                static_cast<void>(stay_on(core));
                work(thread_id);
            });
        }
    } catch (...) {
        stop_workers();
        throw;
    }
}

ThreadPool::~ThreadPool() {
    stop_workers();
}

void ThreadPool::stop_workers() {
    if (::getpid() != owner_pid_) {
        // A forked child: the workers exist only in the parent, and joining them would wait for ever
        // (detaching them may fail). Their handles are given up instead.
        static_cast<void>(std::make_unique<std::vector<std::thread>>(std::move(workers_)).release());
        return;
    }
    stopping_.store(true, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& worker : workers_) {
        worker.join();
    }
}

void ThreadPool::work(int thread_id) {
    std::uint32_t seen = 0;
    while (true) {
        wait_while_equal(generation_, seen, spin_us_);
        ++seen;  // one at a time: the next run cannot start before this thread has reported
        if (stopping_.load(std::memory_order_relaxed)) {
            return;
        }
        call_guarded(thread_id);
        if (num_running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            num_running_.notify_one();
        }
    }
}

void ThreadPool::call_guarded(int thread_id) noexcept {
    const ThreadPool* const outer = t_inside;
    t_inside = this;
    try {
        job_.call(job_.target, thread_id);
    } catch (...) {
        const std::lock_guard lock(failure_mutex_);
        if (failure_ == nullptr) {
            failure_ = std::current_exception();
        }
    }
    t_inside = outer;
}

void ThreadPool::run_job(Job job) {
    if (t_inside == this) {
        throw std::logic_error("ThreadPool::run called from inside a function this pool is running");
    }
    if (::getpid() != owner_pid_) {
        throw std::runtime_error(
            "this thread pool was made before a fork: its threads exist only in the parent");
    }
    const std::lock_guard turn(turn_);
    job_ = job;
    failure_ = nullptr;
    num_running_.store(static_cast<std::uint32_t>(num_threads_ - 1), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    call_guarded(0);
    for (std::uint32_t left = num_running_.load(std::memory_order_acquire); left != 0;
         left = num_running_.load(std::memory_order_acquire)) {
        wait_while_equal(num_running_, left, spin_us_);
    }
    if (failure_ != nullptr) {
        std::rethrow_exception(std::exchange(failure_, nullptr));
    }
}

}  // namespace nanoserve
