// Detect objects with an exported file (.xml or .onnx) in C++ with OpenVINO, whose Python package brings headers and
// libraries. The photo is a binary PPM (P6); pngtopnm, djpeg and Pillow write it.
//
//     OV=$(python -c 'import openvino, pathlib; print(pathlib.Path(openvino.__file__).parent)')
//     g++ -std=c++17 -O2 detect.cpp -I$OV/include -L$OV/libs -l:libopenvino.so.2641 -Wl,-rpath,$OV/libs -o detect
//     ./detect deploy/model.xml photo.ppm

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: detect MODEL PHOTO.ppm\n";
        return 2;
    }
    std::ifstream file(argv[2], std::ios::binary);
    std::string kind;
    int columns = 0, rows = 0, most = 0;
    file >> kind >> columns >> rows >> most;
    file.get();
    if (kind != "P6" || most != 255 || columns < 1 || rows < 1 || columns > 20000 || rows > 20000) {
        std::cerr << argv[2] << ": no binary PPM of 8 bits\n";
        return 1;
    }
    std::vector<uint8_t> photo(3ul * columns * rows);
    file.read(reinterpret_cast<char*>(photo.data()), photo.size());

    ov::Core core;
    // Processors with bf16 compute in it unless told otherwise, which moves boxes by about a pixel.
    auto model = core.compile_model(argv[1], "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = model.create_infer_request();
    const auto shape = model.input().get_partial_shape();
    const int height = shape[1].get_length(), width = shape[2].get_length();
    ov::Tensor images(ov::element::f32, {1, size_t(height), size_t(width), 3});
    float* out = images.data<float>();
    // Four pixels with half-pixel centres, as cv2.INTER_LINEAR.
    for (int y = 0; y < height; ++y) {
        const float v = std::clamp((y + 0.5f) * rows / height - 0.5f, 0.0f, float(rows - 1));
        const int top = int(v), bottom = std::min(top + 1, rows - 1);
        for (int x = 0; x < width; ++x) {
            const float u = std::clamp((x + 0.5f) * columns / width - 0.5f, 0.0f, float(columns - 1));
            const int left = int(u), right = std::min(left + 1, columns - 1);
            auto at = [&](int row, int column, int c) { return float(photo[3ul * (row * columns + column) + c]); };
            for (int c = 0; c < 3; ++c) {
                const float above = at(top, left, c) + (at(top, right, c) - at(top, left, c)) * (u - left);
                const float below = at(bottom, left, c) + (at(bottom, right, c) - at(bottom, left, c)) * (u - left);
                *out++ = above + (below - above) * (v - top);
            }
        }
    }
    request.set_input_tensor(images);
    request.infer();
    const float* boxes = request.get_tensor("boxes").data<float>();
    const float* scores = request.get_tensor("scores").data<float>();
    const int64_t* labels = request.get_tensor("labels").data<int64_t>();
    const int64_t count = request.get_tensor("num_detections").data<int64_t>()[0];
    for (int64_t i = 0; i < count && scores[i] >= 0.5f; ++i) {
        const float* b = boxes + 4 * i;
        std::printf("%ld %.4f %.1f %.1f %.1f %.1f\n", long(labels[i]), scores[i], b[0] * columns / width,
                    b[1] * rows / height, b[2] * columns / width, b[3] * rows / height);
    }
    return 0;
}
