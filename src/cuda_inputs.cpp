#include "cuda_inputs.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "attention_work.h"
#include "checked.h"

namespace nanoserve::cuda {

namespace {

constexpr std::int64_t kAlignment = 256;  // of every array in the block of inputs
template <typename T>
std::int64_t bytes_of(std::int64_t count) {
    return round_up(checked_product("a step's inputs", {{"count", count}, {"bytes", sizeof(T)}}), kAlignment);
}

Limits checked(const Limits& limits) {
    require_at_least("max_sequences", limits.max_sequences, 1);
    require_at_least("max_tokens", limits.max_tokens, limits.max_sequences);
    require_at_least("max_pieces", limits.max_pieces, limits.max_sequences);
    require_range("max_samples", limits.max_samples, limits.max_sequences, limits.max_tokens);
    require_at_least("chunk_rows", limits.chunk_rows, 1);
    require_at_least("segment", limits.segment, 1);
    require_at_least("vocab", limits.vocab, 1);
    require_at_least("logits_stride", limits.logits_stride, limits.vocab);
    require_at_least("num_blocks", limits.num_blocks, 1);
    return limits;
}

}  // namespace

InputLayout::InputLayout(const Limits& limits, std::int64_t page_size)
    : positions_(bytes_of<std::int32_t>(checked(limits).max_tokens)),
      slots_(positions_ + bytes_of<std::int32_t>(limits.max_tokens)),
      sources_(slots_ + bytes_of<std::int32_t>(limits.max_tokens)),
      sample_rows_(sources_ + bytes_of<std::int32_t>(limits.max_tokens)),
      draws_(sample_rows_ + bytes_of<std::int32_t>(limits.max_samples)),
      draw_ints_(draws_ + bytes_of<float>(kDrawFields * limits.max_samples)),
      decodes_(draw_ints_ + bytes_of<std::int32_t>(kDrawFields * limits.max_samples)),
      pieces_(decodes_ + bytes_of<Decode>(limits.max_sequences)),
      chunks_(pieces_ + bytes_of<Piece>(limits.max_pieces)),
      max_chunks_(limits.max_tokens / limits.chunk_rows + limits.max_sequences),
      table_(chunks_ + bytes_of<AttentionSpan>(max_chunks_)),
      // As append_block_table pads it.
      max_table_(checked_product(
          "the block table",
          {{"max_sequences", limits.max_sequences},
           {"pages",
            ceil_div((ceil_div(limits.max_positions, kBlockTokens) + 1) * kBlockTokens, page_size) + 1}})),
      num_bytes_(table_ + bytes_of<std::int32_t>(max_table_)) {}

Inputs::Inputs(const std::shared_ptr<const Device>& device, const Limits& limits, std::int64_t page_size,
               std::vector<std::int64_t> buckets)
    : InputLayout(limits, page_size),
      limits_(limits),
      buckets_(std::move(buckets)),
      hosts_{PinnedBlock(device, "a step's inputs", num_bytes()),
             PinnedBlock(device, "a step's inputs", num_bytes())},
      block_(device, "a step's inputs", num_bytes()) {
    if (!std::is_sorted(buckets_.begin(), buckets_.end()) ||
        (!buckets_.empty() && (buckets_.front() < 1 || buckets_.back() > limits_.max_sequences))) {
        throw std::invalid_argument("buckets must ascend from 1 to at most max_sequences=" +
                                    std::to_string(limits_.max_sequences));
    }
}

std::int64_t Inputs::segments_of(const SequenceSpan& sequence) const {
    return ceil_div(sequence.start + sequence.count, limits_.segment);
}

std::vector<bool> Inputs::choose_pieces(const StepBatch& batch) const {
    const auto& sequences = batch.sequences();
    std::vector<bool> chosen(sequences.size());
    std::int64_t room = limits_.max_pieces;
    for (std::size_t number = 0; number < sequences.size(); ++number) {
        chosen[number] = sequences[number].count == 1;
        room -= chosen[number] ? segments_of(sequences[number]) : 0;
    }
    if (room >= 0) {
        return chosen;
    }
    // The longest gain most by being shared out.
    std::vector<std::size_t> order(sequences.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order, std::greater{},
                             [&](std::size_t number) { return segments_of(sequences[number]); });
    room = limits_.max_pieces;
    for (const std::size_t number : order) {
        const std::int64_t segments = segments_of(sequences[number]);
        chosen[number] = chosen[number] && segments <= room;
        room -= chosen[number] ? segments : 0;
    }
    return chosen;
}

void Inputs::stage_attention(const StepBatch& batch, Sizes& sizes) {
    const auto decodes = at_offset<Decode>(decodes_, at(limits_.max_sequences));
    const auto pieces = at_offset<Piece>(pieces_, at(limits_.max_pieces));
    const auto chunks = at_offset<AttentionSpan>(chunks_, at(max_chunks_));
    const std::vector<bool> has_pieces = choose_pieces(batch);
    for (std::size_t number = 0; number < batch.sequences().size(); ++number) {
        const SequenceSpan& sequence = batch.sequences()[number];
        if (has_pieces[number]) {
            const auto row = static_cast<std::int32_t>(sequence.first_row);
            decodes[at(sizes.decodes++)] = {.row = row,
                                            .keys = static_cast<std::int32_t>(sequence.start + 1),
                                            .first_piece = static_cast<std::int32_t>(sizes.pieces)};
            const std::int64_t segments = segments_of(sequence);
            for (std::int32_t segment = 0; segment < segments; ++segment) {
                pieces[at(sizes.pieces++)] = {.row = row,
                                              .segment = segment,
                                              .position = static_cast<std::int32_t>(sequence.start),
                                              .table_off = static_cast<std::int32_t>(sequence.table_off)};
            }
            continue;
        }
        for (std::int64_t done = 0; done < sequence.count; done += limits_.chunk_rows) {
            chunks[at(sizes.chunks++)] = {
                .first_row = static_cast<std::int32_t>(sequence.first_row + done),
                .count = static_cast<std::int32_t>(std::min(limits_.chunk_rows, sequence.count - done)),
                .start = static_cast<std::int32_t>(sequence.start + done),
                .table_off = static_cast<std::int32_t>(sequence.table_off)};
        }
    }
    // What takes longest begins first.
    std::ranges::sort(chunks.first(at(sizes.chunks)), std::greater{}, &AttentionSpan::start);
}

std::int64_t Inputs::pad_attention(Sizes& sizes) {
    if (sizes.chunks != 0 || sizes.samples != sizes.rows) {
        return 0;  // prompts, or decoding rows that nobody samples
    }
    const auto found = std::lower_bound(buckets_.begin(), buckets_.end(), sizes.rows);
    if (found == buckets_.end()) {
        return 0;
    }
    const auto decodes = at_offset<Decode>(decodes_, at(limits_.max_sequences));
    std::fill(decodes.begin() + sizes.decodes, decodes.begin() + *found, Decode{});
    const auto pieces = at_offset<Piece>(pieces_, at(limits_.max_pieces));
    const auto padded = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(sizes.pieces)));
    const std::int64_t filled = std::min(padded, limits_.max_pieces);
    std::fill(pieces.begin() + sizes.pieces, pieces.begin() + filled, Piece{});
    sizes.pieces = filled;
    return *found;
}

