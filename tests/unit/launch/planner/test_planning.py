"""launch/plan.py: what it prints, what it refuses, and its arithmetic by hand."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from launch.plan import main
from launch.planner.cost import PUBLISHED_RUNS, Machines, StepTime, Traffic, step_time
from launch.planner.hardware import GPUS, find_gpu
from launch.planner.models import PUBLISHED
from launch.planner.tables import duration
from train.engine_config import EngineSettings
from train.errors import UserError
from train.models.flops import FlopsPerToken

ENGINE = EngineSettings(2, 2, 4, 50_000_000, reduces_copies=True, overlap=True, precision="fp16")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("plan")
    words = f"--gpu V100-32GB --price 2 --json {folder}/p.json --plot {folder}/p.png"
    assert main(words.split()) == 0
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "p.json").read_text())


def test_published_recipe_by_hand(figures: dict) -> None:
    # Per layer of BERT-base at 512: 8 d^2 + 4 d f + 4 L d; the head 2 d^2 + 2 d V; the student three times.
    layer, head = 8 * 768**2 + 4 * 768 * 3072 + 4 * 512 * 768, 2 * 768**2 + 2 * 768 * 30522
    assert figures["flops_per_token"] == {"student": 3 * (6 * layer + head), "teachers": 12 * layer + head}
    assert figures["student"]["parameters"] == 66_985_530
    steps = 3 * (4_300_000_000 // 510 // 4096)
    assert figures["steps"] == steps
    assert figures["accumulation"] == 4096 // 32 // 8
    hours = steps * figures["step_s"] / 3600
    assert figures["gpu_hours"] == pytest.approx(8 * hours)
    assert figures["cost"] == pytest.approx(16 * hours)
    assert figures["tokens_per_s"] == pytest.approx(4096 * 512 / figures["step_s"])
    assert figures["step_s"] == pytest.approx(
        4096 * 512 / 8 * sum(figures["flops_per_token"].values()) / (0.3 * 125e12), rel=0.02
    )


def test_cost_claims_can_be_read_off(figures: dict) -> None:
    """3 % of RoBERTa's GPU-hours, 1.5 % when an hour of a 32 GB card counts as two of a 16 GB card."""
    rows = {row["name"]: row for row in figures["comparison"]}
    original = rows["DistilBERT, original"]
    assert original["published_gpu_hours"] == 720
    assert original["share_of_gpu_hours"] == pytest.approx(0.0293, abs=1e-4)
    assert original["share_of_gib_hours"] == pytest.approx(0.0146, abs=1e-4)
    assert rows["RoBERTa-large, 100K steps"]["share_of_flops"] == 1
    assert rows["this recipe"]["share_of_flops"] == pytest.approx(original["share_of_flops"], rel=0.01)
    bert = rows["BERT-base"]
    assert bert["tokens"] == 900_000 * 256 * 128 + 100_000 * 256 * 512
    assert bert["share_of_gpu_hours"] == bert["share_of_gib_hours"]  # 32 GB both
    assert bert["share_of_gib_hours"] == pytest.approx(64 * 79.2 / (1024 * 24))
    assert bert["published_mfu"] is None  # the steps of one run, the hours of another
    assert original["published_mfu"] == pytest.approx(original["flops"] / (720 * 3600 * 125e12))


def test_scaling_curve(figures: dict) -> None:
    curve = figures["curve"]
    assert [point["gpus"] for point in curve] == [2**power for power in range(11)]
    speeds = [point["tokens_per_s"] for point in curve]
    assert speeds == sorted(speeds)
    efficiency = [point["tokens_per_s"] / point["gpus"] / speeds[0] for point in curve]
    assert all(before >= after for before, after in itertools.pairwise(efficiency))
    assert curve[-1]["micro_batch_size"] == 4  # 4,096 sequences on 1,024 GPUs
    assert curve[3]["step_s"] == figures["step_s"]
    assert all(one["memory_gib"] >= more["memory_gib"] for one, more in itertools.pairwise(curve))


