#include "common/call_key.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/tensor.h"

namespace py = pybind11;

namespace fused_attn {
namespace {

// What to ask torch at every call. Never freed: the interpreter may be gone before static
// destructors run.
struct Torch {
  PyObject *is_grad_enabled, *innermost_transform, *tracing_state, *num_dispatch_modes, *forward_ad;
  PyObject *requires_grad, *current_level;  // names of attributes
};
Torch torch;

void connect() {
  const py::module_ c = py::module_::import("torch").attr("_C");
  const auto keep = [](py::object object) { return object.release().ptr(); };
  torch.is_grad_enabled = keep(c.attr("is_grad_enabled"));
  torch.innermost_transform = keep(c.attr("_functorch").attr("peek_interpreter_stack"));
  torch.tracing_state = keep(c.attr("_get_tracing_state"));
  torch.num_dispatch_modes = keep(c.attr("_len_torch_dispatch_stack"));
  torch.forward_ad = keep(py::module_::import("torch.autograd.forward_ad"));
  torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.current_level = PyUnicode_InternFromString("_current_level");
}

py::object ask(PyObject* function) {  // pybind11's own call would build a tuple of no arguments
  PyObject* const result = PyObject_CallNoArgs(function);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Whether nobody takes derivatives forward, transforms, traces or watches operators. Autocast is
// not asked for: it changes dtypes, which are in the key.
bool nobody_watches() {
  return ask(torch.innermost_transform).is_none() && ask(torch.tracing_state).is_none() &&
         ask(torch.num_dispatch_modes).cast<int64_t>() == 0 &&
         py::getattr(torch.forward_ad, torch.current_level).cast<int64_t>() < 0;
}

// Bytes on the stack, for speed. What does not fit has no key.
class Key {
 public:
  void append(const void* bytes, size_t count) {
    fits_ = fits_ && count <= sizeof bytes_ - size_;
    if (!fits_) return;
    std::memcpy(bytes_ + size_, bytes, count);
    size_ += count;
  }
  template <class T>
  void append(const T& value) {
    static_assert(std::has_unique_object_representations_v<T> || std::is_floating_point_v<T>,
                  "padding would make keys of equal calls differ");
    append(&value, sizeof value);
  }
  PyObject* as_bytes() const {
    if (!fits_) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(bytes_, static_cast<Py_ssize_t>(size_));
  }

 private:
  size_t size_ = 0;
  bool fits_ = true;
  char bytes_[2048];
};

// Class, dtype, device, shape, and whether a gradient is wanted. False for what a key cannot
// stand for: an object that is no tensor, a subclass, memory that the kernels cannot read.
bool append_tensor(Key& key, PyObject* object, bool grad_enabled) {
  if (object == Py_None) {
    key.append('-');
    return true;
  }
  if (!is_plain_tensor(object)) return false;
  const TensorView view = tensor_view(object, "tensor");
  if (view.device_type == DeviceType::kOther) return false;  // which one?
  const bool grad = grad_enabled && py::getattr(object, torch.requires_grad).is(py::bool_(true));
  key.append(grad ? 'g' : 't');
  key.append(reinterpret_cast<uintptr_t>(Py_TYPE(object)));
  key.append(static_cast<char>(view.dtype));
  key.append(static_cast<char>(view.device_type));
  key.append(static_cast<char>(view.device_id));
  key.append(static_cast<char>(view.ndim));
  key.append(view.shape, static_cast<size_t>(view.ndim) * sizeof(int64_t));
  return true;
}

// A number, a string, None or a tuple of them, by type and value.
bool append_scalar(Key& key, PyObject* object) {
  if (object == Py_None || object == Py_True || object == Py_False) {
    key.append(object == Py_None ? '-' : object == Py_True ? 'y' : 'n');
  } else if (PyFloat_Check(object)) {
    key.append('f');
    key.append(PyFloat_AS_DOUBLE(object));
  } else if (PyLong_Check(object)) {
    int overflow;
    const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow != 0) return false;
    key.append('i');
    key.append(value);
  } else if (PyUnicode_Check(object)) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(object, &size);
    if (text == nullptr) throw py::error_already_set();
    key.append('s');
    key.append(int64_t{size});
    key.append(text, static_cast<size_t>(size));
  } else if (PyTuple_Check(object)) {
    key.append('(');
    key.append(int64_t{PyTuple_GET_SIZE(object)});
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
      if (!append_scalar(key, PyTuple_GET_ITEM(object, i))) return false;
    }
  } else {
    return false;
  }
  return true;
}

