#include "common/tensor.h"

#include <algorithm>
#include <string>
#include <utility>

#include "common/dlpack.h"

namespace py = pybind11;

namespace fused_attn {
namespace {

constexpr std::pair<const char*, DType> kTypes[] = {
    {"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16},
    {"float64", DType::kFloat64}, {"bool", DType::kBool},       {"int32", DType::kInt32},
    {"int64", DType::kInt64},
};

const char* type_name(DType dtype) {
  for (const auto& [name, value] : kTypes) {
    if (value == dtype) return name;
  }
  return "?";
}

// What is asked of torch once, when the module is imported. Never freed: the interpreter may be
// gone before static destructors run.
struct Torch {
  PyTypeObject* tensor_type = nullptr;
  PyTypeObject* parameter_type = nullptr;
  const dlpack::ExchangeApi* exchange = nullptr;  // nullptr where torch has none
  bool use_exchange = false;
  PyObject* dtypes[std::size(kTypes)] = {};
  PyObject *data_ptr, *shape, *stride, *dtype, *is_cpu, *is_cuda, *get_device;
};
Torch torch;

const dlpack::ExchangeApi* find_exchange_api(py::handle tensor_type) {
  // The second spelling is that of torch 2.10. Only a capsule is taken: its name vouches for the
  // layout, which a bare integer does not.
  for (const char* attribute : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
    const py::object capsule = py::getattr(tensor_type, attribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsuleName)) continue;
    auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
    while (api != nullptr && api->version.major > dlpack::kMajorVersion) api = api->previous;
    if (api != nullptr && api->version.major == dlpack::kMajorVersion &&
        api->tensor_from_py_object != nullptr) {
      return api;
    }
  }
  return nullptr;
}

void connect() {
  const py::module_ module = py::module_::import("torch");
  const py::object tensor_type = module.attr("Tensor");
  torch.exchange = find_exchange_api(tensor_type);
  torch.use_exchange = torch.exchange != nullptr;
  torch.tensor_type = reinterpret_cast<PyTypeObject*>(tensor_type.inc_ref().ptr());
  const py::object parameter_type = module.attr("nn").attr("Parameter");
  torch.parameter_type = reinterpret_cast<PyTypeObject*>(parameter_type.inc_ref().ptr());
  for (size_t i = 0; i < std::size(kTypes); ++i) {
    torch.dtypes[i] = py::object(module.attr(kTypes[i].first)).release().ptr();
  }
  torch.data_ptr = PyUnicode_InternFromString("data_ptr");
  torch.shape = PyUnicode_InternFromString("shape");
  torch.stride = PyUnicode_InternFromString("stride");
  torch.dtype = PyUnicode_InternFromString("dtype");
  torch.is_cpu = PyUnicode_InternFromString("is_cpu");
  torch.is_cuda = PyUnicode_InternFromString("is_cuda");
  torch.get_device = PyUnicode_InternFromString("get_device");
}

std::string tuple_text(const int64_t* values, size_t count) {
  std::string text = "(";
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += values[i] == kAnySize ? "?" : std::to_string(values[i]);
  }
  return text + (count == 1 ? ",)" : ")");
}

void set_dimensions(TensorView& view, int64_t ndim) {
  if (ndim > TensorView::kMaxDims) {
    fail_check(view.name, "have at most " + std::to_string(TensorView::kMaxDims) + " dimensions",
               std::to_string(ndim));
  }
  view.ndim = static_cast<int>(ndim);
}

[[noreturn]] void fail_dtype(const TensorView& view, const std::string& got) {
  fail_check(view.name, "have a dtype that the compiled kernels know", got);
}

// About 0.06 us a tensor.
void read_through_exchange(py::handle object, TensorView& view) {
  dlpack::Tensor tensor;
  if (torch.exchange->tensor_from_py_object(object.ptr(), &tensor) != 0) {
    throw py::error_already_set();
  }
  set_dimensions(view, tensor.ndim);
  std::copy_n(tensor.shape, view.ndim, view.shape);
  std::copy_n(tensor.strides, view.ndim, view.stride);
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.device_id = tensor.device.id;
  switch (tensor.device.type) {
    case dlpack::kCPU:
    case dlpack::kCUDAHost:
      view.device_type = DeviceType::kCPU;
      break;
    case dlpack::kCUDA:
    case dlpack::kROCm:
      view.device_type = DeviceType::kCUDA;
      break;
    default:
      view.device_type = DeviceType::kOther;
  }
  switch (tensor.dtype.code << 8 | tensor.dtype.bits) {
    case dlpack::kFloat << 8 | 16:
      view.dtype = DType::kFloat16;
      break;
    case dlpack::kFloat << 8 | 32:
      view.dtype = DType::kFloat32;
      break;
    case dlpack::kFloat << 8 | 64:
      view.dtype = DType::kFloat64;
      break;
    case dlpack::kBfloat << 8 | 16:
      view.dtype = DType::kBFloat16;
      break;
    case dlpack::kBool << 8 | 8:
      view.dtype = DType::kBool;
      break;
    case dlpack::kInt << 8 | 32:
      view.dtype = DType::kInt32;
      break;
    case dlpack::kInt << 8 | 64:
      view.dtype = DType::kInt64;
      break;
    default:
      fail_dtype(view, py::str(object.attr("dtype")));
  }
}

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object attribute(py::handle object, PyObject* name) {
  return checked(PyObject_GetAttr(object.ptr(), name));
}

py::object call_method(py::handle object, PyObject* name) {
  return checked(PyObject_CallMethodNoArgs(object.ptr(), name));
}

void copy_tuple(const py::object& values, int64_t* out) {
  const py::tuple tuple(values);
  for (size_t i = 0; i < tuple.size(); ++i) out[i] = tuple[i].cast<int64_t>();
}

// For a torch without the exchange API: about 0.7 us a tensor.
void read_through_attributes(py::handle object, TensorView& view) {
  const py::object shape = attribute(object, torch.shape);
  set_dimensions(view, static_cast<int64_t>(py::len(shape)));
  copy_tuple(shape, view.shape);
  copy_tuple(call_method(object, torch.stride), view.stride);
  view.data = reinterpret_cast<void*>(call_method(object, torch.data_ptr).cast<uintptr_t>());
  if (attribute(object, torch.is_cpu).is(py::bool_(true))) {
    view.device_type = DeviceType::kCPU;
  } else if (attribute(object, torch.is_cuda).is(py::bool_(true))) {
    view.device_type = DeviceType::kCUDA;
    view.device_id = call_method(object, torch.get_device).cast<int>();
  } else {
    view.device_type = DeviceType::kOther;
  }
  const py::object dtype = attribute(object, torch.dtype);
  const auto* found = std::find(std::begin(torch.dtypes), std::end(torch.dtypes), dtype.ptr());
  if (found == std::end(torch.dtypes)) fail_dtype(view, py::str(dtype));
  view.dtype = kTypes[found - std::begin(torch.dtypes)].second;
}

}  // namespace

