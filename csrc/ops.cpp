// The schema of every op. In its folder an op has its checks (<op>.cpp) and kernels (<op>_cpu.cpp, <op>_cuda.cu);
// documentation, fake and autograd are in dalle_fast/ops/<op>.py.
//
// A mask is passed as five integers: kind (common/mask.h), text_len, height, width, kernel.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>

#include "cpu/simd.h"

STABLE_TORCH_LIBRARY(dalle_fast, m) {
  // Attention
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, int kind, int text_len, int height, int width, int kernel, "
      "float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "sparse_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int kind, "
      "int text_len, int height, int width, int kernel, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor text_k, Tensor text_v, Tensor(a!) cache_k, "
      "Tensor(b!) cache_v, Tensor position, int kind, int text_len, int height, int width, int kernel, float scale) "
      "-> Tensor");

  // Sampling
  m.def(
      "sample(Tensor logits, Tensor seed, Tensor first, float temperature, int top_k, float top_p, int pitch) -> "
      "Tensor");

  // Quantization
  m.def(
      "gumbel_softmax(Tensor logits, float tau, Tensor seed, bool hard) -> (Tensor y, Tensor kl, Tensor codes, "
      "Tensor stats)");
  m.def(
      "gumbel_softmax_backward(Tensor grad_y, Tensor grad_kl, Tensor logits, Tensor stats, float tau, Tensor seed) "
      "-> Tensor");
  m.def(
      "gumbel_quantize(Tensor logits, Tensor codebook, float tau, Tensor seed, bool hard) -> (Tensor z, Tensor kl, "
      "Tensor codes, Tensor stats, Tensor soft)");
  m.def(
      "gumbel_quantize_backward(Tensor grad_z, Tensor grad_kl, Tensor logits, Tensor codebook, Tensor codes, "
      "Tensor stats, Tensor soft, float tau, Tensor seed, bool hard) -> (Tensor grad_logits, Tensor grad_codebook)");
  m.def("philox_uniform(Tensor seed, int first, int n) -> Tensor");

  // Resblocks
  m.def(
      "residual_layer_norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, ScalarType dtype, "
      "Tensor? scale_in, Tensor? scale_out, Tensor? nonfinite) -> (Tensor total, Tensor normed, Tensor mean, "
      "Tensor rstd)");
  m.def(
      "residual_layer_norm_backward(Tensor? grad_total, Tensor grad_normed, Tensor total, Tensor weight, Tensor mean, "
      "Tensor rstd, ScalarType branch_dtype, Tensor? scale_in, Tensor? scale_out, Tensor(a!)? nonfinite) "
      "-> (Tensor grad_x, Tensor grad_branch, Tensor grad_weight, Tensor grad_bias)");
  m.def("scale_gradient(Tensor grad, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("unscale_gradient(Tensor grad, Tensor scale) -> Tensor");
  m.def("update_scales(Tensor(a!) scale, Tensor(b!) since_division, Tensor(c!) nonfinite, int replicas) -> ()");

  // Linear layers of sampling
  m.def("pack_linear(Tensor weight, ScalarType dtype) -> (Tensor panels, Tensor scales)");
  m.def("packed_linear(Tensor x, Tensor panels, Tensor scales, Tensor? bias, int out_features) -> Tensor");

  // Optimizer
  m.def(
      "adamw16(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] variances, Tensor step, "
      "Tensor lr, float beta1, float beta2, float eps, Tensor weight_decay, Tensor? unscale, Tensor? clip, "
      "Tensor? skip) -> ()");
  m.def("gradient_norm(Tensor[] grads, Tensor? unscale, Tensor? skip) -> (Tensor norm, Tensor skipped)");
}

// Importing the module runs the registrations of this library; SIMD is its one Python member, the instruction set.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  const char* simd;
  try {
    simd = dalle_fast::simd_name(dalle_fast::simd_level());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  PyObject* created = PyModule_Create(&module);
  if (created != nullptr) PyModule_AddStringConstant(created, "SIMD", simd);
  return created;
}
