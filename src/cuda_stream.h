// A stream of work on a device: copies, fills and launches that run in their order, while the host goes on.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "cuda_device.h"

namespace nanoserve::cuda {

struct LaunchShape {
    std::array<unsigned, 3> grid;
    unsigned block;
    unsigned shared_bytes;
    // It may begin before the kernel in front has ended: one that waits for that itself.
    bool early = false;
};

// Work that was captured once and is launched as one; its arguments stay what they were then.
class Graph {
  public:
    Graph(std::shared_ptr<const Device> device, Handle executable)
        : device_(std::move(device)), executable_(executable) {}
    ~Graph();
    Graph(Graph&& other) noexcept
        : device_(std::move(other.device_)), executable_(std::exchange(other.executable_, nullptr)) {}
    Graph& operator=(Graph&&) = delete;
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    [[nodiscard]] Handle executable() const { return executable_; }

  private:
    std::shared_ptr<const Device> device_;
    Handle executable_;
};

// A point in a stream that the host can wait for.
class Event {
  public:
    explicit Event(std::shared_ptr<const Device> device);
    ~Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    [[nodiscard]] Handle handle() const { return handle_; }
    // Until everything is done that was in the stream when this was last recorded.
    void wait() const;

  private:
    std::shared_ptr<const Device> device_;
    Handle handle_ = nullptr;
};

class Stream {
  public:
    explicit Stream(std::shared_ptr<const Device> device);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    [[nodiscard]] const std::shared_ptr<const Device>& device() const { return device_; }
    [[nodiscard]] Handle handle() const { return handle_; }

    // From pinned memory, which must stay as it is until the copy is done (or from any, then it is done at
    // once).
    void copy_in(DevicePtr to, const void* from, std::int64_t num_bytes);
    void copy_out(void* to, DevicePtr from, std::int64_t num_bytes);
    void copy(DevicePtr to, DevicePtr from, std::int64_t num_bytes);
    // One row of so many bytes out of each of `count` blocks that lie one behind the other: row number `row`
    // of each, of `rows`. It is one call of the driver, and no stride is as long as a block: the driver takes
    // strides up to 2 GiB, a layer of a pool can have more.
    struct RowOfBlocks {
        DevicePtr data;
        std::int64_t rows, row;
    };
    void copy_row(const RowOfBlocks& to, const RowOfBlocks& from, std::int64_t row_bytes, std::int64_t count);
    void zero(DevicePtr data, std::int64_t num_bytes);
    // args[i] points at the i-th argument's value. A grid with no blocks launches nothing; false then.
    bool launch(Handle function, const char* name, const LaunchShape& shape, std::span<void* const> args);
    void launch(const Graph& graph);

    // Everything between the two is recorded instead of run. An exception in between: `abandon_capture`.
    void begin_capture();
    [[nodiscard]] Graph end_capture();
    void abandon_capture() noexcept;

    void record(const Event& event);
    void synchronize();

  private:
    std::shared_ptr<const Device> device_;
    Handle handle_ = nullptr;
};

}  // namespace nanoserve::cuda
