// Whole layers: every instruction set against the portable one, thread counts against each other, several layers and
// threads at once, a fork. The Python suites judge the numbers; these tests look for errors of memory and for races.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <stop_token>
#include <thread>

#include "instruction_sets.hpp"
#include "problem.hpp"

using namespace ktv;

namespace {

void test_shape(const Shape& s) {
    Problem problem(s);
    const auto expected = problem.run(*problem.layer("scalar", 1));
    for (const std::string& isa : available_isas()) {
        const auto check_of = [&](bool good, const char* what) {
            check(good, "%s E=%d H=%d I=%d T=%d r=%d parts=%d%s %s", isa.c_str(), s.E, s.H, s.I, s.T, s.r, s.parts,
                  s.fp32 ? " fp32" : "", what);
        };
        const auto layer = problem.layer(isa, 2);
        const auto first = problem.run(*layer);
        // Both round to bf16 in the same places; a sum near a rounding boundary may be rounded the other way.
        check_of(rel_l2(first, expected) < 2e-3, "against scalar");
        check_of(problem.run(*layer) == first, "twice");
        check_of(problem.run(*problem.layer(isa, 1)) == first, "with one thread");
        clear_buffer_cache();
        check_of(problem.run(*layer) == first, "after clear_buffer_cache");
        const auto once = problem.run(*layer, true), twice = problem.run(*layer, true);
        check_of(once == first, "accumulating once");
        // Twice the same gradients, to the bit: a power of two.
        bool doubled = twice.size() == once.size();
        const std::size_t lora = 2 * problem.x.size(), dw = once.size() - problem.ids.size();
        for (std::size_t i = 0; doubled && i < once.size(); ++i)
            doubled = twice[i] == (i >= lora && i < dw ? 2 * once[i] : once[i]);
        check_of(doubled, "accumulating twice");
        // Experts that have a sum and no token in this call keep their sum.
        std::vector<std::int64_t> empty(problem.ids.size(), -1);
        empty.swap(problem.ids);
        const auto idle = problem.run(*layer, true);
        empty.swap(problem.ids);
        bool kept = idle.size() == twice.size();
        for (std::size_t i = lora; kept && i < dw; ++i) kept = idle[i] == twice[i];
        check_of(kept, "accumulating without a token");
    }
}

// A token's output and gradients have the same bits with many and with few other tokens of its expert.
void test_rows(int rank) {
    const Shape many{1, 1, 33, 66, 130, rank, 1, true};
    Shape few = many;
    few.T = kGroup + 1;  // more than any instruction set's few_rows
    Problem all(many), some(few);
    some.gate = all.gate, some.up = all.up, some.down = all.down, some.lora32 = all.lora32;
    std::copy_n(all.x.begin(), some.x.size(), some.x.begin());
    std::copy_n(all.grad_output.begin(), some.x.size(), some.grad_output.begin());
    std::copy_n(all.weights.begin(), few.T, some.weights.begin());
    for (const std::string& isa : available_isas()) {
        const auto of_all = all.run(*all.layer(isa, 1)), of_some = some.run(*some.layer(isa, 1));
        const auto same = [&](const char* what, auto from_all, auto from_some, std::size_t count) {
            check(std::equal(from_some, from_some + static_cast<std::ptrdiff_t>(count), from_all),
                  "%s, rank %d: the %s of %d tokens depends on the others", isa.c_str(), rank, what, few.T);
        };
        const auto rows = [](const Problem& p) { return static_cast<std::ptrdiff_t>(p.x.size()); };
        same("output", of_all.begin(), of_some.begin(), some.x.size());
        same("grad_input", of_all.begin() + rows(all), of_some.begin() + rows(some), some.x.size());
        same("routing gradient", of_all.end() - many.T, of_some.end() - few.T, static_cast<std::size_t>(few.T));
    }
}

// Layers of different sizes from several threads; two threads share one of them, whose experts are packed meanwhile.
// Another thread reads the counts, which wait for no computation.
void test_threads(Problem& small) {
    Problem other({3, 2, 97, 128, 40, 8, 2, false}, 9);
    const std::string best = available_isas().front();
    const auto a = small.layer(best, 2), b = other.layer(best, 2);
    const auto want_a = small.run(*a), want_b = other.run(*b);
    const auto want_output = other.forward(*b);
    const auto fresh = other.layer(best, 2);
    std::atomic<bool> two_layers = true, one_layer = true, sane = true;
    {
        std::jthread reader([&](std::stop_token stop) {
            while (!stop.stop_requested()) {
                for (const Layer* l : {a.get(), b.get(), fresh.get()}) {
                    const int forwards = l->saved_forwards(), packed = l->packed_experts();
                    if (forwards < 0 || forwards > 2 || packed < 0 || packed > l->config().num_experts) sane = false;
                }
                std::this_thread::yield();
            }
        });
        std::vector<std::jthread> threads;
        const auto repeat = [&](std::atomic<bool>& same, auto call) {
            threads.emplace_back([&same, call] {
                for (int i = 0; i < 5; ++i) {
                    if (!call()) same = false;
                }
            });
        };
        repeat(two_layers, [&] { return small.run(*a) == want_a; });
        repeat(two_layers, [&] { return other.run(*b) == want_b; });
        for (int i = 0; i < 2; ++i) repeat(one_layer, [&] { return other.forward(*fresh) == want_output; });
        threads.clear();
    }
    check(two_layers, "two layers from two threads");
    check(one_layer, "one layer from two threads");
    check(sane, "the counts of layers that compute");

    const std::vector<std::int64_t> ids(small.s.T * 2, 4);
    std::vector<bf16> out(small.x.size());
    const bool refused = throws<BadInput>(
        [&] { a->forward({small.s.T, small.x.data(), ids.data(), small.weights.data(), out.data()}); });
    check(refused && small.run(*a) == want_a, "an id out of range is refused and leaves the layer usable");
}

// One thread packs the experts while another gives LoRA of the other dtype and a third new base weights; then the caller
// drops its tensors. Each thread's backward takes the thread's own forward.
void test_changes_meanwhile(Problem& small) {
    const std::string best = available_isas().front();
    const auto wanted = small.run(*small.layer(best, 2));
    auto copy = std::make_shared<Problem>(small);
    const std::weak_ptr<Problem> alive = copy;
    const auto layer = small.layer(best, 2);
    std::vector<std::int64_t> map(small.s.E);
    std::iota(map.begin(), map.end(), 0);
    const auto load = [&](const std::shared_ptr<Problem>& from) {
        const auto source = [&](const std::vector<bf16>& all, int rows, int cols) {
            WeightSource found{{}, cols, 1, false};
            for (int e = 0; e < small.s.E; ++e) found.experts.push_back(all.data() + e * rows * cols);
            return found;
        };
        const int H = small.s.H, I = small.s.I;
        return layer->load_weights(source(from->gate, I, H), source(from->up, I, H), source(from->down, H, I), map,
                                   from);
    };
    {
        const std::jthread forwards([&] {
            for (int i = 0; i < 5; ++i) small.forward(*layer);
        });
        const std::jthread loras([&] {
            for (int i = 0; i < 5; ++i)
                layer->update_lora(i % 2 ? Problem::pointers(small.lora16) : Problem::pointers(small.lora32));
        });
        for (int i = 0; i < 5; ++i) load(std::make_shared<Problem>(small));
    }
    layer->update_lora(Problem::pointers(small.lora16));
    const int name = load(copy);
    copy.reset();
    check(!alive.expired(), "the layer owns its sources");
    layer->move_weights(name + 1, {}, {}, {});  // another name: nothing changes
    check(small.run(*layer) == wanted, "after changes by other threads");
    check(alive.expired() == (layer->packed_experts() == small.s.E), "sources are dropped when all experts are packed");

    Problem other = small;
    other.x = Random{5}.bf16s(small.x.size(), 1);
    const auto wanted_other = other.run(*layer);
    std::atomic<int> waiting = 0;
    std::atomic<bool> own = true;
    {
        std::vector<std::jthread> threads;
        for (const auto& [problem, want] : {std::pair{&small, &wanted}, std::pair{&other, &wanted_other}}) {
            threads.emplace_back([&, problem, want] {
                const auto found = problem->run(*layer, false, [&] {
                    ++waiting;
                    while (waiting < 2) std::this_thread::yield();
                });
                if (found != *want) own = false;
            });
        }
    }
    check(own, "each thread's backward takes its own forward");
}

}  // namespace

