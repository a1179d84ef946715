// What all layers of a process share: the workers and the working buffers. One computation at a time holds it.
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

// Memory of LoRA gradients, handed out again when the caller has dropped the last tensor in it. A training step asks
// for the same sizes each time; fresh pages cost more than the gradients' arithmetic, above all where other programs
// have left no huge ones. What nobody has asked for in the time of kPatience requests goes back to the kernel.
class GradientMemory {
  public:
    struct Taken {
        Block block;
        bool zero;  // fresh pages; otherwise what the last user left
    };
    Taken take(std::size_t bytes);
    void give(Block block) noexcept;
    void clear();

  private:
    // More than a step of any model has layers.
    static constexpr std::uint64_t kPatience = 1024;
    struct Free {
        Block block;
        std::uint64_t since;  // the number of requests when it was given
    };
    std::mutex mutex_;  // its own: a tensor may be dropped while another thread computes
    std::vector<Free> free_;
    std::uint64_t requests_ = 0;
};

struct Process {
    std::mutex mutex;  // held while a layer computes, packs or allocates
    std::map<std::pair<int, int>, std::unique_ptr<Team>> teams;
    GradientMemory gradients;
    BlockCache cache{[this] { gradients.clear(); }};
    // What read_rate reads, and how its pages lie: `share` bytes for each of `workers`.
    struct {
        Block block;
        int workers = 0;
        std::size_t share = 0;
    } ceiling;

    Team& team(int workers, int parts);
    // Gives back what no call and no tensor holds.
    void release();
};

// A forked child gets a fresh one: threads do not survive a fork, and a mutex held by one of them never opens again.
Process& process();

}  // namespace ktv
