// Spherical harmonics and colour network in passes over tiles of samples: forward, and backward with the activations computed again.
#include "field.h"

using dense::add_outer;
using dense::multiply;
using dense::Then;
using dense::TILE;
using simd::Buffer;
using simd::WIDTH;

namespace {

constexpr int COLOURS = 3;

// Real orthonormal spherical harmonics of a direction as csd3d's and tiny-cuda-nn's, zero from degree² on.
void harmonics(const float* d, int degree, float* out) {
    const float x = d[0], y = d[1], z = d[2], xx = x * x, yy = y * y, zz = z * z;
    const float all[HARMONICS] = {
        0.28209479177387814f,
        -0.48860251190291987f * y, 0.48860251190291987f * z, -0.48860251190291987f * x,
        1.0925484305920792f * x * y, -1.0925484305920792f * y * z, 0.94617469575755997f * zz - 0.31539156525251999f,
        -1.0925484305920792f * x * z, 0.54627421529603959f * (xx - yy),
        0.59004358992664352f * y * (yy - 3 * xx), 2.8906114426405538f * x * y * z, 0.45704579946446572f * y * (1 - 5 * zz),
        0.3731763325901154f * z * (5 * zz - 3), 0.45704579946446572f * x * (1 - 5 * zz), 1.4453057213202769f * z * (xx - yy),
        0.59004358992664352f * x * (3 * yy - xx),
    };
    for (int k = 0; k < HARMONICS; ++k) out[k] = k < degree * degree ? all[k] : 0.0f;
}

struct ColourInputs {  // mirrored by _ColourInputs in custom_kernels/field.py
    const float* features;    // geo_features a sample, rows `stride` apart
    int64_t stride, count;
    const float* directions;  // [N, 3] of unit length
    const int64_t* rays;      // the direction of each row of features, or null: its own
    const int64_t* rows;      // [count] the rows to evaluate, or null: the first `count`
    int64_t row(int64_t s) const { return rows ? rows[s] : s; }
};

template <int LD>
struct ColourTile {
    Buffer inputs{TILE * LD}, logits{TILE * LD};
    std::vector<Buffer> hidden;

    explicit ColourTile(const Networks& networks) {
        for (size_t l = 1; l < networks.colour.size(); ++l) hidden.emplace_back(TILE * LD);
    }

    void load(const Field& field, const ColourInputs& from, int64_t at, int count) {
        float* to = inputs.get();
        const float* last = nullptr;
        // A whole padded row is copied where there is one, including the raw density, whose weight is 0.
        const int width = out_width(field), geo = field.geo_features;
        for (int s = 0; s < count; ++s, to += LD) {
            const int64_t row = from.row(at + s);
            if (from.rows && at + s + TILE < from.count) __builtin_prefetch(from.features + from.rows[at + s + TILE] * from.stride);
            const float* direction = from.directions + 3 * (from.rays ? from.rays[row] : row);
            const bool same = last && direction[0] == last[0] && direction[1] == last[1] && direction[2] == last[2];
            if (same) copy_row(to, to - LD, HARMONICS);  // neighbours share a ray
            else harmonics(direction, field.sh_degree, to);
            last = direction;
            if (from.stride >= width) copy_row(to + HARMONICS, from.features + row * from.stride, width);
            else std::memcpy(to + HARMONICS, from.features + row * from.stride, geo * sizeof(float));
        }
        for (int s = count; s < TILE; ++s, to += LD) std::memset(to, 0, LD * sizeof(float));
    }

