// The ray loop: all rays march a few steps, the field's density is evaluated there, and a ray ends when its light is gone, so that little
// behind a surface is ever evaluated. custom_kernels/trace.py states what it finds.
//
// Rays go in waves rather than one by one: the samples of a wave are many, and the encoding is fast for many.
#include <vector>

#include "field.h"
#include "march.h"
#include "scratch.h"

namespace {

constexpr int WAVE = 8;  // most samples of a ray and wave: more would evaluate more behind surfaces, fewer would waste more starts
constexpr int64_t RAY_GRAIN = 64;

struct Rays {  // mirrored by _Rays in custom_kernels/trace.py
    int64_t count;
    const float *o, *d, *t_min, *t_max, *jitter;  // [R, 3] twice, [R] thrice
    const uint8_t *occupied, *blocks;
    int32_t levels, resolution;
    const float* aabb;
    double step, cone;
    int64_t max_samples;
    float early_stop;
};

// Samples of the rays that are still lit, ray by ray.
struct Wave {
    std::vector<int64_t> rays, first;  // first [rays + 1]: where each ray's samples start
    std::vector<int> kept;             // of each ray: the first so many of its samples are lit
    std::vector<float> starts, ends, sigma;
    std::vector<uint8_t> seen;
    Scratch unit, features, out;
    int64_t count() const { return first.back(); }
    int64_t padded() const { return (count() + LANES - 1) / LANES * LANES; }
};

struct Trace {
    const Field& field;
    const Rays& rays;
    const Networks networks;
    const Grid grid;
    const Steps steps;
    const int threads;
    std::vector<double> t;        // where each ray's next step starts
    std::vector<float> light;     // what is left of it there
    std::vector<int64_t> counts;  // lit samples so far
    std::vector<Wave> waves;

    Trace(const Field& field, const Rays& rays, int threads)
        : field(field), rays(rays), networks(field), grid(make_grid(rays.occupied, rays.blocks, rays.levels, rays.resolution, rays.aabb)),
          steps{rays.step, rays.cone, 1 / rays.step}, threads(threads), t(rays.count), light(rays.count, 1.0f), counts(rays.count) {
        for (int64_t r = 0; r < rays.count; ++r) t[r] = double(rays.t_min[r]) + double(rays.jitter[r]) * steps.at(rays.t_min[r]);
    }

