#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "errors.h"
#include "kv_pool.h"
#include "page_table.h"

using namespace nanoserve;

namespace {

using Pages = std::vector<std::int32_t>;

PoolShape small_shape(std::int64_t num_pages = 8) {
    return {.num_pages = num_pages, .page_size = 4, .num_layers = 2, .num_heads = 2, .head_dim = 3};
}

float* floats(std::byte* memory) {
    return reinterpret_cast<float*>(memory);
}

// Fills every element of a page, all layers, with values that name the element.
void fill_page(const KVCachePool& pool, std::int64_t page, float base) {
    const std::int64_t elements = pool.layer_page_bytes() / 4;
    for (std::int64_t layer = 0; layer < pool.shape().num_layers; ++layer) {
        for (std::int64_t i = 0; i < elements; ++i) {
            floats(pool.k_layer(layer))[page * elements + i] = base + static_cast<float>(layer * 1000 + i);
        }
    }
}

bool same_page(const KVCachePool& pool, std::int64_t a, std::int64_t b) {
    const std::int64_t bytes = pool.layer_page_bytes();
    for (std::int64_t layer = 0; layer < pool.shape().num_layers; ++layer) {
        const std::byte* start = pool.k_layer(layer);
        if (!std::equal(start + a * bytes, start + (a + 1) * bytes, start + b * bytes)) {
            return false;
        }
    }
    return true;
}

}  // namespace

TEST(pool_gives_the_lowest_pages) {
    KVCachePool pool(small_shape(200));
    CHECK_EQ(pool.allocate(9), (Pages{0, 1, 2}));
    CHECK_EQ(pool.allocate_pages(2), (Pages{3, 4}));
    CHECK_EQ(pool.allocate(0), Pages{});
    CHECK_EQ(pool.unref(Pages{1, 3}), (Pages{1, 3}));
    CHECK_EQ(pool.allocate_pages(3), (Pages{1, 3, 5}));
    CHECK_EQ(pool.num_free_pages(), 194);
    Pages rest = pool.allocate_pages(194);  // crosses the words of the free set
    CHECK_EQ(rest.front(), 6);
    CHECK_EQ(rest.back(), 199);
    CHECK_EQ(pool.unref(Pages{130}), Pages{130});
    CHECK_EQ(pool.unref(Pages{70}), Pages{70});
    CHECK_EQ(pool.allocate_pages(2), (Pages{70, 130}));
}

TEST(pool_exhaustion_takes_nothing) {
    KVCachePool pool(small_shape());
    CHECK(pool.can_allocate(32));
    CHECK(!pool.can_allocate(33));
    static_cast<void>(pool.allocate_pages(6));
    CHECK_THROWS(PoolExhausted, "3 pages wanted, 2 of 8 free", pool.allocate_pages(3));
    CHECK_THROWS(PoolExhausted, "free", pool.allocate(std::numeric_limits<std::int64_t>::max()));
    CHECK_EQ(pool.num_free_pages(), 2);
    CHECK_EQ(pool.allocate_pages(2), (Pages{6, 7}));
    CHECK_THROWS(std::invalid_argument, "num_tokens is -1", pool.allocate(-1));
    CHECK_THROWS(std::invalid_argument, "num_pages is -1", pool.allocate_pages(-1));
}

TEST(pool_errors_change_nothing) {
    KVCachePool pool(small_shape());
    static_cast<void>(pool.allocate_pages(3));
    pool.ref(Pages{1});
    CHECK_THROWS(std::invalid_argument, "page 3 is free already", pool.unref(Pages{0, 1, 3}));
    CHECK_THROWS(std::invalid_argument, "page 0 is listed 2 times but has 1 references",
                 pool.unref(Pages{0, 1, 0}));
    CHECK_THROWS(std::out_of_range, "page 8 is out of range: the pool has pages 0 to 7",
                 pool.unref(Pages{0, 8}));
    CHECK_THROWS(std::out_of_range, "page -1", pool.unref(Pages{1, -1}));
    CHECK_THROWS(std::invalid_argument, "page 5 is free", pool.ref(Pages{0, 5}));
    CHECK_THROWS(std::out_of_range, "page 9", pool.ref(Pages{0, 9}));
    CHECK_THROWS(std::out_of_range, "page 8", pool.ref_count(8));
    CHECK_EQ(pool.ref_count(0), 1);
    CHECK_EQ(pool.ref_count(1), 2);
    CHECK_EQ(pool.ref_count(3), 0);
    CHECK_EQ(pool.num_free_pages(), 5);
    CHECK_EQ(pool.unref(Pages{1, 1}), Pages{1});  // both references in one call
    CHECK_EQ(pool.num_free_pages(), 6);
}

