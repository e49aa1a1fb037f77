#include "step_plan.h"

#include <array>
#include <stdexcept>
#include <utility>

#include "checked.h"

namespace nanoserve {

namespace {

using Names = std::pair<std::string_view, Source>;
constexpr std::array kSources = {
    Names{"buffer", Source::buffer},
    Names{"weight", Source::weight},
    Names{"k", Source::k},
    Names{"v", Source::v},
    Names{"ids", Source::ids},
    Names{"positions", Source::positions},
    Names{"slots", Source::slots},
    Names{"table", Source::table},
    Names{"items", Source::items},
    Names{"parts", Source::parts},
    Names{"sample_rows", Source::sample_rows},
    Names{"logits", Source::logits},
    Names{"block_max", Source::block_max},
    Names{"num_rows", Source::num_rows},
    Names{"num_samples", Source::num_samples},
};

}  // namespace

Source source_from_name(std::string_view name) {
    for (const auto& [known, source] : kSources) {
        if (known == name) {
            return source;
        }
    }
    throw std::invalid_argument("unknown argument source '" + std::string(name) + "'");
}

bool source_has_index(Source source) {
    return source == Source::buffer || source == Source::weight || source == Source::k || source == Source::v;
}

Domain domain_from_name(std::string_view name) {
    if (name == "rows") {
        return Domain::rows;
    }
    if (name == "samples") {
        return Domain::samples;
    }
    if (name == "tiles") {
        return Domain::tiles;
    }
    // "attention" has its own call: it needs two kernels and a shape.
    throw std::invalid_argument("unknown domain '" + std::string(name) + "', must be rows, samples or tiles");
}

void Op::validate() const {
    if (kernel == nullptr || (domain == Domain::attention && large_kernel == nullptr)) {
        throw std::invalid_argument("operation '" + name + "' has no kernel: the address is 0");
    }
    if (args.size() > KernelCall::kMaxArgs) {
        throw std::invalid_argument("operation '" + name + "' has " + std::to_string(args.size()) +
                                    " arguments, at most " + std::to_string(KernelCall::kMaxArgs) +
                                    " are possible");
    }
    require_at_least("cost_per_unit", cost_per_unit, 0);
    if (domain == Domain::tiles) {
        require_at_least("panels", panels, 1);
        require_at_least("row_block", row_block, 1);
    } else if (panels != 0 || row_block != 0 || over_samples) {
        throw std::invalid_argument("operation '" + name +
                                    "': panels, row_block and over are for the domain tiles");
    }
    for (const Arg& arg : args) {
        if ((arg.source == Source::items || arg.source == Source::parts) && domain != Domain::attention) {
            throw std::invalid_argument("operation '" + name + "' asks for items, which only attention has");
        }
    }
}

std::int64_t Op::num_units(std::int64_t num_rows, std::int64_t num_samples) const {
    switch (domain) {
        case Domain::rows:
            return num_rows;
        case Domain::samples:
            return num_samples;
        case Domain::tiles:
            return checked_product(
                "the tiles of an operation",
                {{"panels", panels},
                 {"row blocks", ceil_div(over_samples ? num_samples : num_rows, row_block)}});
        case Domain::attention:
            break;
    }
    throw std::logic_error("attention counts items, not units");
}

}  // namespace nanoserve
