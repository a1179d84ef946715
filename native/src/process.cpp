#include "process.hpp"

#include <pthread.h>

#include <atomic>

namespace ktv {
namespace {

// Never destroyed: at exit a worker may still be on its way to sleep.
std::atomic<Process*> current{nullptr};

// A fork waits for the computation that another thread has under way, so that the child never sees half of one.
void before_fork() {
    current.load()->mutex.lock();
}
void after_fork_in_parent() {
    current.load()->mutex.unlock();
}
void after_fork_in_child() {
    current.store(new Process);
}

}  // namespace

Process& process() {
    static const bool ready = [] {
        current.store(new Process);
        pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
        return true;
    }();
    (void)ready;
    return *current.load();
}

GradientMemory::Taken GradientMemory::take(std::size_t bytes) {
    {
        const std::lock_guard lock(mutex_);
        if (!free_.empty() && free_.back().size() == bytes) {
            Block found = std::move(free_.back());
            free_.pop_back();
            return {std::move(found), false};
        }
    }
    clear();
    require_memory(bytes, "the LoRA gradients");
    return {Block(bytes), true};
}

void GradientMemory::give(Block block) noexcept {
    try {
        const std::lock_guard lock(mutex_);
        free_.push_back(std::move(block));
    } catch (const std::bad_alloc&) {
        // then it goes back to the kernel
    }
}

void GradientMemory::clear() {
    std::vector<Block> gone;  // unmapped without the lock: who drops a tensor waits for it
    const std::lock_guard lock(mutex_);
    gone.swap(free_);
}

void Process::release() {
    cache.clear();
    gradients.clear();
}

Team& Process::team(int workers, int parts) {
    auto& slot = teams[{workers, parts}];
    if (!slot) slot = std::make_unique<Team>(workers, parts);
    return *slot;
}

}  // namespace ktv
