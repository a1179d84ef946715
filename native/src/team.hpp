// The workers of the process. One team serves all layers with the same number of threads and parts; it runs one parallel
// region at a time. Inside a region the workers take tasks from counters and meet at barriers. They spin for a while
// before they block.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "numa.hpp"

namespace ktv {

// Number of processors that this process may run on.
int allowed_processors();

class Team {
  public:
    // Worker w belongs to part w % parts, and stays on the processors of the part's home. Worker 0 is the caller of run(),
    // or, where the parts have homes, a thread of its own: the engine may not pin a thread that it does not own.
    Team(int workers, std::vector<Home> homes);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int workers() const { return workers_; }
    // Whether a worker without tasks may take those of a part. Only of parts with the same home, unless a home has no
    // worker.
    bool helps(int worker, int part) const {
        return help_everywhere_ || homes_[worker % homes_.size()].nodes == homes_[part].nodes;
    }
    // Calls body(worker) on every worker and returns when all calls have returned. body must not throw.
    void run(const std::function<void(int)>& body);
    // Only inside run(), by every worker.
    void barrier();

  private:
    void serve(int worker);
    void dismiss();
    int workers_;
    std::vector<Home> homes_;
    bool elsewhere_;  // the caller of run() is no worker
    bool help_everywhere_ = false;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* body_ = nullptr;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<int> epoch_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> phase_{0};
    alignas(64) std::atomic<int> done_{0};  // the epoch whose run() is complete, where the caller is no worker
};

// A counter on a cache line of its own.
struct alignas(64) Counter {
    std::atomic<int> value{0};
};

// One of a TaskQueue's tasks.
struct Task {
    int part, row, column;
    // The task that this worker will most likely take next; next_row is -1 when it is not known.
    int next_row, next_column;
};

// `rows` times `columns` tasks for each of `parts`. The columns are split into lanes: one for each worker of the part, or
// fewer where there are fewer columns. A lane's tasks are handed out in order, row by row, so that a column's tasks are
// begun in the order of the rows. Where a row's columns are neighbours in memory, a worker in its own lane reads
// contiguously; if all workers took columns from one queue, it would not. A worker without tasks helps in the other lanes
// of its part, and then in the other parts if it may.
class TaskQueue {
  public:
    TaskQueue(int parts, const Team& team, int rows, int columns = 1)
        : team_(team), parts_(parts), workers_(team.workers()), rows_(rows), columns_(columns) {}
    template <typename Do>  // do_task(const Task&)
    void work(int worker, const Do& do_task) {
        // Helpers go in both directions; otherwise all of them would meet in the same lane.
        const int place = worker / parts_, direction = place % 2 == 0 ? 1 : lanes_ - 1;
        for (int i = 0; i < parts_; ++i) {
            const int part = (worker + i) % parts_;
            if (i > 0 && !team_.helps(worker, part)) continue;
            const int home = std::min(place * lanes_ / workers_of(part), lanes_ - 1);
            for (int l = 0; l < lanes_; ++l) work_in(part, (home + l * direction) % lanes_, i == 0 && l == 0, do_task);
        }
    }

  private:
    template <typename Do>
    void work_in(int part, int lane, bool own, const Do& do_task) {
        const int first = begin(lane), width = begin(lane + 1) - first, count = rows_ * width;
        const int together = at_home(part, lane);
        std::atomic<int>& taken = taken_[part * lanes_ + lane].value;
        // The load first, because a fetch_add takes ownership of the cache line even when no task is left.
        while (taken.load(std::memory_order_relaxed) < count) {
            const int i = taken.fetch_add(1, std::memory_order_relaxed), next = i + together;
            if (i >= count) return;
            const bool known = own && next < count;
            do_task(Task{part, i / width, first + i % width, known ? next / width : -1, first + next % width});
        }
    }
    int begin(int lane) const { return static_cast<int>(static_cast<std::int64_t>(lane) * columns_ / lanes_); }
    // Workers of a part; at least 1.
    int workers_of(int part) const { return std::max(1, (workers_ - part + parts_ - 1) / parts_); }
    // How many workers begin in a lane: those with place * lanes / workers == lane.
    int at_home(int part, int lane) const {
        const int workers = workers_of(part);
        const auto first_place = [&](int l) { return (l * workers + lanes_ - 1) / lanes_; };
        return first_place(lane + 1) - first_place(lane);
    }

    const Team& team_;
    const int parts_, workers_, rows_, columns_, lanes_ = std::clamp(columns_, 1, workers_of(0));
    std::vector<Counter> taken_ = std::vector<Counter>(parts_ * lanes_);
};

// Puts additions to one array into the order of a queue's rows, whichever workers compute them, so that fp32 sums have
// the same bits for any number of threads. The array of a task is that of its part and column. A column's tasks are begun
// in the order of the rows, so the task that wait() waits for is always running already.
class Turns {
  public:
    Turns(int parts, int columns) : columns_(columns), next_row_(parts * columns) {}
    // Returns when the tasks of all earlier rows have passed.
    void wait(const Task& task);
    void pass(const Task& task);

  private:
    std::atomic<int>& next_row(const Task& task) { return next_row_[task.part * columns_ + task.column].value; }
    int columns_;
    std::vector<Counter> next_row_;
};

}  // namespace ktv
