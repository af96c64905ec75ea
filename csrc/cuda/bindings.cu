// The Python module htfkernels._C_cuda, or htfkernels._C_emulated. Importing it registers the
// operators of the other files; it needs no driver.

#include <Python.h>
#include <torch/headeronly/version.h>

#include "cuda/launch.h"

static_assert(Py_LIMITED_API == 0x030A0000);

#ifdef HTF_EMULATE
#define HTF_MODULE _C_emulated
#else
#define HTF_MODULE _C_cuda
#endif
#define HTF_JOIN_(a, b) a##b
#define HTF_JOIN(a, b) HTF_JOIN_(a, b)
#define HTF_TEXT_(a) #a
#define HTF_TEXT(a) HTF_TEXT_(a)

namespace {

#ifdef HTF_EMULATE

constexpr char compiler[] = "the host's, which runs kernels on the CPU";

PyObject* why_not(PyObject*, PyObject*) { Py_RETURN_NONE; }

PyObject* set_backward(PyObject*, PyObject* backward) {
  const int set = PyObject_IsTrue(backward);
  if (set < 0) return nullptr;
  using htf::emulate::Order;
  htf::emulate::set_order(set != 0 ? Order::backward : Order::forward);
  Py_RETURN_NONE;
}

#else

constexpr char compiler[] = "nvcc " HTF_TEXT(__CUDACC_VER_MAJOR__) "." HTF_TEXT(
    __CUDACC_VER_MINOR__) "." HTF_TEXT(__CUDACC_VER_BUILD__);

PyObject* why_not(PyObject*, PyObject*) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return PyUnicode_FromString(cudaGetErrorString(error));
  if (count == 0) return PyUnicode_FromString("there is no CUDA device");
  Py_RETURN_NONE;
}

#endif

PyObject* build_info(PyObject*, PyObject*) {
#ifdef HTF_ARCHITECTURES
  constexpr char architectures[] = HTF_ARCHITECTURES;
#else
  constexpr char architectures[] = "";
#endif
  return Py_BuildValue("{s:s,s:s,s:s}", "compiler", compiler, "architectures", architectures,
                       "torch", TORCH_VERSION);
}

PyObject* launches(PyObject*, PyObject*) { return PyLong_FromLongLong(htf::gpu::launches.load()); }

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "The compiler, the GPU architectures compiled for, and the PyTorch compiled against."},
    {"why_not", why_not, METH_NOARGS, "Why there is no device to run on, or None."},
    {"launches", launches, METH_NOARGS, "How many kernels this process has launched."},
#ifdef HTF_EMULATE
    {"set_backward", set_backward, METH_O,
     "Whether blocks, warps and lanes are taken in descending order."},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      HTF_TEXT(HTF_MODULE),
                      "The CUDA operators of htfkernels.",
                      0,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC HTF_JOIN(PyInit_, HTF_MODULE)() { return PyModule_Create(&module); }
