// How long work on a device takes, by the device's own clock.
#pragma once

#include <memory>

#include "cuda_stream.h"

namespace nanoserve::cuda {

// Marks a time in a stream: when everything before it there is done.
class TimeMark {
  public:
    explicit TimeMark(std::shared_ptr<const Device> device);
    ~TimeMark();
    TimeMark(const TimeMark&) = delete;
    TimeMark& operator=(const TimeMark&) = delete;

    void record(const Stream& stream);
    // Milliseconds from this mark to a later one; waits for that. Both must have been recorded.
    [[nodiscard]] float until(const TimeMark& later) const;

  private:
    std::shared_ptr<const Device> device_;
    Handle event_ = nullptr;
};

}  // namespace nanoserve::cuda
