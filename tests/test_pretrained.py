"""The trained model that comes with the package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mann_ext import cli, data
from mann_ext.models import MANN


def test_it_loads_and_carries_its_state():
    model = MANN.from_pretrained("omniglot-5way")
    assert not model.training
    x = torch.rand(50, 2, 405)
    whole, _ = model(x)
    first, state = model(x[:20])
    rest, _ = model(x[20:], state)
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=1e-3, atol=1e-3)


def test_a_name_that_is_not_there_lists_those_that_are():
    with pytest.raises(ValueError, match="expected one of omniglot-5way, got 'imagenet'"):
        MANN.from_pretrained("imagenet")


def test_the_command_line_evaluates_it(capsys):
    words = ["eval", "omniglot-5way", "--source", "synthetic", "--episodes", "16", "--threads", "1"]
    assert cli.main(words) == 0
    assert "held-out classes" in capsys.readouterr().out
    assert cli.main(["eval", "omniglot-50way"]) == 2
    message = capsys.readouterr().err
    assert "no checkpoint in omniglot-50way; expected" in message
    assert "pretrained model (omniglot-5way)" in message


def test_it_knows_characters_it_has_not_seen_from_one_example():
    if not (Path(os.environ.get("MANN_EXT_DATA", "")) / "omniglot.npz").is_file():
        pytest.skip("no omniglot.npz in MANN_EXT_DATA")
    model = MANN.from_pretrained("omniglot-5way")
    _, held_out = data.load_characters().split()
    sampler = data.EpisodeSampler(held_out, batch_size=200, augment=False, seed=5)
    inputs, targets, instances, _ = sampler.sample()
    with torch.no_grad():
        correct = model(inputs)[0].argmax(-1) == targets
    second, tenth = (correct[instances == n].float().mean().item() for n in (2, 10))
    assert second > 0.92  # 95.7 % over 3,200 episodes
    assert tenth > 0.97  # 99.2 %
