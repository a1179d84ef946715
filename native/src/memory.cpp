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

#include "ktv/errors.hpp"

namespace ktv {
namespace {

constexpr std::size_t kUnlimited = std::numeric_limits<std::size_t>::max();

bool is_huge(std::size_t bytes) {
    return bytes >= 2 * kHuge;
}

std::size_t page_size() {
    static const auto size = sysconf(_SC_PAGESIZE);
    return size;
}

// The number in a file that contains one number; kUnlimited when there is none ("max", no such file).
std::size_t number_in(const char* path) {
    std::ifstream file(path);
    std::size_t value;
    return file >> value ? value : kUnlimited;
}

std::size_t meminfo_available() {
    std::ifstream file("/proc/meminfo");
    for (std::string key, unit; file >> key;) {
        std::size_t kib;
        file >> kib;
        if (key == "MemAvailable:") return kib * 1024;
        std::getline(file, unit);
    }
    return kUnlimited;
}

// The sum of these keys of a file with a "key number" on each line.
std::size_t sum_in(const char* path, std::initializer_list<const char*> keys) {
    std::ifstream file(path);
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
// after reading a checkpoint they fill it. ktverify/system/machine.py uses the same rule.
std::size_t left_in(const Cgroups& version, std::string group) {
    std::size_t least = kUnlimited;
    // Inside a container the path may be the host's and not exist; then the mount's root is the group itself.
    for (;;) {
        const std::string folder = version.root + (group == "/" ? "" : group) + "/";
        const std::size_t limit = number_in((folder + version.limit).c_str());
        std::size_t used = number_in((folder + version.used).c_str());
        if (limit != kUnlimited && used != kUnlimited) {
            used -= std::min(used, sum_in((folder + "memory.stat").c_str(), version.cached));
            least = std::min(least, limit > used ? limit - used : 0);
        }
        if (group.empty() || group == "/") return least;
        group.resize(group.rfind('/'));
    }
}

std::size_t cgroup_left() {
    const Cgroups one{"/sys/fs/cgroup/memory",
                      "memory.limit_in_bytes",
                      "memory.usage_in_bytes",
                      {"total_inactive_file", "total_active_file"}},
        two{"/sys/fs/cgroup", "memory.max", "memory.current", {"inactive_file", "active_file"}};
    std::size_t least = kUnlimited;
    std::ifstream file("/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // number:controller,…:/path
        const std::size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos || line[second + 1] != '/') continue;
        std::string controllers = line.substr(first, second - first + 1);
        controllers.front() = controllers.back() = ',';  // ",cpu,memory,"
        if (line.starts_with("0::")) least = std::min(least, left_in(two, line.substr(second + 1)));
        else if (controllers.find(",memory,") != std::string::npos)
            least = std::min(least, left_in(one, line.substr(second + 1)));
    }
    return least;
}

std::size_t address_space_left() {
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnlimited;
    std::ifstream statm("/proc/self/statm");
    std::size_t pages = 0;
    statm >> pages;
    const std::size_t used = pages * page_size();
    return limit.rlim_cur > used ? limit.rlim_cur - used : 0;
}

std::string gib(std::size_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1u << 30));
    return text;
}

}  // namespace

std::size_t available_memory() {
    return std::min({meminfo_available(), cgroup_left(), address_space_left()});
}

void require_memory(std::size_t bytes, const std::string& what) {
    const std::size_t have = available_memory();
    if (bytes > have) {
        throw OutOfMemory(what + " needs " + gib(bytes) + ", and " + gib(have) +
                          " are available; use fewer tokens per call " +
                          "(chunked_prefill_size), fewer experts, or a machine with more memory");
    }
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

Block::Block(std::size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    const std::size_t size = footprint(bytes);
    void* const mapped =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        throw OutOfMemory("a block of " + gib(bytes) + " could not be mapped, and " + gib(available_memory()) +
                          " are available");
    mapped_ = {mapped, Unmap{size}};
    auto address = reinterpret_cast<std::uintptr_t>(mapped);
    if (is_huge(bytes)) {
        address = (address + kHuge - 1) / kHuge * kHuge;
        // Advice only: without huge pages, the block has small ones.
        (void)madvise(reinterpret_cast<void*>(address), bytes, MADV_HUGEPAGE);
    }
    data_ = reinterpret_cast<std::byte*>(address);
}

void Block::Unmap::operator()(void* mapped) const {
    munmap(mapped, bytes);
}

Block BlockCache::take(std::size_t bytes, const std::string& what) {
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
        if (it->size() >= bytes && (best == free_.end() || it->size() < best->size())) best = it;
    }
    if (best != free_.end()) {
        Block block = std::move(*best);
        free_.erase(best);
        return block;
    }
    // The blocks in the cache are too small for this call: free them before allocating a larger one.
    free_.clear();
    if (bytes > available_memory()) on_shortage_();
    require_memory(bytes, what);
    return Block(bytes);
}

void BlockCache::give(Block block) {
    if (block) free_.push_back(std::move(block));
}

}  // namespace ktv
