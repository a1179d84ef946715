#include "memory.hpp"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "ktv/errors.hpp"

namespace ktv {
namespace {

constexpr std::size_t kUnlimited = std::numeric_limits<std::size_t>::max();

bool is_huge(std::size_t bytes) {
    return bytes >= 2 * kHuge;
}

// The folder that contains proc/ and sys/, with the "/" at its end.
std::string system_root = "/";

std::size_t page_size() {
    static const auto size = sysconf(_SC_PAGESIZE);
    return size;
}

// The number in a file that contains one number; kUnlimited when there is none ("max", no such file).
std::size_t number_in(const std::string& path) {
    std::ifstream file(system_root + path);
    std::size_t value;
    return file >> value ? value : kUnlimited;
}

// A row of /proc/meminfo in bytes; kUnlimited without it.
std::size_t meminfo(const std::string& wanted) {
    std::ifstream file(system_root + "proc/meminfo");
    for (std::string key, unit; file >> key;) {
        std::size_t kib;
        file >> kib;
        if (key == wanted) return kib * 1024;
        std::getline(file, unit);
    }
    return kUnlimited;
}

// The sum of these keys of a file with a "key number" on each line.
std::size_t sum_in(const std::string& path, std::initializer_list<const char*> keys) {
    std::ifstream file(system_root + path);
    std::size_t sum = 0, value;
    for (std::string key; file >> key >> value;) {
        if (std::any_of(keys.begin(), keys.end(), [&](const char* wanted) { return key == wanted; })) sum += value;
    }
    return sum;
}

// Where a version of control groups is mounted, and its names of the values needed here.
struct Cgroups {
    std::string root, limit, used;
    std::initializer_list<const char*> cached;
};

// Memory that a group and its parents leave. A group counts cached files as used, but frees them when memory is requested;
// after reading a checkpoint they fill it. ktverify/system/limits.py uses the same rule.
std::size_t left_in(const Cgroups& version, std::string group) {
    std::size_t least = kUnlimited;
    // Inside a container the path may be the host's and not exist; then the mount's root is the group itself.
    for (;;) {
        const std::string folder = version.root + (group == "/" ? "" : group) + "/";
        const std::size_t limit = number_in(folder + version.limit);
        std::size_t used = number_in(folder + version.used);
        if (limit != kUnlimited && used != kUnlimited) {
            used -= std::min(used, sum_in(folder + "memory.stat", version.cached));
            least = std::min(least, limit > used ? limit - used : 0);
        }
        if (group.empty() || group == "/") return least;
        group.resize(group.rfind('/'));
    }
}

std::size_t cgroup_left() {
    const Cgroups one{"sys/fs/cgroup/memory",
                      "memory.limit_in_bytes",
                      "memory.usage_in_bytes",
                      {"total_inactive_file", "total_active_file"}},
        two{"sys/fs/cgroup", "memory.max", "memory.current", {"inactive_file", "active_file"}},
        beside_one{"sys/fs/cgroup/unified", "memory.max", "memory.current", {"inactive_file", "active_file"}};
    std::size_t least = kUnlimited;
    std::ifstream file(system_root + "proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // number:controller,…:/path
        const std::size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos || line[second + 1] != '/') continue;
        std::string controllers = line.substr(first, second - first + 1);
        controllers.front() = controllers.back() = ',';  // ",cpu,memory,"
        const std::string group = line.substr(second + 1);
        if (line.starts_with("0::")) {
            least = std::min({least, left_in(two, group), left_in(beside_one, group)});
        } else if (controllers.find(",memory,") != std::string::npos) {
            least = std::min(least, left_in(one, group));
        }
    }
    return least;
}

std::size_t left_of(std::size_t limit, std::size_t used) {
    return limit > used ? limit - used : 0;
}

// Pages that can still be touched.
std::size_t pages_left() {
    return std::min(meminfo("MemAvailable:"), cgroup_left());
}

// Bytes that can still be mapped, touched or not.
std::size_t mappings_left() {
    std::size_t size = 0, data = 0, other;
    std::ifstream statm(system_root + "proc/self/statm");
    statm >> size >> other >> other >> other >> other >> data;
    std::size_t least = kUnlimited;
    for (const auto& [kind, pages] : {std::pair{RLIMIT_AS, size}, {RLIMIT_DATA, data}}) {
        rlimit limit{};
        if (getrlimit(kind, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
            least = std::min(least, left_of(limit.rlim_cur, pages * page_size()));
    }
    if (number_in("proc/sys/vm/overcommit_memory") == 2)
        least = std::min(least, left_of(meminfo("CommitLimit:"), meminfo("Committed_AS:")));
    return least;
}

// With the tables of the pages, and what the process allocates meanwhile elsewhere.
std::size_t with_overhead(std::size_t touched) {
    return touched == 0 ? 0 : touched + touched / 256 + (std::size_t{1} << 20);
}

std::string size_text(std::size_t bytes) {
    const bool large = bytes >= (1u << 30);
    char text[32];
    std::snprintf(text, sizeof text, large ? "%.2f GiB" : "%.1f MiB",
                  static_cast<double>(bytes) / (1u << (large ? 30 : 20)));
    return text;
}

}  // namespace

void Need::add_block(std::size_t bytes) {
    mapped += Block::footprint(bytes);
    touched += bytes;
}

std::size_t available_memory() {
    return std::min(pages_left(), mappings_left());
}

bool is_available(const Need& need) {
    return with_overhead(need.touched) <= pages_left() && need.mapped <= mappings_left();
}

void require_memory(const Need& need, const std::string& what) {
    const auto check = [&](std::size_t bytes, std::size_t have) {
        if (bytes <= have) return;
        throw OutOfMemory(what + " needs " + size_text(bytes) + ", and " + size_text(have) +
                          " are available; use fewer tokens per call " +
                          "(chunked_prefill_size), fewer experts, or a machine with more memory");
    };
    check(with_overhead(need.touched), pages_left());
    check(need.mapped, mappings_left());
}

void read_system_below(const std::string& root) {
    system_root = root.ends_with('/') ? root : root + "/";
}

const std::string& system_below() {
    return system_root;
}

void release_pages(const void* first, std::size_t bytes) {
    const std::size_t page = page_size();
    const auto begin = (reinterpret_cast<std::uintptr_t>(first) + page - 1) / page * page,
               end = (reinterpret_cast<std::uintptr_t>(first) + bytes) / page * page;
    // Advice only: if it is refused, the pages stay.
    if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

std::size_t Block::footprint(std::size_t bytes) {
    const std::size_t page = page_size();
    return (bytes + page - 1) / page * page + (is_huge(bytes) ? kHuge : 0);
}

Block::Block(std::size_t bytes, NodeMask nodes) : size_(bytes), nodes_(nodes) {
    if (bytes == 0) return;
    const std::size_t size = footprint(bytes);
    void* const mapped =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        throw OutOfMemory("a block of " + size_text(bytes) + " could not be mapped, and " +
                          size_text(available_memory()) + " are available");
    mapped_ = {mapped, Unmap{size}};
    auto address = reinterpret_cast<std::uintptr_t>(mapped);
    if (is_huge(bytes)) {
        address = (address + kHuge - 1) / kHuge * kHuge;
        // Advice only: without huge pages, the block has small ones.
        (void)madvise(reinterpret_cast<void*>(address), bytes, MADV_HUGEPAGE);
    }
    data_ = reinterpret_cast<std::byte*>(address);
    if (nodes != 0) (void)prefer_nodes(data_, bytes, nodes);
}

void Block::Unmap::operator()(void* mapped) const {
    munmap(mapped, bytes);
}

std::vector<Block> BlockCache::take(const std::vector<Size>& sizes, Need need, const std::string& what) {
    // Below this, pages in older mappings are not worth reading what is free.
    constexpr std::size_t kFew = std::size_t{16} << 20;
    std::vector<Block> blocks(sizes.size());
    bool fit = true;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        auto best = free_.end();
        for (auto it = free_.begin(); it != free_.end(); ++it) {
            const bool fits = it->size() >= sizes[i].bytes && it->nodes() == sizes[i].nodes;
            if (fits && (best == free_.end() || it->size() < best->size())) best = it;
        }
        if (best == free_.end()) {
            need.add_block(sizes[i].bytes);
            fit = false;
        } else {
            blocks[i] = std::move(*best);
            free_.erase(best);
        }
    }
    // The other blocks in the cache are too small for this call: free them before allocating a larger one.
    if (!fit) free_.clear();
    if (need.mapped > 0 || need.touched >= kFew) {
        if (!is_available(need)) {
            free_.clear();
            on_shortage_();
        }
        require_memory(need, what);
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        if (!blocks[i]) blocks[i] = Block(sizes[i].bytes, sizes[i].nodes);
    }
    return blocks;
}

void BlockCache::give(std::vector<Block> blocks) {
    for (Block& block : blocks) {
        if (block) free_.push_back(std::move(block));
    }
}

}  // namespace ktv
