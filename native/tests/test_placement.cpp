// Tensor-parallel parts on NUMA nodes: how they are spread, and where the kernel says that workers and pages are. On a
// machine with one node the same calls have the same bits, and nothing is pinned.
//
// Arguments: the processors of each node that this machine must have, like "0-2" "3"; with them the layers are large enough
// for huge pages.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <fstream>

#include "numa.hpp"
#include "problem.hpp"
#include "process.hpp"

using namespace ktv;

namespace {

std::string text_of(const std::vector<int>& numbers) {
    std::string text;
    for (const int number : numbers) {
        if (!text.empty()) text += ',';
        text += std::to_string(number);
    }
    return text;
}

// The nodes of each part, and then how many of `workers` are used: "0 1 0 (3)".
std::string spread(const std::vector<std::vector<int>>& nodes, int parts, int workers,
                   const std::vector<int>& wanted = {}) {
    std::vector<NumaNode> machine;
    int cpu = 0;
    for (const std::vector<int>& node : nodes) {
        machine.push_back({node[0], {}});
        for (int i = 0; i < node[1]; ++i) machine.back().cpus.push_back(cpu++);
    }
    const std::vector<Home> homes = homes_of_parts(parts, wanted, machine);
    std::string text;
    for (const Home& home : homes) text += text_of(nodes_in(home.nodes)) + " ";
    return text + "(" + std::to_string(workers_that_fit(workers, homes)) + ")";
}

void test_spread() {
    const auto same = [](const std::string& found, const std::string& wanted) {
        check(found == wanted, "parts on nodes: %s, not %s", found.c_str(), wanted.c_str());
    };
    // nodes as {number, processors}
    same(spread({{0, 2}}, 3, 2), "   (2)");               // one node: anywhere
    same(spread({{0, 2}, {1, 2}}, 1, 4), " (4)");         // one part: anywhere
    same(spread({{0, 2}, {1, 2}}, 2, 4), "0 1 (4)");      //
    same(spread({{0, 2}, {3, 2}}, 2, 4), "0 3 (4)");      // nodes without processors have no part
    same(spread({{0, 3}, {1, 1}}, 2, 4), "0 1 (3)");      // a second worker of node 1 would share its processor
    same(spread({{0, 3}, {1, 1}}, 4, 4), "0 1 0 0 (4)");  // more parts where there are more processors
    same(spread({{0, 1}, {1, 1}}, 4, 2), "0 1 0 1 (2)");  // more parts than processors
    same(spread({{0, 2}, {1, 2}}, 3, 4), "0 1 0 (3)");    //
    same(spread({{0, 2}, {1, 2}, {2, 2}, {3, 2}}, 2, 8), "0,1 2,3 (8)");  // fewer parts than nodes
    same(spread({{0, 1}, {1, 1}, {2, 1}}, 2, 3), "0,1 2 (3)");            //
    same(spread({{0, 2}, {1, 2}}, 2, 4, {1, 1}), "1 1 (2)");
    same(spread({{0, 2}, {1, 2}}, 1, 4, {1}), "1 (2)");
    check(throws<BadInput>([] { spread({{0, 2}, {1, 2}}, 2, 4, {0}); }), "fewer nodes than parts are refused");
    check(throws<BadInput>([] { spread({{0, 2}, {1, 2}}, 2, 4, {0, 2}); }), "a node that is not there is refused");
    check(throws<BadInput>([] { spread({{0, 2}}, 1, 4, {-1}); }), "no node has a negative number");
}

// Whose tasks a worker takes, when all parts have homes.
void test_helping() {
    const auto takes = [](std::vector<NodeMask> nodes, int workers) {
        std::vector<Home> homes;
        for (const NodeMask node : nodes) homes.push_back({node, processors_of_this_thread()});
        const int parts = static_cast<int>(homes.size());
        Team team(workers, homes);
        std::string text;
        for (int worker = 0; worker < workers; ++worker) {
            std::vector<int> taken;
            TaskQueue queue(parts, team, 1);
            queue.work(worker, [&](const Task& task) { taken.push_back(task.part); });
            text += text_of(taken) + " ";
        }
        // Each task once, and with one queue for all parts as well, by threads that are not the caller's.
        std::vector<std::atomic<int>> done(parts * 5 + 7);
        std::atomic<bool> by_caller = false;
        const std::thread::id caller = std::this_thread::get_id();
        TaskQueue queue(parts, team, 5), common(1, team, 7);
        team.run([&](int worker) {
            if (std::this_thread::get_id() == caller) by_caller = true;
            queue.work(worker, [&](const Task& task) { ++done[task.part * 5 + task.row]; });
            team.barrier();
            common.work(worker, [&](const Task& task) { ++done[parts * 5 + task.row]; });
        });
        check(std::all_of(done.begin(), done.end(), [](const auto& n) { return n == 1; }), "each task once");
        check(!by_caller, "pinned workers are the engine's own threads");
        return text;
    };
    check(takes({1, 2}, 2) == "0 1 ", "workers stay with the parts of their home");
    check(takes({1, 2, 1}, 3) == "0,2 1 2,0 ", "workers help in the other parts of their home");
    check(takes({1, 2, 1, 2}, 2) == "0,2 1,3 ", "a part without a worker is computed by one of its home");
    check(takes({1, 1, 2, 2}, 2) == "0,1,2,3 1,2,3,0 ", "parts of a home without a worker are computed elsewhere");
    check(takes({1, 2}, 1) == "0,1 ", "one worker computes all parts");
}

std::size_t sum_of(const std::map<int, std::size_t>& pages) {
    std::size_t sum = 0;
    for (const auto& [node, count] : pages) sum += count;
    return sum;
}

// In percent; 100 of no pages, and of pages that may be anywhere.
double share_on(const std::vector<int>& nodes, const std::map<int, std::size_t>& pages) {
    std::size_t there = nodes.empty() ? sum_of(pages) : 0;
    for (const int node : nodes) there += pages.contains(node) ? pages.at(node) : 0;
    const std::size_t all = sum_of(pages);
    return all == 0 ? 100 : 100.0 * static_cast<double>(there) / static_cast<double>(all);
}

struct Plan {
    int parts, threads;
    std::vector<int> numa_nodes = {};
};

class OnThisMachine {
  public:
    // large: blocks of more than two huge pages.
    explicit OnThisMachine(bool large) : large_(large) {}

