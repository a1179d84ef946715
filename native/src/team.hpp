// The workers of the process. One team serves all layers that ask for the same number of threads and parts; it runs one
// parallel region at a time. Inside a region the workers take tasks from counters and meet at barriers: no sleeping
// while work is near.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace ktv {

// Processors this process may run on.
int allowed_processors();
// Of them, those of each NUMA node, in the order of the nodes; nodes without any are left out.
std::vector<std::vector<int>> numa_nodes();
// "0-3,8,10-11", as the kernel writes it.
std::vector<int> parse_cpu_list(const std::string& text);

class Team {
  public:
    // `workers` threads in all, the caller of run() being one of them; worker w belongs to part w % parts. Where there
    // are several NUMA nodes and parts, the workers of part p stay on node p % nodes, except the caller, whose thread
    // is not ours to move.
    Team(int workers, int parts);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int workers() const { return workers_; }
    // Whether a worker that has run out of tasks may take those of another part: not across NUMA nodes, unless a part
    // has no worker of its own.
    bool helps() const { return helps_; }
    // Calls body(worker) on every worker and returns when all have come back. body must not throw.
    void run(const std::function<void(int)>& body);
    // Only inside run(), by every worker.
    void barrier();

  private:
    void serve(int worker);
    void dismiss();
    int workers_;
    bool helps_ = true;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* body_ = nullptr;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<int> epoch_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> phase_{0};
};

// Tasks 0..count-1 of each part, handed out in order. A worker starts with its own part and then may help the others.
class TaskQueue {
  public:
    TaskQueue(int parts, const Team& team)
        : helps_(team.helps() || parts == 1), next_(static_cast<std::size_t>(parts)) {}
    template <typename Task>  // task(part, index)
    void work(int worker, int count, Task&& task) {
        const int parts = static_cast<int>(next_.size());
        for (int i = 0; i < (helps_ ? parts : 1); ++i) {
            const int part = (worker + i) % parts;
            auto& next = next_[static_cast<std::size_t>(part)].value;
            for (int index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(part, index);
        }
    }

  private:
    struct alignas(64) Counter {
        std::atomic<int> value{0};
    };
    bool helps_;
    std::vector<Counter> next_;
};

// Makes additions into one place happen in the order of their tickets, whoever computes them: fp32 sums come out with
// the same bits for any number of threads. Tickets are taken in order from a TaskQueue, so the one that is waited for
// is always already being worked on.
class Turns {
  public:
    Turns(int parts, int slabs)
        : slabs_(slabs), turn_(static_cast<std::size_t>(parts) * static_cast<std::size_t>(slabs)) {}
    void wait(int part, int slab, int ticket) const;
    void pass(int part, int slab, int ticket);

  private:
    const std::atomic<int>& at(int part, int slab) const {
        return turn_[static_cast<std::size_t>(part) * static_cast<std::size_t>(slabs_) +
                     static_cast<std::size_t>(slab)];
    }
    int slabs_;
    std::vector<std::atomic<int>> turn_;
};

}  // namespace ktv
