// The only file that knows Python. It computes nothing: each C function is bound by a line of its own at the end, and what Python
// must give for it follows from its type:
//
//   const case_fast_NAME *, the first    a tuple of all its members in their order
//   const case_fast_NAME *, a later one  a list of such tuples, as many as the first one's member `sources` says
//   another pointer                      an address; 0 stands for an absent array
//   a number                             a whole number, or a float
//
// Anything else is a TypeError that names function and argument. The GIL is released while the function runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bilinear_mim/bilinear_mim.h"
#include "common/cuda.h"
#include "common/simd.h"
#include "cross_attention/cross_attention.h"
#include "graph_attention/graph_attention.h"
#include "linear/linear.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "packed_attention/packed_attention.h"
#include "pooled_attention/pooled_attention.h"
#include "residual_norm/residual_norm.h"
#include "segment_sum/segment_sum.h"

namespace py = pybind11;

static py::dict report() {
    case_fast_cuda_info cuda;
    {
        py::gil_scoped_release release;  // the first call may wait seconds for the CUDA driver
        case_fast_cuda_report(&cuda);
    }
    const int *first = cuda.architectures;
    py::dict out;
    out["version"] = CASE_FAST_VERSION;
    out["families"] = std::vector<std::string>{CASE_FAST_FAMILIES};
    out["simd"] = case_fast_simd_name(case_fast_simd_level());
    out["bf16"] = case_fast_simd_bf16() != 0;
    out["cuda"] = cuda.compiled != 0;
    out["cuda_architectures"] = std::vector<int>(first, first + cuda.architecture_count);
    out["cuda_runtime"] = std::to_string(cuda.runtime_version / 1000) + "." + std::to_string(cuda.runtime_version % 1000 / 10);
    if (!cuda.compiled) out["cuda_runtime"] = "";
    out["cuda_devices"] = cuda.device_count;
    out["cuda_status"] = cuda.status;
    return out;
}

namespace {

struct Refused {};  // thrown where Python's error is set

struct Place {  // of a value, for messages: argument and member from 0, member -1 where the argument itself is meant
    const char *function;
    std::size_t argument;
    std::ptrdiff_t member;
};

[[noreturn]] void refuse(const Place &at, const char *needed, PyObject *given) {
    PyErr_Clear();
    const std::string member = at.member < 0 ? "" : "member " + std::to_string(at.member + 1) + " of ";
    const char *const text = PyLong_Check(given) ? "%s: %sargument %zu must be %s, not %S" : "%s: %sargument %zu must be %s, not a %s";
    void *const what = PyLong_Check(given) ? static_cast<void *>(given) : const_cast<char *>(Py_TYPE(given)->tp_name);
    PyErr_Format(PyExc_TypeError, text, at.function, member.c_str(), at.argument + 1, needed, what);
    throw Refused();
}

template <class T>
T converted(PyObject *given, const Place &at) {
    if constexpr (std::is_pointer_v<T>) {
        void *const address = PyLong_AsVoidPtr(given);
        if (!address && PyErr_Occurred()) refuse(at, "an address", given);
        return static_cast<T>(address);
    } else if constexpr (std::is_floating_point_v<T>) {
        const double number = PyFloat_AsDouble(given);
        if (number == -1 && PyErr_Occurred()) refuse(at, "a number", given);
        return number;
    } else if constexpr (std::is_unsigned_v<T>) {
        static_assert(sizeof(T) == 8);
        const unsigned long long number = PyLong_AsUnsignedLongLong(given);
        if (number == static_cast<unsigned long long>(-1) && PyErr_Occurred()) refuse(at, "a whole number of 64 bits, not below 0", given);
        return number;
    } else {
        const long long number = PyLong_AsLongLong(given);
        if ((number == -1 && PyErr_Occurred()) || number != static_cast<T>(number))
            refuse(at, sizeof(T) == 4 ? "a whole number of 32 bits" : "a whole number of 64 bits", given);
        return static_cast<T>(number);
    }
}

// ---- structs, from tuples

struct Anything {
    template <class T>
    operator T() const;
};
template <class Struct, std::size_t... I>
constexpr auto takes(std::index_sequence<I...>) -> decltype(Struct{(static_cast<void>(I), Anything{})...}, true) {
    return true;
}
template <class Struct>
constexpr bool takes(...) {
    return false;
}
template <class Struct, std::size_t most = 32>  // of plain members: no arrays
constexpr std::size_t member_count() {
    static_assert(!takes<Struct>(std::make_index_sequence<most + 1>()), "a struct of more members than are tried");
    if constexpr (takes<Struct>(std::make_index_sequence<most>()))
        return most;
    else
        return member_count<Struct, most - 1>();
}

struct Member {  // becomes whatever the struct's member is
    PyObject *given;
    Place at;
    template <class T>
    operator T() const {
        return converted<T>(given, at);
    }
};
template <class Struct, std::size_t... I>
Struct filled(PyObject *tuple, const Place &at, std::index_sequence<I...>) {
    return {Member{PyTuple_GET_ITEM(tuple, I), {at.function, at.argument, std::ptrdiff_t(I)}}...};
}
template <class Struct>
Struct filled(PyObject *given, const Place &at) {
    constexpr std::size_t count = member_count<Struct>();
    if (!PyTuple_Check(given)) refuse(at, ("a tuple of " + std::to_string(count) + " members").c_str(), given);
    if (PyTuple_GET_SIZE(given) != Py_ssize_t(count)) {
        PyErr_Format(PyExc_TypeError, "%s: argument %zu takes %zu members, %zd given", at.function, at.argument + 1, count,
                     PyTuple_GET_SIZE(given));
        throw Refused();
    }
    return filled<Struct>(given, at, std::make_index_sequence<count>());
}

// ---- arguments

template <class T, bool first, class = void>
struct Argument {
    T value;
    Argument(PyObject *given, const Place &at) : value(converted<T>(given, at)) {}
    T get() { return value; }
};
template <class T>
constexpr bool is_struct = std::is_pointer_v<T> && std::is_class_v<std::remove_pointer_t<T>>;

template <class T>
struct Argument<T, true, std::enable_if_t<is_struct<T>>> {
    std::remove_const_t<std::remove_pointer_t<T>> value;
    Argument(PyObject *given, const Place &at) : value(filled<decltype(value)>(given, at)) {}
    T get() { return &value; }
};
template <class T>
struct Argument<T, false, std::enable_if_t<is_struct<T>>> {
    using Struct = std::remove_const_t<std::remove_pointer_t<T>>;
    std::vector<Struct> values;
    Argument(PyObject *given, const Place &at) {
        if (!PyList_Check(given)) refuse(at, "a list of tuples", given);
        values.reserve(std::size_t(PyList_GET_SIZE(given)));
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); ++i) values.push_back(filled<Struct>(PyList_GET_ITEM(given, i), at));
    }
    T get() { return values.data(); }
};

