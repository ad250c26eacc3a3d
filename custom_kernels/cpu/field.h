// The radiance field of custom_kernels/field.py: what its parts share.
//
// Symbols: S samples, P = S rounded up to 16, L levels in use, F = 2 features a level, G the width of the density network's output (the
// colour's features, then the raw density), padded to 16.
#pragma once

#include <vector>

#include "dense.h"
#include "hashgrid.h"

struct Field {  // mirrored by _Field in custom_kernels/field.py
    HashGrid grid;                // the levels in use
    int32_t levels;               // all of them
    int32_t hidden, colour_layers, geo_features, sh_degree, unbounded;
    float density_scale, blob_scale, blob_radius;
    const float* aabb;            // [6] min, max
    const float* table;           // [T, F]
    const float* const* weights;  // [out, in] each: two of the density network, colour_layers + 1 of the colour network
};

// What the density pass leaves for the passes after it; every array is given by the caller.
struct Encoded {  // mirrored by _Encoded in custom_kernels/field.py
    int64_t count, padded;  // S, P
    float* unit;            // [3, P] positions in the grid, [0, 1] inside
    float* features;        // [L, P, F] of the hash grid
    float* out;             // [S, G] of the density network
    float* sigma;           // [S]
};

constexpr int GRID_FEATURES = 2, HARMONICS = 16;
constexpr int64_t FORWARD_GRAIN = 64 * dense::TILE;  // samples of a task

inline int padded16(int count) { return (count + 15) / 16 * 16; }
inline int out_width(const Field& field) { return padded16(1 + field.geo_features); }

// A linear layer with padded widths: `forward` [inputs, outputs], `backward` [outputs, inputs].
struct Layer {
    std::vector<int> input_at, output_at;  // where torch's inputs and outputs are among the padded ones
    int inputs, outputs;
    simd::Buffer forward, backward;
    size_t size() const { return static_cast<size_t>(inputs) * outputs; }
    Layer(const float* weights, std::vector<int> in, std::vector<int> out, int inputs, int outputs);
    void unpad(const float* sums, float* gradient) const;  // from [outputs, inputs] to torch's matrix
};

struct Networks {
    std::vector<Layer> density, colour;
    int width;  // the widest layer
    explicit Networks(const Field& field);
};

// Encodes the positions encoded.unit and evaluates the density network. bias [S], or null, is added to the raw density.
void density_pass(const Field& field, const Networks& networks, const Encoded& encoded, const float* bias, int threads);

// World position to grid position, as RadianceField.normalise does; returns the blob's bias (Magic3D).
float place(const Field& field, const float position[3], float unit[3]);

// Sums of weight gradients over samples: a set for each chunk of GRAIN samples, added in the order of the chunks, so that they do not depend
// on the threads.
class Sums {
public:
    static constexpr int64_t GRAIN = 128 * dense::TILE;
    Sums(const std::vector<Layer>& layers, int64_t count);
    float* at(int64_t begin, size_t l) const;       // of layer l and the chunk that starts at sample `begin`: [outputs, inputs]
    void finish(float* const* gradients) const;  // to torch's matrices

private:
    const std::vector<Layer>& layers_;
    std::vector<size_t> first_;  // of each layer in a set, then the size of a set
    int64_t chunks_;
    simd::Buffer data_;
};

// Calls fn with the distance between rows of a tile, as a compile-time constant.
template <typename Function>
void with_rows(int width, const Function& fn) {
    if (width <= 32) fn(std::integral_constant<int, 32>{});
    else if (width <= 64) fn(std::integral_constant<int, 64>{});
    else if (width <= 128) fn(std::integral_constant<int, 128>{});
    else fn(std::integral_constant<int, 256>{});
}

// Copies a row of a multiple of 16 floats.
inline void copy_row(float* to, const float* from, int width) {
    for (int i = 0; i < width; i += 16) std::memcpy(to + i, from + i, 16 * sizeof(float));
}