    // A layer has the bits of a layer of one worker, and its workers and pages are where they should be. Prints what the
    // kernel says.
    void test(const std::string& isa, const Plan& plan) {
        const int wide = large_ ? 576 : 192;
        test(isa, plan, {3, 2, 256, wide, 19, 4, plan.parts, false}, true);
    }
    // The same where the kernel takes no wish: the workers write their part's weights and LoRA first, and buffers may be
    // elsewhere. The weights of each expert are so large that no huge page has those of two.
    void test_first_touch(const Plan& plan) {
        const int wide = large_ ? 2816 : 64;
        test("scalar", plan, {2, 2, 512, wide, 4, 4, plan.parts, false}, false);
    }

  private:
    void test(const std::string& isa, const Plan& plan, const Shape& shape, bool all) {
        process().release();
        Problem problem(shape);
        const auto wanted = problem.run(*problem.layer(isa, 1));
        process().release();
        const auto layer = problem.layer(isa, plan.threads, plan.numa_nodes);
        check(problem.run(*layer) == wanted, "%s, %d parts: the bits of one worker", isa.c_str(), plan.parts);
        std::vector<bf16> output(problem.x.size());
        layer->forward(
            {problem.s.T, problem.x.data(), problem.ids.data(), problem.weights.data(), output.data(), true});
        const std::vector<PartPlacement> found = layer->placement();
        std::printf("  %s, %d %s, %d of %d workers%s\n", isa.c_str(), plan.parts, plan.parts > 1 ? "parts" : "part",
                    layer->threads(), plan.threads,
                    plan.numa_nodes.empty() ? "" : (", numa_nodes " + text_of(plan.numa_nodes)).c_str());
        const std::vector<Home> homes = homes_of_parts(plan.parts, plan.numa_nodes);
        const std::vector<int> allowed = processors_of_this_thread();
        for (int p = 0; p < plan.parts; ++p) {
            check(found[p].nodes == nodes_in(homes[p].nodes), "part %d names its nodes", p);
            test(p, found[p], homes[p].nodes == 0 ? allowed : homes[p].cpus, all);
        }
    }

