#include "bind/bind.h"
#include "logits_reader.h"

namespace nanoserve::bind {

namespace {

using DoubleList = std::vector<double>;
using IntList = std::vector<std::int64_t>;

// float32[rows, vocab] whose rows are contiguous, wherever each of them lies.
LogitsView view_of(const py::array& values) {
    constexpr py::ssize_t item = sizeof(float);
    if (!py::isinstance<py::array_t<float>>(values) || values.ndim() != 2) {
        throw py::type_error("values must be a float32 array [rows, vocab], got shape " + shape_text(values));
    }
    const bool apart = values.shape(1) > 1 && values.strides(1) != item;
    if (values.shape(1) < 1 ||
        (values.shape(0) > 0 && (apart || values.strides(0) < 0 || values.strides(0) % item != 0))) {
        throw std::invalid_argument("values of shape " + shape_text(values) + " must have contiguous rows");
    }
    return {.values = static_cast<const float*>(values.data()),
            .num_rows = values.shape(0),
            .vocab = values.shape(1),
            .row_stride = values.strides(0) / item};
}

LogitsView view_of(const py::array& values, const py::array& block_max) {
    LogitsView view = view_of(values);
    if (!py::isinstance<FloatArray>(block_max) || block_max.ndim() != 2 ||
        block_max.shape(0) != view.num_rows || block_max.shape(1) != num_logits_blocks(view.vocab)) {
        throw std::invalid_argument(
            "block_max must be a C-contiguous float32 array [" + std::to_string(view.num_rows) + ", " +
            std::to_string(num_logits_blocks(view.vocab)) + "], got shape " + shape_text(block_max));
    }
    view.block_max = static_cast<const float*>(block_max.data());
    return view;
}

void require_size(const char* name, std::size_t size, std::size_t rows) {
    if (size != rows) {
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(size) + " entries for " +
                                    std::to_string(rows) + " rows");
    }
}

Choice choice_of(const LogitsView& view, std::int64_t row, const Filters& filters, double uniform) {
    require_range("row", row, 0, view.num_rows - 1);
    require_range("top_k", filters.top_k, 0, std::numeric_limits<std::int64_t>::max());
    // A NaN fails each of these.
    if (!(filters.temperature >= 0.0 && filters.top_p > 0.0 && filters.min_p >= 0.0 && filters.min_p <= 1.0 &&
          uniform >= 0.0 && uniform < 1.0)) {
        throw std::invalid_argument("row " + std::to_string(row) +
                                    ": temperature, top_p, min_p or the uniform number is out of range");
    }
    return {.row = row, .filters = filters, .uniform = uniform};
}

py::array_t<float> block_max(const LogitsReader& reader, const py::array& values, bool may_forbid) {
    const LogitsView view = view_of(values);
    py::array_t<float> out(std::vector<py::ssize_t>{view.num_rows, num_logits_blocks(view.vocab)});
    float* const data = out.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        reader.block_max(view, may_forbid, data);
    }
    return out;
}

void forbid(const LogitsReader& reader, py::array& values, py::array& block_max_array, const IntList& rows,
            const py::array& masks) {
    const LogitsView view = view_of(values, block_max_array);
    const std::int64_t words = ceil_div(view.vocab, 32);
    if (!py::isinstance<py::array_t<std::uint32_t, py::array::c_style>>(masks) || masks.ndim() != 2 ||
        masks.shape(0) != std::ssize(rows) || masks.shape(1) != words) {
        throw std::invalid_argument("masks must be a C-contiguous uint32 array [" +
                                    std::to_string(rows.size()) + ", " + std::to_string(words) +
                                    "], got shape " + shape_text(masks));
    }
    std::vector<bool> seen(at(view.num_rows));
    for (const std::int64_t row : rows) {
        require_range("row", row, 0, view.num_rows - 1);
        if (seen[at(row)]) {
            throw std::invalid_argument("row " + std::to_string(row) + " has more than one mask");
        }
        seen[at(row)] = true;
    }
    auto* const data = static_cast<float*>(values.mutable_data());
    auto* const maxima = static_cast<float*>(block_max_array.mutable_data());
    const std::span<const std::uint32_t> bits{static_cast<const std::uint32_t*>(masks.data()),
                                              rows.size() * at(words)};
    const py::gil_scoped_release unlocked;
    reader.forbid(view, data, maxima, rows, bits);
}