int main() {
    // A forked child does not have the workers of this process: it starts its own. Before any other test, because those
    // use other threads.
    Problem small({4, 2, 64, 64, 20, 4, 1, false});
    const auto before = small.layer("scalar", 2);
    if (const pid_t child = fork(); child == 0) {
        _exit(small.run(*before) == small.run(*small.layer("scalar", 1)) ? 0 : 1);
    } else {
        int status = 1;
        waitpid(child, &status, 0);
        check(status == 0, "a forked child computes");
    }

    emulate_amx();
    for (const Shape& shape : std::vector<Shape>{
             {5, 3, 97, 47, 37, 3, 1, false},
             {3, 2, 64, 96, 1, 1, 1, false},
             {4, 2, 160, 192, 70, 40, 2, true},
             // one expert that has every token: two and three chunks of rows
             {1, 1, 33, 130, 300, 5, 1, true},
             {1, 1, 33, 66, 530, 5, 1, false},
             {8, 2, 130, 64, 33, 16, 4, false},
             {2, 2, 32, 32, 0, 2, 1, false},
             // few tokens an expert: fp32 LoRA, more than one block of ranks, parts, the largest number and one more
             {8, 2, 70, 96, 9, 33, 1, true},
             {6, 2, 33, 66, 4, 17, 2, true},
             {1, 1, 97, 47, 1, 16, 1, false},
             {1, 1, 97, 47, 2, 16, 1, false},
             {1, 1, 97, 47, 11, 16, 1, false},
             {1, 1, 97, 47, 12, 16, 1, false}})
        test_shape(shape);
    for (const int rank : {65, 96, 128, 160}) test_rows(rank);
    test_threads(small);
    test_changes_meanwhile(small);
    return finish();
}