TEST(pool_sizes_are_checked) {
    CHECK_THROWS(std::invalid_argument, "num_pages is 0", KVCachePool(PoolShape{.num_pages = 0}));
    CHECK_THROWS(std::invalid_argument, "page_size is -16", KVCachePool(PoolShape{.page_size = -16}));
    CHECK_THROWS(std::invalid_argument, "head_dim is 0", KVCachePool(PoolShape{.head_dim = 0}));
    CHECK_THROWS(std::invalid_argument, "num_pages * page_size",
                 KVCachePool(PoolShape{.num_pages = std::int64_t{1} << 30, .page_size = 4}));
    CHECK_THROWS(std::invalid_argument, "num_layers=4611686018427387904",
                 KVCachePool(PoolShape{.num_layers = std::int64_t{1} << 62}));
    CHECK_THROWS(std::bad_alloc, "bytes", KVCachePool(PoolShape{.num_layers = std::int64_t{1} << 40}));
    CHECK_EQ(KVCachePool(small_shape()).page_bytes(), 2 * 2 * 2 * 3 * 4 * 4);
}

TEST(pool_layout_is_as_documented) {
    KVCachePool pool(small_shape());
    static_cast<void>(pool.allocate_pages(3));
    std::vector<float> k(2 * 6), v(2 * 6);
    std::iota(k.begin(), k.end(), 1.0F);
    std::iota(v.begin(), v.end(), 101.0F);
    const std::vector<std::int64_t> slots = {1 * 4 + 3, 2 * 4 + 0};  // page 1 offset 3, page 2 offset 0
    pool.store_kv(k, v, slots, 1);
    for (std::int64_t token = 0; token < 2; ++token) {
        for (std::int64_t head = 0; head < 2; ++head) {
            for (std::int64_t dim = 0; dim < 3; ++dim) {
                const std::int64_t page = token + 1;
                const std::int64_t offset = token == 0 ? 3 : 0;
                const float want = static_cast<float>(1 + token * 6 + head * 3 + dim);
                const std::int64_t start = (page * 2 + head) * 2 * 12;  // keys, then values
                CHECK_EQ(floats(pool.k_layer(1))[start + dim * 4 + offset], want);
                CHECK_EQ(floats(pool.v_layer(1))[start + offset * 3 + dim], want + 100.0F);
            }
        }
    }
    float others = 0.0F;  // nothing else was written, in either layer
    for (std::int64_t layer = 0; layer < 2; ++layer) {
        for (std::int64_t i = 0; i < 8 * 2 * 24; ++i) {
            others += floats(pool.k_layer(layer))[i];
        }
    }
    CHECK_EQ(others, std::accumulate(k.begin(), k.end(), 0.0F) + std::accumulate(v.begin(), v.end(), 0.0F));
    CHECK_EQ(reinterpret_cast<std::uintptr_t>(pool.k_layer(0)) % 64, 0U);
}

