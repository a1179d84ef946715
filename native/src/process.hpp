// What all layers of a process share: the workers and the working buffers. One computation at a time holds it.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "memory.hpp"
#include "team.hpp"

namespace ktv {

struct Process {
    std::mutex mutex;  // held while a layer computes, packs or allocates
    std::map<std::pair<int, int>, std::unique_ptr<Team>> teams;
    BlockCache cache;

    Team& team(int workers, int parts);
};

// A forked child gets a fresh one: threads do not survive a fork, and a mutex held by one of them never opens again.
Process& process();

}  // namespace ktv
