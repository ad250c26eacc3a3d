// Grid traversal and packed volume rendering; custom_kernels/rendering.py states what they compute and holds the torch reference.
#include "march.h"

// First pass: the number of samples of each ray, and where its first one starts (the second pass begins there).
EXPORT void march_count(const float* rays_o, const float* rays_d, const float* t_min, const float* t_max, const float* jitter, int64_t rays,
                        const uint8_t* occupied, const uint8_t* blocks, int levels, int resolution, const float* aabb,
                        double step, double cone, int64_t max_samples, int64_t* counts, double* first, int threads) {
    const Grid grid = make_grid(occupied, blocks, levels, resolution, aabb);
    const Steps steps{step, cone, 1 / step};
    parallel_for(rays, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const double start = double(t_min[r]) + double(jitter[r]) * steps.at(t_min[r]);
            int64_t count = 0;
            walk(grid, make_ray(grid, rays_o + 3 * r, rays_d + 3 * r), steps, start, t_max[r], [&](double t, double) {
                if (count == 0) first[r] = t;
                return ++count < max_samples;
            });
            counts[r] = count;
        }
    });
}

// Second pass: writes the samples counted by the first; packed is [rays, 2] of (start, count).
EXPORT void march_fill(const float* rays_o, const float* rays_d, const float* t_max, int64_t rays, const uint8_t* occupied,
                       const uint8_t* blocks, int levels, int resolution, const float* aabb, double step, double cone, const int64_t* packed, const double* first,
                       float* t_starts, float* t_ends, int64_t* ray_indices, int threads) {
    const Grid grid = make_grid(occupied, blocks, levels, resolution, aabb);
    const Steps steps{step, cone, 1 / step};
    parallel_for(rays, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            int64_t k = packed[2 * r];
            const int64_t last = k + packed[2 * r + 1];
            if (k == last) continue;
            walk(grid, make_ray(grid, rays_o + 3 * r, rays_d + 3 * r), steps, first[r], t_max[r], [&](double t, double dt) {
                t_starts[k] = float(t);
                t_ends[k] = float(t + dt);
                ray_indices[k] = r;
                return ++k < last;
            });
        }
    });
}

// transmittance[k] is the light left behind sample k; the backward pass needs it.
EXPORT void composite_forward(const float* sigmas, const float* rgbs, const float* t_starts, const float* t_ends, const int64_t* packed,
                              int64_t rays, float* rgb, float* depth, float* opacity, float* weights, float* transmittance, int threads) {
    parallel_for(rays, 128, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t first = packed[2 * r], last = first + packed[2 * r + 1];
            float left = 1, sum[5] = {};
            for (int64_t k = first; k < last; ++k) {
                const float alpha = -std::expm1(-sigmas[k] * (t_ends[k] - t_starts[k]));
                const float w = left * alpha;
                weights[k] = w;
                transmittance[k] = left *= 1 - alpha;
                for (int c = 0; c < 3; ++c) sum[c] += w * rgbs[3 * k + c];
                sum[3] += w * 0.5f * (t_starts[k] + t_ends[k]);
                sum[4] += w;
            }
            for (int c = 0; c < 3; ++c) rgb[3 * r + c] = sum[c];
            depth[r] = sum[3];
            opacity[r] = sum[4];
        }
    });
}

// With g_k = dL/dw_k:  dL/dsigma_k = dt_k (T_{k+1} g_k - sum_{j>k} w_j g_j),  dL/drgb_k = w_k dL/drgb.  The sum runs from back to front.
EXPORT void composite_backward(const float* rgbs, const float* t_starts, const float* t_ends, const int64_t* packed, int64_t rays,
                               const float* weights, const float* transmittance, const float* g_rgb, const float* g_depth,
                               const float* g_opacity, const float* g_weights, float* g_sigmas, float* g_rgbs, int threads) {
    parallel_for(rays, 128, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t first = packed[2 * r], last = first + packed[2 * r + 1];
            float behind = 0;
            for (int64_t k = last - 1; k >= first; --k) {
                float g = g_weights[k] + g_opacity[r] + g_depth[r] * 0.5f * (t_starts[k] + t_ends[k]);
                for (int c = 0; c < 3; ++c) {
                    g += g_rgb[3 * r + c] * rgbs[3 * k + c];
                    g_rgbs[3 * k + c] = weights[k] * g_rgb[3 * r + c];
                }
                g_sigmas[k] = (t_ends[k] - t_starts[k]) * (transmittance[k] * g - behind);
                behind += weights[k] * g;
            }
        }
    });
}
