// Whole layers: every instruction set against the portable one, thread counts against each other, several layers and
// threads at once, a fork. What the numbers should be is the Python suites' business; this is about memory and races.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <stop_token>
#include <thread>

#include "check.hpp"
#include "cpu.hpp"
#include "emulation/amx_trap.hpp"
#include "ktv/layer.hpp"
#include "team.hpp"

using namespace ktv;

namespace {

struct Shape {
    int E, k, H, I, T, r, parts;
    bool fp32;
};

struct Problem {
    Shape s;
    std::vector<bf16> gate, up, down, x, grad_output;
    std::vector<std::int64_t> ids;
    std::vector<float> weights;
    std::vector<std::vector<bf16>> lora16;
    std::vector<std::vector<float>> lora32;
    std::vector<std::size_t> sizes;

    explicit Problem(const Shape& shape, std::uint64_t seed = 1) : s(shape) {
        check::Random random(seed);
        const auto n = [](int a, int b, int c) { return std::size_t(a) * std::size_t(b) * std::size_t(c); };
        gate = random.bf16s(n(s.E, s.I, s.H), 0.3f);
        up = random.bf16s(n(s.E, s.I, s.H), 0.3f);
        down = random.bf16s(n(s.E, s.H, s.I), 0.3f);
        x = random.bf16s(n(s.T, s.H, 1), 1);
        grad_output = random.bf16s(n(s.T, s.H, 1), 1);
        for (int i = 0; i < s.T * s.k; ++i) {
            ids.push_back(s.E == 1 ? 0 : random.below(s.E + 1) - 1);  // nobody's too; an only expert has every token
            weights.push_back(random.uniform());
        }
        sizes = {n(s.E, s.r, s.H), n(s.E, s.I, s.r), n(s.E, s.r, s.H),
                 n(s.E, s.I, s.r), n(s.E, s.r, s.I), n(s.E, s.H, s.r)};
        for (const std::size_t size : sizes) {
            lora16.push_back(random.bf16s(size, 0.3f));
            auto& wide = lora32.emplace_back();
            for (const bf16 v : lora16.back()) wide.push_back(to_float(v) * 1.001f);
        }
    }
    template <typename V>
    static LoraPointers pointers(V& six) {
        return {six[0].data(), six[1].data(), six[2].data(), six[3].data(), six[4].data(), six[5].data()};
    }
    std::unique_ptr<Layer> layer(Isa isa, int threads) {
        LayerConfig c;
        c.num_experts = s.E, c.top_k = s.k, c.hidden = s.H, c.intermediate = s.I, c.rank = s.r, c.scaling = 2.0f;
        c.parts = s.parts, c.threads = threads, c.max_rows = 4096, c.max_cache_depth = 2, c.lora_fp32 = s.fp32,
        c.isa = isa;
        auto made = std::make_unique<Layer>(c);
        std::vector<std::int64_t> map;
        for (int e = 0; e < s.E; ++e) map.push_back(e);
        const auto source = [&](const std::vector<bf16>& all, int rows, int cols) {
            WeightSource from{{}, cols, 1, false};
            for (std::size_t e = 0; e < std::size_t(s.E); ++e)
                from.experts.push_back(all.data() + e * std::size_t(rows) * std::size_t(cols));
            return from;
        };
        made->load_weights(source(gate, s.I, s.H), source(up, s.I, s.H), source(down, s.H, s.I), map);
        made->update_lora(s.fp32 ? pointers(lora32) : pointers(lora16));
        return made;
    }
    std::vector<bf16> forward(Layer& l) const {
        std::vector<bf16> output(x.size());
        l.forward(s.T, x.data(), ids.data(), weights.data(), output.data(), false);
        return output;
    }
    // Output, grad_input, six LoRA gradients and dw, one after the other. Buffers are exact, so that a sanitizer sees
    // every byte too far.
    std::vector<float> run(Layer& l, bool accumulate = false) {
        std::vector<bf16> output(x.size()), grad_input(x.size());
        std::vector<float> dw(ids.size());
        std::vector<std::vector<bf16>> g16;
        std::vector<std::vector<float>> g32;
        for (const std::size_t size : sizes) {
            g16.emplace_back(size, bf16{0x7fc0});  // NaN: what is not written shows
            g32.emplace_back(size, std::numeric_limits<float>::quiet_NaN());
        }
        l.forward(s.T, x.data(), ids.data(), weights.data(), output.data(), true);
        l.backward(s.T, grad_output.data(), grad_input.data(), s.fp32 ? pointers(g32) : pointers(g16), false, dw.data(),
                   accumulate);
        std::vector<float> all;
        for (const auto* v : {&output, &grad_input}) {
            for (const bf16 b : *v) all.push_back(to_float(b));
        }
        for (std::size_t i = 0; i < 6; ++i) {
            for (std::size_t j = 0; j < sizes[i]; ++j) all.push_back(s.fp32 ? g32[i][j] : to_float(g16[i][j]));
        }
        all.insert(all.end(), dw.begin(), dw.end());
        return all;
    }
};

std::string text(const Shape& s) {
    return "E=" + std::to_string(s.E) + " H=" + std::to_string(s.H) + " I=" + std::to_string(s.I) +
           " T=" + std::to_string(s.T) + " r=" + std::to_string(s.r) + " parts=" + std::to_string(s.parts) +
           (s.fp32 ? " fp32" : "");
}

// The tasks of a queue of which only one worker takes any, in its order.
std::vector<Task> tasks_of(const Team& team, int worker, int parts, int rows, int columns) {
    TaskQueue queue(parts, team, rows, columns);
    std::vector<Task> found;
    queue.work(worker, [&](const Task& task) { found.push_back(task); });
    return found;
}

// Every task once, a column's in the order of its rows, whoever takes them. A worker begins in its own part, and goes on
// in the others unless those have workers and memory of their own; what is announced as its next is what it gets when
// all who begin in its lane take turns.
void test_tasks(int workers, int parts, int rows, int columns) {
    Team team(workers, parts);
    const std::string what = std::to_string(workers) + " workers, " + std::to_string(parts) + " parts, " +
                             std::to_string(rows) + " rows of " + std::to_string(columns) + " tasks";
    const std::size_t count = std::size_t(parts) * std::size_t(rows) * std::size_t(columns);
    std::vector<std::vector<Task>> alone;
    for (int worker = 0; worker < workers; ++worker) alone.push_back(tasks_of(team, worker, parts, rows, columns));
    for (int worker = 0; worker < workers; ++worker) {
        const std::vector<Task>& mine = alone[std::size_t(worker)];
        std::vector<int> begun(std::size_t(parts) * std::size_t(columns));
        bool in_order = mine.size() == (team.helps() ? count : count / std::size_t(parts));
        for (const Task& task : mine)
            in_order &= begun[std::size_t(task.part) * std::size_t(columns) + std::size_t(task.column)]++ == task.row;
        if (!check::that(in_order, what + ": rows in order")) return;  // together the workers would wait for ever
        if (count == 0) continue;
        const auto begins_here = [&](const std::vector<Task>& other) {
            return other[0].part == mine[0].part && other[0].column == mine[0].column;
        };
        const auto together = std::size_t(std::count_if(alone.begin(), alone.end(), begins_here));
        // All but the last `together` of its lane, whose width the number of lanes tells within one.
        const int lanes = std::min(columns, (workers + parts - 1) / parts);
        std::size_t announced = 0;
        bool foretold = mine[0].part == worker % parts;
        for (std::size_t i = 0; i < mine.size(); ++i) {
            if (mine[i].next_row < 0) continue;
            ++announced;
            foretold = foretold && i + together < mine.size() && mine[i].next_row == mine[i + together].row &&
                       mine[i].next_column == mine[i + together].column;
        }
        const auto lane = [&](int width) { return std::size_t(rows) * std::size_t(width); };
        const int narrow = columns / lanes, wide = (columns + lanes - 1) / lanes;
        foretold &= announced > 0 ? announced + together == lane(narrow) || announced + together == lane(wide)
                                  : lane(narrow) <= together;
        check::that(foretold, what + ": next of worker " + std::to_string(worker));
    }
    TaskQueue queue(parts, team, rows, columns);
    Turns turns(parts, columns);
    std::vector<std::atomic<int>> done(count);
    team.run([&](int worker) {
        queue.work(worker, [&](const Task& task) {
            turns.wait(task.part, task.column, task.row);
            ++done[(std::size_t(task.part) * std::size_t(rows) + std::size_t(task.row)) * std::size_t(columns) +
                   std::size_t(task.column)];
            turns.pass(task.part, task.column, task.row);
        });
    });
    check::that(std::all_of(done.begin(), done.end(), [](const auto& n) { return n == 1; }), what + ": each once");
}

}  // namespace

