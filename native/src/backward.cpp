#include "backward.hpp"

#include <cstring>

namespace ktv {

std::vector<std::size_t> Layer::State::grad_sizes() const {
    const std::size_t E = config.num_experts, H = config.hidden, I = config.intermediate, r = config.rank;
    return {E * r * H, E * I * r, E * r * H, E * I * r, E * r * I, E * H * r};
}

Costs Layer::State::backward_costs(const Routing& routing) const {
    Costs costs;
    double rows = 0;
    for (const Routing::Expert& e : routing.experts) rows += e.rows;
    const double H = config.hidden, I = config.intermediate, r = config.lora_backward ? config.rank : 0,
                 T = routing.tokens, experts = static_cast<double>(routing.experts.size()), element = sizeof(bf16),
                 lora = element * terms(), weight = weight_bytes();
    costs.set(Phase::scatter, 0, T * H * element);
    costs.set(Phase::down_lora_b, 2 * rows * config.rank * H, experts * config.rank * H * lora);
    costs.set(Phase::down_grad, 2 * rows * I * (H + config.rank), experts * I * (H * weight + config.rank * lora));
    costs.set(Phase::activation_grad, 0, rows * I * 2 * sizeof(float));
    costs.set(Phase::gate_up_lora_b, 4 * rows * I * r, experts * 2 * I * r * lora);
    costs.set(Phase::gate_up_grad, 4 * rows * H * (I + r), experts * 2 * H * (I * weight + r * lora));
    costs.set(Phase::gate_up_lora_grad, 4 * rows * r * (H + I), experts * 2 * r * (H + I) * lora);
    costs.set(Phase::down_lora_grad, 2 * rows * r * (H + I), experts * r * (H + I) * lora);
    costs.set(Phase::merge, rows * H, T * H * element);
    return costs;
}

void Layer::State::backward(const BackwardArguments& arguments) {
    Process& shared = process();
    const std::lock_guard lock(shared.mutex);
    Team& team = this->team();
    const Ticket ticket = arguments.ticket;
    const auto found = ticket == 0 ? find_newest(arguments.of_any_thread) : find_saved(ticket);
    if (found == saved.end())
        throw BadState(ticket == 0
                           ? "backward without a saved forward: call forward_sft(..., save_for_backward=True) first"
                           : "backward of ticket " + std::to_string(ticket) + ", which was used or dropped before");
    if (arguments.rows != found->routing.tokens)
        throw BadInput("grad_output has " + std::to_string(arguments.rows) + " rows; the saved forward had " +
                       std::to_string(found->routing.tokens));
    if (arguments.grads.fp32 != found->lora->fp32)
        throw BadState("backward while another thread changed the dtype of the LoRA tensors: call it again");
    Recording recording_of(recording, workers, config.lora_backward ? 4 : 3);
    Backward(*this, *found, arguments, recording_of.watch(0)).run(shared, team, recording_of);
    if (recording_of.on()) recorded = recording_of.finish(true, arguments.rows, backward_costs(found->routing));
    shared.cache.give(std::move(found->blocks));
    saved.erase(found);
    note_saved();
}

void Backward::carve(int p, Carver& carver) {
    const std::size_t R = routing_.rows, K = routing_.k_rows;
    Part& part = parts_[p];
    carver.take(part.out, R * hidden_);
    carver.take(part.out_rows, K);
    take(carver, part.ob, R * rank_);
    take(carver, part.ob_t, K * size_.rank_rows());
    carver.take(part.g, R * inter_);
    carver.take(part.u, R * inter_);
    carver.take(part.h, R * inter_);
    carver.take(part.g_rows, K);
    carver.take(part.u_rows, K);
    carver.take(part.h_rows, K);
    carver.take(part.dot, R * dots_);
    take(carver, part.xa, R * rank2_);
    take(carver, part.xa_t, K * size_.rank2_rows());
    if (p == 0) carver.take(zeros_, std::max(hidden_, inter_));
    carver.take(part.scratch, layer_.workers_of(p) * (scratch_size_ + kGradRows * kPanelCols));
    sums_.carve(p, carver, layer_.workers);
    if (p == 0) carver.take(segments_, layer_.workers * segments_of_worker_);
}

void Backward::run(Process& shared, Team& team, Recording& recording) {
    std::vector<Block> blocks =
        shared.cache.take(work_sizes(), results_need(), "a backward of " + std::to_string(call_.rows) + " tokens");
    layer_.cut_parts(blocks, [this](int p, Carver& carver) { carve(p, carver); });
    std::memset(zeros_, 0, std::max(hidden_, inter_) * sizeof(bf16));
    prepare_sums();
    prepare_rows_of_x();

    constexpr int tokens = 256;  // of a task of weight_grad
    const int parts = config_.parts, token_chunks = (call_.rows + tokens - 1) / tokens;
    TaskQueue gathering(parts, team, kblocks_),
        downing(parts, team, active_, (i_panels_ + down_panels_ - 1) / down_panels_), ranking(parts, team, kblocks_),
        inputs(parts, team, active_, (h_panels_ + input_panels_ - 1) / input_panels_),
        loras(1, team, active_, lora_tasks_), idles(1, team, static_cast<int>(idle_.size())),
        routings(1, team, token_chunks);
    caller_.lap(Phase::allocation);
    team.run([&](int index) {
        const Part& part = parts_[index % parts];
        const int place = index / parts;
        float* scratch = part.scratch + place * (scratch_size_ + kGradRows * kPanelCols);
        Worker worker{index, scratch, scratch + scratch_size_, recording.watch(index)};
        kernels_.enter();
        gathering.work(index, [&](const Task& task) { gather(worker, task.part, routing_.kblock(task.row)); });
        end_stage(worker.watch, team);
        downing.work(index, [&](const Task& task) { down_grad(worker, task); });
        end_stage(worker.watch, team);
        if (with_lora_) {
            ranking.work(index, [&](const Task& task) { rank_grad(worker, task.part, routing_.kblock(task.row)); });
            end_stage(worker.watch, team);
        }
        inputs.work(index, [&](const Task& task) { input_grad(worker, task); });
        loras.work(index, [&](const Task& task) { lora_grad(worker, task); });
        idles.work(index, [&](const Task& task) { fill_idle(idle_[task.row]); });
        worker.watch.lap(Phase::allocation);
        routings.work(index, [&](const Task& task) { weight_grad(task.row * tokens, (task.row + 1) * tokens); });
        worker.watch.lap(Phase::routing_grad);
        kernels_.leave();
        worker.watch.tasks_done();
        worker.watch.stage_done();
    });
    if (active_ == 0 && T_ > 0) std::memset(call_.grad_input, 0, T_ * H_ * sizeof(bf16));
    shared.cache.give(std::move(blocks));
}

// What the results take for the first time: grad_input, gradients in fresh pages, and sums of experts without one so far.
Need Backward::results_need() const {
    Need need;
    need.touched = T_ * H_ * sizeof(bf16);
    std::size_t count = 0, fresh = 0;
    for (const std::size_t n : grad_sizes_) count += n;
    const std::size_t element = call_.grads.fp32 ? sizeof(float) : sizeof(bf16), E = config_.num_experts;
    // of one expert: its parts of six tensors, each of which may begin and end within a page
    const auto expert_bytes = [&](std::size_t of_element) {
        return count / E * of_element + grad_sizes_.size() * 8192;
    };
    if (call_.grads_zero && with_lora_)
        need.touched += std::min(routing_.experts.size() * expert_bytes(element), count * element);
    if (!call_.accumulate) return need;
    for (const Routing::Expert& e : routing_.experts) fresh += !layer_.grad_sums || !layer_.has_sums[e.expert];
    need.touched += std::min(fresh * expert_bytes(sizeof(float)), count * sizeof(float));
    if (!layer_.grad_sums) need.mapped += Block::footprint(count * sizeof(float));
    return need;
}

void Backward::prepare_sums() {
    if (call_.accumulate && !layer_.grad_sums) {
        std::size_t count = 0;
        for (const std::size_t n : grad_sizes_) count += n;
        layer_.grad_sums = Block(count * sizeof(float));  // fresh pages are zero
        layer_.has_sums.assign(config_.num_experts, false);
    }
    const LoraPointers& to = call_.grads;
    float* sums = call_.accumulate ? reinterpret_cast<float*>(layer_.grad_sums.data()) : nullptr;
    std::size_t i = 0;
    for (void* const tensor : {to.gate_a, to.gate_b, to.up_a, to.up_b, to.down_a, to.down_b}) {
        write_.emplace_back(kernels_, tensor, sums, to.fp32);
        if (sums) sums += grad_sizes_[i++];
    }
    std::vector<bool> now(config_.num_experts);
    if (with_lora_) {
        for (const Routing::Expert& e : routing_.experts) now[e.expert] = true;
    }
    for (int e = 0; e < config_.num_experts; ++e) {
        if (call_.accumulate && now[e]) layer_.has_sums[e] = true;
        const bool has_sums = call_.accumulate && layer_.has_sums[e];
        if (!now[e] && (has_sums || !call_.grads_zero)) idle_.push_back(e);
    }
}

void Backward::prepare_rows_of_x() {
    if (!with_lora_) return;
    x_rows_.assign(routing_.k_rows, kept_.x + T_ * hidden_);
    for (const Routing::Expert& e : routing_.experts) {
        for (int i = 0; i < e.rows; ++i) x_rows_[e.first_k + i] = kept_.x + (routing_.token[e.first_row + i]) * hidden_;
    }
}

// Stores columns 0..cols of c, the nn result of a k-block, twice: without padding rows in `plain`; all columns of the
// k-block in `transposed`, where padding is zero.
void Backward::put_small(const float* c, int cols, const Routing::KBlock& block, const Small& to) const {
    const std::size_t row0 = block.row, stride = nn_stride(block.rows);
    const auto scaled = [&](int t, int n) {
        return config_.scaling * c[n / kBlock * stride + t * kBlock + n % kBlock];
    };
    for (int t = 0; t < block.rows; ++t) {
        for (int n = 0; n < cols; ++n) put(to.plain, (row0 + t) * to.ld + to.first + n, scaled(t, n));
    }
    for (int n = 0; n < cols && to.first + n < to.rows; ++n) {
        const std::size_t at_row = (to.first + n) * block.ld + block.first;
        for (int t = 0; t < kBlock; ++t) {
            const bool real = t < block.rows;
            const float value = real ? scaled(t, n) : 0.0f;
            const float w = to.weighted && real ? routing_.weight[row0 + t] : 1.0f;
            put(to.transposed, at_row + t, w * value);
        }
    }
}

// `from` [..][ld], the rows of a k-block, times a LoRA B of `kblocks` rows of blocks, whose first `columns` columns count.
void Backward::multiply_b(Worker& worker, const Routing::KBlock& block, const bf16* from, std::size_t ld, const Pair& b,
                          int kblocks, int columns, Small to) const {
    for (int nb = 0; nb < size_.rb; nb += kPanelBlocks, to.first += kPanelCols) {
        const int cblocks = std::min(kPanelBlocks, size_.rb - nb);
        NnSegment segments[2];
        for (int term = 0; term < layer_.terms(); ++term)
            segments[term] =
                segment(from, ld, (term == 0 ? b.hi : b.lo) + nb * kBlockSize, layer_.panel(size_.rb), kblocks);
        kernels_.nn(segments, layer_.terms(), block.rows, cblocks, worker.c);
        put_small(worker.c, std::min(cblocks * kBlock, columns - nb * kBlock), block, to);
    }
}

void Backward::gather(Worker& worker, int p, const Routing::KBlock& block) {
    Part& part = parts_[p];
    const std::size_t row0 = block.row, k = block.expert.first_k + block.first, rows = block.rows;
    for (std::size_t t = 0; t < rows; ++t) {
        bf16* row = part.out + (row0 + t) * hidden_;
        std::memcpy(row, call_.grad_output + routing_.token[row0 + t] * H_, H_ * sizeof(bf16));
        std::memset(row + H_, 0, (hidden_ - H_) * sizeof(bf16));
    }
    for (std::size_t t = 0; t < kBlock; ++t) {
        const bool real = t < rows;
        const std::size_t row = row0 + t;
        part.out_rows[k + t] = real ? part.out + row * hidden_ : zeros_;
        part.g_rows[k + t] = real ? part.g + row * inter_ : zeros_;
        part.u_rows[k + t] = real ? part.u + row * inter_ : zeros_;
        part.h_rows[k + t] = real ? part.h + row * inter_ : zeros_;
    }
    worker.watch.lap(Phase::scatter);
    const Pair b = at(lora_.down_b, block.expert.expert * layer_.lora_strides().down_b);
    const Pair transposed = at(part.ob_t, wide(block.expert.first_k) * size_.rank_rows());
    multiply_b(worker, block, part.out + row0 * hidden_, hidden_, b, size_.hb, size_.rank(),
               {part.ob, rank_, 0, transposed, wide(size_.rank_rows()), true});
    worker.watch.lap(Phase::down_lora_b);
}

void Backward::rank_grad(Worker& worker, int p, const Routing::KBlock& block) {
    Part& part = parts_[p];
    const std::size_t row0 = block.row, rows2 = size_.rank2_rows();
    const Pair transposed = at(part.xa_t, block.expert.first_k * rows2);
    // Rows and columns beyond 2 r are multiplied with padding: they must be zero, not a value of the last call.
    for (std::size_t n = 2 * r_; n < rows2; ++n) {
        for (std::size_t t = 0; t < kBlock; ++t) put(transposed, n * block.ld + block.first + t, 0.0f);
    }
    for (int t = 0; t < block.rows; ++t) {
        for (std::size_t n = 2 * r_; n < rank2_; ++n) put(part.xa, (row0 + t) * rank2_ + n, 0.0f);
    }
    const std::size_t at_b = block.expert.expert * layer_.lora_strides().gate_b;
    for (const bool up : {false, true})
        multiply_b(worker, block, (up ? part.u : part.g) + row0 * inter_, inter_,
                   at((up ? lora_.up_b : lora_.gate_b)[p], at_b), size_.ib, size_.r,
                   {part.xa, rank2_, up ? r_ : 0, transposed, rows2, false});
    worker.watch.lap(Phase::gate_up_lora_b);
}

// dw of tokens `first` to `last`, if there are so many.
void Backward::weight_grad(int first, int last) {
    const std::size_t slots = routing_.slots, end = std::min<std::size_t>(T_, last) * slots;
    for (std::size_t i = first * slots; i < end; ++i) {
        float sum = 0.0f;
        const int row = routing_.row_of[i];
        for (std::size_t p = 0; row >= 0 && p < parts_.size(); ++p) {
            for (int dot = 0; dot < dots_; ++dot) sum += parts_[p].dot[wide(dot) * routing_.rows + row];
        }
        call_.grad_weights[i] = sum;
    }
}

}  // namespace ktv