// Pairs of dims of a key, of slots of a value; rounded to nearest, ties to even, a NaN a NaN.
TEST(pool_stores_bf16) {
    PoolShape shape = small_shape();
    shape.head_dim = 4;
    shape.element = ElementType::bf16;
    KVCachePool pool(shape);
    CHECK_EQ(pool.page_bytes(), 2 * 2 * 2 * 4 * 4 * 2);
    static_cast<void>(pool.allocate_pages(2));
    const float tie_down = 1.0F + 0x1p-8F, tie_up = 1.0F + 3 * 0x1p-8F, above = 1.0F + 0x1.002p-8F;
    const std::vector<float> k = {1.0F, tie_down, tie_up, above, -2.0F, 0.0F, 3.0F, std::nanf("")};
    const std::vector<float> v = {10.0F, 11.0F, 12.0F, 13.0F, 14.0F, 15.0F, 16.0F, 17.0F};
    pool.store_kv(k, v, std::vector<std::int64_t>{4 + 3}, 1);
    const auto* keys = reinterpret_cast<const std::uint16_t*>(pool.k_layer(1)) + 2 * 2 * 16;  // page 1
    const auto* values = keys + 16;
    const auto key = [&](int dim) { return keys[(dim / 2 * 4 + 3) * 2 + dim % 2]; };
    CHECK_EQ(key(0), 0x3f80);
    CHECK_EQ(key(1), 0x3f80);
    CHECK_EQ(key(2), 0x3f82);
    CHECK_EQ(key(3), 0x3f81);
    for (int dim = 0; dim < 4; ++dim) {
        CHECK_EQ(values[(3 / 2 * 4 + dim) * 2 + 1], 0x4120 + 0x10 * dim);
        CHECK_EQ(values[(3 / 2 * 4 + dim) * 2], 0);
    }
    keys += 2 * 16;  // head 1
    CHECK_EQ(key(0), 0xc000);
    CHECK((key(3) & 0x7fffU) > 0x7f80U);
    shape.head_dim = 3;
    CHECK_THROWS(std::invalid_argument, "head_dim is 3, must be even", KVCachePool(shape));
    shape.head_dim = 4;
    shape.page_size = 5;
    CHECK_THROWS(std::invalid_argument, "page_size is 5, must be even", KVCachePool(shape));
    CHECK_THROWS(std::invalid_argument, "element 'f16' must be f32 or bf16", element_from_name("f16"));
}

TEST(pool_store_refuses_bad_slots) {
    KVCachePool pool(small_shape());
    static_cast<void>(pool.allocate_pages(2));
    const std::vector<float> row(6, 1.0F);
    const auto store = [&](std::int64_t slot, std::int64_t layer = 0) {
        pool.store_kv(row, row, std::vector<std::int64_t>{slot}, layer);
    };
    CHECK_THROWS(std::out_of_range, "slot -1", store(-1));
    CHECK_THROWS(std::out_of_range, "slot 32 is out of range: the pool has slots 0 to 31", store(32));
    CHECK_THROWS(std::runtime_error, "page 2 has 0 references", store(8));
    pool.ref(Pages{1});
    CHECK_THROWS(std::runtime_error, "page 1 has 2 references", store(4));
    CHECK_THROWS(std::out_of_range, "layer 2", store(0, 2));
    CHECK_THROWS(std::out_of_range, "layer -1", store(0, -1));
    CHECK_THROWS(std::invalid_argument, "6 numbers",
                 pool.store_kv(row, row, std::vector<std::int64_t>{0, 1}, 0));
    CHECK_EQ(floats(pool.k_layer(0))[0], 0.0F);
}

TEST(pool_copies_and_scrubs_whole_pages) {
    KVCachePool pool(small_shape());
    static_cast<void>(pool.allocate_pages(2));
    fill_page(pool, 0, 1.0F);
    fill_page(pool, 1, 5000.0F);
    const std::int32_t copy = pool.copy_page(1);
    CHECK_EQ(copy, 2);
    CHECK_EQ(pool.ref_count(copy), 1);
    CHECK(same_page(pool, 1, copy));
    CHECK(!same_page(pool, 0, copy));
    pool.scrub(Pages{1});
    CHECK(same_page(pool, 1, 7));  // 7 was never touched
    CHECK(!same_page(pool, 0, 7));
    CHECK(!same_page(pool, copy, 7));
    CHECK_THROWS(std::invalid_argument, "page 5 is free", pool.copy_page(5));
    CHECK_THROWS(std::out_of_range, "page 8", pool.scrub(Pages{0, 8}));
    CHECK(!same_page(pool, 0, 7));  // the bad list scrubbed nothing
    static_cast<void>(pool.allocate_pages(5));
    CHECK_THROWS(PoolExhausted, "1 pages wanted, 0 of 8", pool.copy_page(0));
}

