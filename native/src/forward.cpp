#include "forward.hpp"

#include <cstring>

namespace ktv {
namespace {

// Tokens in the layout of few tokens.
void pack_few(const bf16* const* rows, int count, int k, int kblocks, bf16* pack) {
    for (int kb = 0; kb < kblocks; ++kb) {
        const std::size_t at = z(kb) * kBlock, have = std::min(z(k) - at, z(kBlock));
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

// A small activation as operands: token packs [group][rb], r_stride elements a group.
struct LoraFactor {
    Pair b;           // one row of weight blocks
    Pair activation;  // from the first group on
    std::size_t group_stride;
    int kblocks;
    bool side_by_side;  // activation.hi holds both
};

// nt segments of B (s A x)ᵀ: hi and lo of the small activation, and lo of an fp32 B. Returns how many.
int nt_lora_segments(const LoraFactor& lora, NtSegment* out) {
    int used = 0;
    out[used++] = {lora.b.hi, lora.activation.hi, lora.group_stride, lora.kblocks};
    if (!lora.side_by_side) out[used++] = {lora.b.hi, lora.activation.lo, lora.group_stride, lora.kblocks};
    if (lora.b.lo) out[used++] = {lora.b.lo, lora.activation.hi, lora.group_stride, lora.kblocks};
    return used;
}

}  // namespace

Costs Layer::State::forward_costs(const Routing& routing) const {
    Costs costs;
    double rows = 0;
    for (const Routing::Expert& e : routing.experts) rows += e.rows;
    const double H = config.hidden, I = config.intermediate, r = config.rank, T = routing.tokens,
                 experts = static_cast<double>(routing.experts.size()), element = sizeof(bf16),
                 lora = element * terms();
    costs.set(Phase::pack_input, 0, T * H * element);
    costs.set(Phase::gate_up_lora_a, 4 * rows * r * H, experts * 2 * r * H * lora);
    costs.set(Phase::gate_up, 4 * rows * I * (H + r), experts * 2 * I * (H * element + r * lora));
    costs.set(Phase::down_lora_a, 2 * rows * r * I, experts * r * I * lora);
    costs.set(Phase::down, 2 * rows * H * (I + r), experts * H * (I * element + r * lora));
    costs.set(Phase::merge, 2 * rows * H, T * H * element);
    return costs;
}

Layer::Ticket Layer::State::forward(const ForwardArguments& arguments) {
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    Team& team = shared.team(workers, config.parts);
    if (arguments.save && static_cast<int>(saved.size()) >= config.max_cache_depth)
        throw BadState("forward_sft(save_for_backward=True): " + std::to_string(saved.size()) +
                       " forwards already wait for their backward, and max_cache_depth is " +
                       std::to_string(config.max_cache_depth) + "; call backward first or raise max_cache_depth");
    if (arguments.given_up == source_name && source_name > 0)
        given_up = gate.disposable = up.disposable = down.disposable = true;
    Recording recording_of(recording, workers, 4);
    Watch caller = recording_of.watch(0);
    Saved kept;
    kept.lora = lora;
    kept.routing = route(arguments.ids, arguments.weights, arguments.rows, config.top_k, config.num_experts);
    kept.parts.resize(z(config.parts));
    caller.lap(Phase::routing);
    Forward(*this, kept, arguments, caller).run(shared, team, recording_of);
    if (recording_of.on()) recorded = recording_of.finish(false, arguments.rows, forward_costs(kept.routing));
    if (!arguments.save) return 0;
    kept.ticket = ++last_ticket;
    saved.push_back(std::move(kept));
    note_saved();
    return last_ticket;
}

Forward::Forward(Layer::State& layer, Saved& kept, const ForwardArguments& arguments, Watch caller)
    : layer_(layer),
      config_(layer.config),
      size_(layer.size),
      kernels_(layer.kernels),
      kept_(kept),
      routing_(kept.routing),
      lora_(*kept.lora),
      strides_(layer.lora_strides()),
      given_(arguments),
      caller_(caller),
      keep_lora_(arguments.save && config_.lora_backward),
      groups_(routing_.rows / kGroup),
      active_(static_cast<int>(routing_.experts.size())),
      T_(z(arguments.rows)),
      x_stride_(z(size_.hb) * kPackSize),
      h_stride_(z(size_.ib) * kPackSize),
      r_stride_(z(size_.rb) * kPackSize),
      parts_(z(config_.parts)),
      turns_(config_.parts, size_.hb),
      parts_done_(z(size_.hb)) {}

void Forward::carve_work(Carver& carver) {
    const std::size_t G = z(groups_);
    for (Part& part : parts_) {
        carver.take(part.x_pack, G * x_stride_);
        take(carver, part.gate_xa, G * r_stride_);
        take(carver, part.up_xa, G * r_stride_);
        carver.take(part.h_pack, G * h_stride_);
        take(carver, part.ha, G * r_stride_);
        carver.take(part.sum, T_ * z(size_.hidden()));
    }
    carver.take(scratch_, z(layer_.workers) * kScratch);
    carver.take(part_sums_, z(layer_.workers * config_.parts));
}

void Forward::carve_kept(Carver& carver) {
    const std::size_t R = z(routing_.rows), K = z(routing_.k_rows);
    carver.take(kept_.x, (T_ + 1) * z(size_.hidden_ld()));
    take(carver, kept_.xa_t, K * 2 * z(size_.rank_rows()));
    for (Saved::Part& part : kept_.parts) {
        carver.take(part.g, R * z(size_.inter_ld()));
        carver.take(part.u, R * z(size_.inter_ld()));
        take(carver, part.ha_t, K * z(size_.rank_rows()));
    }
}

void Forward::run(Process& shared, Team& team, Recording& recording) {
    const std::string tokens = std::to_string(given_.rows) + " tokens";
    Carver measure_work;
    carve_work(measure_work);
    Block work = shared.cache.take(measure_work.used(), "a forward of " + tokens);
    Carver cut_work(work.data());
    carve_work(cut_work);
    if (given_.save) {
        Carver measure_kept;
        carve_kept(measure_kept);
        kept_.block = shared.cache.take(measure_kept.used(), "saving a forward of " + tokens);
        Carver cut_kept(kept_.block.data());
        carve_kept(cut_kept);
    }
    caller_.lap(Phase::allocation);
    pack_new_experts(shared, team);

    const int parts = config_.parts, copies = given_.save ? groups_of(given_.rows + 1) : 0;
    TaskQueue copying(1, team, copies), packing(parts, team, groups_), upping(parts, team, active_, size_.ib),
        ranking(parts, team, groups_), downing(parts, team, active_, size_.hb);
    const std::function<void(int)> body = [&](int worker) {
        Hand hand{worker, scratch_ + z(worker) * kScratch, recording.watch(worker)};
        const auto stage_ends = [&] {
            hand.watch.tasks_done();
            team.barrier();
            hand.watch.stage_done();
        };
        kernels_.enter();
        packing.work(worker, [&](const Task& task) { pack(hand, task.part, task.row); });
        copying.work(worker, [&](const Task& task) { keep_rows(hand, task.row); });
        stage_ends();
        upping.work(worker, [&](const Task& task) { up(hand, task); });
        stage_ends();
        ranking.work(worker, [&](const Task& task) { rank(hand, task.part, task.row); });
        stage_ends();
        downing.work(worker, [&](const Task& task) { down(hand, task); });
        kernels_.leave();
        hand.watch.tasks_done();
        hand.watch.stage_done();
    };
    caller_.lap(Phase::allocation);
    team.run(body);
    if (active_ == 0 && T_ > 0) std::memset(given_.output, 0, T_ * z(size_.H) * sizeof(bf16));
    shared.cache.give(std::move(work));
}

void Forward::pack_new_experts(Process& shared, Team& team) {
    std::vector<int> wanted;
    for (const Routing::Expert& e : routing_.experts) {
        if (!layer_.experts[0][z(e.expert)].block) wanted.push_back(e.expert);
    }
    if (wanted.empty()) return;
    const std::size_t made = z(config_.parts) * Block::footprint(layer_.expert_bytes());
    // Memory that is given up pays for the experts after the first, but for their padding.
    const std::size_t given = layer_.given_up ? std::min(made, layer_.source_bytes()) : 0;
    const std::size_t need = made + (wanted.size() - 1) * (made - given);
    if (need > available_memory()) shared.release();
    require_memory(need, "packing the weights of " + std::to_string(wanted.size()) + " experts");
    layer_.pack_experts(team, wanted);
    caller_.lap(Phase::pack_weights);
}

// nt for `rows` tokens of an expert: c [32][ldc], or [rows][32] where they are few.
void Forward::multiply(const Routing::Expert& expert, const NtSegment* segments, int used, int rows, float* c,
                       std::size_t ldc) const {
    if (is_few(expert)) return kernels_.nt_few(segments, used, rows, c);
    kernels_.nt(segments, used, rows, c, ldc);
}

// 32 rows of a LoRA A, from element `at` of its pack on, times `rows` tokens of one group.
void Forward::multiply_a(const Routing::Expert& expert, int rows, const Pair& a, std::size_t at, const bf16* tokens,
                         std::size_t stride, int kblocks, float* c) const {
    NtSegment segments[2];
    for (int term = 0; term < layer_.terms(); ++term)
        segments[term] = {(term == 0 ? a.hi : a.lo) + at, tokens, stride, kblocks};
    multiply(expert, segments, layer_.terms(), rows, c, kGroup);
}

// Element n of token t of a small activation into its group's pack, which begins at `from`.
void Forward::put_packed(const Pair& to, std::size_t from, int n, int t, Order order, float value) const {
    const Split s = split(value);
    to.hi[from + order.in_pack(n, t)] = s.hi;
    if (size_.side_by_side()) {
        to.hi[from + order.in_pack(n + kBlock / 2, t)] = s.lo;
    } else {
        to.lo[from + order.in_pack(n, t)] = s.lo;
    }
}

// A group's columns of the first `rows` rows of an operand whose reduction index is the token.
void Forward::clear_kept(const Pair& to, std::size_t at, int rows, const Routing::Columns& columns) const {
    for (int row = 0; row < rows; ++row) clear(to, at + z(row) * columns.ld + columns.first, columns.width);
}

// 16 of the rows of x that backward wants, with room for whole blocks; a zero row follows the last.
void Forward::keep_rows(Hand& hand, int first_group) {
    const int first = first_group * kGroup;
    for (int t = first; t < std::min(given_.rows + 1, first + kGroup); ++t) {
        bf16* row = kept_.x + z(t) * z(size_.hidden_ld());
        const std::size_t have = t < given_.rows ? z(size_.H) : 0;
        if (have) std::memcpy(row, given_.x + z(t) * have, have * sizeof(bf16));
        std::memset(row + have, 0, (z(size_.hidden()) - have) * sizeof(bf16));
    }
    hand.watch.lap(Phase::pack_input);
}

void Forward::pack(Hand& hand, int p, int group) {
    Part& part = parts_[z(p)];
    const Routing::Expert& expert = routing_.expert_at(group);
    const Order order = order_of(expert);
    const bf16* token[kGroup];
    for (int t = 0; t < kGroup; ++t) {
        const int id = routing_.token[z(group * kGroup + t)];
        token[t] = id < 0 ? nullptr : given_.x + z(id) * z(size_.H);
    }
    bf16* packed_x = part.x_pack + z(group) * x_stride_;
    if (order.few > 0) {
        pack_few(token, order.few, size_.H, size_.hb, packed_x);
    } else {
        kernels_.pack_tokens(token, size_.H, size_.hb, packed_x);
    }
    hand.watch.lap(Phase::pack_input);

    const bool keep = keep_lora_ && p == 0;  // the same for every part
    const Routing::Columns to = routing_.columns(group);
    const std::size_t kept_at = z(expert.first_k) * 2 * z(size_.rank_rows()), pack_at = z(group) * r_stride_;
    clear(part.gate_xa, pack_at, r_stride_);
    clear(part.up_xa, pack_at, r_stride_);
    if (keep) clear_kept(kept_.xa_t, kept_at, 2 * size_.rank_rows(), to);
    for (int nb = 0; nb < size_.ab; ++nb) {
        multiply_a(expert, to.rows, lora_.gate_up_a,
                   z(expert.expert) * strides_.gate_up_a + z(nb) * layer_.panel(size_.hb), packed_x, x_stride_,
                   size_.hb, hand.c);
        for (int j = 0; j < kBlock && nb * kBlock + j < 2 * size_.r; ++j) {
            const bool is_up = nb * kBlock + j >= size_.r;
            const int n = nb * kBlock + j - (is_up ? size_.r : 0);
            const Pair& pack_to = is_up ? part.up_xa : part.gate_xa;
            const std::size_t kept_row = kept_at + z(is_up ? size_.rank_rows() + n : n) * to.ld + to.first;
            for (int t = 0; t < to.rows; ++t) {
                const float value = config_.scaling * hand.c[order.in_result(j, t)];
                put_packed(pack_to, pack_at, n, t, order, value);
                if (keep) put(kept_.xa_t, kept_row + z(t), value);
            }
        }
    }
    hand.watch.lap(Phase::gate_up_lora_a);
}

// The rows of W, `stride` apart, that the next task begins with, or null.
const bf16* Forward::next_weights(const Task& task, bf16* PackedExpert::* matrix, std::size_t stride) const {
    if (task.next_row < 0) return nullptr;
    const Routing::Expert& expert = routing_.experts[z(task.next_row)];
    return layer_.experts[z(task.part)][z(expert.expert)].*matrix + z(task.next_column) * stride;
}

void Forward::up(Hand& hand, const Task& task) {
    const int p = task.part, ib = task.column;
    Part& part = parts_[z(p)];
    Saved::Part& kept = kept_.parts[z(p)];
    const Routing::Expert& expert = routing_.experts[z(task.row)];
    const PackedExpert& base = layer_.experts[z(p)][z(expert.expert)];
    const std::size_t b_at = z(expert.expert) * strides_.gate_b + z(ib) * layer_.panel(size_.rb),
                      w_at = z(ib) * layer_.gate_up_stride();
    for (RowChunk chunk(expert, 0); chunk.rows > 0; chunk = RowChunk(expert, chunk.first + chunk.rows)) {
        const int rows = chunk.rows;
        const std::size_t group = z((expert.first_row + chunk.first) / kGroup), ldc = z(chunk.groups) * kGroup;
        const auto product = [&](const bf16* w, const Pair& b, const Pair& xa, float* c, const bf16* next) {
            NtSegment segments[4];
            segments[0] = {w + w_at, part.x_pack + group * x_stride_, x_stride_, size_.hb, next};
            const int more = nt_lora_segments(
                {at(b, b_at), at(xa, group * r_stride_), r_stride_, size_.rb, size_.side_by_side()}, segments + 1);
            multiply(expert, segments, 1 + more, rows, c, ldc);
        };
        float* g = hand.c;
        float* u = hand.c + kBlock * ldc;
        product(base.gate, lora_.gate_b[z(p)], part.gate_xa, g, base.up + w_at);
        product(base.up, lora_.up_b[z(p)], part.up_xa, u,
                chunk.last ? next_weights(task, &PackedExpert::gate, layer_.gate_up_stride()) : base.gate + w_at);
        hand.watch.lap(Phase::gate_up);
        const std::size_t keep_at = group * kGroup * z(size_.inter_ld()) + z(ib) * kBlock;
        const Order order = order_of(expert);
        bf16* h = part.h_pack + group * h_stride_ + z(ib) * order.k_block();
        float* keep_g = given_.save ? kept.g + keep_at : nullptr;
        float* keep_u = given_.save ? kept.u + keep_at : nullptr;
        if (order.few > 0) {
            kernels_.silu_mul_few(g, u, rows, h, keep_g, keep_u, z(size_.inter_ld()));
        } else {
            kernels_.silu_mul(g, u, ldc, chunk.groups, h, h_stride_, keep_g, keep_u, z(size_.inter_ld()));
        }
        hand.watch.lap(Phase::activation);
    }
}

void Forward::rank(Hand& hand, int p, int group) {
    Part& part = parts_[z(p)];
    const Routing::Expert& expert = routing_.expert_at(group);
    const Pair& kept_to = kept_.parts[z(p)].ha_t;
    const Routing::Columns to = routing_.columns(group);
    const std::size_t kept_at = z(expert.first_k) * z(size_.rank_rows()), pack_at = z(group) * r_stride_;
    const float* weight = routing_.weight.data() + z(group) * kGroup;
    const Order order = order_of(expert);
    clear(part.ha, pack_at, r_stride_);
    if (keep_lora_) clear_kept(kept_to, kept_at, size_.rank_rows(), to);
    for (int nb = 0; nb < size_.rb; ++nb) {
        multiply_a(expert, to.rows, lora_.down_a[z(p)],
                   z(expert.expert) * strides_.down_a + z(nb) * layer_.panel(size_.ib),
                   part.h_pack + z(group) * h_stride_, h_stride_, size_.ib, hand.c);
        for (int j = 0; j < kBlock && nb * kBlock + j < size_.r; ++j) {
            const int n = nb * kBlock + j;
            for (int t = 0; t < to.rows; ++t) {
                const float value = config_.scaling * hand.c[order.in_result(j, t)];
                put_packed(part.ha, pack_at, n, t, order, value);
                if (keep_lora_) put(kept_to, kept_at + z(n) * to.ld + to.first + z(t), weight[t] * value);
            }
        }
    }
    hand.watch.lap(Phase::down_lora_a);
}

void Forward::down(Hand& hand, const Task& task) {
    const int p = task.part, ticket = task.row, hb = task.column;
    Part& part = parts_[z(p)];
    const Routing::Expert& expert = routing_.experts[z(ticket)];
    const bf16* base = layer_.experts[z(p)][z(expert.expert)].down + z(hb) * layer_.panel(size_.ib);
    const Pair b = at(lora_.down_b, z(expert.expert) * strides_.down_b + z(hb) * layer_.panel(size_.rb));
    float* sum = part.sum + z(hb) * T_ * kBlock;
    for (RowChunk chunk(expert, 0); chunk.rows > 0; chunk = RowChunk(expert, chunk.first + chunk.rows)) {
        const int rows = chunk.rows;
        const std::size_t row = z(expert.first_row + chunk.first), group = row / kGroup, ldc = z(chunk.groups) * kGroup;
        NtSegment segments[4];
        segments[0] = {base, part.h_pack + group * h_stride_, h_stride_, size_.ib,
                       chunk.last ? next_weights(task, &PackedExpert::down, layer_.panel(size_.ib)) : base};
        const int more = nt_lora_segments(
            {b, at(part.ha, group * r_stride_), r_stride_, size_.rb, size_.side_by_side()}, segments + 1);
        // Other columns' sums and weights have driven this column's out of the near caches; the product hides the way
        // back. With the first expert there are none yet.
        for (int i = 0; ticket > 0 && i < rows; ++i) {
            const float* to = sum + z(routing_.token[row + z(i)]) * kBlock;
            __builtin_prefetch(to, 0, 2);
            __builtin_prefetch(to + kBlock / 2, 0, 2);
        }
        multiply(expert, segments, 1 + more, rows, hand.c, ldc);
        hand.watch.lap(Phase::down);
        if (chunk.first == 0) {
            turns_.wait(task);
            hand.watch.lap(Phase::wait);
            if (ticket == 0) std::memset(sum, 0, T_ * kBlock * sizeof(float));
        }
        const std::int32_t* token = routing_.token.data() + row;
        const float* weight = routing_.weight.data() + row;
        if (is_few(expert)) {
            kernels_.add_rows(hand.c, kBlock, rows, kBlock, token, weight, sum, kBlock);
        } else {
            kernels_.add_transposed(hand.c, ldc, rows, token, weight, sum, kBlock);
        }
    }
    turns_.pass(task);
    if (ticket == active_ - 1 && parts_done_[z(hb)].fetch_add(1, std::memory_order_acq_rel) == config_.parts - 1)
        finish(hand.worker, hb);
    hand.watch.lap(Phase::merge);
}

// The sum over the parts of 32 columns of the output, rounded.
void Forward::finish(int worker, int hb) {
    const float** sums = part_sums_ + z(worker * config_.parts);
    const std::size_t cols = z(std::min(kBlock, size_.H - hb * kBlock));
    for (std::size_t t = 0; t < T_; ++t) {
        for (std::size_t p = 0; p < parts_.size(); ++p) sums[p] = parts_[p].sum + (z(hb) * T_ + t) * kBlock;
        kernels_.round_sum(sums, config_.parts, cols, given_.output + t * z(size_.H) + z(hb) * kBlock);
    }
}

}  // namespace ktv
