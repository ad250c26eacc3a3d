// The march of a ray through nested occupancy grids; custom_kernels/rendering.py states what it finds and holds the torch reference.
#pragma once

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

inline Grid make_grid(const uint8_t* occupied, const uint8_t* blocks, int levels, int resolution, const float* aabb) {
    Grid grid{occupied, blocks, levels, resolution, {}, {}, 2.0 / resolution};
    for (int i = 0; i < 3; ++i) {
        grid.centre[i] = (double(aabb[i]) + double(aabb[i + 3])) / 2;
        grid.half[i] = (double(aabb[i + 3]) - double(aabb[i])) / 2;
    }
    return grid;
}

inline Ray make_ray(const Grid& grid, const float* o, const float* d) {
    Ray ray;
    for (int i = 0; i < 3; ++i) {
        ray.o[i] = (double(o[i]) - grid.centre[i]) / grid.half[i];
        ray.d[i] = double(d[i]) / grid.half[i];
        ray.inverse[i] = 1 / ray.d[i];
    }
    return ray;
}

inline Cell find_cell(const Grid& grid, const Ray& ray, double t) {
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

inline double leave_cell(const Grid& grid, const Ray& ray, const Cell& cell) {
    double t = std::numeric_limits<double>::infinity();
    for (int i = 0; i < 3; ++i) {
        if (ray.d[i] == 0) continue;
        const double wall = ((cell.index[i] + (ray.d[i] > 0) * cell.width) * grid.cell - 1) * cell.scale;
        t = std::min(t, (wall - ray.o[i]) * ray.inverse[i]);
    }
    return t;
}

// Where the ray enters and leaves the outermost level; enter > leave if it misses, leave = -inf if it is not a finite ray.
inline void clip(const Grid& grid, const Ray& ray, double* enter, double* leave) {
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
inline double skip(const Steps& steps, double t, double target) {
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
