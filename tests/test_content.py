"""content_read: the native kernel against the reference, and what both promise."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mann_ext import _library, ops
from mann_ext._library import backend
from tests.samples import Sample, content_samples

native = pytest.mark.skipif(
    "content_read" not in _library.native_operators("cpu"), reason="native operators are not built"
)
SAMPLES = content_samples()
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)


def run(sample, name):
    args = [
        x.detach().clone().requires_grad_() if x is not None and x.dtype != torch.bool else x
        for x in sample.args
    ]
    with backend(name):
        output = ops.content_read(*args, **sample.options)
    generator = torch.Generator().manual_seed(0)
    total = output[0].new_zeros(())
    for part in output:
        weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        total = total + (part * weight.to(part.dtype)).sum()
    inputs = [x for x in args if x is not None and x.requires_grad]
    return (*output, *torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True))


@native
@samples
def test_native_equals_the_reference_in_float64(sample: Sample):
    for got, want in zip(run(sample, "native"), run(sample, "reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@native
@samples
def test_float32_error_is_at_most_twice_the_references_own(sample: Sample):
    single = sample.to(torch.float32)
    exact = run(single.to(torch.float64), "reference")
    floor = 8 * torch.finfo(torch.float32).eps
    for got, plain, truth in zip(
        run(single, "native"), run(single, "reference"), exact, strict=True
    ):
        scale = truth.norm().clamp_min(1.0)
        error, allowed = ((x.double() - truth).norm() / scale for x in (got, plain))
        assert error <= 2 * allowed + floor


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@samples
def test_sixteen_bit_keys_are_summed_in_float32(sample: Sample, dtype: torch.dtype):
    stored = sample.to(dtype)
    got, want = run(stored, "native"), run(stored, "reference")
    assert got[0].dtype == torch.float32
    for x, y in zip(got, want, strict=True):
        tolerance = 1e-5 if x.dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@native
@pytest.mark.parametrize("sample", SAMPLES[:9], ids=lambda s: s.name)
def test_gradcheck_and_gradgradcheck(sample: Sample):
    args = [
        x.clone().requires_grad_() if x is not None and x.dtype != torch.bool else x
        for x in sample.args
    ]

    def read(*a):
        return ops.content_read(*a, **sample.options)

    assert gradcheck(read, args, fast_mode=True)
    assert gradgradcheck(read, args, fast_mode=True)


@native
def test_vmap_compile_and_opcheck():
    queries, keys, values, _, _ = next(s for s in SAMPLES if s.name == "values").args
    several = torch.stack([queries, queries * 2])

    def loss(q):
        return ops.content_read(q, keys, values).reads.square().sum()

    got = torch.func.vmap(torch.func.grad(loss))(several)
    want = torch.stack([torch.func.grad(loss)(q) for q in several])
    torch.testing.assert_close(got, want)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries), loss(queries))
    torch.library.opcheck(
        torch.ops.mann_ext.content_read.default,
        (queries, keys, values, None, None, True, 1e-8),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_query_that_may_read_nothing_reads_zeros():
    sample = next(s for s in SAMPLES if s.name == "mask_empty")
    for name in ("reference", *(["native"] if _library.native_available() else [])):
        with backend(name):
            reads, weights = ops.content_read(*sample.args)
        assert (reads[0, 1] == 0).all()
        assert (weights[0, 1] == 0).all()
        assert not (weights[~sample.args[4]] != 0).any()


def test_permuting_slots_permutes_weights_and_leaves_reads():
    queries, keys, values, _, _ = next(s for s in SAMPLES if s.name == "values").args
    order = torch.tensor([3, 1, 4, 0, 2])
    plain = ops.content_read(queries, keys, values)
    shuffled = ops.content_read(queries, keys[:, order], values[:, order])
    torch.testing.assert_close(shuffled.reads, plain.reads)
    torch.testing.assert_close(shuffled.weights, plain.weights[..., order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(2, 3, 9)}, "as wide as the keys"),
        ({"values": torch.zeros(2, 4, 7)}, "one value a key"),
        ({"strengths": torch.zeros(2, 4)}, "strengths of shape"),
        ({"mask": torch.zeros(2, 5)}, "dtype bool"),
        ({"mask": torch.zeros(2, 4, dtype=torch.bool)}, "mask of shape"),
        ({"similarity": "l2"}, "similarity"),
        ({"eps": 0.0}, "eps > 0"),
        ({"keys": torch.zeros(5, dtype=torch.float32)}, "rows, width"),
    ],
)
def test_bad_input_gets_one_clear_error(change, message):
    given = {"queries": torch.zeros(2, 3, 4), "keys": torch.zeros(2, 5, 4), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        ops.content_read(**given)