void fail_check(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error("`" + std::string(name) + "` must " + expected + ", got " + got);
}

TensorView tensor_view(py::handle object, const char* name) {
  TensorView view;
  view.name = name;
  if (object.is_none()) return view;
  if (!PyType_IsSubtype(Py_TYPE(object.ptr()), torch.tensor_type)) {
    throw py::type_error("`" + std::string(name) + "` must be a torch.Tensor or None, got " +
                         Py_TYPE(object.ptr())->tp_name);
  }
  if (torch.use_exchange) {
    read_through_exchange(object, view);
  } else {
    read_through_attributes(object, view);
  }
  // An empty tensor has no memory, yet it is there.
  alignas(64) static char empty[64];
  if (view.data == nullptr) view.data = empty;
  return view;
}

View4 view4(const TensorView& tensor) {
  View4 view;
  view.data = tensor.data;
  view.dtype = tensor.dtype;
  if (tensor.ndim > 4) {
    fail_check(tensor.name, "have at most 4 dimensions", std::to_string(tensor.ndim));
  }
  for (int i = 0; i < tensor.ndim; ++i) {
    view.stride[i] = tensor.shape[i] == 1 ? 0 : tensor.stride[i];
  }
  return view;
}

void check_shape(const TensorView& tensor, std::initializer_list<int64_t> expected) {
  if (!tensor) return;
  const bool fits =
      static_cast<size_t>(tensor.ndim) == expected.size() &&
      std::equal(expected.begin(), expected.end(), tensor.shape,
                 [](int64_t want, int64_t is) { return want == kAnySize || want == is; });
  if (fits) return;
  fail_check(tensor.name, "have shape " + tuple_text(expected.begin(), expected.size()),
             tuple_text(tensor.shape, tensor.ndim));
}

