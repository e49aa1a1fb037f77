#include "cuda_timer.h"

namespace nanoserve::cuda {

TimeMark::TimeMark(std::shared_ptr<const Device> device) : device_(std::move(device)) {
    device_->use();
    check(driver().event_create(&event_, 0), "cuEventCreate");
}

TimeMark::~TimeMark() {
    if (event_ != nullptr) {
        static_cast<void>(driver().event_destroy(event_));
    }
}

void TimeMark::record(const Stream& stream) {
    device_->use();
    check(driver().event_record(event_, stream.handle()), "cuEventRecord");
}

float TimeMark::until(const TimeMark& later) const {
    device_->use();
    check(driver().event_synchronize(later.event_), "cuEventSynchronize");
    float milliseconds = 0;
    check(driver().event_elapsed(&milliseconds, event_, later.event_), "cuEventElapsedTime");
    return milliseconds;
}

}  // namespace nanoserve::cuda