    // Marches the rays `active` by up to WAVE samples each.
    Wave march(std::vector<int64_t> active) {
        const int64_t size = static_cast<int64_t>(active.size());
        Wave wave{std::move(active), std::vector<int64_t>(size + 1), std::vector<int>(size), {}, {}, {}, {}, {}, {}, {}};
        std::vector<float> starts(size * WAVE), ends(size * WAVE);
        parallel_for(size, RAY_GRAIN, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t r = wave.rays[i], most = std::min<int64_t>(WAVE, rays.max_samples - counts[r]);
                int64_t found = 0;
                double next = t[r];
                walk(grid, make_ray(grid, rays.o + 3 * r, rays.d + 3 * r), steps, t[r], rays.t_max[r], [&](double at, double dt) {
                    starts[i * WAVE + found] = float(at);
                    ends[i * WAVE + found] = float(at + dt);
                    next = at + dt;
                    return ++found < most;
                });
                t[r] = next;
                wave.first[i + 1] = found;
            }
        });
        for (int64_t i = 0; i < size; ++i) wave.first[i + 1] += wave.first[i];
        wave.starts.resize(wave.count());
        wave.ends.resize(wave.count());
        for (int64_t i = 0; i < size; ++i) {
            const int64_t found = wave.first[i + 1] - wave.first[i];
            std::copy_n(&starts[i * WAVE], found, wave.starts.begin() + wave.first[i]);
            std::copy_n(&ends[i * WAVE], found, wave.ends.begin() + wave.first[i]);
        }
        return wave;
    }

    // Evaluates the density of a wave's samples.
    void evaluate(Wave& wave) {
        const int64_t count = wave.count(), padded = wave.padded();
        wave.unit = Scratch(3 * padded);
        wave.features = Scratch(field.grid.levels * padded * GRID_FEATURES);
        wave.out = Scratch(count * out_width(field));
        wave.sigma.resize(count);
        std::vector<float> bias(field.blob_scale ? count : 0);
        parallel_for(static_cast<int64_t>(wave.rays.size()), RAY_GRAIN, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const float *o = rays.o + 3 * wave.rays[i], *d = rays.d + 3 * wave.rays[i];
                for (int64_t s = wave.first[i]; s < wave.first[i + 1]; ++s) {
                    const float middle = (wave.starts[s] + wave.ends[s]) / 2.0f;
                    const float at[3] = {o[0] + d[0] * middle, o[1] + d[1] * middle, o[2] + d[2] * middle};
                    float unit[3];
                    const float added = place(field, at, unit);
                    for (int k = 0; k < 3; ++k) wave.unit[k * padded + s] = unit[k];
                    if (field.blob_scale) bias[s] = added;
                }
            }
        });
        for (int k = 0; k < 3; ++k) std::fill(&wave.unit[k * padded] + count, &wave.unit[k * padded] + padded, 0.0f);
        const Encoded encoded{count, padded, wave.unit.get(), wave.features.get(), wave.out.get(), wave.sigma.data()};
        density_pass(field, networks, encoded, bias.empty() ? nullptr : bias.data(), threads);
    }

    // Follows the light through a wave; returns the rays that go on.
    std::vector<int64_t> absorb(Wave& wave) {
        const int64_t size = static_cast<int64_t>(wave.rays.size());
        wave.seen.resize(wave.count());
        std::vector<uint8_t> goes_on(size);
        parallel_for(size, RAY_GRAIN, threads, [&](int64_t begin, int64_t end) {
            alignas(64) float left[(WAVE + simd::WIDTH - 1) / simd::WIDTH * simd::WIDTH] = {};
            for (int64_t i = begin; i < end; ++i) {
                const int64_t r = wave.rays[i], first = wave.first[i], found = wave.first[i + 1] - first;
                for (int64_t k = 0; k < found; ++k) left[k] = -wave.sigma[first + k] * (wave.ends[first + k] - wave.starts[first + k]);
                for (int k = 0; k < WAVE; k += simd::WIDTH) simd::store(left + k, simd::exp(simd::load(left + k)));
                float here = light[r];
                int kept = 0;
                while (kept < found && here >= rays.early_stop) {
                    wave.seen[first + kept] = here * (1.0f - left[kept]) > rays.early_stop;
                    here *= left[kept++];
                }
                wave.kept[i] = kept;
                light[r] = here;
                counts[r] += kept;
                goes_on[i] = found == WAVE && here >= rays.early_stop && counts[r] < rays.max_samples;
            }
        });
        std::vector<int64_t> active;
        for (int64_t i = 0; i < size; ++i)
            if (goes_on[i]) active.push_back(wave.rays[i]);
        return active;
    }

    void run(bool with_features) {
        std::vector<int64_t> active(rays.count);
        for (int64_t r = 0; r < rays.count; ++r) active[r] = r;
        while (!active.empty()) {
            Wave wave = march(std::move(active));
            evaluate(wave);
            active = absorb(wave);
            if (!with_features) wave.features = Scratch(), wave.unit = Scratch();
            waves.push_back(std::move(wave));
        }
    }
};

struct Found {  // mirrored by _Found in custom_kernels/trace.py: the lit samples, rays in order and samples front to back
    const int64_t* packed;  // [R, 2] first and count
    float *starts, *ends;   // [S]
    int64_t* ray_indices;   // [S]
    uint8_t* seen;          // [S]
};

