// Reads the arguments of the attention functions of the compiled module.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "attention/params.h"
#include "common/tensor.h"
#include "cpu/threads.h"

namespace fused_attn::attention {

namespace py = pybind11;

// Reads positional arguments one after the other. A tuple stands for its items: Python passes its
// named tuples as they are, which is faster than to unpack them into two dozen arguments.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : next_(values), end_(values + count) {}

  // Where all tensors must be.
  void expect_device(DeviceType type) { device_ = type; }
  DeviceType device() const { return device_; }

  TensorView tensor(const char* name) {
    const TensorView view = tensor_view(take(), name);
    check_device(view, device_);
    return view;
  }
  View4 view(const char* name) { return view4(tensor(name)); }
  // The numbers of a vector, one after the other: the tensor's own, or a copy for this call, which
  // memory of the CPU allows.
  template <class T>
  const T* numbers(const TensorView& vector, DType dtype) {
    check_dtype(vector, {dtype});
    if (device_ != DeviceType::kCPU) check_contiguous(vector);
    if (!vector || vector.shape[0] <= 1 || vector.stride[0] == 1) return vector.as<T>();
    const size_t count = static_cast<size_t>(vector.shape[0]);
    copies_.push_back(std::make_unique<char[]>(count * sizeof(T)));
    T* const copy = reinterpret_cast<T*>(copies_.back().get());
    for (size_t i = 0; i < count; ++i) {
      copy[i] = vector.as<T>()[static_cast<int64_t>(i) * vector.stride[0]];
    }
    return copy;
  }
  template <class T>
  const T* numbers(const char* name, DType dtype) {
    return numbers<T>(tensor(name), dtype);
  }
  int64_t integer() { return checked(PyLong_AsLongLong(take())); }
  double number() { return checked(PyFloat_AsDouble(take())); }
  bool boolean() { return checked(PyObject_IsTrue(take())) != 0; }
  // The rest of the tuple that is being read: operands that no kernel here knows. Python's backends
  // refuse them, so that there is nothing to read.
  void end_of_tuple() {
    while (item_ != items_end_) {
      if (*item_++ != Py_None) throw py::type_error("an operand that these kernels do not know");
    }
  }
  void finish() const {
    if (item_ != items_end_ || next_ != end_) throw py::type_error("too many arguments");
  }

