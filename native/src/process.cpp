#include "process.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <iterator>
#include <new>

namespace ktv {

// Never destroyed, because at exit a worker may still be about to sleep.
static std::atomic<Process*> current{nullptr};

Process& process() {
    static const bool ready = [] {
        current.store(new Process);
        // A fork waits until another thread's computation is complete, so that the child never gets an incomplete one.
        pthread_atfork([] { current.load()->mutex.lock(); }, [] { current.load()->mutex.unlock(); },
                       [] { current.store(new Process); });
        return true;
    }();
    (void)ready;
    return *current.load();
}

std::uint64_t this_thread() {
    static std::atomic<std::uint64_t> last{0};
    thread_local const std::uint64_t mine = ++last;
    return mine;
}

GradientMemory::Taken GradientMemory::take(std::size_t bytes) {
    std::vector<Free> gone;  // unmapped without the lock, because a thread that drops a tensor waits for it
    {
        const std::lock_guard lock(mutex_);
        ++requests_;
        const auto old = [this](const Free& free) { return requests_ - free.since > kPatience; };
        const auto first_old = std::stable_partition(free_.begin(), free_.end(), std::not_fn(old));
        std::move(first_old, free_.end(), std::back_inserter(gone));
        free_.erase(first_old, free_.end());
        // The one returned last: its pages are most likely in the cache.
        const auto found = std::find_if(free_.rbegin(), free_.rend(),
                                        [bytes](const Free& free) { return free.block.size() == bytes; });
        if (found != free_.rend()) {
            Block block = std::move(found->block);
            free_.erase(std::next(found).base());
            return {std::move(block), false};
        }
    }
    gone.clear();
    // No check here of what is free: the backward that fills the block knows how much of it, and asks for all at once.
    if (bytes > available_memory()) clear();
    return {Block(bytes), true};
}

void GradientMemory::give(Block block) noexcept {
    try {
        const std::lock_guard lock(mutex_);
        free_.push_back({std::move(block), requests_});
    } catch (const std::bad_alloc&) {
        // The block goes back to the kernel.
    }
}

void GradientMemory::clear() {
    std::vector<Free> gone;
    const std::lock_guard lock(mutex_);
    gone.swap(free_);
}

void Process::release() {
    cache.clear();
    gradients.clear();
    ceiling = {};
}

Team& Process::team(int workers, const std::vector<Home>& homes) {
    auto& slot = teams[{workers, homes}];
    if (!slot) slot = std::make_unique<Team>(workers, homes);
    return *slot;
}

}  // namespace ktv
