// Hash encoding and density network in passes over tiles of samples: forward, and backward with the activations computed again.
//
// The encoding goes level by level over many samples, so that a level's table stays in the cache; the rest stays in a tile.
#include <cmath>

#include "field.h"
#include "scratch.h"

using dense::add_outer;
using dense::multiply;
using dense::Then;
using dense::TILE;
using simd::Buffer;
using simd::WIDTH;

namespace {

constexpr float EXP_CLAMP = 15.0f;  // of trunc_exp's gradient

// scale exp(x) where inside the box, else 0, for x [TILE] of the samples from `at` on.
void scaled_exp(const Field& field, const Encoded& encoded, int64_t at, int count, float* x) {
    for (int s = 0; s < TILE; s += WIDTH) simd::store(x + s, simd::exp(simd::load(x + s)) * field.density_scale);
    const float *u = encoded.unit + at, *v = u + encoded.padded, *w = v + encoded.padded;
    for (int s = 0; s < count && !field.unbounded; ++s) {
        const bool in = (u[s] >= 0.0f) & (u[s] <= 1.0f) & (v[s] >= 0.0f) & (v[s] <= 1.0f) & (w[s] >= 0.0f) & (w[s] <= 1.0f);
        x[s] = in ? x[s] : 0.0f;
    }
}

// Asks for the next tile's part of a level: the levels are too many short streams for the processor to foresee.
template <int WRITE>
void prefetch(const float* level) {
    for (int i = 0; i < TILE * GRID_FEATURES; i += 16) __builtin_prefetch(level + i, WRITE);
}

template <int LD>
struct DensityTile {
    Buffer encoded{TILE * LD}, hidden{TILE * LD}, out{TILE * LD};

    void load(const Field& field, const Encoded& from, int64_t at, int count) {
        float* e = encoded.get();
        for (int l = 0; l < field.grid.levels; ++l) {
            const float* level = from.features + (l * from.padded + at) * GRID_FEATURES;
            prefetch<0>(level + TILE * GRID_FEATURES);
            for (int s = 0; s < count; ++s)
                std::memcpy(e + s * LD + l * GRID_FEATURES, level + s * GRID_FEATURES, GRID_FEATURES * sizeof(float));
        }
        for (int s = count; s < TILE; ++s) std::memset(e + s * LD, 0, LD * sizeof(float));
    }

    void hide(const Field& field, const Layer& layer) {
        const int depth = field.grid.levels * GRID_FEATURES;  // what follows are zeros
        multiply<LD, Then::RELU>(encoded.get(), layer.forward.get(), layer.outputs, depth, layer.outputs, hidden.get(), hidden.get());
    }
};

// sigma = scale exp(raw − 1) inside, else 0; raw is the column after the colour's features.
template <int LD>
void write_density(const Field& field, const Encoded& to, const float* bias, int64_t at, int count, float* out) {
    const int width = out_width(field), raw = field.geo_features;
    alignas(64) float x[TILE];
    for (int s = 0; s < TILE; ++s) {
        if (bias && s < count) out[s * LD + raw] += bias[at + s];
        x[s] = out[s * LD + raw] - 1.0f;
    }
    scaled_exp(field, to, at, count, x);
    std::memcpy(to.sigma + at, x, count * sizeof(float));
    for (int s = 0; s < count; ++s) copy_row(to.out + (at + s) * width, out + s * LD, width);
}

template <int LD>
void density_tiles(const Field& field, const Networks& networks, const Encoded& encoded, const float* bias, int threads) {
    const Layer &first = networks.density[0], &second = networks.density[1];
    parallel_for(encoded.count, FORWARD_GRAIN, threads, [&](int64_t begin, int64_t end) {
        DensityTile<LD> tile;
        for (int64_t at = begin; at < end; at += TILE) {
            const int count = static_cast<int>(std::min<int64_t>(TILE, end - at));
            tile.load(field, encoded, at, count);
            tile.hide(field, first);
            multiply<LD, Then::STORE>(tile.hidden.get(), second.forward.get(), second.outputs, second.inputs, second.outputs, tile.out.get(), tile.out.get());
            write_density<LD>(field, encoded, bias, at, count, tile.out.get());
        }
    });
}

// The gradient of the density network's output, from those of sigma and of the colour's features.
template <int LD>
void load_out_gradient(const Field& field, const Encoded& encoded, const float* g_sigma, const float* g_out, int64_t at, int count, float* g) {
    const int width = out_width(field), raw = field.geo_features;
    alignas(64) float slope[TILE] = {};
    for (int s = 0; s < count; ++s) slope[s] = std::clamp(encoded.out[(at + s) * width + raw] - 1.0f, -EXP_CLAMP, EXP_CLAMP);
    scaled_exp(field, encoded, at, count, slope);
    for (int s = 0; s < TILE; ++s) {
        if (g_out && s < count) copy_row(g + s * LD, g_out + (at + s) * width, width);
        else std::memset(g + s * LD, 0, width * sizeof(float));
        if (s < count) g[s * LD + raw] += g_sigma[at + s] * slope[s];
    }
}

template <int LD>
void density_backward_tiles(const Field& field, const Networks& networks, const Encoded& encoded, const float* g_sigma, const float* g_out,
                            float* g_features, const Sums& sums, int threads) {
    const Layer &first = networks.density[0], &second = networks.density[1];
    parallel_for(encoded.count, Sums::GRAIN, threads, [&](int64_t begin, int64_t end) {
        DensityTile<LD> tile;
        const Buffer g_hidden(TILE * LD), g_encoded(TILE * LD);
        for (int64_t at = begin; at < end; at += TILE) {
            const int count = static_cast<int>(std::min<int64_t>(TILE, end - at));
            tile.load(field, encoded, at, count);
            tile.hide(field, first);
            float *g = tile.out.get(), *e = g_encoded.get();
            load_out_gradient<LD>(field, encoded, g_sigma, g_out, at, count, g);
            add_outer<LD>(g, tile.hidden.get(), second.outputs, second.inputs, sums.at(begin, 1));
            multiply<LD, Then::GATE>(g, second.backward.get(), second.inputs, field.geo_features + 1, second.inputs, g_hidden.get(), tile.hidden.get());
            add_outer<LD>(g_hidden.get(), tile.encoded.get(), first.outputs, first.inputs, sums.at(begin, 0));
            multiply<LD, Then::STORE>(g_hidden.get(), first.backward.get(), first.inputs, first.outputs, first.inputs, e, e);
            for (int l = 0; l < field.grid.levels; ++l) {
                float* level = g_features + (l * encoded.padded + at) * GRID_FEATURES;
                prefetch<1>(level + TILE * GRID_FEATURES);
                for (int s = 0; s < count; ++s)
                    std::memcpy(level + s * GRID_FEATURES, e + s * LD + l * GRID_FEATURES, GRID_FEATURES * sizeof(float));
            }
        }
    });
}

}  // namespace