def test_communication_hides_behind_the_backward_pass() -> None:
    flops, sent = FlopsPerToken(student=3e8, teachers=1e8), Traffic(1e9, reductions=2, weights=5e8)
    machines = Machines(2, 8, tflops=100, intra_gb_per_s=100, inter_gb_per_s=10, mfu=0.5)
    assert machines.slowest_link == 10e9
    time = step_time(flops, sent, machines, ENGINE, tokens_per_gpu=20_000, num_buckets=2)
    # 20,000 x 4e8 / 5e13 = 0.16 s; a reduction 0.1 s and 2 x 4 x 20 us; behind each 2/3 x 0.12 / 2 = 0.04 s.
    assert time.compute == pytest.approx(0.16)
    assert time.communication == pytest.approx(2 * 0.10016 + 0.05 + 8e-5)
    assert time.exposed == pytest.approx(2 * (0.10016 - 0.04) + 0.05 + 8e-5)
    alone = Machines(1, 1, 100, 100, 10, 0.5)
    assert step_time(flops, sent, alone, ENGINE, tokens_per_gpu=20_000, num_buckets=2) == StepTime(
        time.compute, 0, 0
    )


def test_every_gpu_has_a_source_and_dense_figures() -> None:
    assert len(GPUS) >= 12
    for gpu in GPUS.values():
        assert "NVIDIA" in gpu.source
        assert gpu.tflops < 2500
    assert find_gpu("h100").tflops == 989.4
    assert find_gpu("RTX 4090").name == "RTX4090"
    assert (find_gpu("t4").tflops, find_gpu("a10g").tflops, find_gpu("l4").tflops) == (65, 70, 121)
    assert not find_gpu("t4").bf16
    assert all(run.source for run in PUBLISHED_RUNS)


