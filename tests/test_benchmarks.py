"""The benchmarks' opponents compute what they are compared with."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure, metanet, ntm, scaling, workloads
from benchmarks.eager import eager_scan
from mann_ext import ops, reference
from mann_ext.models import MANN


def spread_inputs() -> tuple[torch.Tensor, ...]:
    """No two usages alike: ``topk`` breaks ties as it likes."""
    memory, weights, usage, *rest = workloads.scan_inputs(6, 2, 30, 8, 3)
    return torch.randn_like(memory), weights, usage + torch.rand_like(usage), *rest


def test_the_eager_scan_is_the_reference():
    inputs = spread_inputs()
    expected = reference.lrua_scan(*inputs)[0]
    torch.testing.assert_close(eager_scan(*inputs), expected)
    torch.testing.assert_close(ops.lrua_scan(*inputs).reads, expected)


def test_the_eager_ntm_is_the_reference():
    inputs = ntm.scan_inputs(6, 2, 30, 8, 3)
    inputs = (torch.randn(2, 30, 8), *inputs[1:])
    expected = reference.ntm_scan(*inputs)[0]
    torch.testing.assert_close(ntm.eager_scan(*inputs), expected)
    torch.testing.assert_close(ops.ntm_scan(*inputs).reads, expected)


def test_the_looped_metanet_is_the_model():
    losses = [metanet.training_step(2, looped=looped)() for looped in (False, True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_forms_of_the_parts_of_metanet_agree():
    for contenders in (metanet.read_contenders(3, 50), metanet.convolution_contenders(2, 4)):
        torch.manual_seed(0)
        assert all(len(run()) == 3 for run in contenders.values())


def test_the_plain_model_is_the_mann():
    torch.manual_seed(0)
    options = {"read_strength": 10.0, "learn_strength": "per_head", "least_used": "per_head"}
    mann = MANN(405, 5, **options)
    plain = workloads.PlainMANN(lambda *a: reference.lrua_scan(*a)[0])
    plain.lstm.load_state_dict(mann.controller.state_dict())
    plain.memory.load_state_dict(mann.memory.state_dict())
    plain.output.load_state_dict(mann.output.state_dict())
    x = torch.rand(7, 3, 405)
    torch.testing.assert_close(plain(x)[0], mann(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["native", "feedback", "stepwise", "native_lstm", "eager", "lstm"])
def test_every_training_step_runs(name: str):
    workloads.training_step(name, batch=2, steps=3)()


def test_a_point_of_the_scaling_study(tmp_path):
    row = scaling.point(128, 8, 1, True, threads=1)
    assert row["ms_a_step"] > 0
    report = {"rows": [row], "bandwidth": 1e10, "steps": scaling.STEPS}
    scaling.plot(report, tmp_path / "figure.png")
    measure.write_json(tmp_path / "report.json", report)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert (tmp_path / "report.json").read_text().startswith("{")
