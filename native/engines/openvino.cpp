// PackedLinear for OpenVINO: Core.add_extension(this library). Models in OpenVINO's own files and in ONNX's have it.
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>

#include "engines/packed.h"
#include "fork.h"

namespace secateur {

void fork(int threads, void (*part)(void* data, int thread, int of), void* data) {
    // Isolated: a thread that waits must not begin another node, which would use the same scratch memory.
    tbb::this_task_arena::isolate([&] {
        tbb::parallel_for(0, threads, [&](int thread) { part(data, thread, threads); }, tbb::static_partitioner{});
    });
}

namespace {

// x, the weight as bytes, and a bias that may be absent.
class PackedLinear : public ov::op::Op {
public:
    OPENVINO_OP("PackedLinear", "secateur");

    PackedLinear() = default;
    explicit PackedLinear(const ov::OutputVector& inputs) : Op(inputs) { constructor_validate_and_infer_types(); }

    void validate_and_infer_types() override {
        const size_t inputs = get_input_size();
        NODE_VALIDATION_CHECK(this, inputs == 2 || inputs == 3, "PackedLinear takes 2 or 3 inputs, got ", inputs);
        const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(get_input_node_shared_ptr(1));
        NODE_VALIDATION_CHECK(this, constant && constant->get_element_type() == ov::element::u8,
                              "the weight of PackedLinear should be a constant of bytes");
        prepare(constant->get_data_ptr(), constant->get_byte_size());
        const ov::PartialShape given = get_input_partial_shape(0);
        ov::PartialShape shape = given;
        if (given.rank().is_static()) {
            NODE_VALIDATION_CHECK(this, given.size() > 0 && given[given.size() - 1].compatible(weight_->columns()),
                                  "the input of PackedLinear should have ", weight_->columns(), " features, got ",
                                  given);
            shape[given.size() - 1] = weight_->rows();
        }
        NODE_VALIDATION_CHECK(this,
                              inputs < 3 || get_input_partial_shape(2).compatible(ov::PartialShape{weight_->rows()}),
                              "the bias of PackedLinear should have ", weight_->rows(), " numbers");
        set_output_type(0, ov::element::f32, shape);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<PackedLinear>(inputs);
    }

    bool visit_attributes(ov::AttributeVisitor&) override { return true; }
    bool has_evaluate() const override { return get_input_element_type(0) == ov::element::f32; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        ov::Shape shape = inputs[0].get_shape();
        const PackedWeight& weight = *weight_;
        OPENVINO_ASSERT(!shape.empty() && int64_t(shape.back()) == weight.columns(),
                        "the input of PackedLinear should have ", weight.columns(), " features");
        const int64_t batch = int64_t(inputs[0].get_size()) / weight.columns();
        shape.back() = size_t(weight.rows());
        outputs[0].set_shape(shape);
        weight.run(inputs[0].data<const float>(), outputs[0].data<float>(),
                   inputs.size() > 2 ? inputs[2].data<const float>() : nullptr, batch, parallel_get_max_threads());
        return true;
    }

private:
    void prepare(const void* data, size_t size) {
        if (weight_ && data == data_) return;
        owned_.clear();
        if (reinterpret_cast<uintptr_t>(data) % alignof(int64_t)) {  // OpenVINO's own files have no alignment
            owned_.resize((size + sizeof(int64_t) - 1) / sizeof(int64_t));
            std::memcpy(owned_.data(), data, size);
            weight_ = std::make_shared<PackedWeight>(owned_.data(), size);
        } else {
            weight_ = std::make_shared<PackedWeight>(data, size);
        }
        data_ = data;
    }

    const void* data_ = nullptr;  // of the constant, which lives as long as this node
    std::vector<int64_t> owned_;
    std::shared_ptr<const PackedWeight> weight_;
};

}  // namespace
}  // namespace secateur

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<secateur::PackedLinear>>(),
    std::make_shared<ov::frontend::onnx::OpExtension<secateur::PackedLinear>>("PackedLinear", "secateur"),
}));
