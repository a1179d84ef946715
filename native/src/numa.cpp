#include "numa.hpp"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <fstream>
#include <sstream>
#include <system_error>

#include "ktv/errors.hpp"
#include "memory.hpp"

namespace ktv {
namespace {

constexpr int kMostNodes = 64;

void add(Home& home, const NumaNode& node) {
    home.nodes |= NodeMask{1} << node.number;
    home.cpus.insert(home.cpus.end(), node.cpus.begin(), node.cpus.end());
}

// How many of `parts` are on each node, at least one.
std::vector<int> parts_of_nodes(int parts, const std::vector<NumaNode>& nodes) {
    std::vector<int> share(nodes.size(), 1);
    for (int rest = parts - static_cast<int>(nodes.size()); rest > 0; --rest) {
        std::size_t best = 0;
        for (std::size_t i = 1; i < nodes.size(); ++i) {
            if (nodes[i].cpus.size() * (share[best] + 1) > nodes[best].cpus.size() * (share[i] + 1)) best = i;
        }
        ++share[best];
    }
    return share;
}

bool crowded(int workers, const std::vector<Home>& homes) {
    const std::size_t parts = homes.size();
    for (const Home& home : homes) {
        std::size_t here = 0;
        for (int worker = 0; worker < workers; ++worker) here += homes[worker % parts].nodes == home.nodes;
        if (home.nodes != 0 && here > home.cpus.size()) return true;
    }
    return false;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
    std::vector<int> cpus;
    std::istringstream ranges(text);
    for (std::string range; std::getline(ranges, range, ',');) {
        int first = 0, last = 0;
        char dash = 0;
        std::istringstream numbers(range);
        if (!(numbers >> first)) continue;
        if (!(numbers >> dash >> last)) last = first;
        for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    }
    return cpus;
}

std::vector<int> nodes_in(NodeMask nodes) {
    std::vector<int> numbers;
    for (; nodes != 0; nodes &= nodes - 1) numbers.push_back(std::countr_zero(nodes));
    return numbers;
}

std::vector<int> processors_of_this_thread() {
    cpu_set_t set;
    CPU_ZERO(&set);
    std::vector<int> cpus;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
    return cpus;
}

std::vector<NumaNode> numa_nodes() {
    const std::vector<int> allowed = processors_of_this_thread();
    std::vector<NumaNode> nodes;
    for (int number = 0; number < kMostNodes; ++number) {
        std::ifstream file(system_below() + "sys/devices/system/node/node" + std::to_string(number) + "/cpulist");
        std::string text;
        if (!std::getline(file, text)) continue;
        std::vector<int> cpus = parse_cpu_list(text);
        std::erase_if(cpus, [&](int cpu) { return !std::binary_search(allowed.begin(), allowed.end(), cpu); });
        if (!cpus.empty()) nodes.push_back({number, std::move(cpus)});
    }
    return nodes;
}

std::vector<Home> homes_of_parts(int parts, const std::vector<int>& wanted, const std::vector<NumaNode>& nodes) {
    const int count = static_cast<int>(nodes.size());
    std::vector<Home> homes(parts);
    if (!wanted.empty() && static_cast<int>(wanted.size()) != parts)
        throw BadInput("numa_nodes has " + std::to_string(wanted.size()) + " nodes; it takes one for each of " +
                       std::to_string(parts) + " parts (threadpool_count)");
    for (std::size_t part = 0; part < wanted.size(); ++part) {
        const auto found =
            std::find_if(nodes.begin(), nodes.end(), [&](const NumaNode& node) { return node.number == wanted[part]; });
        if (found == nodes.end()) {
            std::string has;
            for (const NumaNode& node : nodes) has += (has.empty() ? "" : ", ") + std::to_string(node.number);
            throw BadInput("numa_nodes names node " + std::to_string(wanted[part]) +
                           "; it takes nodes with a processor for this process: " + (has.empty() ? "none" : has));
        }
        add(homes[part], *found);
    }
    if (count < 2 || (wanted.empty() && parts == 1)) return std::vector<Home>(parts);
    if (!wanted.empty()) return homes;
    if (parts < count) {
        for (int i = 0; i < count; ++i) add(homes[i * parts / count], nodes[i]);
        return homes;
    }
    const std::vector<int> share = parts_of_nodes(parts, nodes);
    for (int part = 0, i = 0; part < parts; ++i) {
        if (share[i % count] > i / count) add(homes[part++], nodes[i % count]);
    }
    return homes;
}

int workers_that_fit(int workers, const std::vector<Home>& homes) {
    while (workers > 1 && crowded(workers, homes)) --workers;
    return workers;
}

int prefer_nodes(void* first, std::size_t bytes, NodeMask nodes) {
    const int mode = std::has_single_bit(nodes) ? MPOL_PREFERRED : MPOL_INTERLEAVE;
    // the kernel reads one bit less than the number of bits that it is given
    return syscall(SYS_mbind, first, bytes, mode, &nodes, kMostNodes + 1, 0) == 0 ? 0 : errno;
}

int count_pages(const void* first, std::size_t bytes, std::map<int, std::size_t>& on_node) {
    constexpr std::size_t most = 4096;  // of a call
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    std::uintptr_t at = reinterpret_cast<std::uintptr_t>(first) / page * page;
    const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(first) + bytes;
    std::vector<void*> pages;
    std::vector<int> node(most);
    while (at < end) {
        pages.clear();
        for (; at < end && pages.size() < most; at += page) pages.push_back(reinterpret_cast<void*>(at));
        if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, node.data(), 0) != 0) return errno;
        for (std::size_t i = 0; i < pages.size(); ++i) {
            if (node[i] >= 0) ++on_node[node[i]];  // a page that nothing has touched has an error instead
        }
    }
    return 0;
}

std::string refused_placement() {
    const std::vector<NumaNode> nodes = numa_nodes();
    Block block(1);
    *block.data() = std::byte{1};
    std::map<int, std::size_t> on_node;
    std::string text;
    const auto note = [&](const char* call, int error) {
        if (error != 0)
            text += (text.empty() ? "" : ", ") + std::string(call) + ": " + std::generic_category().message(error);
    };
    if (!nodes.empty()) note("mbind", prefer_nodes(block.data(), 1, NodeMask{1} << nodes.front().number));
    note("move_pages", count_pages(block.data(), 1, on_node));
    return text;
}

}  // namespace ktv
