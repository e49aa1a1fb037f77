#include "stream.h"

#include <utility>

namespace fake_cuda {

bool Position::is_reached() const {
    return stream == nullptr || stream->done_ >= count;
}

void Position::reach() const {
    while (!is_reached()) {
        stream->run_front();
    }
}

void Position::approach() const {
    if (!is_reached()) {
        stream->run_front();
    }
}

void Stream::enqueue(Work work, std::vector<Position> after) {
    pending_.push_back({std::move(work), std::move(after)});
}

void Stream::run_front() {
    // What this waits for was enqueued before it, so this cannot come back here.
    for (const Position& position : pending_.front().after) {
        position.reach();
    }
    const Work work = std::move(pending_.front().work);
    pending_.pop_front();
    ++done_;
    work();
}

void Stream::abandon() {
    done_ += pending_.size();
    pending_.clear();
}

}  // namespace fake_cuda