Staged Inputs::stage(const StepBatch& batch, const Choices& choices, std::size_t turn) {
    turn_ = turn;
    if (std::ssize(batch.table()) > max_table_) {
        throw std::invalid_argument("the block table of this step has " +
                                    std::to_string(batch.table().size()) + " entries, at most " +
                                    std::to_string(max_table_) + " fit");
    }
    Sizes sizes{
        .rows = batch.num_rows(), .samples = batch.num_samples(), .decodes = 0, .chunks = 0, .pieces = 0};
    stage_attention(batch, sizes);
    const std::int64_t bucket = pad_attention(sizes);
    const std::int64_t rows = std::max(sizes.rows, bucket);
    const std::int64_t samples = std::max(sizes.samples, bucket);
    put<std::int32_t>(0, batch.ids(), rows, 0);
    put<std::int32_t>(positions_, batch.positions(), rows, 0);
    put<std::int32_t>(slots_, batch.slots(), rows, -1);
    put<std::int32_t>(sources_, choices.sources, rows, -1);
    put<std::int32_t>(sample_rows_, batch.sample_rows(), samples, 0);
    put<float>(draws_, choices.draws, kDrawFields * samples, 0.0F);
    put<std::int32_t>(draw_ints_, choices.draw_ints, kDrawFields * samples, 0);
    put<std::int32_t>(table_, batch.table(), 0, 0);
    return {.sizes = sizes,
            .bucket = bucket,
            .used = table_ + static_cast<std::int64_t>(batch.table().size_bytes())};
}

void Inputs::copy(Stream& stream, const Staged& staged, std::size_t turn) const {
    stream.copy_in(block_.data(), hosts_[turn].data(), staged.used);
}

DevicePtr Inputs::address(Source array) const {
    const auto offset = [&] {
        switch (array) {
            case Source::ids:
                return std::int64_t{0};
            case Source::positions:
                return positions_;
            case Source::slots:
                return slots_;
            case Source::sources:
                return sources_;
            case Source::sample_rows:
                return sample_rows_;
            case Source::draws:
                return draws_;
            case Source::draw_ints:
                return draw_ints_;
            case Source::decodes:
                return decodes_;
            case Source::pieces:
                return pieces_;
            case Source::chunks:
                return chunks_;
            case Source::table:
                return table_;
            default:
                throw std::invalid_argument("not an array of a step's inputs");
        }
    };
    return block_.data() + static_cast<DevicePtr>(offset());
}

}  // namespace nanoserve::cuda
