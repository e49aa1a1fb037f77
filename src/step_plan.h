// A forward pass as data: a list of operations, each a kernel, where its arguments come from, and how its
// work is cut.
//
// A plan is made once per model. It names no batch: what differs from step to step (row counts, token ids,
// pages) is reached through sources that the executor fills in.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernel_call.h"

namespace nanoserve {

enum class Source : std::uint8_t {
    buffer,       // activations, by id
    weight,       // by id
    k,            // one layer of the pool's keys
    v,            // and values
    ids,          // int32 per row
    positions,    // int32 per row
    slots,        // int32 per row: where its keys and values go
    table,        // the flat block table
    items,        // the attention items of this operation
    parts,        // where these leave the results of segments for each other
    sample_rows,  // int32 per sample: its row
    logits,       // the output of the step
    block_max,    // and the largest of each block of logits, [samples][num_logits_blocks(vocab)]
    num_rows,     // int64
    num_samples,  // int64
};

[[nodiscard]] Source source_from_name(std::string_view name);
[[nodiscard]] bool source_has_index(Source source);

struct Arg {
    Source source;
    std::int64_t index = 0;  // of a buffer or weight, or the layer of k and v
};

enum class Domain : std::uint8_t {
    rows,       // one unit per token of the batch
    samples,    // one unit per row that is sampled
    tiles,      // panels * ceil(m / row_block) units, panel-major; m is the number of rows or of samples
    attention,  // items of an AttentionWork, taken one by one
};

[[nodiscard]] Domain domain_from_name(std::string_view name);

struct Op {
    std::string name;
    Kernel kernel = nullptr;        // attention: the one for few rows
    Kernel large_kernel = nullptr;  // attention only
    std::vector<Arg> args;          // begin and end follow by themselves
    Domain domain = Domain::rows;
    std::int64_t panels = 0;     // tiles only
    std::int64_t row_block = 0;  // tiles only
    bool over_samples = false;   // tiles only: m counts samples
    // Estimated multiply-adds of one unit, 0 for unknown. Decides how many threads share the operation, never
    // its bits.
    std::int64_t cost_per_unit = 0;

    void validate() const;
    // Only for domains other than attention.
    [[nodiscard]] std::int64_t num_units(std::int64_t num_rows, std::int64_t num_samples) const;
};

}  // namespace nanoserve
