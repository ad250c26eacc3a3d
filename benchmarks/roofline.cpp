// The limits of one core, as JSON on standard output: multiply-adds on registers in fp32 and bf16, loads in a row, and
// random reads and additions of 8-byte entries (two features of a hash grid) in tables of several sizes.
// By the thread's processor time, best of several. benchmarks/speed.py compiles and runs this: c++ -O3 -march=native.
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__x86_64__)
#define KEEP(x) asm volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define KEEP(x) asm volatile("" : "+w"(x))
#else
#define KEEP(x) asm volatile("" : "+m"(x))
#endif
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef float Pair __attribute__((vector_size(8)));
constexpr int ACCUMULATORS = 12;
volatile float sink;

static double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

template <class Run>
static double best(Run run, int rounds = 9) {
    double least = 1e9;
    for (int i = 0; i < rounds; ++i) {
        const double start = now();
        run();
        least = std::min(least, now() - start);
    }
    return least;
}

static double fp32() {
    const long count = 2000000;
    const double seconds = best([&] {
        Floats sums[ACCUMULATORS] = {}, x = Floats{} + 1.0000001f, y = Floats{} + 1e-9f;
        for (long i = 0; i < count; ++i) {
#pragma GCC unroll 12
            for (int k = 0; k < ACCUMULATORS; ++k) {
                sums[k] = sums[k] * x + y;
                KEEP(sums[k]);
            }
        }
#pragma GCC unroll 12
        for (int k = 1; k < ACCUMULATORS; ++k) sums[0] += sums[k];
        sink = sums[0][0];
    });
    return 2.0 * WIDTH * ACCUMULATORS * count / seconds;
}

static double bf16() {  // 0: this processor has none
#ifdef __AVX512BF16__
    const long count = 2000000;
    const double seconds = best([&] {
        __m512 sums[ACCUMULATORS] = {};
        const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80), y = (__m512bh)_mm512_set1_epi32(0x30803080);
        for (long i = 0; i < count; ++i) {
#pragma GCC unroll 12
            for (int k = 0; k < ACCUMULATORS; ++k) {
                sums[k] = _mm512_dpbf16_ps(sums[k], x, y);
                KEEP(sums[k]);
            }
        }
#pragma GCC unroll 12
        for (int k = 1; k < ACCUMULATORS; ++k) sums[0] += sums[k];
        sink = sums[0][0];
    });
    return 64.0 * ACCUMULATORS * count / seconds;
#else
    return 0;
#endif
}

static double loads(size_t bytes) {
    const size_t count = bytes / sizeof(Floats), passes = std::max<size_t>(1, (size_t(64) << 20) / bytes);
    std::vector<Floats> data(count, Floats{});
    return double(bytes) * passes / best([&] {
        Floats a = {}, b = {}, c = {}, d = {};
        for (size_t pass = 0; pass < passes; ++pass) {
            for (size_t i = 0; i + 3 < count; i += 4) {
                a += data[i], b += data[i + 1], c += data[i + 2], d += data[i + 3];
            }
            KEEP(a);
        }
        sink = (a + b + c + d)[0];
    }, 5);
}

static void random_access(size_t bytes, double& reads, double& additions) {
    const int count = 1 << 16, passes = 8;
    std::vector<Pair> table(bytes / sizeof(Pair), Pair{});
    std::vector<uint32_t> index(count);
    uint64_t state = 88172645463325252ull;
    for (auto& i : index) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        i = uint32_t(state >> 16) % table.size();
    }
    reads = passes * double(count) / best([&] {
        Pair a = {}, b = {}, c = {}, d = {};
        for (int pass = 0; pass < passes; ++pass) {
            for (int i = 0; i < count; i += 4) {
                a += table[index[i]], b += table[index[i + 1]], c += table[index[i + 2]], d += table[index[i + 3]];
            }
            asm volatile("" ::: "memory");
        }
        sink = (a + b + c + d)[0];
    });
    additions = passes * double(count) / best([&] {
        for (int pass = 0; pass < passes; ++pass) {
            for (int i = 0; i < count; ++i) table[index[i]] += Pair{1e-9f, 1e-9f};
            asm volatile("" ::: "memory");
        }
    });
}

int main() {
    std::printf("{\"fp32_gflop_per_s\": %.1f, \"bf16_gflop_per_s\": %.1f", fp32() / 1e9, bf16() / 1e9);
    for (size_t kib : {16, 512, 8192, 262144}) {
        std::printf(", \"loads_gbyte_per_s_%zu_kib\": %.1f", kib, loads(kib << 10) / 1e9);
    }
    for (size_t kib : {128, 512, 5120, 16384}) {
        double reads, additions;
        random_access(kib << 10, reads, additions);
        std::printf(", \"random_reads_m_per_s_%zu_kib\": %.0f, \"random_additions_m_per_s_%zu_kib\": %.0f", kib,
                    reads / 1e6, kib, additions / 1e6);
    }
    std::printf("}\n");
}