TEST(table_grows_and_gives_back) {
    auto pool = std::make_shared<KVCachePool>(small_shape());
    {
        PageTable table(pool);
        CHECK_EQ(table.grow_to(5), (Pages{0, 1}));
        CHECK_EQ(table.grow_to(8), Pages{});
        CHECK_EQ(table.grow_to(3), Pages{});
        CHECK_EQ(table.num_tokens(), 8);
        CHECK_EQ(table.capacity(), 8);
        CHECK_THROWS(PoolExhausted, "7 pages wanted, 6 of 8 free", table.grow_to(33));
        CHECK_EQ(table.size(), 2);
        CHECK_EQ(table.num_tokens(), 8);
        CHECK_THROWS(std::out_of_range, "index 2", table.page(2));
        CHECK_THROWS(std::out_of_range, "index -1", table.page(-1));
        CHECK_THROWS(std::invalid_argument, "num_tokens is -1", table.grow_to(-1));
    }
    CHECK_EQ(pool->num_free_pages(), 8);
    CHECK_EQ(pool->stats().tokens_capacity_used, 0);  // the pool has forgotten the table
    CHECK_EQ(pool->audit({}), std::vector<std::string>{});
    PageTable again(pool);
    static_cast<void>(again.grow_to(4));
    again.release();
    again.release();
    CHECK_EQ(again.size(), 0);
    CHECK_EQ(pool->num_free_pages(), 8);
    CHECK_EQ(again.grow_to(1), Pages{0});
    CHECK_THROWS(std::invalid_argument, "needs a pool", PageTable(nullptr));
}

TEST(table_shares_and_copies_on_write) {
    auto pool = std::make_shared<KVCachePool>(small_shape());
    PageTable first(pool);
    static_cast<void>(first.grow_to(8));
    fill_page(*pool, 1, 7.0F);
    PageTable second(pool);
    second.adopt(first.pages());
    CHECK_EQ(second.num_tokens(), 8);
    CHECK_EQ(pool->ref_count(1), 2);
    CHECK(second.make_writable(1));
    CHECK_EQ(second.page(1), 2);
    CHECK(same_page(*pool, 1, 2));
    CHECK_EQ(pool->ref_count(1), 1);
    CHECK(!second.make_writable(1));
    CHECK_THROWS(std::out_of_range, "index 2", second.make_writable(2));
    CHECK_THROWS(std::invalid_argument, "page 6 is free", second.adopt(Pages{0, 6}));
    CHECK_EQ(second.size(), 2);
    CHECK_EQ(pool->ref_count(0), 2);
    CHECK_EQ(pool->audit({}), std::vector<std::string>{});
    static_cast<void>(pool->allocate_pages(5));
    CHECK_THROWS(PoolExhausted, "1 pages wanted", second.make_writable(0));
    CHECK_EQ(second.page(0), 0);
    CHECK_EQ(pool->ref_count(0), 2);
}

TEST(table_slots_cross_pages) {
    auto pool = std::make_shared<KVCachePool>(small_shape());
    PageTable table(pool);
    static_cast<void>(pool->allocate_pages(1));  // so that index and page id differ
    static_cast<void>(table.grow_to(4));
    static_cast<void>(pool->allocate_pages(1));
    static_cast<void>(table.grow_to(12));
    std::vector<std::int32_t> slots(7);
    table.slots(3, slots);
    CHECK_EQ(slots, (std::vector<std::int32_t>{7, 12, 13, 14, 15, 16, 17}));
    CHECK_THROWS(std::out_of_range, "room for 12 tokens", table.slots(6, slots));
    CHECK_THROWS(std::out_of_range, "room for", table.slots(std::numeric_limits<std::int64_t>::max(), slots));
    CHECK_THROWS(std::invalid_argument, "start is -1", table.slots(-1, slots));
    table.slots(12, {});
}