IntList sample(const LogitsReader& reader, const py::array& values, const py::array& block_max_array,
               const IntList& rows, const DoubleList& temperature, const IntList& top_k,
               const DoubleList& top_p, const DoubleList& min_p, const DoubleList& uniform) {
    const LogitsView view = view_of(values, block_max_array);
    require_size("temperature", temperature.size(), rows.size());
    require_size("top_k", top_k.size(), rows.size());
    require_size("top_p", top_p.size(), rows.size());
    require_size("min_p", min_p.size(), rows.size());
    require_size("uniform", uniform.size(), rows.size());
    std::vector<Choice> choices;
    choices.reserve(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        choices.push_back(choice_of(
            view, rows[i],
            {.temperature = temperature[i], .top_k = top_k[i], .top_p = top_p[i], .min_p = min_p[i]},
            uniform[i]));
    }
    const py::gil_scoped_release unlocked;
    return reader.sample(view, choices);
}

IntList kept(const LogitsReader& reader, const py::array& values, const py::array& block_max_array,
             std::int64_t row, double temperature, std::int64_t top_k, double top_p, double min_p) {
    const LogitsView view = view_of(values, block_max_array);
    const Choice choice = choice_of(
        view, row, {.temperature = temperature, .top_k = top_k, .top_p = top_p, .min_p = min_p}, 0.0);
    IntList ids;
    for (const WeightedToken& token : reader.kept(view, choice)) {
        ids.push_back(token.id);
    }
    return ids;
}

py::list score(const LogitsReader& reader, const py::array& values, const py::array& block_max_array,
               const IntList& rows, const IntList& tokens, const IntList& num_top) {
    const LogitsView view = view_of(values, block_max_array);
    require_size("tokens", tokens.size(), rows.size());
    require_size("num_top", num_top.size(), rows.size());
    std::vector<Scored> wanted;
    wanted.reserve(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        require_range("row", rows[i], 0, view.num_rows - 1);
        require_range("token", tokens[i], 0, view.vocab - 1);
        require_at_least("num_top", num_top[i], 0);
        wanted.push_back({rows[i], tokens[i], num_top[i]});
    }
    std::vector<Score> scores;
    {
        const py::gil_scoped_release unlocked;
        scores = reader.score(view, wanted);
    }
    py::list out;
    for (const Score& one : scores) {
        out.append(py::make_tuple(one.logprob, one.rank, py::cast(one.top)));
    }
    return out;
}

}  // namespace

void populate_logits(py::module_& m) {
    m.attr("LOGITS_BLOCK") = kLogitsBlock;
    py::class_<LogitsReader>(m, "LogitsReader",
                             "Chooses tokens from rows of logits and says how likely they were.")
        .def(py::init([](std::shared_ptr<ThreadPool> threads, std::uintptr_t block_sums,
                         std::uintptr_t block_max_address, std::int64_t vocab, std::int64_t row_stride,
                         std::int64_t blocks_per_unit) {
                 return std::make_unique<LogitsReader>(
                     std::move(threads),
                     LogitsKernels{.block_sums = reinterpret_cast<Kernel>(block_sums),
                                   .block_max = reinterpret_cast<Kernel>(block_max_address),
                                   .vocab = vocab,
                                   .row_stride = row_stride,
                                   .blocks_per_unit = blocks_per_unit});
             }),
             py::arg("threads") = py::none(), py::arg("block_sums") = 0, py::arg("block_max") = 0,
             py::arg("vocab") = 0, py::arg("row_stride") = 0, py::arg("blocks_per_unit") = 0,
             "block_sums, block_max: addresses of the kernels, which then take rows of `vocab` logits "
             "`row_stride` "
             "floats "
             "apart and no others; 0 for none: sums in double, slowly.")
        .def("block_max", &block_max, py::arg("values"), py::arg("may_forbid") = false,
             "float32[rows, blocks]: the largest of each block of LOGITS_BLOCK logits, not finite where one "
             "of "
             "them is not. may_forbid: -inf is a logit like any other.")
        .def(
            "forbid", &forbid, py::arg("values"), py::arg("block_max"), py::arg("rows"), py::arg("masks"),
            "In place: of rows[i] only the tokens in masks[i] stay, the other logits become -inf, the maxima "
            "follow. "
            "masks: uint32[len(rows), ceil(vocab / 32)], bit i % 32 of word i // 32 for token i.")
        .def("sample", &sample, py::arg("values"), py::arg("block_max"), py::arg("rows"),
             py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("uniform"),
             "A token for each of `rows`; temperature 0 takes the largest. Runs without Python's lock.")
        .def("kept", &kept, py::arg("values"), py::arg("block_max"), py::arg("row"),
             py::arg("temperature") = 1.0, py::arg("top_k") = 0, py::arg("top_p") = 1.0,
             py::arg("min_p") = 0.0, "The tokens that pass the filters, ascending.")
        .def("score", &score, py::arg("values"), py::arg("block_max"), py::arg("rows"), py::arg("tokens"),
             py::arg("num_top"),
             "(log-probability, rank, [(likeliest token, log-probability)]) of a token after each of `rows`. "
             "Runs "
             "without Python's lock.");
}

}  // namespace nanoserve::bind
