#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <strings.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

constexpr int max_workers = 255;
constexpr int spins = 5000;  // pauses before a worker sleeps: some 100 us, for forward to backward take Python that long

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// The tasks of one call.
struct Loop {
    void (*run)(void *, int64_t) = nullptr;
    void *context = nullptr;
    int64_t tasks = 0;
    std::atomic<int64_t> next{0};

    void drain() {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(context, task);
    }
};

struct Pool {
    std::mutex busy;  // held by the caller whose tasks run
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<uint64_t> calls{0};  // changes with each call; what workers spin on
    std::atomic<int> inside{0};      // workers at work on the present call
    int workers = 0, wanted = 0;     // started; still welcome in the present call
    Loop loop;                       // of the present call

    void work() {
        uint64_t seen = 0;
        for (;;) {
            for (int i = 0; i < spins && calls.load(std::memory_order_relaxed) == seen; ++i) pause_briefly();
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return calls.load(std::memory_order_relaxed) != seen; });
                seen = calls.load(std::memory_order_relaxed);
                if (wanted == 0) continue;
                --wanted;
                inside.fetch_add(1, std::memory_order_relaxed);
            }
            loop.drain();
            inside.fetch_sub(1, std::memory_order_release);
        }
    }

    void grow(int count) {  // as far as the system lets us
        try {
            for (; workers < count; ++workers) std::thread(&Pool::work, this).detach();
        } catch (const std::system_error &) {
        } catch (const std::bad_alloc &) {
        }
    }
};

// Never freed: its detached workers sleep until the process ends. A forked child has no workers and starts a pool of its own.
std::atomic<Pool *> pool{nullptr};
std::atomic<bool> forked{false};
thread_local bool within = false;

const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
    pool.store(nullptr);
    forked.store(true);
});

Pool *the_pool() {
    Pool *now = pool.load(std::memory_order_acquire);
    if (now) return now;
    Pool *fresh = new (std::nothrow) Pool;
    if (fresh && pool.compare_exchange_strong(now, fresh)) return fresh;
    delete fresh;
    return now;
}

// The OpenMP team that torch works with, where there is one in this process: its threads spin for milliseconds after each of
// torch's loops, and threads of our own would have to share the cores with them. Not where they sleep instead, since ours wake
// sooner; and not in a forked child, which OpenMP's threads do not follow.
using Team = void (*)(void (*)(void *), void *, unsigned, unsigned);  // body, its argument, threads, flags
Team find_openmp_team() {
    const char *const policy = std::getenv("OMP_WAIT_POLICY");
    return policy && strcasecmp(policy, "passive") == 0 ? nullptr : reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}
Team openmp_team() {
    static const Team found = find_openmp_team();
    return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

void drain(void *loop) {
    within = true;
    static_cast<Loop *>(loop)->drain();
    within = false;
}

}  // namespace

void case_fast_parallel(int threads, int64_t tasks, void (*run)(void *, int64_t), void *context) {
    const int helpers = int(std::min<int64_t>({int64_t(threads) - 1, tasks - 1, max_workers}));
    const bool shares = helpers > 0 && !within;
    if (const Team team = shares ? openmp_team() : nullptr) {
        Loop loop = {run, context, tasks, {0}};
        return team(&drain, &loop, unsigned(threads), 0);  // all of them: a smaller team would end the threads it leaves out
    }
    Pool *const p = shares ? the_pool() : nullptr;
    std::unique_lock<std::mutex> busy;
    if (p) busy = std::unique_lock<std::mutex>(p->busy, std::try_to_lock);
    if (!busy.owns_lock()) {
        for (int64_t task = 0; task < tasks; ++task) run(context, task);
        return;
    }
    p->grow(helpers);
    {
        std::lock_guard<std::mutex> lock(p->mutex);
        p->loop.run = run;
        p->loop.context = context;
        p->loop.tasks = tasks;
        p->loop.next.store(0, std::memory_order_relaxed);
        p->wanted = helpers;
        p->calls.fetch_add(1, std::memory_order_relaxed);
    }
    helpers == 1 && p->workers == 1 ? p->wake.notify_one() : p->wake.notify_all();
    drain(&p->loop);
    {
        std::lock_guard<std::mutex> lock(p->mutex);
        p->wanted = 0;  // who has not come by now finds nothing to do
    }
    for (int i = 0; p->inside.load(std::memory_order_acquire) != 0; ++i) {
        if (i < 10 * spins)
            pause_briefly();
        else
            std::this_thread::yield();
    }
}
