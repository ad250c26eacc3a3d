// The ray loop: all rays march a few steps, the field's density is evaluated there, and a ray ends when its light is gone, so that little
// behind a surface is ever evaluated. custom_kernels/trace.py states what it finds.
//
// Rays go in waves rather than one by one: the samples of a wave are many, and the encoding is fast for many.
#include <vector>

#include "field.h"
#include "march.h"

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
    std::unique_ptr<float[]> unit, features, out;
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
        wave.unit.reset(new float[3 * padded]);
        wave.features.reset(new float[field.grid.levels * padded * GRID_FEATURES]);
        wave.out.reset(new float[count * out_width(field)]);
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
            if (!with_features) wave.features.reset(), wave.unit.reset();
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

void copy_wave(const Wave& wave, const Found& found, const Encoded& to, const std::vector<int64_t>& first, int levels, int width, int threads) {
    parallel_for(static_cast<int64_t>(wave.rays.size()), RAY_GRAIN, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t from = wave.first[i], at = first[wave.rays[i]], kept = wave.kept[i], padded = wave.padded();
            std::copy_n(wave.starts.data() + from, kept, found.starts + at);
            std::copy_n(wave.ends.data() + from, kept, found.ends + at);
            std::copy_n(wave.seen.data() + from, kept, found.seen + at);
            std::copy_n(wave.sigma.data() + from, kept, to.sigma + at);
            std::fill_n(found.ray_indices + at, kept, wave.rays[i]);
            std::copy_n(wave.out.get() + from * width, kept * width, to.out + at * width);
            if (!wave.features) continue;
            for (int k = 0; k < 3; ++k) std::copy_n(&wave.unit[k * padded] + from, kept, to.unit + k * to.padded + at);
            for (int l = 0; l < levels; ++l)
                std::copy_n(&wave.features[(l * padded + from) * GRID_FEATURES], kept * GRID_FEATURES, to.features + (l * to.padded + at) * GRID_FEATURES);
        }
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

// Writes the lit samples and forgets the trace. encoded->unit and features are written if they were asked for.
EXPORT void trace_take(void* held, const Found* found, const Encoded* encoded) {
    const std::unique_ptr<Trace> trace(static_cast<Trace*>(held));
    std::vector<int64_t> first(trace->rays.count);
    for (int64_t r = 0; r < trace->rays.count; ++r) first[r] = found->packed[2 * r];
    for (Wave& wave : trace->waves) {
        copy_wave(wave, *found, *encoded, first, trace->field.grid.levels, out_width(trace->field), trace->threads);
        for (size_t i = 0; i < wave.rays.size(); ++i) first[wave.rays[i]] += wave.kept[i];
        wave = Wave();  // its memory is not needed any more
    }
    for (int k = 0; k < 3 && encoded->unit; ++k)
        std::fill(encoded->unit + k * encoded->padded + encoded->count, encoded->unit + (k + 1) * encoded->padded, 0.0f);
}
