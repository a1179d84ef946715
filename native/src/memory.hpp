// Memory for weights and working buffers: pages from the kernel, huge pages for large blocks, returned at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ktv {

inline constexpr std::size_t kHuge = std::size_t{2} << 20;  // a huge page of x86-64, bytes

// Bytes that can still be allocated without swapping: the least of MemAvailable, the cgroup's limit and RLIMIT_AS.
std::size_t available_memory();
// Throws OutOfMemory with both figures when `bytes` more are not available.
void require_memory(std::size_t bytes, const std::string& what);

// Releases the whole pages inside [first, first + bytes). The next read finds the file's content where a file is mapped
// that was not written, and zeros anywhere else.
void release_pages(const void* first, std::size_t bytes);

// An mmap'd block, 2 MiB aligned when it is large. Pages cost nothing until they are touched.
class Block {
  public:
    Block() = default;
    explicit Block(std::size_t bytes);
    // Address space that a block of `bytes` takes.
    static std::size_t footprint(std::size_t bytes);
    std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }
    explicit operator bool() const { return mapped_ != nullptr; }  // false after a move

  private:
    struct Unmap {
        std::size_t bytes;
        void operator()(void* mapped) const;
    };
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
    std::unique_ptr<void, Unmap> mapped_;
};

// Cuts arrays out of one block. A first pass without a block measures the size, a second pass on the block cuts. One
// function that lists the arrays serves both passes, so that they cannot disagree: see carved().
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

// carve(Carver&) lists the arrays; take(bytes) returns a block for them.
template <typename Carve, typename Take>
Block carved(const Carve& carve, const Take& take) {
    Carver measure;
    carve(measure);
    Block block = take(measure.used());
    Carver cut(block.data());
    carve(cut);
    return block;
}

// Blocks that are reused from call to call: the smallest that fits is handed out again.
class BlockCache {
  public:
    // on_shortage: frees what memory the process can spare.
    explicit BlockCache(std::function<void()> on_shortage) : on_shortage_(std::move(on_shortage)) {}
    Block take(std::size_t bytes, const std::string& what);
    void give(Block block);
    void clear() { free_.clear(); }

  private:
    std::function<void()> on_shortage_;
    std::vector<Block> free_;
};

}  // namespace ktv
