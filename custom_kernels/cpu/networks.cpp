// The networks' weights, padded for the tiles, and the sums of their gradients.
#include <numeric>

#include "field.h"

namespace {

constexpr int COLOURS = 3;

std::vector<int> places(int count, int first = 0) {
    std::vector<int> at(count);
    std::iota(at.begin(), at.end(), first);
    return at;
}

std::vector<size_t> running_sizes(const std::vector<Layer>& layers) {
    std::vector<size_t> first = {0};
    for (const Layer& layer : layers) first.push_back(first.back() + layer.size());
    return first;
}

}  // namespace

Layer::Layer(const float* weights, std::vector<int> in, std::vector<int> out, int inputs, int outputs)
    : input_at(std::move(in)), output_at(std::move(out)), inputs(inputs), outputs(outputs), forward(size()), backward(size()) {
    for (size_t o = 0; o < output_at.size(); ++o)
        for (size_t i = 0; i < input_at.size(); ++i) {
            const float w = weights[o * input_at.size() + i];
            forward.get()[input_at[i] * outputs + output_at[o]] = w;
            backward.get()[output_at[o] * inputs + input_at[i]] = w;
        }
}

void Layer::unpad(const float* sums, float* gradient) const {
    for (size_t o = 0; o < output_at.size(); ++o)
        for (size_t i = 0; i < input_at.size(); ++i) gradient[o * input_at.size() + i] = sums[output_at[o] * inputs + input_at[i]];
}

Networks::Networks(const Field& field) {
    const int encoded = field.levels * GRID_FEATURES, hidden = field.hidden, geo = field.geo_features, out = out_width(field);
    const float* const* weights = field.weights;
    std::vector<int> raw_last = places(1 + geo, -1);  // torch's first output, the raw density, follows the features
    raw_last[0] = geo;
    density.emplace_back(*weights++, places(encoded), places(hidden), padded16(encoded), hidden);
    density.emplace_back(*weights++, places(hidden), raw_last, hidden, out);
    std::vector<int> inputs = places(field.sh_degree * field.sh_degree);
    for (int i = 0; i < geo; ++i) inputs.push_back(HARMONICS + i);
    colour.emplace_back(*weights++, inputs, places(hidden), HARMONICS + out, hidden);
    for (int l = 1; l < field.colour_layers; ++l) colour.emplace_back(*weights++, places(hidden), places(hidden), hidden, hidden);
    colour.emplace_back(*weights++, places(hidden), places(COLOURS), hidden, padded16(COLOURS));
    width = std::max({padded16(encoded), hidden, HARMONICS + out});
}

Sums::Sums(const std::vector<Layer>& layers, int64_t count)
    : layers_(layers), first_(running_sizes(layers)), chunks_(std::max<int64_t>(1, (count + GRAIN - 1) / GRAIN)), data_(first_.back() * chunks_) {}

float* Sums::at(int64_t begin, size_t l) const { return data_.get() + begin / GRAIN * first_.back() + first_[l]; }

void Sums::finish(float* const* gradients) const {
    const size_t size = first_.back();
    for (int64_t chunk = 1; chunk < chunks_; ++chunk)
        for (size_t i = 0; i < size; ++i) data_.get()[i] += data_.get()[chunk * size + i];
    for (size_t l = 0; l < layers_.size(); ++l) layers_[l].unpad(at(0, l), gradients[l]);
}