@pytest.mark.parametrize(
    ("name", "shown"), [("V100-16GB", 15.8), ("L40S", 45.0), ("B200", 179.1), ("T4", 14.8), ("H100", 79.6)]
)
def test_memory_is_what_nvidia_smi_shows(name: str, shown: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_gpu(name).memory_gib == shown
    assert main(["--gpu", name]) == 0
    assert f"% of {shown:g} GiB" in capsys.readouterr().out


def test_local_teacher_and_shards(
    teacher_folder: str, shards_folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [f"--model.teacher={teacher_folder}", "--shards", shards_folder, "--data.sequence_length=32"]
    words += ["--training.global_batch_size=32", "--training.micro_batch_size=8", "--gpus-per-node", "2"]
    words += ["--model.layer_map=every_other", "--json", str(tmp_path / "p.json")]
    assert main(words) == 0
    figures = json.loads((tmp_path / "p.json").read_text())
    assert figures["student"]["layers"] == 2
    assert figures["student"]["width"] == 32
    assert shards_folder in capsys.readouterr().out
    manifest = json.loads(Path(shards_folder, "manifest.json").read_text())
    windows = sum(shard["tokens"] // 30 for shard in manifest["splits"]["train"])
    assert figures["steps"] == 3 * (windows // 32)


def test_short_sequences_first(tmp_path: Path, figures: dict) -> None:
    out = tmp_path / "p.json"
    words = ["--gpu", "V100-32GB", "--schedule.short_sequence_length=128", "--training.max_steps=1000"]
    assert main([*words, "--json", str(out)]) == 0
    short = json.loads(out.read_text())
    assert short["tokens"] == (900 * 128 + 100 * 512) * 4096
    assert short["step_s"] == figures["step_s"]  # of the full length
    assert short["gpu_hours"] < 0.4 * 1000 / figures["steps"] * figures["gpu_hours"]


def test_too_large_a_micro_batch_is_said_with_one_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "V100-16GB", "--training.micro_batch_size=512", "--gpus-per-node", "8"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "--training.micro_batch_size=128 fits" in said
    assert main(["--gpu", "V100-16GB", "--training.micro_batch_size=auto"]) == 0
    assert "4,096 = 128 x 4 x 8" in capsys.readouterr().out


def test_what_stage_1_would_send_is_said_where_it_may_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    """66,985,530 fp16 gradients around a ring of 8, sixteen times or once, and the weights."""
    ring, fp16 = 7 / 8 * 2 * 66_985_530 / 1e9, ["--gpu", "V100-32GB"]  # a GPU without bf16 takes fp16.json
    assert main(fp16) == 0
    said = re.sub(r" +", " ", capsys.readouterr().out)
    assert f"sent by each GPU in a step │ {33 * ring:.2f} GB" in said
    assert f"at stage 1, which reduces once │ {3 * ring:.2f} GB" in said
    for words in (["--deepspeed.config=ds_configs/bf16.json"], [*fp16, "--training.micro_batch_size=512"]):
        assert main(words) == 0
        assert "stage 1" not in capsys.readouterr().out


def test_the_default_micro_batch_adapts_to_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """README's batch of 64 sequences on a node of eight; the curve's other machines take theirs."""
    assert main(["--training.global_batch_size=64", "--gpus-per-node", "8"]) == 0
    said = capsys.readouterr().out
    assert "64 = 8 x 1 x 8" in said
    assert re.search(r"│ 1 +│ +32 x 2 │", said)
    with pytest.raises(UserError, match=r"give training.micro_batch_size=8, or use a world size of 1, 2$"):
        main(["--training.global_batch_size=64", "--training.micro_batch_size=32"])


@pytest.mark.parametrize(
    ("hours", "expected"),
    [
        (87.0, "3.62 days"),
        (30, "30 hours"),
        (1.006, "1.01 hours"),
        (0.5, "30 minutes"),
        (0.005, "18 seconds"),
    ],
)
def test_times_have_a_readers_unit(hours: float, expected: str) -> None:
    assert duration(hours) == expected


def test_no_legend_lies_over_the_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **named: drawn.append(figure))
    assert main(["--plot", str(tmp_path / "p.png")]) == 0
    assert len(drawn[0].legends) == 1
    assert [axes.get_legend() for axes in drawn[0].axes] == [None, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "3"], "use a world size of 1, 2, 4, 8, 16, 32, 64"),
        (["--gpu", "H1000"], "not in the table, which has T4, V100-16GB"),
        (["--mfu", "1.5"], "give a number up to 1"),
        (["--price", "-1"], "--price -1.0: give a number above 0"),
        (["--model.teacher=nobody/knows"], "nothing is downloaded here"),
        (["--model.layer_map=[0,12]"], "names layers .12. that the teacher does not have"),
        (["--tokens", "1e9", "--shards", "x"], "^--tokens 1e\\+09 and --shards x: only one can say"),
        (["--tokens", "1e9", "--data.shards=x"], "^--tokens 1e\\+09 and --shards x: only one can say"),
        (["--shards", "x", "--data.shards", "y"], "^--shards x and --shards y: only one can say"),
        (["--tokens", "1e5"], "fewer than one batch of 4096"),
        (["--deepspeed.config=ds_configs/cpu.json"], "asks for fp32"),
        (["--gpu", "V100", "--deepspeed.config=ds_configs/bf16.json"], "asks for bf16"),
        (["--data.sequence_length=1024"], "positions for 512 tokens"),
        (["--shards", "no/such/folder"], "holds no manifest.json"),
        (
            ["--plot", "no/such/folder/plan.png"],
            "^--plot no/such/folder/plan.png: there is no folder no/such",
        ),
        (["--json", "no/such/folder/p.json"], "^--json no/such/folder/p.json: there is no folder no/such"),
        (["--plot", "plan"], "^--plot plan: give a name that ends in .png, .svg, .pdf"),
        (["--training.nonsense=1"], "nonsense"),
        (["--training.max_steps=0"], "^training.max_steps=0: nothing is trained, .* give 1 or more"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


@pytest.mark.parametrize("number", ["nan", "inf", "1e+30", "0.0", "1e-320"])
@pytest.mark.parametrize(
    "flag",
    [
        "--price",
        "--mfu",
        "--memory-gib",
        "--matrix-rate",
        "--tokens",
        "--intra-node-gb-per-s",
        "--inter-node-gb-per-s",
    ],
)
def test_numbers_that_cannot_be_are_refused_by_their_flag(flag: str, number: str) -> None:
    line = f"{flag} {number}: give a number above 0, from 1e-09 to 1e+15"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        main([flag, number])


@pytest.mark.parametrize("words", [["--tokens", "1e15"], ["--matrix-rate", "1e15"], ["--price", "1e15"]])
def test_the_largest_numbers_are_planned(words: list[str]) -> None:
    assert main([*words, "--mfu", "1e-9", "--memory-gib", "1e15"]) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        ('"bert"', "holds no JSON object"),
        ("{}", "is of model type None"),
        ('{"model_type": "bert"}', "lacks num_hidden_layers"),
        ({"num_hidden_layers": "x"}, "has num_hidden_layers='x', where whole numbers"),
        (
            {"hidden_size": None, "num_attention_heads": 0},
            "has hidden_size=None, num_attention_heads=0, where",
        ),
        ({"type_vocab_size": -1}, "has type_vocab_size=-1, where"),
        ({"pad_token_id": None}, "has pad_token_id=None, where"),
        ({"num_attention_heads": 5}, "describes no bert (The hidden size (768) is not a multiple of"),
    ],
)
def test_a_teachers_config_that_describes_no_model_is_named(
    config: str | dict, message: str, tmp_path: Path
) -> None:
    if isinstance(config, dict):
        config = json.dumps({**PUBLISHED["google-bert/bert-base-uncased"], **config})
    path = tmp_path / "config.json"
    path.write_text(config)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}')}.*; (save|it knows)"):
        main([f"--model.teacher={tmp_path}"])


