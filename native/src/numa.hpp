// NUMA nodes: which there are, which of them a tensor-parallel part is on, and on which of them pages are. System calls
// without libnuma; where the kernel refuses them, as in many containers, everything works without.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ktv {

// A set of nodes: bit n is node n. 0: any node will do.
using NodeMask = std::uint64_t;

struct NumaNode {
    int number;
    std::vector<int> cpus;  // those that this process may run on
};
// The nodes below 64 that have such processors, by number; none where the system names none.
std::vector<NumaNode> numa_nodes();
// The numbers in a set of nodes.
std::vector<int> nodes_in(NodeMask nodes);
// The processors that the calling thread may run on.
std::vector<int> processors_of_this_thread();
// Parses a list as the kernel writes it: "0-3,8,10-11".
std::vector<int> parse_cpu_list(const std::string& text);

// Where a tensor-parallel part is: its nodes, and their processors. Without nodes it may be anywhere.
struct Home {
    NodeMask nodes = 0;
    std::vector<int> cpus;
    auto operator<=>(const Home&) const = default;
};
// The home of each part. `wanted`: a node for each part, or empty. Then every node has a part, and further parts are on the
// nodes with the most processors a part; with fewer parts than nodes, a part has several neighbouring nodes, and a single
// part may be anywhere. The first parts are on different nodes. On a machine with one node every part may be anywhere.
// BadInput for another number of nodes than parts, and for a node that has no processor for this process.
std::vector<Home> homes_of_parts(int parts, const std::vector<int>& wanted,
                                 const std::vector<NumaNode>& nodes = numa_nodes());
// The largest number of workers, at most `workers` and at least 1, with which no home has more workers than processors;
// worker w is of part w % parts.
int workers_that_fit(int workers, const std::vector<Home>& homes);

// Asks the kernel to take the pages of [first, first + bytes) that are not touched yet from these nodes, in turn where
// there are several, and from others when these are full. Returns 0, or the error number where it refuses: then a page is
// on the node of the thread that writes it first.
int prefer_nodes(void* first, std::size_t bytes, NodeMask nodes);
// Adds the touched pages inside [first, first + bytes) to those of their nodes. Returns 0, or the error number where the
// kernel does not tell.
int count_pages(const void* first, std::size_t bytes, std::map<int, std::size_t>& on_node);
// What this kernel refuses of the two, as text; empty when nothing.
std::string refused_placement();

}  // namespace ktv
