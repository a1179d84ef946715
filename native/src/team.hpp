// The workers of the process. One team serves all layers that ask for the same number of threads and parts; it runs one
// parallel region at a time. Inside a region the workers take tasks from counters and meet at barriers: no sleeping
// while work is near.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
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

// One of a TaskQueue's tasks.
struct Task {
    int part, row, column;
    // The place of the task that this worker will most likely take next; none: next_row is -1.
    int next_row, next_column;
};

// For each part `rows` times `columns` tasks. The columns are split into lanes, one for each worker of the part; a
// lane's tasks are handed out in order, row by row, so that a column's tasks are begun in the order of the rows. Where a
// row's columns are neighbours in memory, a worker in its own lane reads on and on, without the breaks that it would see
// if the workers took columns in turns. One without tasks helps in the other lanes of its part, and then may help the
// other parts.
class TaskQueue {
  public:
    TaskQueue(int parts, const Team& team, int rows, int columns = 1)
        : helps_(team.helps() || parts == 1),
          parts_(parts),
          workers_(std::max(1, team.workers() / parts)),
          lanes_(std::clamp(columns, 1, workers_)),
          rows_(rows),
          columns_(columns),
          taken_(static_cast<std::size_t>(parts * lanes_)) {}
    template <typename Do>  // do_task(const Task&)
    void work(int worker, const Do& do_task) {
        for (int i = 0; i < (helps_ ? parts_ : 1); ++i) {
            const int part = (worker + i) % parts_;
            for (int l = 0; l < lanes_; ++l) work_in(part, (worker / parts_ + l) % lanes_, do_task);
        }
    }

  private:
    struct alignas(64) Counter {
        std::atomic<int> value{0};
    };
    template <typename Do>
    void work_in(int part, int lane, const Do& do_task) {
        const int first = begin(lane), width = begin(lane + 1) - first, count = rows_ * width;
        const int together = workers_ / lanes_;  // in one lane, at first
        std::atomic<int>& taken = taken_[static_cast<std::size_t>(part * lanes_ + lane)].value;
        // Looking first spares those who come when all is done the line's ownership.
        while (taken.load(std::memory_order_relaxed) < count) {
            const int i = taken.fetch_add(1, std::memory_order_relaxed), next = i + together;
            if (i >= count) return;
            const bool last = next >= count;
            do_task(Task{part, i / width, first + i % width, last ? -1 : next / width, first + next % width});
        }
    }
    int begin(int lane) const { return static_cast<int>(static_cast<std::int64_t>(lane) * columns_ / lanes_); }

    bool helps_;
    int parts_, workers_, lanes_, rows_, columns_;
    std::vector<Counter> taken_;
};

// Makes additions into one place happen in the order of their tickets, whoever computes them: fp32 sums come out with
// the same bits for any number of threads. A slab is a column of a TaskQueue and a ticket its row, so the one that is
// waited for is always already being worked on.
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