int main() {
    for (const int workers : {1, 2, 3, 7}) {
        for (const int parts : {1, 2, 3}) {
            for (const int rows : {0, 1, 5}) {
                for (const int columns : {0, 1, 2, 5, 24}) test_tasks(workers, parts, rows, columns);
            }
        }
    }
    // The workers of this process do not exist in the child: it starts its own.
    Problem small({4, 2, 64, 64, 20, 4, 1, false});
    const auto before = small.layer(Isa::scalar, 2);
    if (const pid_t child = fork(); child == 0) {
        _exit(small.run(*before) == small.run(*small.layer(Isa::scalar, 1)) ? 0 : 1);
    } else {
        int status = 1;
        waitpid(child, &status, 0);
        check::that(status == 0, "a forked child computes");
    }

    if (!why_not(Isa::amx_bf16).empty() && emulation::amx_trap_install()) set_amx_emulation(true);
    const std::vector<Shape> shapes = {
        {5, 3, 97, 47, 37, 3, 1, false},
        {3, 2, 64, 96, 1, 1, 1, false},
        {4, 2, 160, 192, 70, 40, 2, true},
        // one expert that has every token: two and three chunks of rows
        {1, 1, 33, 130, 300, 5, 1, true},
        {1, 1, 33, 66, 530, 5, 1, false},
        {8, 2, 130, 64, 33, 16, 4, false},
        {2, 2, 32, 32, 0, 2, 1, false},
        // few tokens an expert: fp32 LoRA, more than one block of ranks, parts, the border
        {8, 2, 70, 96, 9, 33, 1, true},
        {6, 2, 33, 66, 4, 17, 2, true},
        {1, 1, 97, 47, 1, 16, 1, false},
        {1, 1, 97, 47, 2, 16, 1, false},
        {1, 1, 97, 47, 11, 16, 1, false},
        {1, 1, 97, 47, 12, 16, 1, false}};
    for (const Shape& shape : shapes) {
        Problem problem(shape);
        const auto expected = problem.run(*problem.layer(Isa::scalar, 1));
        for (const Isa isa : available_isas()) {
            const std::string what = std::string(name_of(isa)) + " " + text(shape);
            const auto layer = problem.layer(isa, 2);
            const auto first = problem.run(*layer);
            // Both round to bf16 in the same places; a sum that falls near a rounding boundary may go the other way.
            check::that(check::rel_l2(first, expected) < 2e-3, what + " against scalar");
            check::that(problem.run(*layer) == first, what + " twice");
            check::that(problem.run(*problem.layer(isa, 1)) == first, what + " with one thread");
            clear_buffer_cache();
            check::that(problem.run(*layer) == first, what + " after clear_buffer_cache");
            const auto once = problem.run(*layer, true), twice = problem.run(*layer, true);
            check::that(once == first, what + " accumulating once");
            // The same gradients twice over, to the bit: a power of two.
            bool doubled = twice.size() == once.size();
            const std::size_t lora = 2 * problem.x.size(), dw = once.size() - problem.ids.size();
            for (std::size_t i = 0; doubled && i < once.size(); ++i)
                doubled = twice[i] == (i >= lora && i < dw ? 2 * once[i] : once[i]);
            check::that(doubled, what + " accumulating twice");
            // Experts that have a sum and no token now keep it.
            std::vector<std::int64_t> nobody(problem.ids.size(), -1);
            nobody.swap(problem.ids);
            const auto idle = problem.run(*layer, true);
            nobody.swap(problem.ids);
            bool kept = idle.size() == twice.size();
            for (std::size_t i = lora; kept && i < dw; ++i) kept = idle[i] == twice[i];
            check::that(kept, what + " accumulating without a token");
        }
    }

    // Layers of different sizes from several threads, one of them shared by two. Meanwhile another thread reads the
    // counts, which wait for no computation.
    Problem other({3, 2, 97, 128, 40, 8, 2, false}, 9);
    const Isa best = available_isas().front();
    const auto a = small.layer(best, 2), b = other.layer(best, 2);
    const auto want_a = small.run(*a), want_b = other.run(*b);
    const auto want_output = other.forward(*b);
    const auto fresh = other.layer(best, 2);
    bool same[4] = {true, true, true, true};
    std::atomic<bool> sane = true;
    {
        std::jthread reader([&](std::stop_token stop) {
            while (!stop.stop_requested()) {
                for (const Layer* l : {a.get(), b.get(), fresh.get()}) {
                    const int forwards = l->saved_forwards(), packed = l->packed_experts(), rows = l->saved_rows();
                    if (forwards < 0 || forwards > 2 || packed < 0 || packed > l->config().num_experts || rows < -1)
                        sane = false;
                }
                std::this_thread::yield();
            }
        });
        std::jthread one([&] {
            for (int i = 0; i < 5; ++i) same[0] &= small.run(*a) == want_a;
        });
        std::jthread two([&] {
            for (int i = 0; i < 5; ++i) same[1] &= other.run(*b) == want_b;
        });
        // Its experts are packed while the others compute.
        std::jthread three([&] {
            for (int i = 0; i < 5; ++i) same[2] &= other.forward(*fresh) == want_output;
        });
        std::jthread four([&] {
            for (int i = 0; i < 5; ++i) same[3] &= other.forward(*fresh) == want_output;
        });
        for (std::jthread* thread : {&one, &two, &three, &four}) thread->join();
    }
    check::that(same[0] && same[1], "two layers from two threads");
    check::that(same[2] && same[3], "one layer from two threads");
    check::that(sane, "the counts of layers that compute");

    bool refused = false;
    try {
        std::vector<std::int64_t> ids(std::size_t(small.s.T) * 2, 4);
        std::vector<bf16> out(small.x.size());
        a->forward(small.s.T, small.x.data(), ids.data(), small.weights.data(), out.data(), false);
    } catch (const BadInput&) {
        refused = true;
    }
    check::that(refused && small.run(*a) == want_a, "an id out of range is refused and leaves the layer usable");
    check::that(parse_cpu_list("0-2,8,10-11") == std::vector<int>{0, 1, 2, 8, 10, 11}, "a list of processors");
    return check::finish();
}
