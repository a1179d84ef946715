#include "forward.hpp"

#include <cstring>

namespace ktv {
namespace {

// Tokens in the layout of few tokens.
void pack_few(const bf16* const* rows, int count, int k, int kblocks, bf16* pack) {
    for (int kb = 0; kb < kblocks; ++kb) {
        const int at = kb * kBlock, have = std::min(k - at, kBlock);
        for (int t = 0; t < count; ++t, pack += kBlock) {
            std::memcpy(pack, rows[t] + at, have * sizeof(bf16));
            std::memset(pack + have, 0, (kBlock - have) * sizeof(bf16));
        }
    }
}

void clear(const Pair& to, std::size_t at, std::size_t count) {
    std::memset(to.hi + at, 0, count * sizeof(bf16));
    std::memset(to.lo + at, 0, count * sizeof(bf16));
}

}  // namespace

Costs Layer::State::forward_costs(const Routing& routing) const {
    Costs costs;
    double rows = 0;
    for (const Routing::Expert& e : routing.experts) rows += e.rows;
    const double H = config.hidden, I = config.intermediate, r = config.rank, T = routing.tokens,
                 experts = static_cast<double>(routing.experts.size()), element = sizeof(bf16),
                 lora = element * terms(), weight = weight_bytes();
    costs.set(Phase::pack_input, 0, T * H * element);
    costs.set(Phase::gate_up_lora_a, 4 * rows * r * H, experts * 2 * r * H * lora);
    costs.set(Phase::gate_up, 4 * rows * I * (H + r), experts * 2 * I * (H * weight + r * lora));
    costs.set(Phase::down_lora_a, 2 * rows * r * I, experts * r * I * lora);
    costs.set(Phase::down, 2 * rows * H * (I + r), experts * H * (I * weight + r * lora));
    costs.set(Phase::merge, 2 * rows * H, T * H * element);
    return costs;
}

Ticket Layer::State::forward(const ForwardArguments& given, const std::vector<std::int64_t>& ids) {
    ForwardArguments arguments = given;
    std::shared_ptr<const void> finished;  // dropped after the lock
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    Team& team = this->team();
    if (arguments.room > 0) {
        arguments.save = arguments.save && static_cast<int>(saved.size()) < arguments.room;
    } else if (arguments.save && static_cast<int>(saved.size()) >= config.max_cache_depth) {
        throw BadState("forward_sft(save_for_backward=True): " + std::to_string(saved.size()) +
                       " forwards already wait for their backward, and max_cache_depth is " +
                       std::to_string(config.max_cache_depth) + "; call backward first or raise max_cache_depth");
    }
    if (arguments.given_up == source_name && source_name > 0)
        given_up = gate.disposable = up.disposable = down.disposable = true;
    Recording recording_of(recording, workers, 4);
    Watch caller = recording_of.watch(0);
    Saved kept;
    kept.lora = lora;
    kept.routing = route(ids, arguments.weights, arguments.rows, config.top_k, config.num_experts);
    kept.parts.resize(config.parts);
    caller.lap(Phase::routing);
    Forward(*this, kept, arguments, caller).run(shared, team, recording_of);
    if (packed == config.num_experts) finished.swap(owner);
    if (recording_of.on()) recorded = recording_of.finish(false, arguments.rows, forward_costs(kept.routing));
    if (!arguments.save) return 0;
    kept.ticket = ++last_ticket;
    kept.thread = this_thread();
    saved.push_back(std::move(kept));
    note_saved();
    return last_ticket;
}

void Forward::carve_work(int p, Carver& carver) {
    Part& part = parts_[p];
    carver.take(part.x_pack, groups_ * x_stride_);
    take(carver, part.gate_xa, groups_ * r_stride_);
    take(carver, part.up_xa, groups_ * r_stride_);
    carver.take(part.h_pack, groups_ * h_stride_);
    take(carver, part.ha, groups_ * r_stride_);
    carver.take(part.scratch, layer_.workers_of(p) * scratch_size_);
    sums_.carve(p, carver, layer_.workers);
}

void Forward::carve_kept(int p, Carver& carver) {
    const std::size_t R = routing_.rows, K = routing_.k_rows;
    if (p == 0) {
        carver.take(kept_.x, (T_ + 1) * size_.hidden_ld());
        take(carver, kept_.xa_t, K * 2 * size_.rank_rows());
    }
    Saved::Part& part = kept_.parts[p];
    carver.take(part.g, R * size_.inter_ld());
    carver.take(part.u, R * size_.inter_ld());
    take(carver, part.ha_t, K * size_.rank_rows());
}

void Forward::run(Process& shared, Team& team, Recording& recording) {
    const std::vector<int> wanted = new_experts();
    Need need = layer_.packing_need(wanted.size());
    need.touched += T_ * size_.H * sizeof(bf16);  // the output
    std::string what = (call_.save ? "a saved forward of " : "a forward of ") + std::to_string(call_.rows) + " tokens";
    if (!wanted.empty()) what += " that packs " + std::to_string(wanted.size()) + " experts";
    std::vector<BlockCache::Size> sizes = work_sizes();
    if (call_.save) std::ranges::copy(kept_sizes(), std::back_inserter(sizes));
    std::vector<Block> blocks = shared.cache.take(sizes, need, what);
    layer_.cut_parts(blocks, [this](int p, Carver& carver) { carve_work(p, carver); });
    if (call_.save) {
        std::move(blocks.begin() + config_.parts, blocks.end(), std::back_inserter(kept_.blocks));
        blocks.resize(config_.parts);
        layer_.cut_parts(kept_.blocks, [this](int p, Carver& carver) { carve_kept(p, carver); });
    }
    caller_.lap(Phase::allocation);
    layer_.pack_experts(team, wanted);
    if (!wanted.empty()) caller_.lap(Phase::pack_weights);

    const int parts = config_.parts, copies = call_.save ? groups_of(call_.rows + 1) : 0;
    TaskQueue copying(1, team, copies), packing(parts, team, kblocks_),
        upping(parts, team, active_, (size_.ib + up_strips_ - 1) / up_strips_), ranking(parts, team, kblocks_),
        downing(parts, team, active_, (size_.hb + down_strips_ - 1) / down_strips_);
    caller_.lap(Phase::allocation);
    team.run([&](int index) {
        const Part& part = parts_[index % parts];
        const int place = index / parts;
        Worker worker{index, part.scratch + place * scratch_size_, recording.watch(index)};
        kernels_.enter();
        packing.work(index, [&](const Task& task) { pack(worker, task.part, routing_.kblock(task.row)); });
        copying.work(index, [&](const Task& task) { keep_rows(worker, task.row); });
        end_stage(worker.watch, team);
        upping.work(index, [&](const Task& task) { up(worker, task); });
        end_stage(worker.watch, team);
        ranking.work(index, [&](const Task& task) { rank(worker, task.part, routing_.kblock(task.row)); });
        end_stage(worker.watch, team);
        downing.work(index, [&](const Task& task) { down(worker, task); });
        kernels_.leave();
        worker.watch.tasks_done();
        worker.watch.stage_done();
    });
    if (active_ == 0 && T_ > 0) std::memset(call_.output, 0, T_ * size_.H * sizeof(bf16));
    shared.cache.give(std::move(blocks));
}

// The experts of this call that are not packed yet.
std::vector<int> Forward::new_experts() const {
    std::vector<int> wanted;
    for (const Routing::Expert& e : routing_.experts) {
        if (!layer_.experts[0][e.expert].is_packed()) wanted.push_back(e.expert);
    }
    return wanted;
}

// The first `columns` rows of a LoRA A, whose pack starts at `a`, times the tokens of a k-block; store(n, t, value) gets
// each element, scaled.
template <typename Store>
void Forward::multiply_a(Worker& worker, const Routing::KBlock& block, const Pair& a, int columns, const bf16* tokens,
                         std::size_t stride, int kblocks, const Store& store) const {
    const Order order = order_of(block.expert);
    const int terms = layer_.terms();
    constexpr int most = 2;  // strips of a call
    for (int first = 0; first < columns; first += most * kBlock) {
        NtSegment segments[most * 2];
        const int strips = std::min(most, blocks_of(columns - first));
        for (int i = 0; i < strips * terms; ++i)
            segments[i] = {(i % terms == 0 ? a.hi : a.lo) + (first / kBlock + i / terms) * layer_.panel(kblocks),
                           tokens, stride, kblocks};
        multiply(block.expert, segments, terms, strips, block.rows, worker.c);
        for (int j = 0; j < strips * kBlock && first + j < columns; ++j) {
            for (int t = 0; t < block.rows; ++t)
                store(first + j, t, config_.scaling * worker.c[order.in_result(j, t, block.groups)]);
        }
    }
}

// Stores element n of token t of a small activation into its pack; that of the first token's group starts at `from`.
void Forward::put_packed(const Pair& to, std::size_t from, int n, int t, Order order, float value) const {
    const Split s = split(value);
    to.hi[from + order.in_pack(n, t, r_stride_)] = s.hi;
    if (size_.side_by_side()) {
        to.hi[from + order.in_pack(n + kBlock / 2, t, r_stride_)] = s.lo;
    } else {
        to.lo[from + order.in_pack(n, t, r_stride_)] = s.lo;
    }
}

// Clears a k-block of the first `rows` rows of an operand whose reduction index is the token.
void Forward::clear_kept(const Pair& to, std::size_t at, int rows, const Routing::KBlock& block) const {
    for (int row = 0; row < rows; ++row) clear(to, at + row * block.ld + block.first, kBlock);
}

// Copies 16 of the rows of x for backward, padded to whole blocks; a zero row follows the last.
void Forward::keep_rows(Worker& worker, int first_group) {
    const int first = first_group * kGroup;
    for (int t = first; t < std::min(call_.rows + 1, first + kGroup); ++t) {
        bf16* row = kept_.x + wide(t) * size_.hidden_ld();
        const std::size_t have = t < call_.rows ? size_.H : 0;
        if (have) std::memcpy(row, call_.x + t * have, have * sizeof(bf16));
        std::memset(row + have, 0, (size_.hidden() - have) * sizeof(bf16));
    }
    worker.watch.lap(Phase::pack_input);
}

void Forward::pack(Worker& worker, int p, const Routing::KBlock& block) {
    Part& part = parts_[p];
    const Order order = order_of(block.expert);
    bf16* packed_x = part.x_pack + block.group * x_stride_;
    for (int group = 0; group < block.groups; ++group) {
        const bf16* token[kGroup];
        for (int t = 0; t < kGroup; ++t) {
            const int id = routing_.token[block.row + group * kGroup + t];
            token[t] = id < 0 ? nullptr : call_.x + wide(id) * size_.H;
        }
        if (order.few > 0) {
            pack_few(token, order.few, size_.H, size_.hb, packed_x);
        } else {
            kernels_.pack_tokens(token, size_.H, size_.hb, packed_x + group * x_stride_);
        }
    }
    worker.watch.lap(Phase::pack_input);

    const bool keep = keep_lora_ && p == 0;  // the same for every part
    const int expert = block.expert.expert, rank_rows = size_.rank_rows();
    const std::size_t kept_at = wide(block.expert.first_k) * 2 * rank_rows, pack_at = block.group * r_stride_;
    clear(part.gate_xa, pack_at, block.groups * r_stride_);
    clear(part.up_xa, pack_at, block.groups * r_stride_);
    if (keep) clear_kept(kept_.xa_t, kept_at, 2 * rank_rows, block);
    multiply_a(worker, block, at(lora_.gate_up_a, expert * strides_.gate_up_a), 2 * size_.r, packed_x, x_stride_,
               size_.hb, [&](int row, int t, float value) {
                   const bool is_up = row >= size_.r;
                   const int n = is_up ? row - size_.r : row, kept_row = is_up ? rank_rows + n : n;
                   put_packed(is_up ? part.up_xa : part.gate_xa, pack_at, n, t, order, value);
                   if (keep) put(kept_.xa_t, kept_at + kept_row * block.ld + block.first + t, value);
               });
    worker.watch.lap(Phase::gate_up_lora_a);
}

void Forward::rank(Worker& worker, int p, const Routing::KBlock& block) {
    Part& part = parts_[p];
    const Pair& kept_to = kept_.parts[p].ha_t;
    const std::size_t kept_at = wide(block.expert.first_k) * size_.rank_rows(), pack_at = block.group * r_stride_;
    const float* weight = routing_.weight.data() + block.row;
    const Order order = order_of(block.expert);
    clear(part.ha, pack_at, block.groups * r_stride_);
    if (keep_lora_) clear_kept(kept_to, kept_at, size_.rank_rows(), block);
    multiply_a(worker, block, at(lora_.down_a[p], block.expert.expert * strides_.down_a), size_.r,
               part.h_pack + block.group * h_stride_, h_stride_, size_.ib, [&](int n, int t, float value) {
                   put_packed(part.ha, pack_at, n, t, order, value);
                   if (keep_lora_) put(kept_to, kept_at + n * block.ld + block.first + t, weight[t] * value);
               });
    worker.watch.lap(Phase::down_lora_a);
}

}  // namespace ktv
