"""Products of bf16 matrices on processors with and without instructions for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import run_here
from torch.nn.functional import linear, scaled_dot_product_attention

from peftscope.cli.doctor import bf16_finding
from peftscope.errors import InputError
from peftscope.hardware import bf16
from peftscope.hardware.bf16 import PRODUCTS, bf16_products, chosen_way, has_native_bf16
from peftscope.hardware.cards import Rates
from peftscope.hardware.meter import make_meter
from peftscope.planning import estimate
from peftscope.planning.plan import plan_experiment
from peftscope.planning.published import published_records
from peftscope.report.page import _warnings
from peftscope.spec import RunSpec
from peftscope.training.ceilings import bf16_rates

Results = list[torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def backward(outputs: torch.Tensor, *inputs: torch.Tensor) -> Results:
    """The outputs, and the gradients of inputs for a gradient that does not depend on precision."""
    outputs.backward(torch.linspace(-1, 1, outputs.numel()).reshape(outputs.shape).bfloat16().to(outputs.dtype))
    return [outputs.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[misc]


LAYERS: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "linear": (linear, [(4, 24, 96), (160, 96), (160,)]),
    "without bias": (linear, [(4, 24, 96), (160, 96)]),
    "batched": (torch.bmm, [(3, 40, 96), (3, 96, 24)]),
    "long attention": (partial(scaled_dot_product_attention, is_causal=True), [(2, 3, 200, 32)] * 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fp32_products_are_no_less_exact_than_native_ones(name: str) -> None:
    torch.manual_seed(0)
    layer, shapes = LAYERS[name]
    inputs = [random(*shape) for shape in shapes]

    def results(dtype: torch.dtype) -> Results:
        own = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        return backward(layer(*own), *own)

    exact = results(torch.float64)
    found: dict[str, Results] = {}
    for way in ("native", "fp32"):
        with bf16_products(way):  # type: ignore[arg-type]
            found[way] = results(torch.bfloat16)
    for native, ours, truth in zip(found["native"], found["fp32"], exact, strict=True):
        assert ours.dtype is native.dtype is torch.bfloat16
        errors = [float((result.double() - truth).norm() / truth.norm()) for result in (native, ours)]
        assert 0 < errors[1] <= 1.02 * errors[0], errors


def test_fp32_products_of_a_4_bit_layer_are_those_of_its_rounded_weights() -> None:
    torch.manual_seed(0)
    layer = Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    layer.weight.data = torch.randn(96, 128)
    layer.to("cpu").support_avx512bf16_for_cpu = False
    weight = torch.ops.bitsandbytes.dequantize_4bit(
        layer.weight.data, layer.weight.quant_state.absmax, 64, "nf4", [96, 128], torch.bfloat16
    )
    inputs = random(5, 128).requires_grad_()
    with bf16_products("fp32"):
        output, gradient = backward(layer(inputs), inputs)
    assert torch.equal(output, (inputs.float() @ weight.float().T).bfloat16())
    given = torch.linspace(-1, 1, output.numel()).reshape(output.shape).bfloat16()
    assert torch.equal(gradient, (given.float() @ weight.float()).bfloat16())


def test_products_into_a_given_tensor_and_scaled_sums() -> None:
    torch.manual_seed(0)
    left, right, bias = random(32, 64), random(64, 48), random(48)
    with bf16_products("fp32"):
        out = torch.empty(32, 48, dtype=torch.bfloat16)
        assert torch.mm(left, right, out=out) is out
        summed = torch.addmm(bias, left, right, beta=0.5, alpha=2)
        with torch.autocast("cpu", torch.bfloat16):
            cast = left.float() @ right.float()
        whole = torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 2, dtype=torch.int64)
    exact = left.float() @ right.float()
    assert torch.equal(out, exact.bfloat16()) and torch.equal(cast, out)
    assert torch.equal(summed, torch.addmm(bias.float(), left.float(), right.float(), beta=0.5, alpha=2).bfloat16())
    assert whole.dtype is torch.int64 and int(whole[0, 0]) == 3
    # A weight for each row of a batch is cast once.
    rows, weight = random(1024, 1, 32), random(8192, 32).t()
    (meter := make_meter("cpu")).reset()
    before = meter.peaks()["peak_resident_bytes"] or 0
    with bf16_products("fp32"):
        product = torch.bmm(rows, weight.expand(1024, 32, 8192))
    assert (meter.peaks()["peak_resident_bytes"] or 0) < before + 2**28  # copies would take 1 GiB
    assert torch.equal(product, torch.bmm(rows.float(), weight.float().expand(1024, 32, 8192)).bfloat16())


def test_kernels_are_as_before_after_the_block() -> None:
    names = [f"aten::{name}" for name in PRODUCTS]

    def replaced() -> list[bool]:
        return [Path(bf16.__file__).name in torch._C._dispatch_dump(name) for name in names]

    with pytest.raises(KeyError), bf16_products("fp32"):
        assert all(replaced())
        raise KeyError
    assert not any(replaced())
    with bf16_products("native"):
        assert not any(replaced())


CPUINFO = {
    "laptop": "model name\t: a laptop\nflags\t\t: fpu avx2 fma\n",
    "server": "flags\t\t: fpu avx2 avx512f avx512_bf16\n",
    "older server": "flags\t\t: avx2 avx512f avx512_vnni\n",
    "arm": "Features\t: fp asimd bf16\n",
    "older arm": "Features\t: fp asimd\n",
}


@pytest.mark.parametrize(
    ("processor", "environment", "way"),
    [
        ("laptop", {}, "fp32"),
        ("server", {}, "native"),
        ("older server", {}, "fp32"),
        ("arm", {}, "native"),
        ("older arm", {}, "fp32"),
        ("server", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "fp32"),
        ("server", {"DNNL_MAX_CPU_ISA": "avx512_core"}, "fp32"),
        ("server", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "native"),
        ("server", {"PEFTSCOPE_BF16": "fp32"}, "fp32"),
        ("laptop", {"PEFTSCOPE_BF16": "native"}, "native"),
    ],
)
def test_the_way_follows_from_what_the_processor_can(
    processor: str, environment: dict[str, str], way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PEFTSCOPE_BF16", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO[processor])
    monkeypatch.setattr(bf16, "CPUINFO", file)
    monkeypatch.setattr(bf16.platform, "system", lambda: "Linux")
    assert chosen_way() == way
    monkeypatch.setattr(bf16.platform, "system", lambda: "Darwin")
    assert not has_native_bf16()


def test_a_wrong_wish_is_refused_before_any_run(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTSCOPE_BF16", "fp16")
    with pytest.raises(InputError, match=r"PEFTSCOPE_BF16: unknown way .*'fp16'.* -> use native or fp32"):
        plan_experiment("smoke")


@pytest.mark.slow
def test_a_run_says_its_way_and_takes_the_same_memory(toy, make_spec, tmp_path, monkeypatch) -> None:
    records = {}
    for way in ("native", "fp32"):
        monkeypatch.setenv("PEFTSCOPE_BF16", way)
        records[way] = record = run_here(make_spec(method="lora", generation_items=0), tmp_path / way)
        assert record.status == "ok" and record.provenance["bf16_products"] == way
        assert record.memory.predicted.train_peak_tensor_bytes == record.memory.train.peak_tensor_bytes
    native, ours = records.values()
    assert native.run_id == ours.run_id
    assert native.memory.predicted == ours.memory.predicted
    assert native.memory.train.peak_tensor_bytes == ours.memory.train.peak_tensor_bytes
    assert ours.train_nll == pytest.approx(native.train_nll, rel=0.01)
    assert ours.train_nll[-1] < ours.train_nll[0]


def test_a_mixed_comparison_is_pointed_out() -> None:
    columns = {"git_commit": "a", "git_dirty": False, "cpu": "x", "gpu": None, "status": "ok"}
    runs = pd.DataFrame([{**columns, "bf16_products": way} for way in ("native", "fp32", None)])
    assert [line for line in _warnings(runs) if "bf16 matrices natively, others in fp32" in line]
    assert not _warnings(runs[1:])


def test_doctor_says_the_rates_of_both_ways_and_warns_of_the_slower() -> None:
    rates = bf16_rates()
    assert min(rates.values()) > 0
    good = bf16_finding("fp32", {"native": 2.4e9, "fp32": 3.03e11})
    assert good.fine and "in fp32: 303.0 GFLOP/s, natively 2.4 GFLOP/s" in good.found and not good.remedy
    bad = bf16_finding("native", {"native": 2.4e9, "fp32": 3.03e11})
    assert not bad.fine and "PEFTSCOPE_BF16=fp32" in bad.remedy


def test_estimates_follow_the_rate_of_this_machine(monkeypatch: pytest.MonkeyPatch, in_repository: None) -> None:
    record = json.loads(published_records("quick")["lora-r8-a16-all-linear-s1-363fb313"])
    spec = RunSpec.model_validate(record["spec"])
    monkeypatch.setattr(estimate, "_measured", lambda **_: {estimate._kind(record["spec"])[0]: record})
    there = Rates(*(record["ceilings"][name] for name in estimate.CEILINGS), casts=False)

    def at(by: float) -> float:
        return estimate.estimate_seconds(spec, lambda spec: there._replace(flops=by * there.flops))

    slower, same, faster = at(0.5), at(1), at(1e6)
    assert same == pytest.approx(record["seconds"]["wall"]) == estimate.estimate_seconds(spec)
    computing = sum(record["seconds"][phase] for phase in ("train", "evaluate"))
    assert same < slower < same + computing  # some of it is no product
    assert same - computing < faster < same - 0.2 * computing


def test_expand_measures_this_machine(toy: Path, monkeypatch: pytest.MonkeyPatch, peftscope) -> None:
    seen, usual = [], Rates(1e5, 1e9, casts=False)
    monkeypatch.setattr(estimate, "_measured", lambda **_: {})
    monkeypatch.setattr("peftscope.training.ceilings.processor_rates", lambda spec: seen.append(spec) or usual)
    code, out, _ = peftscope("expand", "smoke", "--brief")
    assert code == 0 and len(seen) == 6 and " h " in out