    void hide(const Networks& networks) {
        const float* from = inputs.get();
        for (size_t l = 0; l < hidden.size(); ++l) {
            const Layer& layer = networks.colour[l];
            float* to = hidden[l].get();
            multiply<LD, Then::RELU>(from, layer.forward.get(), layer.outputs, layer.inputs, layer.outputs, to, to);
            from = to;
        }
    }
};

template <int LD>
void colour_tiles(const Field& field, const Networks& networks, const ColourInputs& from, float* rgb, int threads) {
    const Layer& last = networks.colour.back();
    parallel_for(from.count, FORWARD_GRAIN, threads, [&](int64_t begin, int64_t end) {
        ColourTile<LD> tile(networks);
        alignas(64) float x[COLOURS * TILE];
        for (int64_t at = begin; at < end; at += TILE) {
            const int count = static_cast<int>(std::min<int64_t>(TILE, end - at));
            tile.load(field, from, at, count);
            tile.hide(networks);
            float* logits = tile.logits.get();
            multiply<LD, Then::STORE>(tile.hidden.back().get(), last.forward.get(), last.outputs, last.inputs, last.outputs, logits, logits);
            for (int s = 0; s < TILE; ++s)
                for (int c = 0; c < COLOURS; ++c) x[COLOURS * s + c] = logits[s * LD + c];
            for (int i = 0; i < COLOURS * TILE; i += WIDTH) simd::store(x + i, simd::sigmoid(simd::load(x + i)));
            for (int s = 0; s < count; ++s) std::memcpy(rgb + COLOURS * from.row(at + s), x + COLOURS * s, COLOURS * sizeof(float));
        }
    });
}

template <int LD>
void colour_backward_tiles(const Field& field, const Networks& networks, const ColourInputs& from, const float* rgb, const float* g_rgb,
                           float* g_out, const Sums& sums, int threads) {
    const std::vector<Layer>& layers = networks.colour;
    const size_t last = layers.size() - 1;
    const int width = out_width(field);
    parallel_for(from.count, Sums::GRAIN, threads, [&](int64_t begin, int64_t end) {
        ColourTile<LD> tile(networks);
        const Buffer above(TILE * LD), below(TILE * LD);
        for (int64_t at = begin; at < end; at += TILE) {
            const int count = static_cast<int>(std::min<int64_t>(TILE, end - at));
            tile.load(field, from, at, count);
            tile.hide(networks);
            float *g = above.get(), *next = below.get(), *logits = tile.logits.get();  // the logits' columns from COLOURS on stay 0
            for (int s = 0; s < TILE; ++s)
                for (int c = 0; c < COLOURS; ++c) {
                    const float y = s < count ? rgb[COLOURS * (at + s) + c] : 0.0f;
                    logits[s * LD + c] = s < count ? g_rgb[COLOURS * (at + s) + c] * y * (1.0f - y) : 0.0f;
                }
            const float* h = tile.hidden[last - 1].get();
            add_outer<LD>(logits, h, COLOURS + 1, layers[last].inputs, sums.at(begin, last));
            multiply<LD, Then::GATE>(logits, layers[last].backward.get(), layers[last].inputs, COLOURS, layers[last].inputs, g, h);
            for (size_t l = last - 1; l > 0; --l) {
                h = tile.hidden[l - 1].get();
                add_outer<LD>(g, h, layers[l].outputs, layers[l].inputs, sums.at(begin, l));
                multiply<LD, Then::GATE>(g, layers[l].backward.get(), layers[l].inputs, layers[l].outputs, layers[l].inputs, next, h);
                std::swap(g, next);
            }
            add_outer<LD>(g, tile.inputs.get(), layers[0].outputs, layers[0].inputs, sums.at(begin, 0));
            multiply<LD, Then::STORE>(g, layers[0].backward.get() + HARMONICS, layers[0].inputs, layers[0].outputs, width, next, next);
            for (int s = 0; s < count; ++s) copy_row(g_out + (at + s) * width, next + s * LD, width);
        }
    });
}

}  // namespace

// The colour of features under directions, to the same rows of rgb [S, 3].
EXPORT void field_colour(const Field* field, const ColourInputs* inputs, float* rgb, int threads) {
    const Networks networks(*field);
    with_rows(networks.width, [&](auto rows) { colour_tiles<rows()>(*field, networks, *inputs, rgb, threads); });
}

// g_rgb [S, 3] -> g_out (of all rows) [S, G] and the gradients of the colour network's weights.
EXPORT void field_colour_backward(const Field* field, const ColourInputs* inputs, const float* rgb, const float* g_rgb, float* g_out,
                                  float* const* g_weights, int threads) {
    const Networks networks(*field);
    const Sums sums(networks.colour, inputs->count);
    with_rows(networks.width, [&](auto rows) {
        colour_backward_tiles<rows()>(*field, networks, *inputs, rgb, g_rgb, g_out, sums, threads);
    });
    sums.finish(g_weights);
}
