// Streams: queues of work that nobody does before it must be done.
//
// A GPU does what is in a stream in order, at a time of its own choosing; streams are ordered among each
// other only by events, by synchronisation and by the legacy default stream. So the emulated device does
// nothing when it is told to: an operation runs when somebody waits for it, or for something that comes after
// it. A program that reads a result, or overwrites an input, without waiting has then always been too early.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_types.h"

namespace fake_cuda {

class Stream;
struct Capture;

// A point in a stream: behind everything that was enqueued before.
struct Position {
    std::shared_ptr<Stream> stream;
    std::uint64_t count = 0;

    [[nodiscard]] bool is_reached() const;
    void reach() const;     // does all the work up to here, and what that waits for
    void approach() const;  // does one piece of it
};

class Stream : public std::enable_shared_from_this<Stream> {
  public:
    // A blocking stream takes turns with the legacy default stream.
    explicit Stream(bool is_blocking) : is_blocking_(is_blocking) {}

    using Work = std::function<void()>;
    void enqueue(Work work, std::vector<Position> after);
    [[nodiscard]] Position end() { return {shared_from_this(), done_ + pending_.size()}; }
    [[nodiscard]] bool is_blocking() const { return is_blocking_; }
    [[nodiscard]] bool is_idle() const { return pending_.empty(); }
    [[nodiscard]] std::uint64_t done() const { return done_; }
    // Forget all work; it counts as done.
    void abandon();

    // What follows is appended to a graph instead of done; null when the stream does not capture.
    std::shared_ptr<Capture> capture;

  private:
    friend struct Position;
    struct Operation {
        Work work;
        std::vector<Position> after;
    };
    void run_front();

    bool is_blocking_;
    std::uint64_t done_ = 0;
    std::deque<Operation> pending_;
};

struct Event {
    bool has_timing = true;
    bool is_recorded = false;
    Position position;
    std::shared_ptr<double> time_ms;  // when it was reached
    // Recorded in a stream that captures: which capture, and after how many nodes of that stream.
    std::shared_ptr<Capture> capture;
    Stream* captured_in = nullptr;
    std::uint64_t captured_nodes = 0;
};

}  // namespace fake_cuda