TEST(audit_counts_every_holder) {
    auto pool = std::make_shared<KVCachePool>(small_shape());
    PageTable table(pool);
    static_cast<void>(table.grow_to(6));
    std::vector<Pages> tree = {pool->allocate_pages(1)};
    CHECK_EQ(pool->audit(tree), std::vector<std::string>{});
    CHECK_EQ(pool->audit({}).size(), 1U);
    CHECK_EQ(pool->audit({}).front(), "page 2 has 1 references but 0 holders");
    tree.push_back({0});
    CHECK_EQ(pool->audit(tree).front(), "page 0 has 1 references but 2 holders");
    pool->ref(Pages{0});
    CHECK_EQ(pool->audit(tree), std::vector<std::string>{});
    tree.push_back({99});
    CHECK_EQ(pool->audit(tree).size(), 1U);
}

TEST(stats_add_up) {
    auto pool = std::make_shared<KVCachePool>(small_shape());
    CHECK_EQ(pool->stats().internal_fragmentation, 0.0);
    PageTable a(pool), b(pool);
    static_cast<void>(a.grow_to(5));  // 5 of 8
    b.adopt(a.pages().first(1));      // 4 of 4
    const PoolStats stats = pool->stats();
    CHECK_EQ(stats.used, 2);
    CHECK_EQ(stats.free, 6);
    CHECK_EQ(stats.shared, 1);
    CHECK_EQ(stats.tokens_held, 9);
    CHECK_EQ(stats.tokens_capacity_used, 12);
    CHECK_EQ(stats.internal_fragmentation, 0.25);
    CHECK_EQ(stats.bytes_used, 2 * pool->page_bytes());
    CHECK(stats.bytes_total >= 8 * pool->page_bytes());
}

// Ten thousand random calls against a plain model of who holds what; many of the calls are wrong on purpose.
TEST(pool_agrees_with_a_model) {
    constexpr int kPages = 70;
    auto pool = std::make_shared<KVCachePool>(small_shape(kPages));
    std::mt19937 random(1);
    std::vector<int> model(kPages, 0);
    const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    int wrong = 0, refused = 0;
    for (int step = 0; step < 10'000; ++step) {
        Pages list(static_cast<std::size_t>(pick(6)));
        for (std::int32_t& page : list) {
            page = pick(kPages + 2) - 1;  // -1 and kPages are out of range
        }
        std::vector<int> next = model;
        bool valid = true;
        try {
            switch (pick(3)) {
                case 0: {
                    const int n = pick(12);
                    valid = n <= std::count(model.begin(), model.end(), 0);
                    for (int page = 0, left = n; valid && left > 0; ++page) {
                        if (next[static_cast<std::size_t>(page)] == 0) {
                            next[static_cast<std::size_t>(page)] = 1;
                            --left;
                        }
                    }
                    static_cast<void>(pool->allocate_pages(n));
                    break;
                }
                case 1:
                    for (const std::int32_t page : list) {
                        valid =
                            valid && page >= 0 && page < kPages && model[static_cast<std::size_t>(page)] > 0;
                        if (valid) {
                            ++next[static_cast<std::size_t>(page)];
                        }
                    }
                    pool->ref(list);
                    break;
                default:
                    for (const std::int32_t page : list) {
                        valid =
                            valid && page >= 0 && page < kPages && next[static_cast<std::size_t>(page)] > 0;
                        if (valid) {
                            --next[static_cast<std::size_t>(page)];
                        }
                    }
                    pool->unref(list);
            }
            model = next;
            wrong += valid ? 0 : 1;
        } catch (const std::exception&) {
            ++refused;
            wrong += valid ? 1 : 0;
        }
        for (int page = 0; page < kPages; ++page) {
            wrong += pool->ref_count(page) == model[static_cast<std::size_t>(page)] ? 0 : 1;
        }
        wrong += pool->num_free_pages() == std::count(model.begin(), model.end(), 0) ? 0 : 1;
    }
    CHECK_EQ(wrong, 0);
    CHECK(refused > 1000);
    std::vector<Pages> holders(1);
    for (int page = 0; page < kPages; ++page) {
        holders[0].insert(holders[0].end(), static_cast<std::size_t>(model[static_cast<std::size_t>(page)]),
                          page);
    }
    CHECK_EQ(pool->audit(holders), std::vector<std::string>{});
}
