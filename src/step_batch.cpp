#include "step_batch.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "checked.h"

namespace nanoserve {

namespace {

constexpr std::int64_t kMaxPositions = std::numeric_limits<std::int32_t>::max();  // kernels read int32

std::int32_t offset_of(const StepInputs& inputs, std::size_t sequence) {
    return inputs.position_offsets.empty() ? 0 : inputs.position_offsets[sequence];
}

}  // namespace

StepBatch::StepBatch(const StepLimits& limits) : limits_(limits) {
    require_range("max_tokens", limits.max_tokens, 1, std::numeric_limits<std::int32_t>::max());
    require_at_least("max_positions", limits.max_positions, 1);
}

void StepBatch::check_shapes(const StepInputs& inputs) const {
    const std::size_t num_sequences = inputs.tables.size();
    if (num_sequences == 0) {
        throw std::invalid_argument("a step needs at least one sequence");
    }
    if (inputs.starts.size() != num_sequences || inputs.counts.size() != num_sequences) {
        throw std::invalid_argument("a step of " + std::to_string(num_sequences) +
                                    " tables needs as many starts and " + "counts, got " +
                                    std::to_string(inputs.starts.size()) + " and " +
                                    std::to_string(inputs.counts.size()));
    }
    if (!inputs.position_offsets.empty() && inputs.position_offsets.size() != num_sequences) {
        throw std::invalid_argument("a step of " + std::to_string(num_sequences) +
                                    " tables needs as many position_offsets, got " +
                                    std::to_string(inputs.position_offsets.size()));
    }
    std::int64_t total = 0;
    for (const std::int32_t count : inputs.counts) {
        require_at_least("every count", count, 1);
        total += count;
    }
    if (total != std::ssize(inputs.input_ids)) {
        throw std::invalid_argument("the counts add up to " + std::to_string(total) +
                                    " tokens, input_ids has " + std::to_string(inputs.input_ids.size()));
    }
    if (total > limits_.max_tokens) {
        throw std::invalid_argument("a step of " + std::to_string(total) +
                                    " tokens: this executor was made for at most " +
                                    std::to_string(limits_.max_tokens));
    }
    for (const std::int32_t row : inputs.sample_rows) {
        if (row < 0 || row >= total) {
            throw std::out_of_range("sample row " + std::to_string(row) +
                                    " is out of range: the step has rows 0 to " + std::to_string(total - 1));
        }
    }
}

void StepBatch::check_ids(const StepInputs& inputs) const {
    require_at_least("vocab", inputs.vocab, 1);
    std::int64_t row = 0;
    for (std::size_t sequence = 0; sequence < inputs.tables.size(); ++sequence) {
        for (std::int64_t i = 0; i < inputs.counts[sequence]; ++i, ++row) {
            const std::int32_t id = inputs.input_ids[at(row)];
            if (id < 0 || id >= inputs.vocab) {
                throw std::invalid_argument("token id " + std::to_string(id) + " at position " +
                                            std::to_string(inputs.starts[sequence] + i) + " of sequence " +
                                            std::to_string(sequence) + ", must be in [0, " +
                                            std::to_string(inputs.vocab - 1) + "]");
            }
        }
    }
}

void StepBatch::check_tables(const KVCachePool& pool, const StepInputs& inputs) {
    for (const PageTable* table : inputs.tables) {
        if (table == nullptr || table->pool().get() != &pool) {
            throw std::invalid_argument("a page table of this step belongs to another pool");
        }
    }
    std::vector<const PageTable*> sorted(inputs.tables.begin(), inputs.tables.end());
    std::sort(sorted.begin(), sorted.end(), std::less<>());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
        throw std::invalid_argument("a page table is listed twice in one step: its rows would race");
    }
}

void StepBatch::check_sequence(const KVCachePool& pool, const StepInputs& inputs,
                               std::size_t sequence) const {
    const PageTable& table = *inputs.tables[sequence];
    const std::int64_t start = inputs.starts[sequence];
    const std::int64_t end = start + inputs.counts[sequence];
    const std::string name = "sequence " + std::to_string(sequence);
    require_at_least("every start", start, 0);
    if (end > table.capacity()) {
        throw std::invalid_argument(name + " reaches " + std::to_string(end) + " tokens, its pages hold " +
                                    std::to_string(table.capacity()) + ": grow the table first");
    }
    const std::int64_t offset = offset_of(inputs, sequence);
    require_at_least("every position offset", offset, 0);
    const std::int64_t max_positions = std::min(limits_.max_positions, kMaxPositions);
    if (end + offset > max_positions) {
        throw std::invalid_argument(name + " reaches " + std::to_string(end) + " tokens" +
                                    (offset > 0 ? " at position offset " + std::to_string(offset) : "") +
                                    ", the model has " + std::to_string(max_positions) + " positions");
    }
    const std::int64_t page_size = pool.shape().page_size;
    for (std::int64_t index = start / page_size; index <= (end - 1) / page_size; ++index) {
        const std::int32_t page = table.page(index);
        if (const std::int32_t count = pool.ref_count(page); count != 1) {
            throw std::runtime_error(name + " would write page " + std::to_string(page) + ", which has " +
                                     std::to_string(count) +
                                     " references: shared pages are never written, make it writable first");
        }
    }
}

void StepBatch::prepare(const KVCachePool& pool, const StepInputs& inputs) {
    check_shapes(inputs);
    check_tables(pool, inputs);
    for (std::size_t sequence = 0; sequence < inputs.tables.size(); ++sequence) {
        check_sequence(pool, inputs, sequence);
    }
    check_ids(inputs);

    ids_.assign(inputs.input_ids.begin(), inputs.input_ids.end());
    sample_rows_.assign(inputs.sample_rows.begin(), inputs.sample_rows.end());
    positions_.resize(ids_.size());
    slots_.resize(ids_.size());
    table_.clear();
    sequences_.clear();
    std::int64_t row = 0;
    for (std::size_t sequence = 0; sequence < inputs.tables.size(); ++sequence) {
        const PageTable& table = *inputs.tables[sequence];
        const std::int64_t start = inputs.starts[sequence];
        const std::int64_t count = inputs.counts[sequence];
        const auto positions = std::span(positions_).subspan(at(row), at(count));
        std::iota(positions.begin(), positions.end(), inputs.starts[sequence] + offset_of(inputs, sequence));
        table.slots(start, std::span(slots_).subspan(at(row), at(count)));
        sequences_.push_back(
            {.first_row = row,
             .start = start,
             .count = count,
             .table_off = append_block_table(table_, table.pages(), start + count, pool.shape().page_size)});
        row += count;
    }
}

}  // namespace nanoserve
