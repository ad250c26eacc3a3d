// Shared by all kernels: exported symbols have C linkage and take plain pointers, so that one build works with every torch.
// Each source is compiled once per instruction set (see setup.py); custom_kernels/native.py loads the best one for the machine.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Runs fn(first, last) over [0, count) in chunks of `grain`, on `threads` threads. Chunk boundaries depend on `grain` alone and each
// chunk runs on one thread: results that depend only on the chunk are the same for any number of threads.
template <typename Function>
void parallel_for(int64_t count, int64_t grain, int threads, const Function& fn) {
    const int64_t chunks = (count + grain - 1) / grain;
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks;) fn(chunk * grain, std::min(count, (chunk + 1) * grain));
    };
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < std::min<int64_t>(threads, chunks); ++i) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
}
