#include "step/site.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace subnibble {

void multiply_hadamard(const StepFunctions& functions, const std::vector<HadamardRun>& runs, const float* x, float* y,
                       float* work) {
    for (const HadamardRun& run : runs) {
        const std::int64_t numbers = run.order * run.count;
        const float* from = x;
        std::int64_t inner = 1;
        for (std::size_t i = 0; i < run.factors.size(); ++i) {
            const HadamardRun::Factor& factor = run.factors[i];
            const bool last = i + 1 == run.factors.size();
            // The last factor writes to y; the others take turns.
            float* to = (run.factors.size() - 1 - i) % 2 == 0 ? y : work;
            const float scale = last ? 1.0f / std::sqrt(static_cast<float>(run.order)) : 1.0f;
            functions.factor(from, factor.matrix, factor.order, inner, numbers / (factor.order * inner), scale, to);
            from = to;
            inner *= factor.order;
        }
        if (run.factors.empty()) std::copy(x, x + numbers, y);
        x += numbers, y += numbers, work += numbers;
    }
}

Site::Site(const Kernel& kernel, const StepFunctions& functions, SiteSteps steps, std::vector<LinearTerms> readers)
    : kernel_(kernel), functions_(functions), steps_(std::move(steps)), readers_(std::move(readers)) {
    for (const LinearTerms& reader : readers_) {
        if (reader.dense != nullptr)
            has_dense_ = true;
        else
            has_packed_ = true;
        has_low_rank_ = has_low_rank_ || !reader.down.empty();
    }
}

const Operand& Site::Entered::of(const TiledRange& range) const {
    for (const auto& operand : operands)
        if (operand->start() == range.start && operand->suits(range.tiles)) return *operand;
    throw std::logic_error("an input was not prepared for a weight");
}

void Site::Entered::prepare(const std::vector<TiledRange>& ranges) {
    for (const TiledRange& range : ranges) {
        const bool known = std::any_of(operands.begin(), operands.end(), [&](const auto& operand) {
            return operand->start() == range.start && operand->suits(range.tiles);
        });
        if (!known)
            operands.push_back(
                std::make_unique<Operand>(*input, range.start, range.tiles.columns, range.tiles.group));
    }
}

void Site::Entered::begin(std::int64_t tokens) {
    input->resize(tokens);
    for (const auto& operand : operands) operand->attach(*input);
}

void Site::Entered::read(const Kernel& kernel, std::int64_t t) {
    for (const auto& operand : operands) operand->read(kernel, *input, t);
}

void Site::reserve(std::int64_t tokens, bool with_results) {
    results_.clear();
    y_.assign(readers_.size(), nullptr);
    low_rank_.clear();
    if (with_results)
        for (std::size_t i = 0; i < readers_.size(); ++i) {
            results_.push_back(aligned<float>(tokens * readers_[i].rows));
            y_[i] = results_.back().get();
        }
    if (has_dense_) plain_ = aligned<float>(tokens * steps_.width);
    if (!has_packed_) return;
    x_.input = std::make_unique<Input>(steps_.scheme, tokens, steps_.width);
    x_.operands.clear();
    if (steps_.requantized > 0) {
        rest_.input = std::make_unique<Input>(steps_.scheme, tokens, steps_.requantized);
        rest_.operands.clear();
    }
    for (const LinearTerms& reader : readers_) {
        x_.prepare(reader.main);
        x_.prepare(reader.salient);
        x_.prepare(reader.down);
        if (steps_.requantized > 0) rest_.prepare(reader.salient);
        LowRank& branch = low_rank_.emplace_back();
        if (reader.down.empty()) continue;
        const std::int64_t rank = reader.down.front().tiles.rows;
        branch.inner = aligned<float>(tokens * rank);
        branch.entered.input = std::make_unique<Input>(reader.inner, tokens, rank);
        branch.entered.prepare(reader.up);
    }
}

std::int64_t Site::panel_bytes() const {
    // As many tokens as need panels at all.
    constexpr std::int64_t kMany = 1 << 20;
    std::int64_t most = 0;
    for (const LinearTerms& reader : readers_)
        for (const auto* ranges : {&reader.main, &reader.salient, &reader.down, &reader.up})
            for (const TiledRange& range : *ranges) most = std::max(most, scratch_bytes(range.tiles, kMany));
    return most;
}

