// What all layers of a process share: the workers and the working buffers. One computation at a time uses them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "memory.hpp"
#include "team.hpp"

namespace ktv {

// The memory of LoRA gradients. It returns here when the caller drops the last tensor in it, and is handed out again: a
// training step requests the same sizes each time, and fresh pages cost more than the gradients' arithmetic, above all
// where other programs have used up the huge pages. A block that fits none of kPatience requests goes back to the kernel.
class GradientMemory {
  public:
    struct Taken {
        Block block;
        bool zero;  // fresh pages; otherwise the values of the last user
    };
    Taken take(std::size_t bytes);
    void give(Block block) noexcept;
    void clear();

  private:
    // More than any model has layers.
    static constexpr std::uint64_t kPatience = 1024;
    struct Free {
        Block block;
        std::uint64_t since;  // the number of requests when it was given
    };
    std::mutex mutex_;  // separate, because a tensor may be dropped while another thread computes
    std::vector<Free> free_;
    std::uint64_t requests_ = 0;
};

struct Process {
    std::mutex mutex;  // held while a layer computes, packs or allocates
    std::map<std::pair<int, std::vector<Home>>, std::unique_ptr<Team>> teams;  // by workers and homes
    GradientMemory gradients;
    // The memory that read_rate reads: `share` bytes for each of `workers`.
    struct Ceiling {
        Block block;
        int workers = 0;
        std::size_t share = 0;
    } ceiling;
    BlockCache cache{[this] {
        gradients.clear();
        ceiling = Ceiling{};
    }};

    Team& team(int workers, const std::vector<Home>& homes = std::vector<Home>(1));
    // Frees all memory that no call and no tensor uses.
    void release();
};

// A number for the calling thread, which no other thread ever gets.
std::uint64_t this_thread();

// A forked child gets a fresh one: threads do not survive a fork, and a mutex that one of them has locked stays locked.
Process& process();

}  // namespace ktv
