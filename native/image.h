// A convolution as a product: each pixel of y is one row of the batch, and its columns are what the kernel covers.
#pragma once
#include <cstdint>

namespace secateur {

// x [images, channels, height, width] and y [images, rows, down, across], both contiguous. The columns of the weight
// are [channels, kernel_down, kernel_across], and Linear::batch is images * down * across.
struct Image {
    int64_t images, height, width, down, across;
    int64_t kernel_down, kernel_across, stride_down, stride_across;
    int64_t padding_down, padding_across, dilation_down, dilation_across;
};

}  // namespace secateur