bool append_call(Key& key, PyObject* operands, PyObject* scalars) {
  if (!PyTuple_Check(operands) || !nobody_watches()) return false;
  const bool grad_enabled = ask(torch.is_grad_enabled).ptr() == Py_True;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(operands); ++i) {
    if (!append_tensor(key, PyTuple_GET_ITEM(operands, i), grad_enabled)) return false;
  }
  return append_scalar(key, scalars);
}

// METH_FASTCALL: pybind11's own call would cost as much again.
PyObject* call_key(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "call_key() takes operands and scalars");
    return nullptr;
  }
  Key key;
  try {
    if (!append_call(key, values[0], values[1])) Py_RETURN_NONE;
  } catch (const std::exception&) {  // a dtype that the kernels do not know, no memory to read
    Py_RETURN_NONE;
  }
  return key.as_bytes();
}

bool is_plain_backward(PyObject* dout) {
  if (!is_plain_tensor(dout) || ask(torch.is_grad_enabled).ptr() == Py_True) return false;
  if (ask(torch.num_dispatch_modes).cast<int64_t>() != 0) return false;
  return tensor_view(dout, "dout").device_type != DeviceType::kOther;
}

// METH_O. A tensor that cannot be read stands for many, or holds something unknown.
PyObject* backward_is_plain(PyObject*, PyObject* dout) {
  try {
    return PyBool_FromLong(is_plain_backward(dout));
  } catch (const std::exception&) {
    Py_RETURN_FALSE;
  }
}

// All that a launch depends on but its numbers: of each tensor dtype, device, shape, strides, and
// how far from a multiple of 16 bytes it starts.
void append_layout(Key& key, const TensorView& view, uintptr_t start) {
  if (!view) return key.append('-');
  key.append(static_cast<char>('0' + start % 16));
  key.append(static_cast<char>(view.dtype));
  key.append(static_cast<char>(view.device_type));
  key.append(static_cast<char>(view.device_id));
  key.append(static_cast<char>(view.ndim));
  key.append(view.shape, static_cast<size_t>(view.ndim) * sizeof(int64_t));
  key.append(view.stride, static_cast<size_t>(view.ndim) * sizeof(int64_t));
}

bool is_empty(const TensorView& view) {
  return std::find(view.shape, view.shape + view.ndim, 0) != view.shape + view.ndim;
}

// METH_O.
PyObject* launch_key(PyObject*, PyObject* tensors) {
  if (!PyTuple_Check(tensors)) {
    PyErr_SetString(PyExc_TypeError, "launch_key() takes a tuple of tensors");
    return nullptr;
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  try {
    Key key;
    py::tuple starts(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      const py::handle object = PyTuple_GET_ITEM(tensors, i);
      const TensorView view = tensor_view(object, "tensor");
      const bool somewhere = view && !is_empty(view);
      const auto start = somewhere ? reinterpret_cast<uintptr_t>(view.data) : uintptr_t{0};
      append_layout(key, view, start);
      PyTuple_SET_ITEM(starts.ptr(), i, PyLong_FromUnsignedLongLong(start));
    }
    const auto bytes = py::reinterpret_steal<py::object>(key.as_bytes());
    if (!bytes || bytes.is_none()) return py::none().release().ptr();
    return PyTuple_Pack(2, bytes.ptr(), starts.ptr());
  } catch (const std::exception&) {  // a dtype that the kernels do not know
    Py_RETURN_NONE;
  }
}

PyMethodDef kMethods[] = {
    {"call_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_key)),
     METH_FASTCALL,
     "call_key(operands, scalars): bytes that are equal for calls that come to the same: a tuple "
     "of tensors and Nones by class, dtype, device, shape and whether a gradient is wanted, and "
     "scalars by type and value. None where a call must be looked at by itself: somebody "
     "transforms, traces or watches operators, an operand is a subclass or out of reach of the "
     "kernels, a scalar is something unknown."},
    {"launch_key", &launch_key, METH_O,
     "launch_key(tensors): bytes that are equal where a tuple of tensors and Nones has equal "
     "dtypes, devices, shapes, strides and starts relative to multiples of 16 bytes, and a tuple "
     "of the addresses where they start, 0 for None and for an empty one. None where the key "
     "cannot tell: a dtype that the compiled kernels do not know, too many tensors."},
    {"backward_is_plain", &backward_is_plain, METH_O,
     "backward_is_plain(dout): True if a backward that is given dout may call a kernel without "
     "looking further: nobody wants to differentiate it again, transforms, traces or watches "
     "operators, and dout is a tensor of torch's own that a kernel can read."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_call_key(py::module_& m) {
  connect();
  if (PyModule_AddFunctions(m.ptr(), kMethods) != 0) throw py::error_already_set();
}

}  // namespace fused_attn
