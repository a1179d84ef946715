// More workers than processors: layers with 8 to 64 workers give the bits of one worker, and end.
#include <sched.h>

#include "problem.hpp"
#include "process.hpp"

using namespace ktv;

// In place of the C library's: the engine takes no more workers than there are processors, and this machine may have two.
extern "C" int sched_getaffinity(pid_t, std::size_t size, cpu_set_t* set) noexcept {
    CPU_ZERO_S(size, set);
    for (int cpu = 0; cpu < 64; ++cpu) CPU_SET_S(cpu, size, set);
    return 0;
}

int main() {
    read_system_below("/proc/self/task");  // names no NUMA nodes, which would have fewer processors
    const std::string best = available_isas().front();
    for (const Shape& shape : std::vector<Shape>{
             {6, 3, 96, 64, 37, 4, 1, false},   // more workers than strips, experts and groups
             {6, 3, 96, 64, 37, 4, 2, false},   // parts
             {1, 1, 64, 96, 530, 4, 3, true},   // one expert: every sum waits for no other, three chunks of rows
             {40, 4, 160, 64, 50, 8, 1, false}  // many experts: long chains of turns
         }) {
        Problem problem(shape);
        const auto wanted = problem.run(*problem.layer(best, 1));
        for (const int workers : {8, 23, 60, 64}) {
            const auto layer = problem.layer(best, workers);
            check(layer->threads() == workers, "%d workers: got %d", workers, layer->threads());
            bool same = true;
            for (int repeat = 0; repeat < 5; ++repeat) same &= problem.run(*layer) == wanted;
            check(same, "E=%d T=%d parts=%d: the bits of %d workers", shape.E, shape.T, shape.parts, workers);
            // the next number has a team of its own; 64 sleeping workers are no test
            process().teams.clear();
        }
    }
    return finish();
}
