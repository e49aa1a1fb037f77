#include "cuda_stream.h"

#include <string>

#include "checked.h"

namespace nanoserve::cuda {

namespace {

constexpr unsigned kNonBlocking = 1;    // CU_STREAM_NON_BLOCKING: does not wait for the default stream
constexpr unsigned kNoTiming = 2;       // CU_EVENT_DISABLE_TIMING
constexpr int kDeviceMemory = 2;        // CU_MEMORYTYPE_DEVICE
constexpr int kCaptureThreadLocal = 1;  // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
constexpr int kStartsEarly = 6;         // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

}  // namespace

Graph::~Graph() {
    if (executable_ != nullptr) {
        static_cast<void>(driver().graph_exec_destroy(executable_));
    }
}

Event::Event(std::shared_ptr<const Device> device) : device_(std::move(device)) {
    device_->use();
    check(driver().event_create(&handle_, kNoTiming), "cuEventCreate");
}

Event::~Event() {
    if (handle_ != nullptr) {
        static_cast<void>(driver().event_destroy(handle_));
    }
}

void Event::wait() const {
    device_->use();
    check(driver().event_synchronize(handle_), "waiting for a step");
}

Stream::Stream(std::shared_ptr<const Device> device) : device_(std::move(device)) {
    device_->use();
    check(driver().stream_create(&handle_, kNonBlocking), "cuStreamCreate");
}

Stream::~Stream() {
    if (handle_ != nullptr) {
        static_cast<void>(driver().stream_destroy(handle_));
    }
}

void Stream::copy_in(DevicePtr to, const void* from, std::int64_t num_bytes) {
    if (num_bytes > 0) {
        check(driver().copy_to_device(to, from, at(num_bytes), handle_),
              "copying " + std::to_string(num_bytes) + " bytes to the device");
    }
}

void Stream::copy_out(void* to, DevicePtr from, std::int64_t num_bytes) {
    if (num_bytes > 0) {
        check(driver().copy_to_host(to, from, at(num_bytes), handle_),
              "copying " + std::to_string(num_bytes) + " bytes from the device");
    }
}

void Stream::copy_row(const RowOfBlocks& to, const RowOfBlocks& from, std::int64_t row_bytes,
                      std::int64_t count) {
    const auto side = [&](const RowOfBlocks& blocks) {
        BoxSide made{};
        made.y = at(blocks.row);
        made.memory_type = kDeviceMemory;
        made.device = blocks.data;
        made.pitch = at(row_bytes);
        made.height = at(blocks.rows);
        return made;
    };
    const BoxCopy box{
        .from = side(from), .to = side(to), .width = at(row_bytes), .height = 1, .depth = at(count)};
    check(driver().copy_box(&box, handle_),
          "copying " + std::to_string(count) + " x " + std::to_string(row_bytes) + " bytes on the device");
}

void Stream::copy(DevicePtr to, DevicePtr from, std::int64_t num_bytes) {
    if (num_bytes > 0) {
        check(driver().copy_on_device(to, from, at(num_bytes), handle_),
              "copying " + std::to_string(num_bytes) + " bytes on the device");
    }
}

void Stream::zero(DevicePtr data, std::int64_t num_bytes) {
    if (num_bytes > 0) {
        check(driver().fill(data, 0, at(num_bytes), handle_),
              "clearing " + std::to_string(num_bytes) + " bytes on the device");
    }
}

bool Stream::launch(Handle function, const char* name, const LaunchShape& shape,
                    std::span<void* const> args) {
    const auto& [x, y, z] = shape.grid;
    if (x == 0 || y == 0 || z == 0) {
        return false;
    }
    void** const values = const_cast<void**>(args.data());
    int result = 0;
    if (shape.early) {
        const LaunchAttribute early{.id = kStartsEarly, .padding = 0, .value = {.number = 1}};
        const LaunchConfig config{.grid = {x, y, z},
                                  .block = {shape.block, 1, 1},
                                  .shared_bytes = shape.shared_bytes,
                                  .stream = handle_,
                                  .attributes = &early,
                                  .num_attributes = 1};
        result = driver().launch_with(&config, function, values, nullptr);
    } else {
        result = driver().launch(function, x, y, z, shape.block, 1, 1, shape.shared_bytes, handle_, values,
                                 nullptr);
    }
    if (result != 0) {
        check(result, std::string("launching ") + name + " with " + std::to_string(x) + " x " +
                          std::to_string(y) + " x " + std::to_string(z) + " blocks of " +
                          std::to_string(shape.block) + " threads and " + std::to_string(shape.shared_bytes) +
                          " bytes of shared memory");
    }
    return true;
}

void Stream::launch(const Graph& graph) {
    check(driver().graph_launch(graph.executable(), handle_), "cuGraphLaunch");
}

void Stream::begin_capture() {
    check(driver().capture_begin(handle_, kCaptureThreadLocal), "cuStreamBeginCapture");
}

Graph Stream::end_capture() {
    Handle graph = nullptr;
    check(driver().capture_end(handle_, &graph), "cuStreamEndCapture");
    Handle executable = nullptr;
    const int result = driver().graph_instantiate(&executable, graph, 0);
    static_cast<void>(driver().graph_destroy(graph));
    check(result, "cuGraphInstantiate");
    return {device_, executable};
}

void Stream::abandon_capture() noexcept {
    Handle graph = nullptr;
    if (driver().capture_end(handle_, &graph) == 0 && graph != nullptr) {
        static_cast<void>(driver().graph_destroy(graph));
    }
}

void Stream::record(const Event& event) {
    check(driver().event_record(event.handle(), handle_), "cuEventRecord");
}

void Stream::synchronize() {
    check(driver().stream_synchronize(handle_), "waiting for the device");
}

}  // namespace nanoserve::cuda