void check_dtype(const TensorView& tensor, std::initializer_list<DType> expected) {
  if (!tensor || std::count(expected.begin(), expected.end(), tensor.dtype) > 0) return;
  std::string names;
  for (const DType dtype : expected)
    names += std::string(names.empty() ? "" : " or ") + type_name(dtype);
  fail_check(tensor.name, "have dtype " + names, type_name(tensor.dtype));
}

void check_contiguous(const TensorView& tensor) {
  int64_t dense = 1;
  bool contiguous = true;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return;
    contiguous = contiguous && (tensor.shape[i] == 1 || tensor.stride[i] == dense);
    dense *= tensor.shape[i];
  }
  if (contiguous) return;
  fail_check(tensor.name, "be contiguous", "strides " + tuple_text(tensor.stride, tensor.ndim));
}

void check_device(const TensorView& tensor, DeviceType type, int id) {
  if (!tensor ||
      (tensor.device_type == type && (type == DeviceType::kCPU || tensor.device_id == id))) {
    return;
  }
  const auto text = [](DeviceType type, int id) -> std::string {
    if (type == DeviceType::kCPU) return "cpu";
    return type == DeviceType::kCUDA ? "cuda:" + std::to_string(id) : "another device";
  };
  fail_check(tensor.name, "be on " + text(type, id), text(tensor.device_type, tensor.device_id));
}

void check_present(const TensorView& tensor) {
  if (!tensor) fail_check(tensor.name, "be a tensor", "None");
}

bool is_plain_tensor(py::handle object) {
  return Py_TYPE(object.ptr()) == torch.tensor_type ||
         Py_TYPE(object.ptr()) == torch.parameter_type;
}

void bind_tensor(py::module_& m) {
  connect();
  m.def(
      "use_exchange_api",
      [](bool wanted) {
        const bool before = torch.use_exchange;
        torch.use_exchange = wanted && torch.exchange != nullptr;
        return before;
      },
      py::arg("wanted"),
      "Whether tensors are read through torch's DLPack exchange API (where torch has one) or "
      "attribute "
      "by attribute. Returns what was in force before. For tests: the results are the same.");
  m.def(
      "describe",
      [](py::handle object) -> py::object {
        const TensorView view = tensor_view(object, "tensor");
        if (!view) return py::none();
        py::tuple shape(view.ndim), stride(view.ndim);
        for (int i = 0; i < view.ndim; ++i) {
          shape[i] = view.shape[i];
          stride[i] = view.stride[i];
        }
        constexpr const char* kDevices[] = {"cpu", "cuda", "other"};
        return py::dict(py::arg("data") = reinterpret_cast<uintptr_t>(view.data),
                        py::arg("dtype") = type_name(view.dtype),
                        py::arg("device") = kDevices[static_cast<int>(view.device_type)],
                        py::arg("device_id") = view.device_id, py::arg("shape") = shape,
                        py::arg("stride") = stride);
      },
      py::arg("tensor"), "What the compiled kernels see of a tensor, as a dict. For tests.");
}

}  // namespace fused_attn
