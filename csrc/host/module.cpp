// The Python module dalle_fast._host: the C++ of the data path. Heavy calls run without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "host/area_resize.h"
#include "host/bpe.h"

namespace py = pybind11;

namespace dalle_fast {
namespace {

using Image = py::array_t<uint8_t, py::array::c_style>;

Image area_resize_numpy(const py::array& image, int64_t height, int64_t width) {
  if (!py::isinstance<py::array_t<uint8_t>>(image)) {
    throw py::type_error("image: expected dtype uint8, got " + std::string(py::str(image.dtype())));
  }
  if (image.ndim() != 3 || image.size() == 0) {
    throw py::value_error("image: expected [height, width, channels] with pixels, got shape " +
                          std::string(py::str(image.attr("shape"))));
  }
  if (height < 1 || width < 1) {
    throw py::value_error("height and width: expected 1 or more, got " + std::to_string(height) + " and " +
                          std::to_string(width));
  }
  const Image source = Image::ensure(image);  // a copy where the input is not contiguous
  Image out({static_cast<py::ssize_t>(height), static_cast<py::ssize_t>(width), source.shape(2)});
  const uint8_t* from = source.data();
  uint8_t* to = out.mutable_data();
  {
    py::gil_scoped_release release;
    area_resize(from, source.shape(0), source.shape(1), source.shape(2), to, height, width);
  }
  return out;
}

}  // namespace
}  // namespace dalle_fast

PYBIND11_MODULE(_host, m) {
  using dalle_fast::BPE;
  m.doc() = "Host-side kernels of the data path: area resize and BPE with seeded dropout.";
  m.def("area_resize", &dalle_fast::area_resize_numpy, py::arg("image"), py::arg("height"), py::arg("width"),
        "Resize uint8 [H, W, C] to [height, width, C]: area averages when shrinking, linear when enlarging.\n\n"
        "TypeError or ValueError for another dtype or rank, an empty image, or a size below 1.");
  py::class_<BPE>(m, "BPE", "Byte-pair encoder over pre-tokenized words, with BPE dropout from a seed.")
      .def(py::init<const BPE::Vocab&, const BPE::Merges&>(), py::arg("vocab"), py::arg("merges"))
      .def("encode", &BPE::encode, py::arg("words"), py::arg("dropout"), py::arg("seed"),
           py::call_guard<py::gil_scoped_release>(),
           "Token ids of the words. dropout: probability that a merge is passed over. seed: unsigned 64 bit.");
}
