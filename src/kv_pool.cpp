#include "kv_pool.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>

#include "arena.h"
#include "checked.h"
#include "errors.h"
#include "page_table.h"

namespace nanoserve {

namespace {

// Kernels may read one vector past the last element of the last page; those bytes must be mapped.
constexpr std::int64_t kSlackBytes = 256;

// Every dimension checked.
std::int64_t checked_bytes(const PoolShape& shape) {
    require_at_least("num_pages", shape.num_pages, 1);
    require_at_least("page_size", shape.page_size, 1);
    require_at_least("num_layers", shape.num_layers, 1);
    require_at_least("num_heads", shape.num_heads, 1);
    require_at_least("head_dim", shape.head_dim, 1);
    // Slots travel as int32 through block tables and kernels.
    require_range("num_pages * page_size",
                  checked_product("the number of slots",
                                  {{"num_pages", shape.num_pages}, {"page_size", shape.page_size}}),
                  1, std::numeric_limits<std::int32_t>::max());
    const std::int64_t bytes =
        checked_product("the KV arena in bytes", {{"2 (K and V)", 2},
                                                  {"num_layers", shape.num_layers},
                                                  {"num_pages", shape.num_pages},
                                                  {"num_heads", shape.num_heads},
                                                  {"head_dim", shape.head_dim},
                                                  {"page_size", shape.page_size},
                                                  {"element bytes", element_bytes(shape.element)}});
    if (shape.element == ElementType::bf16) {
        for (const auto& [name, size] :
             {Factor{"page_size", shape.page_size}, {"head_dim", shape.head_dim}}) {
            if (size % 2 != 0) {
                throw std::invalid_argument(std::string(name) + " is " + std::to_string(size) +
                                            ", must be even: bf16 keys and values lie in pairs");
            }
        }
    }
    return bytes;
}

class HostPages final : public PageMemory {
  public:
    explicit HostPages(const PoolShape& shape)
        : shape_(shape),
          page_bytes_(2 * shape.num_heads * shape.head_dim * shape.page_size * element_bytes(shape.element)),
          arena_("the KV arena", round_up(checked_bytes(shape) + kSlackBytes, 64)) {}

    [[nodiscard]] std::int64_t num_bytes() const override { return arena_.num_bytes(); }
    [[nodiscard]] std::byte* host() const override { return arena_.data(); }
    bool populate() override { return arena_.populate(); }

    void copy_page(std::int64_t from, std::int64_t to) override {
        for (std::int64_t layer = 0; layer < shape_.num_layers; ++layer) {
            std::copy_n(at_page(layer, from), page_bytes_, at_page(layer, to));
        }
    }

    void scrub_page(std::int64_t page) override {
        for (std::int64_t layer = 0; layer < shape_.num_layers; ++layer) {
            std::fill_n(at_page(layer, page), page_bytes_, std::byte{0});
        }
    }

  private:
    [[nodiscard]] std::byte* at_page(std::int64_t layer, std::int64_t page) const {
        return arena_.data() + (layer * shape_.num_pages + page) * page_bytes_;
    }

