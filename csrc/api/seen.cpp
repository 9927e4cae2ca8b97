// Whether things of Python's still are what they were: containers by the identity of what they hold, tensors by all that a
// kernel has to know of them. An optimizer asks in every step, where Python would take longer to look than kernels to run.
//
// Tensors are read through DLPack's C exchange interface (DLPack 1.3, `torch.Tensor.__dlpack_c_exchange_api__`), so that no
// header of torch's is needed.
#include "api/seen.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "api/structs.h"

namespace py = pybind11;

namespace lopt {
namespace {

// ---- Containers -----------------------------------------------------------------------------------------------------

// f(item) for what a list holds, or the values of a dict, in order, while it returns true.
template <class Function>
bool each_item(PyObject* container, const Function& f) {
  if (PyList_Check(container)) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i)
      if (!f(PyList_GET_ITEM(container, i))) return false;
    return true;
  }
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(container, &position, &key, &value))
    if (!f(value)) return false;
  return true;
}

Py_ssize_t size_of(PyObject* container) {
  return PyList_Check(container) ? PyList_GET_SIZE(container) : PyDict_Size(container);
}

// Lists and dicts, and what they held when they were added.
class Seen {
 public:
  // All it holds, in this order; of a dict the values.
  void all(const py::object& container) {
    if (!PyList_Check(container.ptr()) && !PyDict_Check(container.ptr()))
      throw py::type_error("container: expected a list or a dict, got " +
                           std::string(Py_TYPE(container.ptr())->tp_name));
    Whole whole{container, {}};
    each_item(container.ptr(), [&](PyObject* item) {
      whole.items.push_back(py::reinterpret_borrow<py::object>(item));
      return true;
    });
    wholes_.push_back(std::move(whole));
  }

  // What is in it under these keys; a key that is not there must stay away.
  void items(const py::dict& container, const py::args& keys) {
    for (const py::handle& key : keys)
      items_.push_back({container, py::reinterpret_borrow<py::object>(key),
                        py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(container.ptr(), key.ptr()))});
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  bool same() const {
    for (const Whole& whole : wholes_) {
      auto item = whole.items.begin();
      if (size_of(whole.container.ptr()) != Py_ssize_t(whole.items.size()) ||
          !each_item(whole.container.ptr(), [&](PyObject* found) { return found == (item++)->ptr(); }))
        return false;
    }
    for (const Item& item : items_)
      if (PyDict_GetItemWithError(item.container.ptr(), item.key.ptr()) != item.value.ptr()) {
        PyErr_Clear();
        return false;
      }
    return true;
  }

  template <class Visit>
  int traverse(const Visit& visit) const {
    for (const Whole& whole : wholes_) {
      if (const int stop = visit(whole.container)) return stop;
      for (const py::object& item : whole.items)
        if (const int stop = visit(item)) return stop;
    }
    for (const Item& item : items_)
      for (const py::object* object : {&item.container, &item.key, &item.value})
        if (const int stop = visit(*object)) return stop;
    return 0;
  }

  void clear() { wholes_.clear(), items_.clear(); }

 private:
  struct Whole {
    py::object container;
    std::vector<py::object> items;
  };
  struct Item {
    py::object container, key, value;
  };
  std::vector<Whole> wholes_;
  std::vector<Item> items_;
};

// ---- Tensors --------------------------------------------------------------------------------------------------------

// DLPack's DLTensor.
struct DlTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// DLPack's DLPackExchangeAPI.
struct DlExchange {
  uint32_t major, minor;
  const DlExchange* older;
  void *allocate, *export_tensor, *import_tensor;
  int (*read)(void* tensor, DlTensor* to);  // not 0, and a Python exception, where it cannot be told
  void* stream;
};

// What is read of one tensor.
struct Read {
  DlTensor tensor;
  bool contiguous, negative;

  int64_t address() const { return reinterpret_cast<int64_t>(tensor.data) + int64_t(tensor.byte_offset); }
};

