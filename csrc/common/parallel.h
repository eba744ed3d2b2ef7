// Threads that stay, for loops of a few microseconds: those of torch's OpenMP where they spin, else of our own.
#pragma once

#include <cstdint>

// Calls run(context, task) once for each task in [0, tasks), on up to `threads` threads, the caller being one of them.
// Tasks are handed out in ascending order to whichever thread is free, so results must not depend on who ran what. `run` may
// not throw. A call from within a task, or while another thread's call is under way, runs on the caller alone. Works after
// fork().
void case_fast_parallel(int threads, int64_t tasks, void (*run)(void *context, int64_t task), void *context);

template <class Task>
void case_fast_parallel(int threads, int64_t tasks, Task task) {
    case_fast_parallel(threads, tasks, [](void *context, int64_t i) { (*static_cast<Task *>(context))(i); }, &task);
}
