// A forward pass on a device as data: kernels, where their arguments come from, and how their grids follow
// from a step's sizes. It names no batch; cuda_inputs.h has what differs from step to step.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "cuda_blas.h"
#include "cuda_kernel.h"

namespace nanoserve::cuda {

enum class Source : std::uint8_t {
    // Pointers.
    buffer,       // activations, by id
    weight,       // by id
    k,            // one layer of the pool's keys, as cuda_pages.h lays them out
    v,            // and values
    ids,          // int32 per row
    positions,    // int32 per row
    slots,        // int32 per row: where its keys and values go, -1 for padding
    table,        // int32, the flat block table
    decodes,      // Decode per sequence of one row
    pieces,       // Piece per segment of its keys
    chunks,       // AttentionSpan per tile of rows of a longer one
    sample_rows,  // int32 per sample: its row
    sources,      // int32 per row: the sample of the step before whose token is its id, -1: none
    draws,        // float32 [samples][4], how a token is chosen: kernels/cuda/choose.py
    draw_ints,    // int32 [samples][4], the same
    logits,       // float32 [samples][stride]
    block_max,    // float32 [samples][blocks]
    tokens,       // int32 per sample: what was chosen, -1 where a logit is not finite
    // int64.
    num_rows,
    num_samples,
    num_decodes,
    num_chunks,
    num_pieces,
    number,  // the index itself
};

[[nodiscard]] Source source_from_name(std::string_view name);

// Whether an argument is a number, not a pointer.
[[nodiscard]] constexpr bool is_scalar(Source source) {
    return source >= Source::num_rows;
}

inline constexpr std::size_t kMaxArgs = 32;

struct Arg {
    Source source;
    std::int64_t index = 0;  // of a buffer or weight, the layer of k and v, or the number
};

// Blocks along one dimension of a grid: times * ceil(scalar / per).
struct Extent {
    Arg scalar{.source = Source::number, .index = 1};
    std::int64_t per = 1;
    std::int64_t times = 1;
};

// A kernel for up to `most` of something; all of an operation give the same bits.
struct Variant {
    std::int64_t most;  // the last one's is not looked at
    std::shared_ptr<const Kernel> kernel;
    std::array<Extent, 3> grid;
    std::vector<TensorMap> maps{};  // for the kernel's tensors, made when a step gets the plan
};

struct Op {
    std::string name;
    std::vector<Variant> variants;       // by `most`, ascending
    Arg over{.source = Source::number};  // the number that chooses among them
    std::vector<Arg> args;
};

// A matrix product that cuBLAS does.
struct Product {
    std::string name;
    ProductShape shape;
    Arg x, w, y;
    Arg rows;
};

// One turn of a plan.
using Work = std::variant<Op, Product>;

// Throws invalid_argument unless every operation has kernels in order, and grids that follow from numbers.
void validate(const Op& op);
void validate(const Product& product);

}  // namespace nanoserve::cuda
