// The functions of entry.cpp in Python: every argument is an integer, or None for a null address. A call costs a few tenths
// of a microsecond, and releases the GIL.
#include <Python.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "entry.hpp"

namespace {

bool to_integer(PyObject* object, int64_t* value) {
    if (object == Py_None) {
        *value = 0;
        return true;
    }
    *value = PyLong_AsLongLong(object);
    return *value != -1 || !PyErr_Occurred();
}

template <class T>
T cast(int64_t value) {
    if constexpr (sizeof(T) == sizeof(int64_t) && !std::is_same_v<T, int64_t>) {
        return reinterpret_cast<T>(value);
    } else {
        return value;
    }
}

template <class... Arguments, size_t... i>
int64_t call(int64_t (*function)(Arguments...), const int64_t* values, std::index_sequence<i...>) {
    return function(cast<Arguments>(values[i])...);
}

template <class... Arguments>
PyObject* call_with(int64_t (*function)(Arguments...), PyObject* const* arguments, Py_ssize_t count) {
    constexpr Py_ssize_t kExpected = sizeof...(Arguments);
    if (count != kExpected) return PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", count, kExpected);
    int64_t values[kExpected], result;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!to_integer(arguments[i], &values[i])) return nullptr;
    }
    Py_BEGIN_ALLOW_THREADS;
    result = call(function, values, std::index_sequence_for<Arguments...>{});
    Py_END_ALLOW_THREADS;
    return PyLong_FromLongLong(result);
}

template <auto function>
PyObject* method(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return call_with(function, arguments, count);
}

PyObject* isa_name(PyObject*, PyObject* index) {
    int64_t value;
    if (!to_integer(index, &value)) return nullptr;
    const char* name = efx_isa_name(value);
    if (!name) Py_RETURN_NONE;
    return PyUnicode_FromString(name);
}

template <auto function>
PyMethodDef define(const char* name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method<function>)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    {"efx_isa_name", isa_name, METH_O, nullptr},
    define<efx_isa_supported>("efx_isa_supported"),
    define<efx_packed_size>("efx_packed_size"),
    define<efx_pack>("efx_pack"),
    define<efx_linear>("efx_linear"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module{PyModuleDef_HEAD_INIT, "_linear", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__linear() { return PyModule_Create(&module); }
