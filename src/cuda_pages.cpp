#include "cuda_pages.h"

#include "checked.h"

namespace nanoserve::cuda {

namespace {

std::int64_t page_bytes(const PoolShape& shape) {
    return checked_product("a page in bytes", {{"num_heads", shape.num_heads},
                                               {"page_size", shape.page_size},
                                               {"head_dim", shape.head_dim},
                                               {"element bytes", element_bytes(shape.element)}});
}

std::int64_t all_bytes(const PoolShape& shape) {
    return checked_product("the KV pool in bytes", {{"2 (K and V)", 2},
                                                    {"num_layers", shape.num_layers},
                                                    {"num_pages", shape.num_pages},
                                                    {"page bytes", page_bytes(shape)}});
}

}  // namespace

DevicePages::DevicePages(std::shared_ptr<Stream> stream, const PoolShape& shape)
    : stream_(std::move(stream)),
      shape_(shape),
      page_bytes_(page_bytes(shape)),
      layer_bytes_(shape.num_pages * page_bytes_),
      block_(stream_->device(), "the KV pool", all_bytes(shape)),
      zeros_(stream_->device(), "a page of zeros", num_blocks() * page_bytes_) {
    stream_->zero(block_.data(), block_.num_bytes());
    stream_->zero(zeros_.data(), zeros_.num_bytes());
}

DevicePtr DevicePages::keys(std::int64_t layer) const {
    require_range("layer", layer, 0, shape_.num_layers - 1);
    return block_.data() + static_cast<DevicePtr>(2 * layer * layer_bytes_);
}

DevicePtr DevicePages::values(std::int64_t layer) const {
    return keys(layer) + static_cast<DevicePtr>(layer_bytes_);
}

void DevicePages::copy_page(std::int64_t from, std::int64_t to) {
    stream_->device()->use();
    stream_->copy_row(pages(to), pages(from), page_bytes_, num_blocks());
}

void DevicePages::scrub_page(std::int64_t page) {
    stream_->device()->use();
    stream_->copy_row(pages(page), {.data = zeros_.data(), .rows = 1, .row = 0}, page_bytes_, num_blocks());
}

void DevicePages::read(DevicePtr from, std::span<std::byte> to) const {
    stream_->device()->use();
    stream_->copy_out(to.data(), from, std::ssize(to));
    stream_->synchronize();
}

}  // namespace nanoserve::cuda