// Reads torch's tensors.
class Reader {
 public:
  // tensor_class: torch.Tensor.
  explicit Reader(const py::object& tensor_class) : is_neg_(tensor_class.attr("is_neg")) {
    const py::object capsule = py::getattr(tensor_class, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
    auto exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (exchange && exchange->major != 1) exchange = exchange->older;
    if (exchange) read_ = exchange->read;
  }

  bool works() const { return read_ != nullptr; }

  // False for what is no dense tensor in memory.
  bool operator()(PyObject* tensor, Read& to) const {
    if (!read_ || read_(tensor, &to.tensor) != 0 || !to.address()) {
      PyErr_Clear();
      return false;
    }
    const py::object negative =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg_.ptr(), &tensor, 1, nullptr));
    if (!negative) {
      PyErr_Clear();
      return false;
    }
    to.negative = negative.ptr() != Py_False;
    int64_t step = 1;
    to.contiguous = true;
    for (int d = to.tensor.ndim - 1; d >= 0; --d) {
      if (to.tensor.shape[d] != 1 && to.tensor.strides && to.tensor.strides[d] != step) to.contiguous = false;
      step *= to.tensor.shape[d];
    }
    return true;
  }

 private:
  py::object is_neg_;
  int (*read_)(void*, DlTensor*) = nullptr;
};

// Whether a tensor is one number that kernels can read as it is: of the same class, dtype and device as `like`.
bool is_number(const py::handle& tensor, const py::handle& like) {
  static const Reader& read = *new Reader(py::type::of(like));  // for ever: Python is gone when statics are destroyed
  if (!py::type::of(tensor).is(py::type::of(like))) return false;
  Read found, wanted;
  if (!read(tensor.ptr(), found) || !read(like.ptr(), wanted) || found.negative) return false;
  const DlTensor &a = found.tensor, &b = wanted.tensor;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != 1) return false;
  return a.code == b.code && a.bits == b.bits && a.device_type == b.device_type && a.device_index == b.device_index;
}

// The parameters of an optimizer, and what they and their gradients were when `accept` was called.
class Operands {
 public:
  Operands(const py::object& tensor_class, const py::list& params) : read_(tensor_class), params_(params) {}

