// Multiresolution hash encoding: forward and both backward passes over points [S, 3].
#include "hashgrid.h"

namespace {

template <int F>
void forward(const float* positions, int64_t count, const float* table, const HashGrid& grid, float* out, int threads) {
    const int levels = grid.levels;
    parallel_for(count, grain_for(count, threads), threads, [=, &grid](int64_t first, int64_t last) {
        const Axes axes(positions, first, last);
        const int64_t padded = axes.axis[1] - axes.axis[0];
        // Features of a level are buffered: writing them straight to `out` would move all of it once a level.
        const int64_t row = (padded + LANES) * F;
        const std::unique_ptr<float[]> features(new float[levels * row]);
        encode_levels<F>(axes.axis, padded, table, grid, features.get(), row);
        const float* from = features.get();
        float* to = out + first * levels * F;
        for (int64_t i = 0; i < last - first; ++i, from += F)
            for (int64_t at = 0; at < levels * row; at += row, to += F) std::memcpy(to, from + at, F * sizeof(float));
    });
}

// [S, L, F] to [L, S, F], so that a level reads its gradients in one stream.
template <int F>
std::vector<float> group_by_level(const float* grad, int64_t count, int levels, int threads) {
    std::vector<float> grouped(static_cast<size_t>(count) * levels * F);
    parallel_for(count, grain_for(count, threads), threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            for (int l = 0; l < levels; ++l)
                std::memcpy(&grouped[(l * count + i) * F], grad + (i * levels + l) * F, F * sizeof(float));
    });
    return grouped;
}

template <int F>
void backward_table(const float* grad, const float* positions, int64_t count, const HashGrid& grid, float* grad_table,
                    int threads) {
    const Axes axes(positions, 0, count);
    const std::vector<float> grouped = group_by_level<F>(grad, count, grid.levels, threads);
    scatter_levels<F>(axes.axis, count, grid, grouped.data(), count * F, grad_table, threads);
}

// d out / d x_k = scale * sum over corners of (+1 | -1 on x_k's far | near side) * (the other axes' weights) * entry.
template <int F>
inline void slope(const Cells& cells, const Level& level, const float* table, const float* grad, int64_t stride,
                  int count, float* const sums[3]) {
    alignas(64) float value[CORNERS][LANES] = {};
    for (int i = 0; i < count; ++i)
        for (int c = 0; c < CORNERS; ++c) {
            const float* entry = table + static_cast<size_t>(cells.index[c][i]) * F;
            for (int f = 0; f < F; ++f) value[c][i] += grad[i * stride + f] * entry[f];
        }
    for (int k = 0; k < 3; ++k) {
        const int u = (k + 1) % 3, v = (k + 2) % 3;
        for (int c = 0; c < CORNERS; ++c) {
            if (c >> k & 1) continue;
            for (int i = 0; i < LANES; ++i) {
                const float a = c >> u & 1 ? cells.fraction[u][i] : 1.0f - cells.fraction[u][i];
                const float b = c >> v & 1 ? cells.fraction[v][i] : 1.0f - cells.fraction[v][i];
                sums[k][i] += level.scale * a * b * (value[c | 1 << k][i] - value[c][i]);
            }
        }
    }
}

template <int F>
void backward_positions(const float* grad, const float* positions, int64_t count, const float* table,
                        const HashGrid& grid, float* grad_positions, int threads) {
    const int64_t stride = static_cast<int64_t>(grid.levels) * F;
    parallel_for(count, grain_for(count, threads), threads, [&](int64_t first, int64_t last) {
        const Axes axes(positions, first, last);
        const int64_t padded = axes.axis[1] - axes.axis[0];
        std::vector<float> sums(3 * padded);
        Cells cells;
        for (int l = 0; l < grid.levels; ++l) {
            const Level level = level_of(grid, l);
            for (int64_t at = 0; at < last - first; at += LANES) {
                find_cells(level, axes.axis, at, cells);
                const int lanes = static_cast<int>(std::min<int64_t>(LANES, last - first - at));
                float* const here[3] = {&sums[at], &sums[padded + at], &sums[2 * padded + at]};
                const float* const level_grad = grad + (first + at) * stride + l * F;
                slope<F>(cells, level, table + level.offset * F, level_grad, stride, lanes, here);
            }
        }
        for (int64_t i = 0; i < last - first; ++i)
            for (int k = 0; k < 3; ++k) {
                const float x = axes.axis[k][i];
                grad_positions[3 * (first + i) + k] = x < 0.0f || x > 1.0f ? 0.0f : sums[k * padded + i];
            }
    });
}

// Calls fn with the number of features as a compile-time constant.
template <typename Function>
void with_features(int features, const Function& fn) {
    if (features == 1) fn(std::integral_constant<int, 1>{});
    if (features == 2) fn(std::integral_constant<int, 2>{});
    if (features == 4) fn(std::integral_constant<int, 4>{});
    if (features == 8) fn(std::integral_constant<int, 8>{});
}

}  // namespace

EXPORT void hash_encode_forward(const float* positions, int64_t count, const float* table, const HashGrid* grid,
                                float* out, int threads) {
    with_features(grid->features, [&](auto f) { forward<f()>(positions, count, table, *grid, out, threads); });
}

// grad_table must be zero on entry.
EXPORT void hash_encode_backward_table(const float* grad, const float* positions, int64_t count, const HashGrid* grid,
                                       float* grad_table, int threads) {
    with_features(grid->features,
                  [&](auto f) { backward_table<f()>(grad, positions, count, *grid, grad_table, threads); });
}

EXPORT void hash_encode_backward_positions(const float* grad, const float* positions, int64_t count, const float* table,
                                           const HashGrid* grid, float* grad_positions, int threads) {
    with_features(grid->features, [&](auto f) {
        backward_positions<f()>(grad, positions, count, table, *grid, grad_positions, threads);
    });
}
