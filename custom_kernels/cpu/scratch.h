// Large temporary arrays that are used again: fresh memory costs a page fault for every 4 KiB, a tenth of a training step.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

// Uninitialised floats, returned to a pool of the process at the end of their life. The pool keeps at most LIMIT floats.
class Scratch {
public:
    Scratch() = default;
    explicit Scratch(size_t count) {
        const std::lock_guard<std::mutex> lock(pool().mutex);
        const auto found = pool().free.lower_bound(count);
        if (found != pool().free.end() && found->first <= 2 * count + SMALL) {
            pool().size -= found->first;
            size_ = found->first;
            data_ = std::move(found->second);
            pool().free.erase(found);
        } else {
            size_ = count;
            data_.reset(new float[count]);
        }
    }
    Scratch(Scratch&& other) noexcept : size_(std::exchange(other.size_, 0)), data_(std::move(other.data_)) {}
    Scratch& operator=(Scratch&& other) noexcept {
        std::swap(size_, other.size_);
        std::swap(data_, other.data_);
        return *this;
    }
    ~Scratch() {
        if (!data_) return;
        const std::lock_guard<std::mutex> lock(pool().mutex);
        if (pool().size + size_ > LIMIT) return;
        pool().size += size_;
        pool().free.emplace(size_, std::move(data_));
    }
    float* get() const { return data_.get(); }
    float& operator[](size_t i) const { return data_[i]; }
    explicit operator bool() const { return data_ != nullptr; }

private:
    static constexpr size_t SMALL = 1 << 16, LIMIT = size_t{1} << 25;
    struct Pool {
        std::mutex mutex;
        std::multimap<size_t, std::unique_ptr<float[]>> free;
        size_t size = 0;
    };
    static Pool& pool() {
        static Pool* const shared = new Pool;  // never destroyed: threads may outlive static objects
        return *shared;
    }
    size_t size_ = 0;
    std::unique_ptr<float[]> data_;
};
