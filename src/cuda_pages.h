// The pages of a KV pool on a device.
//
// Layout: [layer] K [page][head][slot][dim], then V the same: a GPU reads keys in rows, so they are not
// transposed as on the CPU. The bytes start as zeros. Copies and clearing go through the stream that the
// steps run in, so they happen before any later step. Each is one call of the driver for all layers: a page
// is a row of every block of num_pages rows.
#pragma once

#include <memory>

#include "cuda_stream.h"
#include "kv_pool.h"
#include "page_memory.h"

namespace nanoserve::cuda {

class DevicePages final : public PageMemory {
  public:
    DevicePages(std::shared_ptr<Stream> stream, const PoolShape& shape);

    [[nodiscard]] std::int64_t num_bytes() const override { return block_.num_bytes(); }
    void copy_page(std::int64_t from, std::int64_t to) override;
    void scrub_page(std::int64_t page) override;
    bool populate() override { return true; }

    [[nodiscard]] DevicePtr keys(std::int64_t layer) const;
    [[nodiscard]] DevicePtr values(std::int64_t layer) const;
    // For tests and debugging: a copy of a layer's keys or values, as they lie.
    void read(DevicePtr from, std::span<std::byte> to) const;
    [[nodiscard]] const std::shared_ptr<Stream>& stream() const { return stream_; }

  private:
    [[nodiscard]] std::int64_t num_blocks() const { return 2 * shape_.num_layers; }
    [[nodiscard]] Stream::RowOfBlocks pages(std::int64_t page) const {
        return {.data = block_.data(), .rows = shape_.num_pages, .row = page};
    }

    std::shared_ptr<Stream> stream_;
    PoolShape shape_;
    std::int64_t page_bytes_;   // of a page's keys, or values, in one layer
    std::int64_t layer_bytes_;  // num_pages of them
    DeviceBlock block_;
    DeviceBlock zeros_;  // a page of all layers, to clear others with
};

}  // namespace nanoserve::cuda