  // The gradients of those parameters that have one; whether it is other parameters than the selected ones that have one;
  // and whether anything about them has to be checked, as it is not what was accepted.
  py::tuple look() {
    const Py_ssize_t count = PyList_GET_SIZE(params_.ptr());
    py::list grads;
    given_.clear(), found_.clear(), param_addresses_.clear(), grad_addresses_.clear();
    bool readable = true;
    plain_ = true;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* param = PyList_GET_ITEM(params_.ptr(), i);
      const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, name_.ptr()));
      if (!grad) throw py::error_already_set();
      if (grad.is_none()) continue;
      given_.push_back(i);
      grads.append(grad);
      readable = readable && note(param, param_addresses_) && note(grad.ptr(), grad_addresses_);
    }
    const bool others = given_ != selected_;
    unchecked_ = others || !readable || found_ != accepted_;
    if (!readable) found_.clear();
    return py::make_tuple(std::move(grads), others, unchecked_);
  }

  // What the last `look` saw has been checked.
  void accept() { accepted_ = found_; }

  // The parameters whose gradients the last `look` saw are selected; they are the ones returned.
  const std::vector<int64_t>& select() { return selected_ = given_; }

  // Whether what the last `look` saw is as it was accepted, contiguous, and no negated view.
  bool plain() const { return plain_ && !unchecked_; }

  // These tensors are in the place of the gradients that the last `look` saw, and of the same kind.
  void replace(const py::list& grads) {
    grad_addresses_.clear();
    for (const py::handle& grad : grads) {
      Read read;
      plain_ = plain_ && read_(grad.ptr(), read);
      if (plain_) grad_addresses_.push_back(read.address());
    }
  }

  // Writes addresses that the last `look` saw to the tables of a plan over the selected tensors. Returns whether any of a
  // parameter, and whether any of a gradient is another than was there.
  std::pair<bool, bool> write(uint64_t entries, uint64_t grads) const {
    auto entry = reinterpret_cast<TensorEntry*>(entries);
    auto grad = reinterpret_cast<int64_t*>(grads);
    bool moved = false, fresh = false;
    for (size_t t = 0; t < param_addresses_.size(); ++t) {
      moved |= entry[t].param != param_addresses_[t];
      fresh |= grad[t] != grad_addresses_[t];
      entry[t].param = param_addresses_[t];
      grad[t] = grad_addresses_[t];
    }
    return {moved, fresh};
  }

  template <class Visit>
  int traverse(const Visit& visit) const {
    return visit(params_);
  }

  void clear() { params_ = py::list(); }

 private:
  bool note(PyObject* tensor, std::vector<int64_t>& addresses) {
    Read read;
    if (!read_(tensor, read)) return false;
    const DlTensor& x = read.tensor;
    plain_ = plain_ && read.contiguous && !read.negative;
    addresses.push_back(read.address());
    found_.push_back(reinterpret_cast<int64_t>(Py_TYPE(tensor)));
    found_.push_back(int64_t{x.device_type} << 32 | x.device_index);
    found_.push_back(int64_t{x.code} << 48 | int64_t{x.bits} << 40 | int64_t{x.lanes} << 16 | read.contiguous << 1 |
                     read.negative);
    found_.push_back(x.ndim);
    found_.insert(found_.end(), x.shape, x.shape + x.ndim);
    return true;
  }

  const Reader read_;
  py::list params_;
  const py::str name_{"grad"};
  std::vector<int64_t> selected_, given_;  // positions of parameters
  std::vector<int64_t> accepted_, found_;  // all facts, one after the other
  std::vector<int64_t> param_addresses_, grad_addresses_;
  bool plain_ = false, unchecked_ = true;
};

// The object that Python's has inside; null before its constructor has run.
template <class T>
T* inside(PyObject* self) {
  py::detail::value_and_holder found = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return found.holder_constructed() ? found.template value_ptr<T>() : nullptr;
}

// Lets Python's garbage collector look into a class: what is held may lead back to who holds it, as from a parameter's hook.
template <class T>
void collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const auto visit_held = [&](const py::handle& held) {
      Py_VISIT(held.ptr());
      return 0;
    };
    const T* object = inside<T>(self);
    return object ? object->traverse(visit_held) : 0;
  };
  type.tp_clear = [](PyObject* self) {
    if (T* object = inside<T>(self)) object->clear();
    return 0;
  };
}

}  // namespace

void bind_seen(py::module_& m) {
  using namespace pybind11::literals;
  py::class_<Seen>(m, "Seen", "Lists and dicts, and whether they hold the objects that they held when they were added.",
                   py::custom_type_setup(&collectable<Seen>))
      .def(py::init<>())
      .def("all", &Seen::all, "container"_a, "Everything in a list, or all values of a dict, in their order.")
      .def("items", &Seen::items, "What is in a dict under these keys.")
      .def("same", &Seen::same, "Whether nothing else is there now.");
  py::class_<Operands>(m, "Operands", "Parameters and their gradients as kernels see them; see lopt/kernels/seen.py.",
                       py::custom_type_setup(&collectable<Operands>))
      .def(py::init<py::object, py::list>(), "tensor_class"_a, "params"_a)
      .def("look", &Operands::look)
      .def("accept", &Operands::accept)
      .def("select", &Operands::select)
      .def("replace", &Operands::replace, "grads"_a)
      .def("write", &Operands::write, "entries"_a, "grads"_a)
      .def_property_readonly("plain", &Operands::plain);
  m.def("is_number", &is_number, "tensor"_a, "like"_a,
        "Whether a tensor is one number that kernels can read as it is: of the class, dtype and device of `like`.");
}

}  // namespace lopt
