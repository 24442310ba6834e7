"""Code books, rounding errors, normality, and what rounding does to a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ledger_parts import verdicts_of

from peftscope.claims.checks import codes, quantised_models
from peftscope.claims.checks.codes import CODES, CodeBook
from peftscope.claims.measurement import NotRunError
from peftscope.claims.verdict import Verdict


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_rounding_by_definition_agrees_with_bitsandbytes(code: str, block: int) -> None:
    weights = normal(48, 160)  # blocks run over the ends of rows, and the last one is not full
    book = CodeBook(code)
    expected = book.rounded_by_definition(weights, block)
    torch.testing.assert_close(book.rounded(weights, block), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("code", CODES)
def test_every_value_goes_to_the_nearest_of_all_levels(code: str) -> None:
    book, weights = CodeBook(code), normal(4, 64)
    index, constants = book.encoded(weights, 64)
    distance = (weights.unsqueeze(-1) - constants.unsqueeze(-1) * book.levels).abs()
    chosen = distance.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=0, atol=1e-6)
    rounded = book.rounded(weights, 64)
    largest = weights.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(rounded.gather(1, largest), weights.gather(1, largest))


@pytest.mark.parametrize("code", CODES)
def test_a_block_of_zeros_stays_zero_and_levels_stay_themselves(code: str) -> None:
    book = CodeBook(code)
    assert book.rounded(torch.zeros(64), 64).abs().max() == 0
    padded = torch.cat([book.levels, torch.zeros(64 - len(book.levels))])
    torch.testing.assert_close(book.rounded(padded, 64), padded)


def test_relative_errors_of_normal_values_are_those_of_the_literature() -> None:
    """Figures of the project's claim survey, computed there with other code."""
    values = normal(2048, 2048)

    def error(name: str, block: int, metric: str = "rmse") -> float:
        return codes._error(values, CodeBook(name), block, metric)

    assert error("nf4", 32) == pytest.approx(0.0873, abs=3e-4)
    assert error("int4-twos-complement", 32) == pytest.approx(0.0859, abs=3e-4)
    assert error("nf4", 4096) == pytest.approx(0.1098, abs=1e-3)
    assert error("nf4", 32, "mae") < error("int4-twos-complement", 32, "mae")


def test_weights_that_were_not_fetched_are_no_verdict(in_tmp: None) -> None:
    with pytest.raises(NotRunError, match="peftscope fetch minilm"):
        codes.share_with_lower_error("minilm", 64, "nf4", ["int4"])
    assert verdicts_of("S64") == [Verdict.NOT_RUN]


def test_only_linear_layers_inside_the_blocks_are_rounded(toy: Path) -> None:
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained("resources/models/toy", local_files_only=True) for _ in range(2)]
    before, after = (dict(model.named_parameters()) for model in models)
    quantised_models._rounded(models[1], "nf4")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 14
    assert all(".layers." in name and "norm" not in name for name in changed)
    name = changed[0]
    torch.testing.assert_close(after[name].data, CodeBook("nf4").rounded_by_definition(before[name].data, 64))
