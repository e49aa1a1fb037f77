#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "step_executor.h"
#include "test_kernels.h"

using namespace nanoserve;
using test::arg;

namespace {

constexpr std::int64_t kVocab = 100;
constexpr std::int64_t kLogitsStride = 128;
constexpr std::int64_t kStride = 64 + 16;  // of a buffer of 3 columns
constexpr std::int64_t kMaxTokens = 64;

// x[r] = (token id, position, slot)
void embed(void** args) {
    const auto* ids = arg<const std::int32_t*>(args, 0);
    const auto* positions = arg<const std::int32_t*>(args, 1);
    const auto* slots = arg<const std::int32_t*>(args, 2);
    auto* x = arg<float*>(args, 3);
    for (std::int64_t r = arg<std::int64_t>(args, 4); r < arg<std::int64_t>(args, 5); ++r) {
        x[r * kStride] = static_cast<float>(ids[r]);
        x[r * kStride + 1] = static_cast<float>(positions[r]);
        x[r * kStride + 2] = static_cast<float>(slots[r]);
    }
}

// counts[unit] += 1: a unit done twice or never shows.
void count_units(void** args) {
    auto* counts = arg<std::int32_t*>(args, 0);
    for (std::int64_t u = arg<std::int64_t>(args, 1); u < arg<std::int64_t>(args, 2); ++u) {
        ++counts[u];
    }
}

// out[r] = r + the sum of in over all rows, modulo a prime so that a long chain stays exact and forgets
// nothing: reads what every other thread wrote in the operation before.
void sum_all(void** args) {
    const auto* in = arg<const float*>(args, 0);
    auto* out = arg<float*>(args, 1);
    const std::int64_t num_rows = arg<std::int64_t>(args, 2);
    for (std::int64_t r = arg<std::int64_t>(args, 3); r < arg<std::int64_t>(args, 4); ++r) {
        float sum = 0.0F;
        for (std::int64_t i = 0; i < num_rows; ++i) {
            sum += in[i * kStride];
        }
        out[r * kStride] = std::fmod(sum + static_cast<float>(r), 61.0F);
    }
}

// logits[s][j] = x[sample_rows[s]][0] * 1000 + j
void head(void** args) {
    const auto* x = arg<const float*>(args, 0);
    const auto* rows = arg<const std::int32_t*>(args, 1);
    auto* logits = arg<float*>(args, 2);
    for (std::int64_t s = arg<std::int64_t>(args, 3); s < arg<std::int64_t>(args, 4); ++s) {
        for (std::int64_t j = 0; j < kVocab; ++j) {
            logits[s * kLogitsStride + j] = x[rows[s] * kStride] * 1000.0F + static_cast<float>(j);
        }
    }
}

std::atomic<int> blocked{0};
std::atomic<bool> unblock{false};
void block(void**) {
    ++blocked;
    while (!unblock) {
        std::this_thread::yield();
    }
}

struct Fixture {
    std::shared_ptr<KVCachePool> pool = std::make_shared<KVCachePool>(
        PoolShape{.num_pages = 200, .page_size = 4, .num_layers = 2, .num_heads = 2, .head_dim = 4});
    std::shared_ptr<ThreadPool> threads;
    StepExecutor executor;
    std::vector<std::unique_ptr<PageTable>> tables;
    std::vector<std::int32_t> ids, starts, counts, sample_rows, position_offsets;
    std::int64_t vocab = kVocab;
    std::vector<float> logits;

    explicit Fixture(int num_threads, std::int64_t max_positions = 1000)
        : threads(std::make_shared<ThreadPool>(num_threads)),
          executor(pool, threads, {.max_tokens = kMaxTokens, .max_positions = max_positions}) {}

    void sequence(std::int32_t start, std::int32_t count) {
        tables.push_back(std::make_unique<PageTable>(pool));
        static_cast<void>(tables.back()->grow_to(start + count));
        starts.push_back(start);
        counts.push_back(count);
        for (std::int32_t i = 0; i < count; ++i) {
            ids.push_back(static_cast<std::int32_t>(ids.size() * 7 % kVocab));
        }
    }