    const PoolShape shape_;
    const std::int64_t page_bytes_;  // of one layer
    const Arena arena_;
};

// Rounded to nearest, ties to even; a NaN stays one.
std::uint16_t to_bf16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const bool is_nan = value != value;
    return static_cast<std::uint16_t>(is_nan ? bits >> 16 | 0x40U
                                             : (bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

// One token's row of one head into the page's keys and values, as kv_pool.h lays them out.
void store_token(std::byte* keys, std::byte* values, std::int64_t offset, const PoolShape& shape,
                 const float* k, const float* v) {
    const std::int64_t dims = shape.head_dim;
    if (shape.element == ElementType::f32) {
        auto* const k_page = reinterpret_cast<float*>(keys);
        auto* const v_page = reinterpret_cast<float*>(values);
        for (std::int64_t dim = 0; dim < dims; ++dim) {
            k_page[dim * shape.page_size + offset] = k[dim];
            v_page[offset * dims + dim] = v[dim];
        }
        return;
    }
    auto* const k_page = reinterpret_cast<std::uint16_t*>(keys);
    auto* const v_page = reinterpret_cast<std::uint16_t*>(values);
    for (std::int64_t dim = 0; dim < dims; ++dim) {
        k_page[(dim / 2 * shape.page_size + offset) * 2 + dim % 2] = to_bf16(k[dim]);
        v_page[(offset / 2 * dims + dim) * 2 + offset % 2] = to_bf16(v[dim]);
    }
}

}  // namespace

std::int64_t element_bytes(ElementType type) {
    switch (type) {
        case ElementType::f32:
            return 4;
        case ElementType::bf16:
            return 2;
    }
    throw std::invalid_argument("unknown element type");
}

const char* element_name(ElementType type) {
    return type == ElementType::f32 ? "f32" : "bf16";
}

ElementType element_from_name(std::string_view name) {
    for (const ElementType type : {ElementType::f32, ElementType::bf16}) {
        if (name == element_name(type)) {
            return type;
        }
    }
    throw std::invalid_argument("element '" + std::string(name) + "' must be f32 or bf16");
}

KVCachePool::KVCachePool(const PoolShape& shape) : KVCachePool(shape, std::make_unique<HostPages>(shape)) {}

KVCachePool::KVCachePool(const PoolShape& shape, std::unique_ptr<PageMemory> memory)
    : shape_(shape), memory_(std::move(memory)), refs_(shape.num_pages) {
    if (memory_ == nullptr || memory_->num_bytes() < checked_bytes(shape)) {
        throw std::invalid_argument("a KV pool's memory is smaller than its pages");
    }
}

std::int64_t KVCachePool::head_bytes() const {
    return shape_.head_dim * shape_.page_size * element_bytes(shape_.element);
}

std::int64_t KVCachePool::layer_page_bytes() const {
    return 2 * shape_.num_heads * head_bytes();
}

std::int64_t KVCachePool::page_bytes() const {
    return shape_.num_layers * layer_page_bytes();
}

std::int64_t KVCachePool::pages_needed(std::int64_t num_tokens) const {
    require_at_least("num_tokens", num_tokens, 0);
    return ceil_div(num_tokens, shape_.page_size);
}

bool KVCachePool::can_allocate(std::int64_t num_tokens) const {
    return pages_needed(num_tokens) <= num_free_pages();
}

std::vector<std::int32_t> KVCachePool::allocate(std::int64_t num_tokens) {
    return refs_.allocate(pages_needed(num_tokens));
}

std::vector<std::int32_t> KVCachePool::allocate_pages(std::int64_t num_pages) {
    return refs_.allocate(num_pages);
}

std::byte* KVCachePool::k_layer(std::int64_t layer) const {
    if (layer < 0 || layer >= shape_.num_layers) {
        throw std::out_of_range("layer " + std::to_string(layer) +
                                " is out of range: the pool has layers 0 to " +
                                std::to_string(shape_.num_layers - 1));
    }
    return page_start(layer, 0);
}

std::byte* KVCachePool::page_start(std::int64_t layer, std::int64_t page) const {
    if (memory_->host() == nullptr) {
        throw std::runtime_error(
            "the pages of this pool are on a device: the host cannot read or write them");
    }
    return memory_->host() + (layer * shape_.num_pages + page) * layer_page_bytes();
}

void KVCachePool::store_kv(std::span<const float> k, std::span<const float> v,
                           std::span<const std::int64_t> slots, std::int64_t layer) {
    const std::int64_t row = shape_.num_heads * shape_.head_dim;
    if (std::ssize(k) != std::ssize(slots) * row || std::ssize(v) != std::ssize(slots) * row) {
        throw std::invalid_argument("store_kv: k and v need " + std::to_string(row) +
                                    " numbers for each of " + std::to_string(slots.size()) + " slots, got " +
                                    std::to_string(k.size()) + " and " + std::to_string(v.size()));
    }
    for (const std::int64_t slot : slots) {
        if (slot < 0 || slot >= num_slots()) {
            throw std::out_of_range("slot " + std::to_string(slot) +
                                    " is out of range: the pool has slots 0 to " +
                                    std::to_string(num_slots() - 1));
        }
        const std::int64_t page = slot / shape_.page_size;
        if (const std::int32_t count = ref_count(page); count != 1) {
            throw std::runtime_error("slot " + std::to_string(slot) + " cannot be written: page " +
                                     std::to_string(page) + " has " + std::to_string(count) +
                                     " references, must have exactly 1");
        }
    }
    static_cast<void>(k_layer(layer));  // the layer's check
    for (std::int64_t i = 0; i < std::ssize(slots); ++i) {
        std::byte* const page = page_start(layer, slots[at(i)] / shape_.page_size);
        const std::int64_t offset = slots[at(i)] % shape_.page_size;
        for (std::int64_t head = 0; head < shape_.num_heads; ++head) {
            std::byte* const keys = page + 2 * head * head_bytes();
            const std::size_t source = at(i * row + head * shape_.head_dim);
            store_token(keys, keys + head_bytes(), offset, shape_, &k[source], &v[source]);
        }
    }
}

std::int32_t KVCachePool::copy_page(std::int64_t page) {
    if (ref_count(page) == 0) {
        throw std::invalid_argument("page " + std::to_string(page) + " is free: there is nothing to copy");
    }
    const std::int32_t copy = refs_.allocate(1).front();
    memory_->copy_page(page, copy);
    return copy;
}

void KVCachePool::scrub(std::span<const std::int32_t> pages) {
    for (const std::int32_t page : pages) {
        check_page(page);
    }
    for (const std::int32_t page : pages) {
        memory_->scrub_page(page);
    }
}

PoolStats KVCachePool::stats() const {
    PoolStats stats{};
    stats.num_pages = shape_.num_pages;
    stats.free = num_free_pages();
    stats.used = num_used_pages();
    stats.shared = refs_.num_shared();
    stats.bytes_total = bytes_total();
    stats.bytes_used = stats.used * page_bytes();
    for (const PageTable* table : tables_) {
        stats.tokens_held += table->num_tokens();
        stats.tokens_capacity_used += table->capacity();
    }
    if (stats.tokens_capacity_used > 0) {
        stats.internal_fragmentation =
            1.0 - static_cast<double>(stats.tokens_held) / static_cast<double>(stats.tokens_capacity_used);
    }
    return stats;
}

std::vector<std::string> KVCachePool::audit(std::span<const std::vector<std::int32_t>> holders) const {
    std::vector<std::string> problems;
    std::vector<std::int64_t> expected(at(shape_.num_pages), 0);
    for (const std::vector<std::int32_t>& holder : holders) {
        for (const std::int32_t page : holder) {
            if (page < 0 || page >= shape_.num_pages) {
                problems.push_back("a holder lists page " + std::to_string(page) +
                                   ", the pool has pages 0 to " + std::to_string(shape_.num_pages - 1));
            } else {
                ++expected[at(page)];
            }
        }
    }
    for (const PageTable* table : tables_) {
        for (const std::int32_t page : table->pages()) {
            ++expected[at(page)];
        }
    }
    for (std::string& problem : refs_.audit(expected)) {
        problems.push_back(std::move(problem));
    }
    return problems;
}

}  // namespace nanoserve
