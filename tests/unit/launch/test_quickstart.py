"""The quickstart's number format: measured once, kept afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import quickstart
from train.errors import UserError
from train.models import precision


@pytest.mark.parametrize(("bf16", "expected"), [(1.9e11, "fp32"), (2.1e11, "bf16")])
def test_bf16_where_its_products_are_twice_as_fast(
    bf16: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "product_rates", lambda: (1e11, bf16))
    assert quickstart._settled_format("auto", tmp_path) == expected
    other = {"bf16": "fp32", "fp32": "bf16"}[expected]
    assert quickstart._settled_format(other, tmp_path) == other
    (tmp_path / "options.json").write_text(json.dumps({"format": other}))
    assert quickstart._settled_format("auto", tmp_path) == other


def test_a_folder_of_before_went_on_in_fp32(tmp_path: Path) -> None:
    before = {"scale": 1.0, "source": "installed-docs"}
    (tmp_path / "options.json").write_text(json.dumps(before))
    assert quickstart._settled_format("auto", tmp_path) == "fp32"
    quickstart._refuse_other_options(tmp_path, {**before, "format": "fp32"})
    with pytest.raises(UserError, match=r"was started with .*'format': 'fp32'"):
        quickstart._refuse_other_options(tmp_path, {**before, "format": "bf16"})


def test_runs_get_the_engine_and_the_teachers_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(quickstart, "_deepspeed", lambda *words: calls.append([str(word) for word in words]))
    monkeypatch.setattr(quickstart, "final_model", lambda folder: folder / "model")
    for number_format in ("fp32", "bf16"):
        for stage in quickstart.stages(tmp_path, 1.0, "text.txt", number_format):
            if stage.name in quickstart.STEPS:
                stage.work()
    found = [
        [word for word in call if "deepspeed.config" in word or "teacher_dtype" in word] for call in calls
    ]
    engine, teacher = "--deepspeed.config=ds_configs/cpu-bf16.json", "--model.teacher_dtype=bf16"
    assert found == [[], [], [], [engine], [engine, teacher], [engine, teacher]]
