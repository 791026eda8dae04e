// The Python module `drl_fast._C`. It is empty: importing it loads this library, which registers the CPU kernels.
#include <Python.h>

// NOLINTNEXTLINE(bugprone-reserved-identifier): Python derives this name from the module's.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_C", .m_size = -1};
  return PyModule_Create(&definition);
}