    [[nodiscard]] std::span<float> floats(std::int64_t buffer) const {
        const StepExecutor::BufferView view = executor.buffer_view(buffer);
        return {reinterpret_cast<float*>(view.data), static_cast<std::size_t>(kMaxTokens * view.row_stride)};
    }

    [[nodiscard]] std::vector<const PageTable*> table_list() const {
        std::vector<const PageTable*> list;
        for (const auto& table : tables) {
            list.push_back(table.get());
        }
        return list;
    }

    StepExecutor::Step prepare() {
        const auto list = table_list();
        return executor.prepare({.input_ids = ids,
                                 .tables = list,
                                 .starts = starts,
                                 .counts = counts,
                                 .sample_rows = sample_rows,
                                 .vocab = vocab,
                                 .position_offsets = position_offsets});
    }

    void forward() {
        const auto step = prepare();
        logits.assign(sample_rows.size() * static_cast<std::size_t>(StepExecutor::logits_stride(vocab)),
                      0.0F);
        executor.run(step, logits.data(), nullptr);
    }
};

Op make_op(const std::string& name, Kernel kernel, std::vector<Arg> args, Domain domain = Domain::rows) {
    return {.name = name, .kernel = kernel, .args = std::move(args), .domain = domain};
}

}  // namespace

TEST(strides_avoid_aliasing) {
    CHECK_EQ(StepExecutor::stride(1), 80);
    CHECK_EQ(StepExecutor::stride(64), 80);
    CHECK_EQ(StepExecutor::stride(65), 144);
    for (const std::int64_t cols : {64, 1024, 3072, 4096}) {
        CHECK(StepExecutor::stride(cols) * 4 % 4096 != 0);
    }
    CHECK_EQ(StepExecutor::logits_stride(100), 128);
    CHECK_EQ(StepExecutor::logits_stride(128), 128);
    CHECK_THROWS(std::invalid_argument, "cols is 0", StepExecutor::stride(0));
    CHECK_THROWS(std::invalid_argument, "cols is 9223372036854775807",
                 StepExecutor::stride(std::numeric_limits<std::int64_t>::max()));
}

TEST(rows_samples_and_batch_arrays) {
    for (const int threads : {1, 2, 5}) {
        Fixture f(threads);
        f.sequence(0, 9);
        f.sequence(6, 1);
        f.sequence(3, 5);
        f.sample_rows = {8, 14, 9, 9};
        const std::int64_t x = f.executor.buffer(3);
        CHECK_EQ(reinterpret_cast<std::uintptr_t>(f.floats(x).data()) % 64, 0U);
        CHECK_EQ(std::ssize(f.floats(x)), kMaxTokens * kStride);
        CHECK_EQ(StepExecutor::stride(3, 2), 64 + 32);
        CHECK_EQ(StepExecutor::stride(65, 1), 128 + 64);
        const auto view = f.executor.buffer_view(f.executor.buffer(65, 1));
        CHECK_EQ(view.row_stride, 128 + 64);
        CHECK_EQ(view.item_bytes, 1);
        CHECK_EQ(f.executor.buffer_view(f.executor.row_scales()).row_stride, 1);
        CHECK_THROWS(std::invalid_argument, "item_bytes is 3, must be 1, 2 or 4", f.executor.buffer(3, 3));
        f.executor.op(make_op("embed", embed,
                              {{Source::ids}, {Source::positions}, {Source::slots}, {Source::buffer, x}}));
        f.executor.op(make_op("head", head, {{Source::buffer, x}, {Source::sample_rows}, {Source::logits}},
                              Domain::samples));
        f.forward();
        std::size_t row = 0;
        for (std::size_t s = 0; s < 3; ++s) {
            for (std::int32_t i = 0; i < f.counts[s]; ++i, ++row) {
                const float* got = f.floats(x).data() + row * kStride;
                const std::int32_t position = f.starts[s] + i;
                CHECK_EQ(got[0], static_cast<float>(f.ids[row]));
                CHECK_EQ(got[1], static_cast<float>(position));
                CHECK_EQ(got[2], static_cast<float>(f.tables[s]->page(position / 4) * 4 + position % 4));
            }
        }
        CHECK_EQ(f.floats(x)[row * kStride], 0.0F);  // no row past the last was touched
        for (std::size_t s = 0; s < 4; ++s) {
            const float base =
                static_cast<float>(f.ids[static_cast<std::size_t>(f.sample_rows[s])]) * 1000.0F;
            CHECK_EQ(f.logits[s * kLogitsStride], base);
            CHECK_EQ(f.logits[s * kLogitsStride + 99], base + 99.0F);
        }
    }
}

