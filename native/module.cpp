// The Python module: the instruction sets of this build, a class for each layout of a weight, and the other operations
// as functions. Tensors come as addresses, so that nothing of torch is linked and one build serves every version of it.
// The Python side checks them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "fork.h"
#include "runtime.h"

namespace nb = nanobind;

namespace secateur {

void fork(int threads, void (*part)(void* data, int thread, int of), void* data) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    part(data, omp_get_thread_num(), omp_get_num_threads());
#else
    (void)threads;
    part(data, 0, 1);
#endif
}

namespace {

nb::list isas() {
    nb::list names;
    for (const InstructionSet* isa = instruction_sets; isa->name; ++isa) names.append(isa->name);
    return names;
}

bool has(const std::string& name) { return find_instruction_set(name.c_str()) != nullptr; }

const Table& table(const std::string& name) {
    if (const InstructionSet* isa = find_instruction_set(name.c_str())) return isa->table;
    throw std::invalid_argument("this machine cannot run the instruction set '" + name + "'");
}

// A member as Python passes it: an address as a number.
template <class Member> using FromPython = std::conditional_t<std::is_pointer_v<Member>, uintptr_t, Member>;

template <class Struct, class Member> Member type_of(Member Struct::*);
template <auto member> using TypeOf = decltype(type_of(member));

template <class Struct, class Base, class Member, class Value>
void set(Struct& to, Member Base::* member, Value value) {
    if constexpr (std::is_pointer_v<Member>) to.*member = reinterpret_cast<Member>(value);
    else to.*member = value;
}

template <class Arguments, auto... members>
Arguments filled(Fields<members...>, FromPython<TypeOf<members>>... values) {
    Arguments arguments = {};
    (set(arguments, members, values), ...);
    return arguments;
}

using Released = nb::call_guard<nb::gil_scoped_release>;
template <class Arguments> using Function = void (*)(const Arguments&);

// A weight and the function of one instruction set that multiplies by it.
template <class Weight> struct Bound {
    Weight weight;
    Function<Weight> function;
};

template <class Weight, auto... members>
void bind_weight(nb::module_& m, const char* name, Function<Weight> Table::* entry, Fields<members...> fields) {
    nb::class_<Bound<Weight>> bound(m, name);
    bound.def("__init__",
              [entry, fields](Bound<Weight>* self, const std::string& isa, FromPython<TypeOf<members>>... values) {
        new (self) Bound<Weight>{filled<Weight>(fields, values...), table(isa).*entry};
    });
    const auto run = [](const Bound<Weight>& self, uintptr_t x, uintptr_t y, uintptr_t bias, int64_t batch,
                        int threads) {
        Weight call = self.weight;  // a copy, because threads may share the weight
        call.x = reinterpret_cast<const float*>(x);
        call.y = reinterpret_cast<float*>(y);
        call.bias = reinterpret_cast<const float*>(bias);
        call.batch = batch;
        call.threads = threads;
        self.function(call);
    };
    bound.def("run", run, Released());
    if constexpr (Weight::kTakesImages) {
        const auto convolve = [](const Bound<Weight>& self, uintptr_t x, uintptr_t y, uintptr_t bias,
                                 const std::array<int64_t, 13>& sizes, int threads) {
            Image image;
            static_assert(sizeof image == sizeof sizes);
            std::memcpy(&image, sizes.data(), sizeof image);
            Weight call = self.weight;
            call.x = reinterpret_cast<const float*>(x);
            call.y = reinterpret_cast<float*>(y);
            call.bias = reinterpret_cast<const float*>(bias);
            call.batch = image.images * image.down * image.across;
            call.threads = threads;
            call.image = &image;
            self.function(call);
        };
        bound.def("convolve", convolve, Released());
    }
}

template <class Arguments, auto... members>
void bind_function(nb::module_& m, const char* name, Function<Arguments> Table::* entry, Fields<members...> fields) {
    const auto run = [entry, fields](const std::string& isa, FromPython<TypeOf<members>>... values) {
        (table(isa).*entry)(filled<Arguments>(fields, values...));
    };
    m.def(name, run, Released());
}

template <class Arguments>
void bind(nb::module_& m, const char* name, const char* type, Function<Arguments> Table::* entry) {
    const typename Arguments::Members members;
    if constexpr (std::is_base_of_v<Linear, Arguments>) bind_weight<Arguments>(m, type, entry, members);
    else bind_function<Arguments>(m, name, entry, members);
}

}  // namespace

}  // namespace secateur

NB_MODULE(_native, m) {
    using namespace secateur;
    m.doc() = "The kernels. Addresses are not checked: use secateur.kernels.linear and secateur.nn.";
    m.def("isas", &isas, "The instruction sets of this build, widest first.");
    m.def("has", &has, "Whether this build has the instruction set and this machine can run it.");
#define OP(file, function, Arguments) bind<Arguments>(m, #function, #Arguments, &Table::function);
#include "ops/list.h"
}
