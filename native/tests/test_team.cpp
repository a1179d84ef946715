// Workers: which tasks a worker gets, in which order, and the order that Turns keeps.
#include <algorithm>
#include <atomic>
#include <vector>

#include "check.hpp"
#include "team.hpp"

using namespace ktv;

namespace {

// The tasks of a queue from which only one worker takes, in its order.
std::vector<Task> tasks_of(const Team& team, int worker, int parts, int rows, int columns) {
    TaskQueue queue(parts, team, rows, columns);
    std::vector<Task> found;
    queue.work(worker, [&](const Task& task) { found.push_back(task); });
    return found;
}

// Every task comes once, and the tasks of a column in the order of its rows, whichever worker takes them. A worker begins
// in its own part. It goes on in the others unless those have workers and memory of their own. What is announced as its
// next task is what it gets when all workers that begin in its lane take turns.
void test_tasks(int workers, int parts, int rows, int columns) {
    Team team(workers, std::vector<Home>(parts));
    char what[96];
    std::snprintf(what, sizeof what, "%d workers, %d parts, %d rows of %d tasks", workers, parts, rows, columns);
    const std::size_t count = parts * rows * columns;
    std::vector<std::vector<Task>> alone;
    for (int worker = 0; worker < workers; ++worker) alone.push_back(tasks_of(team, worker, parts, rows, columns));
    for (int worker = 0; worker < workers; ++worker) {
        const std::vector<Task>& mine = alone[worker];
        std::vector<int> begun(parts * columns);
        bool in_order = mine.size() == count;
        for (const Task& task : mine) in_order &= begun[task.part * columns + task.column]++ == task.row;
        if (!check(in_order, "%s: rows in order", what)) return;  // together the workers would wait for ever
        if (count == 0) continue;
        const std::size_t together = std::count_if(alone.begin(), alone.end(), [&](const std::vector<Task>& other) {
            return other[0].part == mine[0].part && other[0].column == mine[0].column;
        });
        // All but the last `together` tasks of its lane are announced. The number of lanes gives their width within one.
        const int lanes = std::min(columns, (workers + parts - 1) / parts);
        std::size_t announced = 0;
        bool foretold = mine[0].part == worker % parts;
        for (std::size_t i = 0; i < mine.size(); ++i) {
            if (mine[i].next_row < 0) continue;
            ++announced;
            foretold = foretold && i + together < mine.size() && mine[i].next_row == mine[i + together].row &&
                       mine[i].next_column == mine[i + together].column;
        }
        const std::size_t narrow = rows * (columns / lanes), wide = rows * ((columns + lanes - 1) / lanes);
        foretold &= announced > 0 ? announced + together == narrow || announced + together == wide : narrow <= together;
        check(foretold, "%s: next of worker %d", what, worker);
    }
    TaskQueue queue(parts, team, rows, columns);
    Turns turns(parts, columns);
    std::vector<std::atomic<int>> done(count), next_row(parts * columns);
    std::atomic<bool> in_turn = true;
    team.run([&](int worker) {
        queue.work(worker, [&](const Task& task) {
            turns.wait(task);
            if (next_row[task.part * columns + task.column]++ != task.row) in_turn = false;
            ++done[(task.part * rows + task.row) * columns + task.column];
            turns.pass(task);
        });
    });
    check(std::all_of(done.begin(), done.end(), [](const auto& n) { return n == 1; }), "%s: each once", what);
    check(in_turn, "%s: in the order of the rows", what);
}

}  // namespace

int main() {
    for (const int workers : {1, 2, 3, 7}) {
        for (const int parts : {1, 2, 3}) {
            for (const int rows : {0, 1, 5}) {
                for (const int columns : {0, 1, 2, 5, 24}) test_tasks(workers, parts, rows, columns);
            }
        }
    }
    return finish();
}
