/* Stands in for vLLM's kernels: a library that loads, and says by which compiler it was made. */
#define Py_LIMITED_API 0x03080000
#include <Python.h>

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "compiled by " __VERSION__, -1, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
