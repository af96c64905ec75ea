// The Python module htfkernels._C. Importing it loads this library, which runs the static
// initialisers that register the operators of the other files with PyTorch's dispatcher.

#include <Python.h>
#include <torch/headeronly/version.h>

#include "cpu/memory.h"

// setup.py builds this module for the stable ABI of Python 3.10.
static_assert(Py_LIMITED_API == 0x030A0000);

namespace {

#if defined(__clang__)
constexpr char compiler[] = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char compiler[] = "GCC " __VERSION__;
#else
constexpr char compiler[] = "unknown";
#endif

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:l,s:s,s:s}", "compiler", compiler, "cxx_standard",
                       static_cast<long>(__cplusplus), "torch", TORCH_VERSION, "torch_minimum",
                       "2.11");
}

PyObject* release_memory(PyObject*, PyObject*) { return PyLong_FromSize_t(htf::release_unused()); }

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "The compiler, the C++ standard, the PyTorch compiled against and the oldest it runs with."},
    {"release_memory", release_memory, METH_NOARGS,
     "Gives buffers kept between calls back to the operating system; returns their bytes."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "The compiled operators of htfkernels.",
                      0,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
