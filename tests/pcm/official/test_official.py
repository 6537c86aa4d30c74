"""Published names, published checkpoints, and the verification of golden files."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcm.captioners.pcmnet.model import PCMNet
from pcm.errors import InputError
from pcm.official.__main__ import main
from pcm.official.golden import TOLERANCE, Recomputation
from pcm.official.golden_file import read_golden
from pcm.official.state_dict import (
    POSITION_KEY,
    config_from_state,
    from_official,
    load_state_dict,
    official_names,
    position_rounding,
    to_official,
)
from tests.helpers.paths import DATA
from tests.helpers.slow_pcmnet import Settings
from tests.helpers.tiny_goldens import Sizes, write_golden

GOLDEN = DATA / "pcmnet_small.safetensors"
LOSSES = [
    {"name": "pairs", "alpha": 3.0, "gamma": 2, "gamma_type": "sent", "label_smoothing": 0.15},
    {"name": "plain", "alpha": 9.0, "gamma": 0, "gamma_type": "batch", "label_smoothing": 0.1},
    {"name": "sharp", "alpha": 2.0, "gamma": 1, "gamma_type": "word", "label_smoothing": 0.0},
    {"name": "steep", "alpha": 2.0, "gamma": 4, "gamma_type": "batch", "label_smoothing": 0.3},
]


def official_state() -> dict[str, torch.Tensor]:
    return {n.removeprefix("state."): t for n, t in load_file(GOLDEN).items() if n.startswith("state.")}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden set, to be damaged."""
    for suffix in (".safetensors", ".json"):
        shutil.copy(GOLDEN.with_suffix(suffix), tmp_path / f"golden{suffix}")
    return tmp_path / "golden.safetensors"