    void test(int p, const PartPlacement& part, const std::vector<int>& cpus, bool all) const {
        const std::tuple<const char*, const std::map<int, std::size_t>&, bool> kinds[] = {
            {"weights", part.weights, true},
            {"LoRA", part.lora, true},
            {"saved", part.saved, all},
            {"buffers", part.buffers, all}};
        std::printf("    part %d on %s: workers on CPUs", p,
                    part.nodes.empty() ? "any node" : ("node " + text_of(part.nodes)).c_str());
        for (const std::vector<int>& worker : part.workers) std::printf(" [%s]", text_of(worker).c_str());
        std::printf(part.error == 0 ? "; there are" : "; the kernel does not tell where pages are");
        for (const auto& [name, pages, sure] : kinds) {
            if (part.error != 0) continue;
            if (!part.nodes.empty()) std::printf(" %.1f %% of", share_on(part.nodes, pages));
            std::printf(" %zu of %s", sum_of(pages), name);
        }
        std::printf("\n");
        for (const std::vector<int>& worker : part.workers)
            check(worker == cpus, "a worker of part %d stays on %s", p, text_of(cpus).c_str());
        check(part.error == 0 || part.error == EPERM, "only a kernel that refuses does not tell");
        for (const auto& [name, pages, sure] : kinds) {
            // where no node is wanted, the kernel does not see pages that it may soon move (NUMA balancing)
            check(part.error != 0 || part.nodes.empty() || sum_of(pages) > 0, "part %d has pages of %s", p, name);
            if (sure)
                check(share_on(part.nodes, pages) >= 99, "99 %% of the pages of %s of part %d are there", name, p);
        }
    }

    bool large_;
};

// From now on these system calls end with EPERM in this thread, as in a container.
void refuse(const std::vector<unsigned>& calls) {
    for (const unsigned call : calls) {
        sock_filter program[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                                 BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
                                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
        const sock_fprog filter{std::size(program), program};
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0, "a system call can be refused");
    }
}

std::size_t huge_pages_of(NodeMask nodes) {
    const auto now = [] {
        std::ifstream file("/proc/self/smaps_rollup");
        std::size_t kib = 0;
        for (std::string word; file >> word;) {
            if (word == "AnonHugePages:") file >> kib;
        }
        return kib;
    };
    const std::size_t before = now();
    Block block(8 * kHuge, nodes);
    std::fill_n(block.data(), block.size(), std::byte{1});
    return (now() - before) * 1024 / kHuge;
}

void keep_to(const std::vector<int>& cpus) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int cpu : cpus) CPU_SET(cpu, &set);
    check(sched_setaffinity(0, sizeof set, &set) == 0, "processors %s", text_of(cpus).c_str());
}