float place(const Field& field, const float position[3], float unit[3]) {
    const float *low = field.aabb, *high = field.aabb + 3;
    float from_centre = 0.0f, norm = 1.0f;
    for (int k = 0; k < 3; ++k) {
        unit[k] = (position[k] - low[k]) / (high[k] - low[k]);
        norm = std::max(norm, std::fabs(unit[k] * 2.0f - 1.0f));
        const float offset = position[k] - (low[k] + high[k]) / 2.0f;
        from_centre += offset * offset;
    }
    for (int k = 0; k < 3 && field.unbounded; ++k)  // Mip-NeRF 360's contraction
        unit[k] = ((2.0f - 1.0f / norm) * (unit[k] * 2.0f - 1.0f) / norm + 2.0f) / 4.0f;
    return field.blob_scale ? field.blob_scale * (1.0f - std::sqrt(from_centre) / field.blob_radius) : 0.0f;
}

void density_pass(const Field& field, const Networks& networks, const Encoded& encoded, const float* bias, int threads) {
    parallel_for(encoded.padded, grain_for(encoded.padded, threads), threads, [&](int64_t first, int64_t last) {
        const float* const axes[3] = {encoded.unit + first, encoded.unit + encoded.padded + first, encoded.unit + 2 * encoded.padded + first};
        const int64_t row = encoded.padded * GRID_FEATURES;
        encode_levels<GRID_FEATURES>(axes, last - first, field.table, field.grid, encoded.features + first * GRID_FEATURES, row);
    });
    with_rows(networks.width, [&](auto rows) { density_tiles<rows()>(field, networks, encoded, bias, threads); });
}

// Positions [S, 3] in the world -> all that Encoded holds.
EXPORT void field_density(const Field* field, const float* positions, const Encoded* encoded, int threads) {
    std::vector<float> bias(field->blob_scale ? encoded->count : 0);
    for (int k = 0; k < 3; ++k) std::fill(encoded->unit + k * encoded->padded + encoded->count, encoded->unit + (k + 1) * encoded->padded, 0.0f);
    parallel_for(encoded->count, FORWARD_GRAIN, threads, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
            float unit[3];
            const float added = place(*field, positions + 3 * s, unit);
            for (int k = 0; k < 3; ++k) encoded->unit[k * encoded->padded + s] = unit[k];
            if (field->blob_scale) bias[s] = added;
        }
    });
    density_pass(*field, Networks(*field), *encoded, bias.empty() ? nullptr : bias.data(), threads);
}

// g_sigma [S], g_out [S, G] (or null for 0) -> the table's gradient (zero on entry, or null: not wanted) and those of the density network's
// weights.
EXPORT void field_density_backward(const Field* field, const Encoded* encoded, const float* g_sigma, const float* g_out, float* g_table,
                                   float* const* g_weights, int threads) {
    const Networks networks(*field);
    const Sums sums(networks.density, encoded->count);
    const int64_t row = encoded->padded * GRID_FEATURES;
    const Scratch g_features(field->grid.levels * row);
    with_rows(networks.width, [&](auto rows) {
        density_backward_tiles<rows()>(*field, networks, *encoded, g_sigma, g_out, g_features.get(), sums, threads);
    });
    const float* const axes[3] = {encoded->unit, encoded->unit + encoded->padded, encoded->unit + 2 * encoded->padded};
    if (g_table) scatter_levels<GRID_FEATURES>(axes, encoded->count, field->grid, g_features.get(), row, g_table, threads);
    sums.finish(g_weights);
}