def report(path: Path, capsys: pytest.CaptureFixture) -> tuple[int, dict]:
    status = main(["verify", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return status, json.loads(lines[0])


def test_every_output_of_the_golden_set_is_reproduced(capsys: pytest.CaptureFixture) -> None:
    status, result = report(GOLDEN, capsys)
    assert status == 0, result["failed"]
    assert result["max_abs_diff"].keys() == load_file(GOLDEN).keys()
    positions = f"state.{POSITION_KEY}"  # of another processor, perhaps
    assert max(value for name, value in result["max_abs_diff"].items() if name != positions) <= TOLERANCE


def test_verification_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "pcm.official", "verify", str(GOLDEN)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_gradients_agree_relative_to_their_size_too() -> None:
    golden = read_golden(GOLDEN)
    recompute = Recomputation(golden)
    for name, tensor in golden.tensors.items():
        if name.startswith("grad.") and tensor.abs().max() > 1e-6:
            assert (recompute(name) - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name


@pytest.mark.parametrize(
    ("sizes", "settings", "beams"),
    [
        (Sizes(), Settings(3, 1, 2, 5, 3, 4, 0.05), [(1, 1), (4, 3)]),
        (Sizes(batch=3, hidden=16, num_patches=7, vocab_size=6), Settings(2, 2, 1, 4, 2, 0.3, 0.0), [(3, 3), (6, 1)]),
        (Sizes(num_patches=1, vocab_size=5), Settings(4, 1, 2, 3, 1, 1, 0.5), [(2, 2)]),
        (Sizes(num_patches=3, batch=1), Settings(4, 1, 1, 3, 2, 0.1, 0.0), [(2, 1)]),
    ],
    ids=["dropped-concepts", "fraction-of-pairs", "one-patch", "no-pair"],
)
def test_files_with_other_sizes_and_settings_are_reproduced(
    sizes: Sizes, settings: Settings, beams: list, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "other.safetensors"
    tensors = write_golden(path, sizes=sizes, settings=settings, losses=LOSSES, beams=beams, seed=0)
    status, result = report(path, capsys)
    assert status == 0, (result["failed"], result["unknown"])
    assert result["outputs"] == len(tensors)
    if settings.topk == 3:  # the case must really drop some concepts and keep others
        assert 0 < tensors["mid.concept_keep"].mean() < 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out.eval.logits", lambda t: t + 5e-5),
        ("mid.replace_mask", lambda t: 1 - t),
        ("beam3.out1.ids", lambda t: t + 1),
        ("extra.train_traj.lr", lambda t: t + 1e-9),
        ("grad.predictor.logits.bias", lambda t: t * float("nan")),
        ("greedy.logp", lambda t: t[:, :-1].clone()),
    ],
)
def test_a_changed_output_fails_by_name(name: str, change, copy: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = load_file(copy)
    tensors[name] = change(tensors[name])
    save_file(tensors, copy)
    status, result = report(copy, capsys)
    assert status == 1
    assert result["failed"] == [name]


@pytest.mark.parametrize("name", ["mid.surprise", "beam3.ids", "out.eval.attention", "new", "extra.thing.x", "in.mask"])
def test_an_output_of_unknown_meaning_fails_by_name(name: str, copy: Path, capsys: pytest.CaptureFixture) -> None:
    save_file({**load_file(copy), name: torch.zeros(1)}, copy)
    status, result = report(copy, capsys)
    assert status == 1
    assert result["unknown"] == [name]


def test_an_output_that_the_description_promises_must_be_there(copy: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = load_file(copy)
    del tensors["out.eval.logits"]
    save_file(tensors, copy)
    status, result = report(copy, capsys)
    assert status == 1
    assert result["missing"] == ["out.eval.logits"]


def test_the_description_may_be_in_the_metadata(copy: Path, capsys: pytest.CaptureFixture) -> None:
    save_file(load_file(copy), copy, metadata={"description": copy.with_suffix(".json").read_text()})
    copy.with_suffix(".json").unlink()
    assert report(copy, capsys)[0] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"not tensors"),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").write_text("[]"),
        lambda path: path.with_suffix(".json").write_text('{"spec": {"topk": 5}}'),
        lambda path: save_file({"in.att_feats": torch.zeros(1)}, path),
        lambda path: save_file({**load_file(path), "state.predictor.logits.bias": torch.zeros(3)}, path),
        lambda path: path.with_suffix(".json").write_text(
            path.with_suffix(".json").read_text().replace('REPLACE_TYPE": "top"', 'REPLACE_TYPE": "random"')
        ),
    ],
    ids=[
        "missing",
        "garbage",
        "truncated",
        "no-json",
        "bad-json",
        "list-json",
        "thin-json",
        "no-state",
        "shape",
        "random",
    ],
)
def test_an_unreadable_file_is_exit_2_and_one_line(damage, copy: Path, capsys: pytest.CaptureFixture) -> None:
    damage(copy)
    assert main(["verify", str(copy)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1


def test_every_published_name_has_one_of_ours_and_back() -> None:
    official = official_state()
    state = from_official(official)
    back = to_official(state)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official if name != POSITION_KEY)
    table, ours = official[POSITION_KEY][0], back[POSITION_KEY][0]  # made on another processor
    assert ((table - ours).abs() <= position_rounding(len(table))).all()
    model = PCMNet(config_from_state(official, num_heads=4, num_concepts=20))
    model.load_state_dict(state, strict=True)


def test_fused_keys_come_before_values() -> None:
    assert official_names("decoder.1.cross_attention.key_value.weight") == (
        "decoder.g_layers.1.x_att.self.key.weight",
        "decoder.g_layers.1.x_att.self.value.weight",
    )


def test_a_name_that_is_no_parameter_is_refused() -> None:
    with pytest.raises(KeyError):
        official_names("decoder.1.cross_attention.surprise.weight")


def test_missing_and_unknown_tensors_are_named() -> None:
    official = official_state()
    official["surprise"] = official.pop("predictor.logits.bias")
    with pytest.raises(InputError, match=r"predictor\.logits\.bias.*surprise"):
        from_official(official)


def test_another_position_table_is_refused() -> None:
    official = official_state()
    published = official[POSITION_KEY]
    for other in (published * 2, positions_table(published, base=10_001)):
        official[POSITION_KEY] = other
        with pytest.raises(InputError, match="sinusoid"):
            from_official(official)


@pytest.mark.parametrize("name", sorted(official_state()))
def test_a_tensor_of_another_rank_is_refused(name: str) -> None:
    for change in (torch.Tensor.flatten, lambda tensor: tensor.unsqueeze(0), lambda tensor: tensor[0]):
        official = official_state()
        official[name] = change(official[name])
        if official[name].shape == official_state()[name].shape:
            continue
        with pytest.raises((InputError, RuntimeError)):  # load_state_dict's, which an import makes one line of
            PCMNet(config_from_state(official, num_heads=4)).load_state_dict(from_official(official))


@pytest.mark.parametrize("ulps", [-1, 1])
def test_a_position_table_of_another_processor_is_accepted(ulps: int) -> None:
    official = official_state()
    official[POSITION_KEY] = positions_table(official[POSITION_KEY], ulps=ulps)
    from_official(official)


def positions_table(published: torch.Tensor, *, base: float = 10_000.0, ulps: int = 0) -> torch.Tensor:
    """Word positions (1, length, H), the frequencies off by a float32's last bit."""
    _, length, hidden = published.shape
    frequencies = torch.tensor(base, dtype=torch.float64) ** (-torch.arange(0, hidden, 2, dtype=torch.float64) / hidden)
    frequencies = torch.nextafter(frequencies.float(), torch.tensor(torch.inf * ulps)) if ulps else frequencies.float()
    angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(1, length, hidden)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"model": {f"module.{n}": t for n, t in s.items()}}]
)
def test_torch_checkpoints_are_read(wrap, tmp_path: Path) -> None:
    official = official_state()
    torch.save(wrap(official), tmp_path / "published.pth")
    loaded, expected = load_state_dict(tmp_path / "published.pth"), from_official(official)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_execute_something_is_refused_unexecuted(zipped: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "bad.pth"
    if zipped:
        torch.save({"model": Malicious(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Malicious(target)}))
    with pytest.raises(InputError, match="refused") as caught:
        load_state_dict(path)
    assert not target.exists()
    assert len(str(caught.value).splitlines()) == 1
