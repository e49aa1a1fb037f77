#include "cuda_plan.h"

#include <stdexcept>
#include <utility>

#include "checked.h"

namespace nanoserve::cuda {

namespace {

using Name = std::pair<std::string_view, Source>;
constexpr std::array kSources = {
    Name{"buffer", Source::buffer},
    Name{"weight", Source::weight},
    Name{"k", Source::k},
    Name{"v", Source::v},
    Name{"ids", Source::ids},
    Name{"positions", Source::positions},
    Name{"slots", Source::slots},
    Name{"table", Source::table},
    Name{"decodes", Source::decodes},
    Name{"pieces", Source::pieces},
    Name{"chunks", Source::chunks},
    Name{"sample_rows", Source::sample_rows},
    Name{"sources", Source::sources},
    Name{"draws", Source::draws},
    Name{"draw_ints", Source::draw_ints},
    Name{"logits", Source::logits},
    Name{"block_max", Source::block_max},
    Name{"tokens", Source::tokens},
    Name{"num_rows", Source::num_rows},
    Name{"num_samples", Source::num_samples},
    Name{"num_decodes", Source::num_decodes},
    Name{"num_chunks", Source::num_chunks},
    Name{"num_pieces", Source::num_pieces},
    Name{"number", Source::number},
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

void validate(const Op& op) {
    if (op.variants.empty() || op.args.size() > kMaxArgs) {
        throw std::invalid_argument(op.name + ": needs a kernel, and at most " + std::to_string(kMaxArgs) +
                                    " arguments");
    }
    std::int64_t before = -1;
    for (const Variant& variant : op.variants) {
        if (variant.kernel == nullptr || (&variant != &op.variants.back() && variant.most <= before)) {
            throw std::invalid_argument(op.name + ": variants need a kernel each, and must ascend");
        }
        before = variant.most;
        for (const TensorForm& form : variant.kernel->tensors()) {
            require_range("argument of a tensor map", narrow<std::int64_t>(form.argument), 0,
                          std::ssize(op.args) - 1);
        }
        for (const Extent& extent : variant.grid) {
            if (!is_scalar(extent.scalar.source) || extent.per < 1 || extent.times < 1) {
                throw std::invalid_argument(op.name +
                                            ": a grid follows from numbers, per and times at least 1");
            }
        }
    }
    if (!is_scalar(op.over.source)) {
        throw std::invalid_argument(op.name + ": a number chooses among variants");
    }
}

void validate(const Product& product) {
    validate(product.name, product.shape);
    for (const Arg& arg : {product.x, product.w, product.y}) {
        if (is_scalar(arg.source)) {
            throw std::invalid_argument(product.name + ": x, w and y are pointers");
        }
    }
    if (!is_scalar(product.rows.source)) {
        throw std::invalid_argument(product.name + ": rows is a number");
    }
}

}  // namespace nanoserve::cuda