@pytest.mark.parametrize(
    "words", [["--data.shards=shards"], ["--data.shards", "none"], ["--config", "r.yaml"]]
)
def test_shards_that_are_named_and_not_there(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never the published corpus in their place, but what is asked for by --tokens, and said."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("data: {shards: none}")
    with pytest.raises(UserError, match=r"(?s)holds no manifest\.json.*or plan without shards: --tokens N"):
        main(words)
    assert main(["--config", "r.yaml", "--tokens", "5e9"]) == 0
    assert "corpus: 5e9 tokens (--tokens, not none)" in capsys.readouterr().out
    assert main([]) == 0
    assert "corpus: 4.3e9 tokens (Wikipedia" in capsys.readouterr().out


def test_shards_of_less_than_a_batch_are_named_with_the_other_way(shards_folder: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"(?s)shards of {shards_folder}\n.*fewer than one batch.*or plan for another corpus: --tokens",
    ):
        main(["--shards", shards_folder, "--training.global_batch_size=65536"])


def test_data_shards_is_shards(shards_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--training.global_batch_size=32", "--training.micro_batch_size=4", "--data.sequence_length=32"]
    lines = []
    for flag in ("--shards", "--data.shards"):
        assert main([*words, flag, shards_folder]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]
    assert f"shards of {shards_folder}" in lines[0]


def test_nothing_is_printed_before_an_output_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag in ("--plot", "--json"):
        with pytest.raises(ValueError, match=f"^{flag} {tmp_path}: a folder; give a file's name$"):
            main([flag, str(tmp_path)])
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=r"p\.json: cannot be written to; choose another place$"):
        main(["--json", str(tmp_path / "p.json")])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