 private:
  PyObject* take() {
    while (item_ == items_end_) {
      if (next_ == end_) throw py::type_error("too few arguments");
      PyObject* const value = *next_++;
      if (!PyTuple_Check(value)) return value;
      item_ = PySequence_Fast_ITEMS(value);
      items_end_ = item_ + PyTuple_GET_SIZE(value);
    }
    return *item_++;
  }
  template <class T>
  static T checked(T value) {
    if (value == T(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  PyObject* const* next_;
  PyObject* const* end_;
  PyObject* const* item_ = nullptr;  // of the tuple that is being read
  PyObject* const* items_end_ = nullptr;
  DeviceType device_ = DeviceType::kCPU;
  std::vector<std::unique_ptr<char[]>> copies_;
};

// A key padding mask, key lengths and the rest of what all three functions take first.
inline void read_operands(Arguments& args, Params& p) {
  const TensorView q = args.tensor("q"), k = args.tensor("k"), v = args.tensor("v");
  check_present(q);
  check_present(k);
  check_present(v);
  p.dtype = q.dtype;
  check_dtype(k, {q.dtype});
  check_dtype(v, {q.dtype});
  p.batch = q.shape[0];
  p.num_heads = q.shape[1];
  p.seqlen_q = q.shape[2];
  p.head_dim = q.shape[3];
  p.num_heads_kv = k.shape[1];
  p.seqlen_k = k.shape[2];
  p.head_dim_v = v.shape[3];
  p.q = view4(q);
  p.k = view4(k);
  p.v = view4(v);
  p.bias = args.view("bias");
  p.mask = args.view("mask");
  const TensorView padding = args.tensor("key_padding_mask");
  const View4 padding_view = view4(padding);
  p.key_padding_mask = padding.as<uint8_t>();
  p.key_padding_stride[0] = padding_view.stride[0];
  p.key_padding_stride[1] = padding_view.stride[1];
  p.key_lengths = args.numbers<int64_t>("key_lengths", DType::kInt64);
  p.alibi_slopes = args.numbers<float>("alibi_slopes", DType::kFloat32);
  const TensorView cu_q = args.tensor("cu_seqlens_q"), cu_k = args.tensor("cu_seqlens_k");
  if (cu_q) p.batch = cu_q.shape[0] - 1;
  p.cu_seqlens_q = args.numbers<int32_t>(cu_q, DType::kInt32);
  p.cu_seqlens_k = args.numbers<int32_t>(cu_k, DType::kInt32);
  p.rng = args.numbers<int64_t>("rng", DType::kInt64);
}

// What only the CPU's kernels know: documents and prefixes. Sinks no kernel knows.
inline void read_more_operands(Arguments& args, Params& p) {
  if (args.tensor("sinks")) throw py::type_error("an operand that these kernels do not know");
  const TensorView of_queries = args.tensor("query_documents");
  const TensorView of_keys = args.tensor("key_documents");
  check_dtype(of_queries, {DType::kInt32, DType::kInt64});
  check_dtype(of_keys, {of_queries.dtype});
  p.query_documents = view4(of_queries);
  p.key_documents = view4(of_keys);
  p.prefix_lengths = args.numbers<int64_t>("prefix_lengths", DType::kInt64);
  args.end_of_tuple();
}

// The values are the user's data, and a kernel that believed wrong ones would leave the tensors.
inline void check_sequences(const char* name, const int32_t* cu_seqlens, int64_t batch,
                            int64_t rows, int64_t max_seqlen) {
  if (batch >= 0 && cu_seqlens[0] != 0) {
    fail_check(name, "start at 0", std::to_string(cu_seqlens[0]));
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];
    if (length < 0 || length > max_seqlen) {
      fail_check(name, "rise by 0 to " + std::to_string(max_seqlen) + " (the maximum length)",
                 std::to_string(length) + " for sequence " + std::to_string(b));
    }
  }
  if (cu_seqlens[batch] > rows) {
    fail_check(name, "end within the " + std::to_string(rows) + " rows of the tensor",
               std::to_string(cu_seqlens[batch]));
  }
}

// The scalars that all three functions take last, but for `threads`.
inline void read_scalars(Arguments& args, Params& p) {
  const int64_t max_seqlen_q = args.integer(), max_seqlen_k = args.integer();
  p.rows_q = p.seqlen_q;
  p.rows_k = p.seqlen_k;
  if (p.cu_seqlens_q != nullptr) {
    // A GPU's kernels, emulated or not, stay inside the tensors by themselves.
#if defined(FUSED_ATTN_EMULATED)
    const bool check = false;
#else
    const bool check = args.device() == DeviceType::kCPU;
#endif
    if (check) {
      check_sequences("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.seqlen_q, max_seqlen_q);
      check_sequences("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.seqlen_k, max_seqlen_k);
    }
    p.seqlen_q = max_seqlen_q;
    p.seqlen_k = max_seqlen_k;
  }
  p.causal = static_cast<Causal>(args.integer());
  p.window_left = args.integer();
  p.window_right = args.integer();
  p.scale = args.number();
  p.softcap = args.number();
  p.dropout_p = args.number();
  p.chunk = args.integer();
}

inline void read_threads(Arguments& args, Params& p) {
  p.threads = usable_threads(args.integer());
  args.finish();
}

// A function of `Arguments` in CPython's vectorcall convention.
template <void (*function)(Arguments&)>
PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) {
  try {
    Arguments args(values, count);
    function(args);
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <void (*function)(Arguments&)>
constexpr PyCFunction method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<function>));
}

}  // namespace fused_attn::attention
