// Memory for weights and working buffers: pages from the kernel, huge pages for large blocks, returned at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "numa.hpp"

namespace ktv {

inline constexpr std::size_t kHuge = std::size_t{2} << 20;  // a huge page of x86-64, bytes

// What a call is about to take, all of it, added up before any page is touched: a page that was promised and not yet
// touched still counts as free everywhere else. mapped: new mappings. touched: pages that the call writes first, in new
// mappings or in older ones.
struct Need {
    std::size_t mapped = 0, touched = 0;
    void add_block(std::size_t bytes);
};

// Bytes that can still be allocated without swapping: the least of MemAvailable, what the cgroups leave, RLIMIT_AS,
// RLIMIT_DATA and, where the kernel does not overcommit, what is not yet committed.
std::size_t available_memory();
bool is_available(const Need& need);
// Throws OutOfMemory with both figures when the need is not available.
void require_memory(const Need& need, const std::string& what);
// Reads proc/ and sys/ below this folder instead of "/", for tests. No other thread may use memory meanwhile.
void read_system_below(const std::string& root);
// That folder, with a "/" at its end.
const std::string& system_below();

// Releases the whole pages inside [first, first + bytes). The next read finds the file's content where a file is mapped
// that was not written, and zeros anywhere else.
void release_pages(const void* first, std::size_t bytes);

// An mmap'd block, 2 MiB aligned when it is large. Pages cost nothing until they are touched; then they come from `nodes`,
// where the kernel permits it (prefer_nodes).
class Block {
  public:
    Block() = default;
    explicit Block(std::size_t bytes, NodeMask nodes = 0);
    // Address space that a block of `bytes` takes.
    static std::size_t footprint(std::size_t bytes);
    std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }
    NodeMask nodes() const { return nodes_; }
    explicit operator bool() const { return mapped_ != nullptr; }  // false after a move

  private:
    struct Unmap {
        std::size_t bytes;
        void operator()(void* mapped) const;
    };
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
    NodeMask nodes_ = 0;
    std::unique_ptr<void, Unmap> mapped_;
};

// Cuts arrays out of one block. A first pass without a block measures the size, a second pass on the block cuts. One
// function that lists the arrays serves both passes, so that they cannot disagree: see measured() and cut().
class Carver {
  public:
    explicit Carver(std::byte* base = nullptr) : base_(base) {}
    template <typename T>
    void take(T*& array, std::size_t count) {
        array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
    }
    std::size_t used() const { return used_; }

  private:
    std::byte* base_;
    std::size_t used_ = 0;
};

// At least `count` elements, in whole cache lines: the share of a worker, because a line that two workers write moves
// between their caches with each write.
template <typename T>
constexpr std::size_t whole_lines(std::size_t count) {
    constexpr std::size_t each = 64 / std::gcd(std::size_t{64}, sizeof(T));
    return (count + each - 1) / each * each;
}

// carve(Carver&) lists the arrays: the bytes that they take, and the cut of a block of so many bytes.
template <typename Carve>
std::size_t measured(const Carve& carve) {
    Carver carver;
    carve(carver);
    return carver.used();
}
template <typename Carve>
void cut(const Block& block, const Carve& carve) {
    Carver carver(block.data());
    carve(carver);
}

// Blocks that are reused from call to call: the smallest of the same nodes that fits is handed out again.
class BlockCache {
  public:
    // on_shortage: frees what memory the process can spare.
    explicit BlockCache(std::function<void()> on_shortage) : on_shortage_(std::move(on_shortage)) {}
    struct Size {
        std::size_t bytes;
        NodeMask nodes = 0;
    };
    // Blocks of these sizes. OutOfMemory unless they fit together with `need`, which is all that the call takes besides.
    std::vector<Block> take(const std::vector<Size>& sizes, Need need, const std::string& what);
    void give(std::vector<Block> blocks);
    void clear() { free_.clear(); }
    const std::vector<Block>& unused() const { return free_; }

  private:
    std::function<void()> on_shortage_;
    std::vector<Block> free_;
};

}  // namespace ktv