void Site::begin(std::int64_t tokens) {
    tokens_ = tokens;
    if (!has_packed_) return;
    x_.begin(tokens);
    if (steps_.requantized > 0) rest_.begin(tokens);
    for (LowRank& branch : low_rank_)
        if (branch.entered.input != nullptr) branch.entered.begin(tokens);
}

void Site::enter(std::int64_t t, const float* x, float* room) {
    const std::int64_t width = steps_.width;
    if (steps_.column_scale != nullptr) {
        for (std::int64_t i = 0; i < width; ++i) room[i] = x[i] * steps_.column_scale[i];
        x = room;
    }
    if (steps_.gather != nullptr) {
        float* to = x == room ? room + width : room;
        for (std::int64_t i = 0; i < width; ++i) to[i] = x[steps_.gather[i]];
        x = to;
    }
    if (!steps_.blocks.empty()) {
        float* to = x == room ? room + width : room;
        multiply_hadamard(functions_, steps_.blocks, x, to, room + 2 * width);
        x = to;
    }
    if (has_dense_) std::memcpy(plain_.get() + t * width, x, static_cast<std::size_t>(width) * 4);
    if (!has_packed_) return;
    x_.input->round(kernel_, t, x);
    x_.read(kernel_, t);
    if (steps_.requantized > 0) {
        rest_.input->round_rest(kernel_, *x_.input, t, x, room + 2 * width);
        rest_.read(kernel_, t);
    }
}

std::pair<std::int64_t, std::int64_t> Site::part_of(const Team& team, std::size_t reader) const {
    const std::int64_t rows = readers_[reader].rows;
    return team.share(rows, 2 * kTileRows);
}

void Site::multiply_ranges(const Entered& x, const std::vector<TiledRange>& ranges, float* y, std::int64_t y_stride,
                           std::int64_t first, std::int64_t last, bool add, Scratch& scratch) const {
    const std::int64_t from = first / kTileRows, to = (last + kTileRows - 1) / kTileRows;
    for (const TiledRange& range : ranges) {
        multiply_tiles(kernel_, range.tiles, x.of(range), y, y_stride, add, from, to, scratch.panels.get());
        add = true;
    }
}

void Site::multiply_part(std::size_t reader, std::int64_t first, std::int64_t last, Scratch& scratch) {
    const LinearTerms& terms = readers_[reader];
    float* y = y_[reader];
    if (terms.dense != nullptr) {
        functions_.dense(terms.dense, terms.dense_type, steps_.width, plain_.get(), steps_.width, tokens_, first, last,
                         y, terms.rows);
    } else {
        multiply_ranges(x_, terms.main, y, terms.rows, first, last, false, scratch);
        multiply_ranges(x_, terms.salient, y, terms.rows, first, last, true, scratch);
        if (steps_.requantized > 0) multiply_ranges(rest_, terms.salient, y, terms.rows, first, last, true, scratch);
        multiply_ranges(low_rank_[reader].entered, terms.up, y, terms.rows, first, last, true, scratch);
    }
    if (terms.bias == nullptr) return;
    for (std::int64_t t = 0; t < tokens_; ++t)
        functions_.add(y + t * terms.rows + first, terms.bias + first, last - first);
}

void Site::multiply_low_rank(const Team& team, Scratch& scratch) {
    if (!has_low_rank_) return;
    for (std::size_t i = 0; i < readers_.size(); ++i) {
        if (readers_[i].down.empty()) continue;
        const std::int64_t rank = readers_[i].down.front().tiles.rows;
        const auto [first, last] = team.share(rank, 2 * kTileRows);
        if (first < last)
            multiply_ranges(x_, readers_[i].down, low_rank_[i].inner.get(), rank, first, last, false, scratch);
    }
    team.meet();
    const auto [first, last] = team.share(tokens_);
    for (std::size_t i = 0; i < readers_.size(); ++i) {
        if (readers_[i].down.empty()) continue;
        const std::int64_t rank = readers_[i].down.front().tiles.rows;
        for (std::int64_t t = first; t < last; ++t) {
            low_rank_[i].entered.input->round(kernel_, t, low_rank_[i].inner.get() + t * rank);
            low_rank_[i].entered.read(kernel_, t);
        }
    }
    team.meet();
}

}  // namespace subnibble
