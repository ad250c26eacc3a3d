// Grid traversal and packed volume rendering; custom_kernels/rendering.py states what they compute and holds the torch reference.
#include <cmath>
#include <limits>

#include "common.h"

namespace {

// Cell walls are moved early by this part of a step: rounding may check a cell twice, but never assigns a step to the wrong cell.
constexpr double kEarly = 1e-6;

// A ray in the coordinates of the grid: level l covers [-2^l, 2^l]^3. All is computed in double, so that the cell of a midpoint does not
// depend on the instruction set, the thread or fused multiply-add (except for ties within 1e-16).
struct Ray {
    double o[3], d[3], inverse[3];
};

struct Grid {
    const uint8_t* occupied;  // [levels, resolution, resolution, resolution]
    const uint8_t* blocks;    // whether any of 4^3 cells is occupied: [levels, b, b, b], b = ceil(resolution / 4)
    int levels, resolution;
    double centre[3], half[3], cell;  // cell: edge of a cell of level 0
};

struct Steps {
    double size, cone, inverse;
    double at(double t) const { return std::max(size, cone * t); }
};

struct Cell {
    bool inside, occupied;
    double scale;  // half extent of the level
    int index[3], width;  // first cell, and edge in cells: 1, or 4 for an empty block
};

Grid make_grid(const uint8_t* occupied, const uint8_t* blocks, int levels, int resolution, const float* aabb) {
    Grid grid{occupied, blocks, levels, resolution, {}, {}, 2.0 / resolution};
    for (int i = 0; i < 3; ++i) {
        grid.centre[i] = (double(aabb[i]) + double(aabb[i + 3])) / 2;
        grid.half[i] = (double(aabb[i + 3]) - double(aabb[i])) / 2;
    }
    return grid;
}

Ray make_ray(const Grid& grid, const float* o, const float* d) {
    Ray ray;
    for (int i = 0; i < 3; ++i) {
        ray.o[i] = (double(o[i]) - grid.centre[i]) / grid.half[i];
        ray.d[i] = double(d[i]) / grid.half[i];
        ray.inverse[i] = 1 / ray.d[i];
    }
    return ray;
}

Cell find_cell(const Grid& grid, const Ray& ray, double t) {
    double p[3], extent = 0;
    for (int i = 0; i < 3; ++i) {
        p[i] = ray.o[i] + ray.d[i] * t;
        extent = std::max(extent, std::abs(p[i]));
    }
    Cell cell{false, false, 1, {}, 1};
    int level = 0;
    double inverse = 1;
    for (; level < grid.levels - 1 && extent > cell.scale; ++level) cell.scale *= 2, inverse *= 0.5;
    if (!(extent <= cell.scale)) return cell;
    cell.inside = true;
    const int64_t n = grid.resolution, b = (n + 3) / 4;
    int* x = cell.index;
    for (int i = 0; i < 3; ++i) x[i] = std::min(int((p[i] * inverse + 1) * 0.5 * n), grid.resolution - 1);
    if (grid.blocks[((level * b + x[0] / 4) * b + x[1] / 4) * b + x[2] / 4]) {
        cell.occupied = grid.occupied[((level * n + x[0]) * n + x[1]) * n + x[2]];
    } else {
        for (int i = 0; i < 3; ++i) x[i] &= ~3;
        cell.width = 4;
    }
    return cell;
}

double leave_cell(const Grid& grid, const Ray& ray, const Cell& cell) {
    double t = std::numeric_limits<double>::infinity();
    for (int i = 0; i < 3; ++i) {
        if (ray.d[i] == 0) continue;
        const double wall = ((cell.index[i] + (ray.d[i] > 0) * cell.width) * grid.cell - 1) * cell.scale;
        t = std::min(t, (wall - ray.o[i]) * ray.inverse[i]);
    }
    return t;
}

// Where the ray enters and leaves the outermost level; enter > leave if it misses, leave = -inf if it is not a finite ray.
void clip(const Grid& grid, const Ray& ray, double* enter, double* leave) {
    const double reach = std::ldexp(1.0, grid.levels - 1);
    for (int i = 0; i < 3; ++i) {
        const bool finite = std::isfinite(ray.o[i]) && std::isfinite(ray.d[i]);
        if (!finite || (ray.d[i] == 0 && std::abs(ray.o[i]) > reach)) *leave = -std::numeric_limits<double>::infinity();
        if (!finite || ray.d[i] == 0) continue;
        const double near = (-reach - ray.o[i]) * ray.inverse[i], far = (reach - ray.o[i]) * ray.inverse[i];
        *enter = std::max(*enter, std::min(near, far));
        *leave = std::min(*leave, std::max(near, far));
    }
}

// The first step, after at least one, whose midpoint is not before `target`.
double skip(const Steps& steps, double t, double target) {
    if (steps.cone == 0) return t + std::max(1.0, std::ceil((target - t) * steps.inverse - 0.5)) * steps.size;
    do t += steps.at(t);
    while (t + 0.5 * steps.at(t) < target);
    return t;
}

// Calls emit(t, dt) for each step with an occupied midpoint before t_max, in order, until it returns false.
template <typename Emit>
void walk(const Grid& grid, const Ray& ray, const Steps& steps, double t, double t_max, const Emit& emit) {
    double enter = -std::numeric_limits<double>::infinity();
    clip(grid, ray, &enter, &t_max);
    while (t + 0.5 * steps.at(t) < t_max) {  // written so that NaN ends the loop
        const Cell cell = find_cell(grid, ray, t + 0.5 * steps.at(t));
        const double leave = (cell.inside ? leave_cell(grid, ray, cell) : enter) - kEarly * steps.size;
        if (!cell.occupied) {
            t = skip(steps, t, leave);
            continue;
        }
        const double until = std::min(leave, t_max);
        do {
            const double dt = steps.at(t);
            if (!emit(t, dt)) return;
            t += dt;
        } while (t + 0.5 * steps.at(t) < until);
    }
}

}  // namespace

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
