// Streams and events.
#include <chrono>

#include "device_work.h"
#include "driver.h"

using namespace fake_cuda;

namespace {

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// Runs body(driver, stream) for a stream that exists and does not capture.
template <typename Body>
Result with_stream(void* handle, const Body& body) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto stream = driver.stream(handle);
        if (stream == nullptr) {
            return driver.fail(kInvalidHandle, "no such stream");
        }
        if (stream->capture != nullptr) {
            stream->capture->is_invalid = true;
            return driver.fail(kStreamCaptureUnsupported,
                               "this call is not permitted on a stream that captures");
        }
        return body(driver, stream);
    });
}

template <typename Body>
Result with_event(void* handle, const Body& body) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto event = driver.events.find(handle);
        return event == nullptr ? driver.fail(kInvalidHandle, "no such event") : body(driver, *event);
    });
}

// Another stream waits for an event of a capture, or joins it thereby.
Result wait_in_capture(Driver& driver, const std::shared_ptr<Stream>& stream, const Event& event) {
    if (event.capture == nullptr) {
        stream->capture->is_invalid = true;
        return driver.fail(kStreamCaptureUnsupported,
                           "a stream that captures cannot wait for work outside of it");
    }
    if (stream->capture == nullptr) {
        stream->capture = event.capture;
        stream->capture->branches[stream.get()];
    } else if (stream->capture != event.capture) {
        return driver.fail(kStreamCaptureUnsupported, "two captures cannot wait for each other");
    }
    Capture::Branch& branch = event.capture->branches[event.captured_in];
    branch.is_joined = event.captured_nodes == branch.num_nodes;
    return kSuccess;
}

}  // namespace

FAKE_CUDA_EXPORT Result cuStreamCreate(void** stream, unsigned flags) {
    return call(Needs::kContext, [&](Driver& driver) {
        if (flags > kStreamNonBlocking) {
            return driver.fail(kInvalidValue, "cuStreamCreate: unknown flags");
        }
        *stream = driver.add_stream(flags != kStreamNonBlocking);
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}

FAKE_CUDA_EXPORT Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return call(Needs::kContext, [&](Driver&) {
        *least = *greatest = 0;
        return kSuccess;
    });
}

// Returns at once on a GPU, and the work is done some time; here it is done now, for nobody can wait for it
// any more.
FAKE_CUDA_EXPORT Result cuStreamDestroy_v2(void* handle) {
    return with_stream(handle, [&](Driver& driver, const std::shared_ptr<Stream>& stream) {
        stream->end().reach();
        return driver.streams.remove(handle) ? driver.sticky
                                             : driver.fail(kInvalidHandle, "a stream of the driver's own");
    });
}

FAKE_CUDA_EXPORT Result cuStreamSynchronize(void* handle) {
    return with_stream(handle, [](Driver& driver, const std::shared_ptr<Stream>& stream) {
        stream->end().reach();
        return driver.sticky;
    });
}

// Asking makes progress: a program may poll.
FAKE_CUDA_EXPORT Result cuStreamQuery(void* handle) {
    return with_stream(handle, [](Driver& driver, const std::shared_ptr<Stream>& stream) {
        if (stream->is_idle()) {
            return driver.sticky;
        }
        stream->end().approach();
        return driver.sticky != kSuccess ? driver.sticky : kNotReady;
    });
}

FAKE_CUDA_EXPORT Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
    return with_event(event_handle, [&](Driver& driver, Event& event) {
        const auto stream = driver.stream(handle);
        if (stream == nullptr) {
            return driver.fail(kInvalidHandle, "no such stream");
        }
        if (stream->capture != nullptr || event.capture != nullptr) {
            return wait_in_capture(driver, stream, event);
        }
        if (event.is_recorded) {  // one that is not is no reason to wait
            return driver.submit(stream, [position = event.position] { position.reach(); });
        }
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto stream = driver.stream(handle);
        if (stream == nullptr || function == nullptr) {
            return driver.fail(stream == nullptr ? kInvalidHandle : kInvalidValue, "cuLaunchHostFunc");
        }
        return driver.submit(stream, [=] { function(argument); });
    });
}

FAKE_CUDA_EXPORT Result fake_cuda_enqueue(void* handle, Result (*run)(void*), void* data,
                                          void (*release)(void*)) {
    const std::shared_ptr<void> owned(data, release);
    return call(Needs::kContext, [&](Driver& driver) {
        const auto stream = driver.stream(handle);
        if (stream == nullptr) {
            return driver.fail(kInvalidHandle, "no such stream");
        }
        return driver.submit(stream, [&driver, run, owned] {
            if (driver.sticky != kSuccess) {
                return;
            }
            if (const Result result = run(owned.get())) {
                driver.sticky = driver.fail(result, "work of a library");
            }
        });
    });
}

FAKE_CUDA_EXPORT Result cuEventCreate(void** event, unsigned flags) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto made = std::make_shared<Event>();
        made->has_timing = (flags & kEventDisableTiming) == 0;
        *event = driver.events.add(made);
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuEventDestroy_v2(void* handle) {
    return call(Needs::kContext, [&](Driver& driver) {
        return driver.events.remove(handle) ? kSuccess : driver.fail(kInvalidHandle, "no such event");
    });
}

FAKE_CUDA_EXPORT Result cuEventRecord(void* handle, void* stream_handle) {
    return with_event(handle, [&](Driver& driver, Event& event) {
        const auto stream = driver.stream(stream_handle);
        if (stream == nullptr) {
            return driver.fail(kInvalidHandle, "no such stream");
        }
        event.capture = stream->capture;
        if (stream->capture != nullptr) {
            event.captured_in = stream.get();
            event.captured_nodes = stream->capture->branches[stream.get()].num_nodes;
            return kSuccess;
        }
        event.time_ms = std::make_shared<double>(0.0);
        const Result result = driver.submit(stream, [time = event.time_ms] { *time = now_ms(); });
        event.position = stream->end();
        event.is_recorded = result == kSuccess;
        return result;
    });
}

FAKE_CUDA_EXPORT Result cuEventRecordWithFlags(void* handle, void* stream, unsigned) {
    return cuEventRecord(handle, stream);
}

FAKE_CUDA_EXPORT Result cuEventSynchronize(void* handle) {
    return with_event(handle, [](Driver& driver, Event& event) {
        if (event.capture != nullptr) {
            return driver.fail(kStreamCaptureUnsupported, "an event of a capture cannot be waited for");
        }
        event.position.reach();
        return driver.sticky;
    });
}

FAKE_CUDA_EXPORT Result cuEventQuery(void* handle) {
    return with_event(handle, [](Driver& driver, Event& event) {
        if (event.position.is_reached()) {
            return driver.sticky;
        }
        event.position.approach();
        return driver.sticky != kSuccess ? driver.sticky : kNotReady;
    });
}

FAKE_CUDA_EXPORT Result cuEventElapsedTime(float* milliseconds, void* start_handle, void* end_handle) {
    return call(Needs::kContext, [&](Driver& driver) {
        const auto start = driver.events.find(start_handle);
        const auto end = driver.events.find(end_handle);
        if (start == nullptr || end == nullptr || !start->has_timing || !end->has_timing ||
            !start->is_recorded || !end->is_recorded) {
            return driver.fail(kInvalidHandle,
                               "an event that does not exist, has no timing or was not recorded");
        }
        if (!start->position.is_reached() || !end->position.is_reached()) {
            return kNotReady;
        }
        *milliseconds = static_cast<float>(*end->time_ms - *start->time_ms);
        return kSuccess;
    });
}

FAKE_CUDA_EXPORT Result cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime(milliseconds, start, end);
}