// A machine whose files name two nodes, each with one of this one's processors, and which has but one: workers are pinned,
// the kernel refuses the second node, and the placement says where pages are.
void test_a_node_without_memory() {
    const std::vector<int> cpus = processors_of_this_thread();
    if (cpus.size() < 2) return;
    const auto root = std::filesystem::temp_directory_path() / ("ktv_nodes_" + std::to_string(getpid()));
    for (int node = 0; node < 2; ++node) {
        const auto folder = root / "sys/devices/system/node" / ("node" + std::to_string(40 + node));
        std::filesystem::create_directories(folder);
        std::ofstream(folder / "cpulist") << cpus[node] << "\n";
    }
    Problem problem({3, 2, 64, 64, 9, 4, 2, false});
    const auto wanted = problem.run(*problem.layer("scalar", 1));
    read_system_below(root);
    const auto layer = problem.layer("scalar", 2);
    check(problem.run(*layer) == wanted, "the bits do not depend on nodes");
    const std::vector<PartPlacement> found = layer->placement();
    read_system_below("/");
    std::filesystem::remove_all(root);
    for (int p = 0; p < 2; ++p) {
        check(found[p].nodes == std::vector<int>{40 + p}, "part %d should be on node %d", p, 40 + p);
        check(found[p].workers == std::vector<std::vector<int>>{{cpus[p]}}, "part %d is on processor %d", p, cpus[p]);
        check(found[p].error != 0 || (sum_of(found[p].weights) > 0 && !found[p].weights.contains(40 + p)),
              "pages are not where there is no memory");
    }
}

}  // namespace

int main(int count, char** arguments) {
    check(parse_cpu_list("0-2,8,10-11") == std::vector<int>{0, 1, 2, 8, 10, 11}, "a list of processors");
    test_spread();
    test_helping();
    test_a_node_without_memory();

    const std::vector<std::string> wanted(arguments + 1, arguments + count);
    const std::vector<NumaNode> nodes = numa_nodes();
    for (const NumaNode& node : nodes) std::printf("  node %d: CPUs %s\n", node.number, text_of(node.cpus).c_str());
    if (!wanted.empty()) {
        bool same = wanted.size() == nodes.size();
        for (std::size_t i = 0; same && i < nodes.size(); ++i) same = nodes[i].cpus == parse_cpu_list(wanted[i]);
        if (!check(same, "the machine has the nodes that the arguments name")) return finish();
        check(refused_placement().empty(), "the kernel refuses %s", refused_placement().c_str());
        const std::size_t huge = huge_pages_of(0), of_first = huge_pages_of(1);
        check(of_first > 0 && of_first >= huge, "blocks of a node have %zu huge pages, others %zu", of_first, huge);
    }
    OnThisMachine machine(!wanted.empty());
    const int cpus = allowed_processors(), last = nodes.empty() ? 0 : nodes.back().number;
    for (const std::string& isa : available_isas()) {
        if (!wanted.empty() && isa != "avx2" && isa != "scalar") continue;
        for (const int parts : {1, 2, 3, 4}) {
            if (isa != "scalar" || parts == 2) machine.test(isa, {parts, cpus});
        }
        if (!nodes.empty()) machine.test(isa, {2, cpus, {last, last}});
        if (wanted.empty()) break;
    }
    if (nodes.size() > 1) {
        // As under a cpuset: without the last node, and without the first processor.
        std::vector<int> kept;
        for (std::size_t i = 0; i + 1 < nodes.size(); ++i)
            kept.insert(kept.end(), nodes[i].cpus.begin(), nodes[i].cpus.end());
        const std::vector<int> before = processors_of_this_thread();
        if (kept.size() > 1) kept.erase(kept.begin());
        keep_to(kept);
        std::printf("  only CPUs %s\n", text_of(kept).c_str());
        machine.test("scalar", {2, cpus});
        keep_to(before);
    }
    std::printf("  without mbind\n");
    // it would move pages, and not see those that it may soon move
    if (!wanted.empty()) check(!!(std::ofstream("/proc/sys/kernel/numa_balancing") << 0 << std::flush), "no balancing");
    refuse({SYS_mbind});
    check(refused_placement().starts_with("mbind: "), "mbind is refused");
    machine.test_first_touch({2, cpus});
    std::printf("  without move_pages\n");
    refuse({SYS_move_pages});
    check(refused_placement().find("move_pages: ") != std::string::npos, "move_pages is refused");
    machine.test_first_touch({2, cpus});
    return finish();
}