// ---- functions

template <auto function>
struct Bound;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Bound<function> {
    static inline const char *name;

    template <std::size_t... I>
    static Result run(PyObject *const *given, std::index_sequence<I...>) {
        std::tuple<Argument<Parameters, I == 0>...> arguments = {Argument<Parameters, I == 0>(given[I], {name, I, -1})...};
        (check_count<Parameters, I>(arguments), ...);
        const py::gil_scoped_release release;
        return function(std::get<I>(arguments).get()...);
    }
    template <class T, std::size_t I, class Arguments>
    static void check_count(const Arguments &arguments) {
        if constexpr (I > 0 && is_struct<T>) {
            const std::size_t count = std::get<I>(arguments).values.size();
            const std::int64_t expected = std::get<0>(arguments).value.sources;
            if (std::int64_t(count) == expected) return;
            PyErr_Format(PyExc_TypeError, "%s: argument %zu takes %lld tuples, %zu given", name, I + 1, (long long)expected, count);
            throw Refused();
        }
    }
    static PyObject *call(PyObject *, PyObject *const *given, Py_ssize_t count) {
        constexpr std::size_t expected = sizeof...(Parameters);
        if (count != Py_ssize_t(expected))
            return PyErr_Format(PyExc_TypeError, "%s takes %zu arguments, %zd given", name, expected, count);
        try {
            const Result result = run(given, std::make_index_sequence<expected>());
            return std::is_unsigned_v<Result> ? PyLong_FromSize_t(std::size_t(result)) : PyLong_FromLongLong((long long)result);
        } catch (const Refused &) {
            return nullptr;
        } catch (const std::bad_alloc &) {
            return PyErr_NoMemory();
        }
    }
};

template <auto function>
PyMethodDef bound(const char *name) {
    Bound<function>::name = name;
    const auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Bound<function>::call));
    return {name, call, METH_FASTCALL, "Arguments and result: the C function of that name, in the header of its family."};
}
#define ON_CPU(name) bound<case_fast_##name##_cpu>(#name)
#define ON_CUDA(name) bound<case_fast_##name##_cuda>(#name "_cuda")

PyMethodDef functions[] = {
    ON_CPU(graph_attention_forward),
    ON_CPU(graph_attention_backward),
    ON_CPU(packed_attention_forward),
    ON_CPU(packed_attention_backward),
    ON_CPU(pooled_attention_forward),
    ON_CPU(pooled_attention_backward),
    ON_CPU(cross_attention_forward),
    ON_CPU(cross_attention_backward),
    bound<case_fast_cross_attention_saved>("cross_attention_saved"),
    ON_CPU(bilinear_mim_forward),
    ON_CPU(bilinear_mim_backward),
    bound<case_fast_bilinear_mim_saved>("bilinear_mim_saved"),
    ON_CPU(linear_forward),
    ON_CPU(linear_backward),
    ON_CPU(linear_cross_entropy_forward),
    ON_CPU(linear_cross_entropy_backward),
    ON_CPU(top_words),
    ON_CPU(residual_norm_forward),
    ON_CPU(residual_norm_backward),
    ON_CPU(residual_norm_drop),
    ON_CPU(segment_sum_forward),
#ifdef CASE_FAST_WITH_CUDA
    ON_CUDA(graph_attention_workspace),
    ON_CUDA(graph_attention_forward),
    ON_CUDA(graph_attention_backward),
    ON_CUDA(packed_attention_workspace),
    ON_CUDA(packed_attention_forward),
    ON_CUDA(packed_attention_backward),
    ON_CUDA(cross_attention_workspace),
    ON_CUDA(cross_attention_forward),
    ON_CUDA(cross_attention_drop),
#endif
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native core of case_fast.";
    module.attr("__version__") = CASE_FAST_VERSION;
    module.attr("simd") = case_fast_simd_name(case_fast_simd_level());
    module.def("report", &report, "How the module was built, and what it finds on this machine now.");
    if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw py::error_already_set();
}
