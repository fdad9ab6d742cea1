"""The predicted figures for GPUs follow from the code beside them. Published figures stand in the words of their
source. The counted bytes are those that autograd keeps.
"""

from __future__ import annotations

import csv
import importlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2exp.config import ModelConfig, PrecisionConfig, PrecisionName, RunConfig, TrainConfig
from gpt2exp.model import gpt as models
from gpt2exp.model import size
from gpt2exp.training import precision, setup

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "scaling"


@pytest.fixture(scope="module")
def page() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("page")


@pytest.fixture(scope="module")
def anew(page: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    page.compute(folder)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["fitted", "checks", "predictions", "announced"])
def test_committed_rows_are_computed_ones(name: str, anew: Path) -> None:
    """Within what another machine's arithmetic can move the third digit of a fitted number."""
    committed, computed = rows(FOLDER / f"{name}.csv"), rows(anew / f"{name}.csv")
    assert len(committed) == len(computed)
    for old, new in zip(committed, computed, strict=True):
        assert old.keys() == new.keys()
        for key, value in old.items():
            try:
                assert float(new[key]) == pytest.approx(float(value), rel=0.01, abs=0.01), (old, key)
            except ValueError:
                assert new[key] == value


def test_the_page_shows_the_committed_rows(page: Any) -> None:
    text = (FOLDER / "README.md").read_text()
    for name, block in page.blocks(FOLDER).items():
        found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
        assert found is not None
        assert found[1] == block, name
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (FOLDER / picture).stat().st_size > 1000


@pytest.mark.parametrize("name", ["announced", "answer", "ratios", "A100", "H100", "loss"])
def test_what_is_predicted_says_so(page: Any, name: str) -> None:
    assert page.blocks(FOLDER)[name].startswith("Prediction: ")


def test_a_published_figure_stands_in_its_sources_words() -> None:
    for row in rows(FOLDER / "published.csv"):
        assert row["url"].startswith("https://")
        said = [float(text.replace("_", "")) for text in re.findall(r"\d[\d_]*(?:\.\d+)?", row["says"])]
        value = float(row["value"])
        assert any(abs(number * unit - value) < 0.6 for number in said for unit in (1, 1000)), row


def test_a_plan_is_the_largest_batch_that_fits_and_a_whole_step(page: Any) -> None:
    planned = [row for row in rows(FOLDER / "predictions.csv") if row["batch"] != "0"]
    assert len(planned) > 250
    for row in planned:
        gpus, batch = int(row["gpus"]), int(row["batch"])
        assert gpus * batch * int(row["accumulation"]) == page.SEQUENCES
        room = page.ROOM * page.GPUS[row["gpu"]].memory
        assert float(row["memory_gb"]) * 1e9 <= room * 1.001
        parallel = "fsdp" if row["parallel"] == "fsdp" else "ddp"
        asked = page.Setup(page.SIZES[row["model"]], row["gpu"], gpus, row["precision"], 2 * batch, parallel=parallel)
        assert page.memory(asked) > room or 2 * batch * gpus > page.SEQUENCES
        assert 0 < float(row["mfu"]) < 0.87


def test_links_are_waited_for_only_where_they_last_longer(page: Any) -> None:
    xl = page.Setup(page.SIZES["gpt2-xl"], "A100", 64, "bf16", batch=1)
    once = 4 * size.parameters(xl.model)["total"] * 63 / 64 / (0.8 * 200e9)
    parts = page.step(xl, page.Fitted())
    backward = (parts["products"] + parts["memory traffic"]) * 2 / 3
    assert parts["links"] == pytest.approx(2e3 * once - backward)
    assert page.step(replace(xl, batch=64), page.Fitted())["links"] == 0
    assert page.step(replace(xl, gpus=1), page.Fitted())["links"] == 0
    assert page.step(replace(xl, parallel="fsdp"), page.Fitted())["links"] > parts["links"]


@pytest.mark.parametrize(("name", "kept"), [("fp32", 64), ("bf16", 36)])
def test_a_block_keeps_the_bytes_that_are_counted(name: str, kept: int) -> None:
    """Autograd's own list of what it saves, of one layer more; 24 n_embd**2 of it in bf16 are the weights' copies."""
    width, batch, seq_len = 64, 2, 32
    cast = torch.bfloat16 if name == "bf16" else None

    def saved(layers: int) -> int:
        torch.manual_seed(0)
        gpt = models.GPT(ModelConfig(n_layer=layers, n_head=4, n_embd=width, block_size=seq_len, vocab_size=97))
        own = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
        storages: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address comes twice
            return tensor

        idx = torch.randint(97, (batch, seq_len))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), precision.cast(torch.device("cpu"), cast):
            gpt(idx, idx)
        return sum(size for size, _ in storages.values())

    weights = 24 * width**2 if name == "bf16" else 0
    a_block = (saved(3) - saved(2) - weights) / (batch * seq_len * width)
    assert a_block == pytest.approx(kept, rel=0.02)


def test_the_programs_own_estimate_is_near_a_published_peak_and_not_below() -> None:
    """64 sequences of GPT-2 in bf16 on an H100, the logits whole: gollem's 35,457 MiB."""
    published = next(
        float(row["value"]) * 2**20
        for row in rows(FOLDER / "published.csv")
        if (row["batch"], row["quantity"], row["gpus"]) == ("64", "MiB", "1")
    )
    train = TrainConfig(batch_size=64, seq_len=1024, loss_chunk=64 * 1024)
    config = RunConfig(train=train, precision=PrecisionConfig(name=PrecisionName.bf16))
    need = setup.memory(config, setup.Hardware("cuda"))
    assert published < need < 1.12 * published
    assert setup.memory(config, setup.Hardware("cpu")) > need
    assert math.isfinite(need)