// A ray's lit samples of one wave, and where they go.
struct Segment {
    const Wave* wave;
    int64_t from, kept, at, ray;
};

// The segments of rays [begin, end), in the order of the samples.
std::vector<Segment> segments_of(const std::vector<Wave>& waves, const int64_t* packed, int64_t begin, int64_t end) {
    std::vector<int64_t> next(waves.size());  // of each wave, the first ray that is not passed
    for (size_t w = 0; w < waves.size(); ++w)  // a wave's rays ascend
        next[w] = std::lower_bound(waves[w].rays.begin(), waves[w].rays.end(), begin) - waves[w].rays.begin();
    std::vector<Segment> found;
    for (int64_t r = begin; r < end; ++r) {
        int64_t at = packed[2 * r];
        for (size_t w = 0; w < waves.size(); ++w) {
            const Wave& wave = waves[w];
            if (next[w] == static_cast<int64_t>(wave.rays.size()) || wave.rays[next[w]] != r) break;  // no later wave has it
            const int64_t i = next[w]++;
            found.push_back({&wave, wave.first[i], wave.kept[i], at, r});
            at += wave.kept[i];
        }
    }
    return found;
}

// Array by array, so that each is written in one stream.
void copy_segments(const std::vector<Segment>& segments, const Found& found, const Encoded& to, int levels, int width) {
    const auto each = [&](const auto& copy) {
        for (const Segment& x : segments) copy(x, *x.wave);
    };
    each([&](const Segment& x, const Wave& wave) {
        std::copy_n(wave.starts.data() + x.from, x.kept, found.starts + x.at);
        std::copy_n(wave.ends.data() + x.from, x.kept, found.ends + x.at);
        std::copy_n(wave.seen.data() + x.from, x.kept, found.seen + x.at);
        std::copy_n(wave.sigma.data() + x.from, x.kept, to.sigma + x.at);
        std::fill_n(found.ray_indices + x.at, x.kept, x.ray);
    });
    each([&](const Segment& x, const Wave& wave) { std::copy_n(wave.out.get() + x.from * width, x.kept * width, to.out + x.at * width); });
    for (int k = 0; k < 3 && to.padded; ++k)
        each([&](const Segment& x, const Wave& wave) {
            std::copy_n(wave.unit.get() + k * wave.padded() + x.from, x.kept, to.unit + k * to.padded + x.at);
        });
    for (int l = 0; l < levels && to.padded; ++l)
        each([&](const Segment& x, const Wave& wave) {
            const float* from = wave.features.get() + (l * wave.padded() + x.from) * GRID_FEATURES;
            std::copy_n(from, x.kept * GRID_FEATURES, to.features + (l * to.padded + x.at) * GRID_FEATURES);
        });
}

}  // namespace

// Traces rays; counts [R] of lit samples. The result is held for `trace_take`, which must be called once.
EXPORT void* trace_rays(const Field* field, const Rays* rays, int with_features, int64_t* counts, int threads) {
    Trace* trace = new Trace(*field, *rays, threads);
    trace->run(with_features != 0);
    std::copy(trace->counts.begin(), trace->counts.end(), counts);
    return trace;
}

// Writes the lit samples and forgets the trace. encoded->unit and features are written if they were asked for; else padded is 0.
EXPORT void trace_take(void* held, const Found* found, const Encoded* encoded) {
    const std::unique_ptr<Trace> trace(static_cast<Trace*>(held));
    parallel_for(trace->rays.count, RAY_GRAIN, trace->threads, [&](int64_t begin, int64_t end) {
        const std::vector<Segment> segments = segments_of(trace->waves, found->packed, begin, end);
        copy_segments(segments, *found, *encoded, trace->field.grid.levels, out_width(trace->field));
    });
    for (int k = 0; k < 3 && encoded->padded; ++k)
        std::fill(encoded->unit + k * encoded->padded + encoded->count, encoded->unit + (k + 1) * encoded->padded, 0.0f);
}
