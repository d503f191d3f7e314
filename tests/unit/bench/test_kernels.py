"""Kernels by name, with names as profilers show them, and the shares of a step's time."""

import pytest

from dsft.bench.kernels import GPU_IDLE, KernelSpan, classify_kernel, share_step_time, share_wall_clock


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256>(Params)", "matrix products"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)", "dequantization"),
        (
            "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, "
            "cutlass::bfloat16_t>>",
            "attention",
        ),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("void kOptimizer32bit2State<float, 1>(float*, float*, float*)", "optimizer"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "elementwise and copies",
        ),
        ("Memcpy HtoD (Pageable -> Device)", "elementwise and copies"),
        ("Memset (Device)", "elementwise and copies"),
    ],
)
def test_a_kernel_is_known_by_its_name(name: str, kind: str) -> None:
    assert classify_kernel(name) == kind


def test_what_no_kernel_fills_is_idle() -> None:
    spans = [KernelSpan("gemm", 0, 40), KernelSpan("kDequantizeBlockwise", 50, 60), KernelSpan("add", 60, 70)]
    shares = share_step_time(spans, step_ns=100)
    assert shares["matrix products"] == pytest.approx(0.4)
    assert shares["dequantization"] == pytest.approx(0.1)
    assert shares["elementwise and copies"] == pytest.approx(0.1)
    assert shares["attention"] == 0
    assert shares[GPU_IDLE] == pytest.approx(0.4)
    assert next(iter(shares)) == "matrix products"
    assert list(shares)[-1] == GPU_IDLE


def test_overlapping_kernels_share_the_time_they_took_together() -> None:
    # 60 ns covered by kernels that took 80 together: each counts three quarters.
    spans = [KernelSpan("gemm", 0, 40), KernelSpan("add", 20, 60)]
    shares = share_step_time(spans, step_ns=120)
    assert shares["matrix products"] == pytest.approx(0.25)
    assert shares[GPU_IDLE] == pytest.approx(0.5)


def test_shares_never_exceed_the_step() -> None:
    shares = share_step_time([KernelSpan("gemm", 0, 110)], step_ns=100)
    assert shares["matrix products"] == pytest.approx(1.0)
    assert shares[GPU_IDLE] == pytest.approx(0.0)


def test_phases_of_a_wall_clock() -> None:
    assert share_wall_clock({"forward": 1.0, "backward": 3.0}) == {"forward": 0.25, "backward": 0.75}
    assert share_wall_clock({"forward": 0.0}) == {}