// A second position table lies behind the first: one sequence reads that one. Slots and ids stay.
TEST(position_offsets_move_positions_only) {
    Fixture f(2, 200);
    f.sequence(0, 9);
    f.sequence(6, 3);
    const std::int64_t x = f.executor.buffer(3);
    f.executor.op(
        make_op("embed", embed, {{Source::ids}, {Source::positions}, {Source::slots}, {Source::buffer, x}}));
    f.forward();
    const auto rows = [&] {
        const auto data = f.floats(x);
        return std::vector<float>(data.begin(), data.begin() + 12 * kStride);
    };
    const std::vector<float> before = rows();
    f.position_offsets = {0, 100};
    f.forward();
    std::vector<float> want = before;
    for (std::size_t row = 9; row < 12; ++row) {
        want[row * kStride + 1] += 100.0F;
    }
    CHECK(rows() == want);
    f.position_offsets = {0, 0};
    f.forward();
    CHECK(rows() == before);
}

TEST(position_offsets_are_checked) {
    Fixture f(1, 30);
    f.sequence(0, 6);
    f.sequence(8, 2);
    f.position_offsets = {24, 20};
    f.forward();  // each ends at the last position
    f.position_offsets = {24, 21};
    CHECK_THROWS(std::invalid_argument,
                 "sequence 1 reaches 10 tokens at position offset 21, the model has 30 positions",
                 f.forward());
    f.position_offsets = {2'147'483'647, 0};
    CHECK_THROWS(std::invalid_argument, "sequence 0 reaches 6 tokens at position offset 2147483647",
                 f.forward());
    f.position_offsets = {0, -1};
    CHECK_THROWS(std::invalid_argument, "every position offset is -1", f.forward());
    f.position_offsets = {0};
    CHECK_THROWS(std::invalid_argument, "2 tables needs as many position_offsets, got 1", f.forward());
    f.position_offsets = {};
    f.forward();

    // Without a limit of the model's, the limit is what kernels can read.
    Fixture boundless(1, std::numeric_limits<std::int64_t>::max());
    boundless.sequence(0, 6);
    boundless.position_offsets = {2'147'483'641};
    boundless.forward();
    boundless.position_offsets = {2'147'483'642};
    CHECK_THROWS(std::invalid_argument, "the model has 2147483647 positions", boundless.forward());
}

TEST(every_unit_is_done_once) {
    for (const int threads : {1, 2, 3, 8}) {
        for (const std::int64_t cost : {0, 1, 10'000, 1'000'000}) {
            Fixture f(threads);
            f.sequence(0, 21);
            f.sample_rows = {1, 2, 3};
            std::vector<std::vector<std::int32_t>> counts(4, std::vector<std::int32_t>(200, 0));
            const auto add = [&](std::size_t i, Domain domain, std::int64_t panels, std::int64_t block,
                                 bool samples) {
                Op op = make_op("op " + std::to_string(i), count_units,
                                {{Source::weight, f.executor.weight(counts[i].data())}}, domain);
                op.panels = panels;
                op.row_block = block;
                op.over_samples = samples;
                op.cost_per_unit = cost;
                f.executor.op(op);
            };
            add(0, Domain::rows, 0, 0, false);
            add(1, Domain::samples, 0, 0, false);
            add(2, Domain::tiles, 11, 4, false);  // 11 * ceil(21 / 4)
            add(3, Domain::tiles, 11, 2, true);   // 11 * ceil(3 / 2)
            for (int repeat = 0; repeat < 3; ++repeat) {
                f.forward();
            }
            const std::size_t units[] = {21, 3, 66, 22};
            for (std::size_t i = 0; i < 4; ++i) {
                std::vector<std::int32_t> want(200, 0);
                std::fill_n(want.begin(), units[i], 3);
                CHECK_EQ(counts[i], want);
            }
        }
    }
}

// Chains of operations that read all rows of the one before, some shared by all threads, some on thread 0
// alone: every missing barrier shows as a wrong sum. The reference is one thread.
TEST(operations_wait_for_each_other) {
    constexpr std::size_t kSteps = 60;
    std::vector<std::vector<float>> want(
        kSteps);  // each step has its own: what is left of the last one must not do
    for (const int threads : {1, 2, 3, 7}) {
        Fixture f(threads);
        f.sequence(0, 24);
        const std::int64_t x = f.executor.buffer(3), y = f.executor.buffer(3);
        f.executor.op(make_op("embed", embed,
                              {{Source::ids}, {Source::positions}, {Source::slots}, {Source::buffer, x}}));
        for (int i = 0; i < 30; ++i) {
            Op op = make_op("sum", sum_all,
                            {{Source::buffer, i % 2 == 0 ? x : y},
                             {Source::buffer, i % 2 == 0 ? y : x},
                             {Source::num_rows}});
            op.cost_per_unit = i % 3 == 0 ? 1 : (i % 3 == 1 ? 0 : 10'000);  // one thread, all, two
            f.executor.op(op);
        }
        for (std::size_t step = 0; step < kSteps; ++step) {
            f.ids[step % 24] = static_cast<std::int32_t>(step);
            f.forward();
            const auto data = f.floats(x);
            const std::vector<float> got(data.begin(), data.begin() + 24 * kStride);
            want[step] = threads == 1 ? got : want[step];
            CHECK(got == want[step]);
        }
    }
    CHECK(want[0] != want[1]);
}

// Once too little work to share, once enough for five threads; twice each, because items are handed out anew.
TEST(attention_runs_over_pages) {
    constexpr int kRow = 2 * 2 * 4;
    constexpr int kLd = 64 + 16;
    constexpr Kernel small = test::attention<{2, 2, 4, 4, kLd, kLd, 2, 2}>;
    constexpr Kernel large = test::attention<{2, 2, 4, 4, kLd, kLd, 1, 12}>;
    for (const std::int32_t context : {0, 400}) {
        std::vector<float> want;
        for (const int threads : {1, 2, 5}) {
            Fixture f(threads);
            f.sequence(context, 40);
            f.sequence(17, 1);
            f.sequence(2, 3);
            const std::int64_t q = f.executor.buffer(kRow), out = f.executor.buffer(kRow);
            for (std::size_t i = 0; i < 44 * kLd; ++i) {
                f.floats(q)[i] = static_cast<float>(i % 13) / 13.0F - 0.5F;
            }
            auto* const keys = reinterpret_cast<float*>(f.pool->k_layer(1));
            const auto* const values = reinterpret_cast<const float*>(f.pool->v_layer(1));
            for (std::int64_t i = 0; i < f.pool->num_slots() * 2 * 2 * 4; ++i) {  // keys and values
                keys[i] = static_cast<float>(i % 17) / 17.0F - 0.5F;
            }
            Op op = make_op("attention", small,
                            {{Source::buffer, q},
                             {Source::k, 1},
                             {Source::v, 1},
                             {Source::table},
                             {Source::items},
                             {Source::parts},
                             {Source::buffer, out}});
            op.large_kernel = large;
            f.executor.attention(op, 2, 2, {2, 2}, {6, 2});
            const auto data = f.floats(out);
            for (int repeat = 0; repeat < 2; ++repeat) {
                std::fill(data.begin(), data.end(), 0.0F);
                f.forward();
                const std::vector<float> got(data.begin(), data.begin() + 44 * kLd);
                want = want.empty() ? got : want;
                CHECK(got == want);
            }
            // Against the definition for one row: sequence 1, position 17, query head 3 (KV head 1),
            // number 2.
            double total = 0.0, sum = 0.0;
            for (int p = 0; p <= 17; ++p) {
                const std::int64_t start = (f.tables[1]->page(p / 4) * 2 + 1) * 2 * 16;
                double score = 0.0;
                for (int d = 0; d < 4; ++d) {
                    score += double{f.floats(q)[static_cast<std::size_t>(40 * kLd + 12 + d)]} *
                             double{keys[start + d * 4 + p % 4]};
                }
                total += std::exp(score);
                sum += std::exp(score) * double{values[start + p % 4 * 4 + 2]};
            }
            CHECK(std::abs(double{data[40 * kLd + 12 + 2]} - sum / total) < 1e-6);
        }
    }
}

TEST(attention_needs_two_kernels_and_the_pools_heads) {
    Fixture f(1);
    const auto op = [] {
        Op made = make_op("attend", count_units, {{Source::items}});
        made.large_kernel = count_units;
        return made;
    };
    f.executor.attention(op(), 2, 2, {2, 2}, {6, 1});
    CHECK_THROWS(std::invalid_argument, "has 3 KV heads, the pool has 2",
                 f.executor.attention(op(), 2, 3, {2, 2}, {6, 1}));
    CHECK_THROWS(std::invalid_argument, "small rows is 0", f.executor.attention(op(), 2, 2, {0, 1}, {6, 1}));
    f.executor.attention(op(), 2, 2, {2, 2}, {6, 1}, 128);
    CHECK_THROWS(std::invalid_argument, "window is -1", f.executor.attention(op(), 2, 2, {2, 2}, {6, 1}, -1));
    Op half = op();
    half.large_kernel = nullptr;
    CHECK_THROWS(std::invalid_argument, "has no kernel", f.executor.attention(half, 2, 2, {2, 2}, {6, 1}));
    CHECK_THROWS(std::invalid_argument, "asks for items",
                 f.executor.op(make_op("x", count_units, {{Source::items}})));
    CHECK_THROWS(std::invalid_argument, "added by attention()",
                 f.executor.op(make_op("x", count_units, {}, Domain::attention)));
}

TEST(plans_are_checked) {
    Fixture f(1);
    const std::int64_t x = f.executor.buffer(3);
    CHECK_EQ(x, 0);
    CHECK_THROWS(std::out_of_range, "buffer 1", f.executor.op(make_op("a", embed, {{Source::buffer, 1}})));
    CHECK_THROWS(std::out_of_range, "buffer -1", f.executor.op(make_op("a", embed, {{Source::buffer, -1}})));
    CHECK_THROWS(std::out_of_range, "weight 0", f.executor.op(make_op("a", embed, {{Source::weight, 0}})));
    CHECK_THROWS(std::out_of_range, "layer 2", f.executor.op(make_op("a", embed, {{Source::k, 2}})));
    CHECK_THROWS(std::out_of_range, "layer -1", f.executor.op(make_op("a", embed, {{Source::v, -1}})));
    CHECK_THROWS(std::invalid_argument, "'a' has no kernel", f.executor.op(make_op("a", nullptr, {})));
    CHECK_THROWS(std::invalid_argument, "40 arguments",
                 f.executor.op(make_op("a", embed, std::vector<Arg>(40, Arg{Source::ids}))));
    CHECK_THROWS(std::invalid_argument, "panels is 0", f.executor.op(make_op("a", embed, {}, Domain::tiles)));
    Op op = make_op("a", embed, {});
    op.panels = 3;
    CHECK_THROWS(std::invalid_argument, "for the domain tiles", f.executor.op(op));
    op.panels = 0;
    op.cost_per_unit = -1;
    CHECK_THROWS(std::invalid_argument, "cost_per_unit is -1", f.executor.op(op));
    CHECK_THROWS(std::invalid_argument, "needs memory", f.executor.weight(nullptr));
    CHECK_THROWS(std::invalid_argument, "unknown argument source 'idz'", source_from_name("idz"));
    CHECK_THROWS(std::invalid_argument, "unknown domain 'row'", domain_from_name("row"));
    for (const char* name : {"buffer", "weight", "k", "v"}) {
        CHECK(source_has_index(source_from_name(name)));
    }
    CHECK(!source_has_index(source_from_name("num_rows")));
    CHECK_THROWS(std::invalid_argument, "max_tokens is 0", StepExecutor(f.pool, f.threads, {0, 1}));
    CHECK_THROWS(std::invalid_argument, "needs a pool", StepExecutor(nullptr, f.threads, {1, 1}));
}

TEST(steps_are_checked) {
    Fixture f(2, 30);
    f.sequence(0, 6);
    f.sequence(8, 2);
    f.sample_rows = {5, 7};
    f.forward();
    const auto with = [&](auto change, auto undo) {
        change();
        std::string message = "none";
        try {
            f.forward();
        } catch (const std::exception& error) {
            message = error.what();
        }
        undo();
        return message;
    };
    const auto says = [&](const std::string& message, const std::string& part) {
        check::report(message.find(part) != std::string::npos, __FILE__, __LINE__,
                      "'" + message + "' does not say '" + part + "'");
    };
    says(with([&] { f.ids[6] = 100; }, [&] { f.ids[6] = 1; }),
         "token id 100 at position 8 of sequence 1, must be in [0, 99]");
    says(with([&] { f.ids[0] = -1; }, [&] { f.ids[0] = 1; }), "token id -1 at position 0 of sequence 0");
    says(with([&] { f.vocab = 0; }, [&] { f.vocab = kVocab; }), "vocab is 0");
    says(with([&] { f.counts[0] = 5; }, [&] { f.counts[0] = 6; }),
         "the counts add up to 7 tokens, input_ids has 8");
    says(with([&] { f.counts[0] = 0; }, [&] { f.counts[0] = 6; }), "every count is 0");
    says(with([&] { f.starts[1] = -1; }, [&] { f.starts[1] = 8; }), "every start is -1");
    says(with([&] { f.starts[1] = 11; }, [&] { f.starts[1] = 8; }),
         "sequence 1 reaches 13 tokens, its pages hold 12");
    says(with([&] { f.starts[1] = 2'147'483'647; }, [&] { f.starts[1] = 8; }), "reaches 2147483649 tokens");
    says(with([&] { f.starts.pop_back(); }, [&] { f.starts.push_back(8); }), "got 1 and 2");
    says(with([&] { f.sample_rows[1] = 8; }, [&] { f.sample_rows[1] = 7; }),
         "sample row 8 is out of range: the step has rows 0 to 7");
    says(with([&] { f.sample_rows[1] = -1; }, [&] { f.sample_rows[1] = 7; }), "sample row -1");
    const std::vector<std::int32_t> shared = {f.tables[1]->page(2)};
    says(with([&] { f.pool->ref(shared); }, [&] { f.pool->unref(shared); }),
         "sequence 1 would write page " + std::to_string(shared[0]) + ", which has 2 references");
    const std::vector<std::int32_t> prefix = {f.tables[1]->page(0)};
    says(with([&] { f.pool->ref(prefix); }, [&] { f.pool->unref(prefix); }),
         "none");  // only read: may be shared
    const auto own = f.pool;
    auto foreign = std::make_shared<KVCachePool>(own->shape());
    std::unique_ptr<PageTable> kept = std::move(f.tables[0]);
    f.tables[0] = std::make_unique<PageTable>(foreign);
    static_cast<void>(f.tables[0]->grow_to(6));
    CHECK_THROWS(std::invalid_argument, "another pool", f.forward());
    f.tables[0] = std::move(kept);
    f.forward();

    const std::vector<const PageTable*> twice = {f.tables[0].get(), f.tables[0].get()};
    CHECK_THROWS(std::invalid_argument, "listed twice",
                 f.executor.prepare({f.ids, twice, f.starts, f.counts, f.sample_rows, kVocab}));
    CHECK_THROWS(std::invalid_argument, "at least one sequence",
                 f.executor.prepare({{}, {}, {}, {}, {}, kVocab}));
    Fixture long_one(1, 30);
    long_one.sequence(29, 2);
    CHECK_THROWS(std::invalid_argument, "reaches 31 tokens, the model has 30 positions", long_one.forward());
    Fixture many(1);
    many.sequence(0, 65);
    CHECK_THROWS(std::invalid_argument, "a step of 65 tokens: this executor was made for at most 64",
                 many.forward());
}

TEST(what_a_plan_writes_needs_memory) {
    Fixture f(1);
    f.sequence(0, 6);
    f.sample_rows = {0, 5};
    f.executor.op(make_op("logits", [](void**) {}, {{Source::logits}}, Domain::samples));
    CHECK(f.executor.writes_logits());
    CHECK(!f.executor.writes_block_max());
    f.executor.op(make_op("block_max", [](void**) {}, {{Source::block_max}}, Domain::samples));
    CHECK(f.executor.writes_block_max());
    std::vector<float> memory(2 * static_cast<std::size_t>(StepExecutor::logits_stride(f.vocab)));
    const auto step = f.prepare();
    f.executor.run(step, memory.data(), memory.data());
    CHECK_THROWS(std::invalid_argument, "2 samples", f.executor.run(step, nullptr, memory.data()));
    CHECK_THROWS(std::invalid_argument, "2 samples", f.executor.run(step, memory.data(), nullptr));
}

TEST(a_chunk_may_sample_nothing) {
    Fixture f(2);
    f.sequence(0, 5);
    const std::int64_t x = f.executor.buffer(3);
    f.executor.op(make_op("head", head, {{Source::buffer, x}, {Source::sample_rows}, {Source::logits}},
                          Domain::samples));
    f.forward();
    CHECK_EQ(f.logits.size(), std::size_t{0});
    const auto step = f.prepare();
    f.executor.run(step, nullptr, nullptr);
}

TEST(one_step_at_a_time) {
    Fixture f(2);
    f.sequence(0, 5);
    f.executor.op(make_op("block", block, {}));
    blocked = 0;
    unblock = false;
    std::thread other([&] { f.forward(); });
    while (blocked.load() == 0) {
        std::this_thread::yield();
    }
    CHECK_THROWS(std::runtime_error, "running a step already", f.prepare());
    CHECK_THROWS(std::runtime_error, "running a step", f.executor.op(make_op("x", block, {})));
    CHECK_THROWS(std::runtime_error, "running a step", f.executor.buffer(3));
    CHECK_THROWS(std::runtime_error, "running a step", f.executor.profile(true));
    CHECK_THROWS(std::runtime_error, "running a step", f.executor.timings());
    unblock = true;
    other.join();
    f.forward();  // and afterwards it is free again, as it is after an error:
    f.ids[0] = -1;
    CHECK_THROWS(std::invalid_argument, "token id -1", f.forward());
    f.ids[0] = 0;
    f.forward();
}

TEST(profile_counts_calls_and_time) {
    Fixture f(2);
    f.sequence(0, 5);
    f.executor.op(
        make_op("slow", [](void**) { std::this_thread::sleep_for(std::chrono::milliseconds(3)); }, {}));
    f.executor.op(make_op("fast", [](void**) {}, {}));
    f.forward();
    CHECK_EQ(f.executor.timings()[0].calls, 0);
    f.executor.profile(true);
    f.forward();
    f.forward();
    f.executor.profile(false);
    f.forward();
    const auto timings = f.executor.timings();
    CHECK_EQ(timings[0].name, std::string("slow"));
    CHECK_EQ(timings[0].calls, 2);
    CHECK_EQ(timings[1].calls, 2);
    CHECK(timings[0].nanoseconds >= 6'000'000);
    CHECK(timings[1].nanoseconds < timings[0].nanoseconds);
    f.executor.profile(true);
    CHECK_EQ(f.executor.timings()[0].calls, 0);
}
